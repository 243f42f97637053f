//! The middle of the host, and all that bindings know of it: every call and event passes through
//! here, whichever door it came in by.

mod moves;
mod registry;
mod sessions;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use bytes::Bytes;
use bytestring::ByteString;
use parking_lot::Mutex;
use parlour_core::wire::{HeaderFields, MAX_TEXT};
use parlour_core::{
    Call, CallId, Directory, Event, Fault, FaultKind, Header, MessageId, Payload, Principal,
    Recipients, Reply, TopicId, WorkerId,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::Config;
use crate::channel::dialect;
use crate::config::limits;
use crate::durable::AttemptTo;
use crate::event::SharedEvent;
use crate::metrics::Metrics;
use crate::peer::{
    Bounds, Close, Dispatched, Outgoing, Peer, ProgressTo, RETRY_AFTER, Refused, ReplyTo,
};
use moves::{Moves, Moving};

pub(crate) use moves::Stay;

/// Where every call and event of a host passes through. Cloning gives another handle to the same.
#[derive(Clone)]
pub(crate) struct Exchange(Arc<Inner>);

struct Inner {
    config: Arc<Config>,
    metrics: Arc<Metrics>,
    clock: Clock,
    /// Read without a lock by every message; replaced, under `peers`, by every registration.
    directory: ArcSwap<Directory<Peer>>,
    peers: Mutex<BTreeMap<WorkerId, Peer>>,
    /// Is sent to with each such change.
    changes: watch::Sender<()>,
    moves: Moves,
    /// The connections that can go on over another socket, by the secret name of their session.
    sessions: Mutex<HashMap<ByteString, Peer>>,
    /// How many of them have no socket now.
    in_grace: AtomicUsize,
    next_call: AtomicU64,
    next_worker: AtomicU64,
    draining: AtomicBool,
    /// Whether channels are closed as soon as they are there. Set under `peers`.
    closing: AtomicBool,
}

/// The time of day, read from the runtime's clock so that a simulation can turn it.
#[derive(Clone, Copy, Debug)]
struct Clock {
    started: Instant,
    started_unix: Duration,
}

/// Who sends a message: what its connection or request is known by.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    /// Who connected.
    pub(crate) principal: Principal,
    /// The connection, if it has one that can serve agents.
    pub(crate) worker: Option<WorkerId>,
}

/// A call that was sent on its way, by which its caller can give it up.
#[derive(Clone, Debug)]
pub(crate) struct Ticket {
    pub(crate) id: CallId,
    to: To,
}

#[derive(Clone, Debug)]
enum To {
    Peer(Peer),
    /// It has to wait until its agent has moved.
    Moving(Moving),
}

impl Ticket {
    /// Tells the worker's connection that nobody waits any more. Harmless for a call that ended.
    pub(crate) fn cancel(&self) {
        match &self.to {
            To::Peer(peer) => peer.cancel(self.id),
            To::Moving(moving) => moving.cancel(self.id),
        }
    }
}

/// What became of a publish.
#[derive(Debug)]
pub(crate) struct Published {
    /// Names the event.
    pub(crate) id: MessageId,
    /// Names its conversation.
    pub(crate) conversation: MessageId,
    /// Agents and subscriptions it went to.
    pub(crate) recipients: u64,
    /// Those whose queue was full.
    pub(crate) dropped: Vec<ByteString>,
}

/// The most bytes of a content type or data type: some doors carry them in headers.
const MAX_TYPE: usize = 1024;
/// Recipients that a publish names, of those that did not take the event; the rest it counts.
const DROPPED_NAMES: usize = 64;

impl Exchange {
    pub(crate) fn new(config: Arc<Config>) -> Self {
        // One right after the other, or all times would be off by what came in between.
        let (started, started_unix) = (Instant::now(), SystemTime::now());
        let started_unix = started_unix.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(Arc::new(Inner {
            metrics: Arc::new(Metrics::new(&config)),
            config,
            clock: Clock { started, started_unix },
            directory: ArcSwap::default(),
            peers: Mutex::default(),
            changes: watch::Sender::new(()),
            moves: Moves::default(),
            sessions: Mutex::default(),
            in_grace: AtomicUsize::new(0),
            next_call: AtomicU64::new(1),
            next_worker: AtomicU64::new(1),
            draining: AtomicBool::new(false),
            closing: AtomicBool::new(false),
        }))
    }

    pub(crate) fn config(&self) -> &Arc<Config> {
        &self.0.config
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.0.metrics
    }

    /// Tells of each change of who serves what.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.0.changes.subscribe()
    }

    /// The time of day at `now`, since the Unix epoch.
    pub(crate) fn unix_time(&self, now: Instant) -> Duration {
        self.0.clock.started_unix + now.duration_since(self.0.clock.started)
    }

    /// From now on only calls are taken that running ones depend on.
    pub(crate) fn begin_drain(&self) {
        self.0.draining.store(true, Relaxed);
        self.0.peers.lock().values().for_each(|peer| peer.push(Outgoing::Drain));
    }

    /// Ends every call: the host goes now.
    pub(crate) fn give_up(&self) {
        // First, so that none of these goes to a worker that has been told already.
        self.fail_all_held();
        self.peers().iter().for_each(|peer| peer.push(Outgoing::GiveUp));
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.0.draining.load(Relaxed)
    }

    // Connections.

    /// Makes a place for a connection, which is known until [`leave`](Self::leave).
    pub(crate) fn join(
        &self,
        protocol: &'static str,
        principal: Principal,
    ) -> (Peer, mpsc::UnboundedReceiver<Outgoing>) {
        let id = WorkerId(self.0.next_worker.fetch_add(1, Relaxed));
        let limits = &self.0.config.limits;
        let bounds = Bounds { messages: limits.queue_messages, bytes: limits.queue_bytes.0 };
        let (peer, inbox) = Peer::new(id, protocol, principal, bounds);
        let mut peers = self.0.peers.lock();
        peers.insert(id, peer.clone());
        if self.0.closing.load(Relaxed) {
            close_for_good(&peer);
        }
        drop(peers);
        (peer, inbox)
    }

    /// Has every channel closed, and those that still come.
    pub(crate) fn close(&self) {
        let peers = self.0.peers.lock();
        self.0.closing.store(true, Relaxed);
        peers.values().for_each(close_for_good);
    }

    /// Forgets a connection and all that it served.
    pub(crate) fn leave(&self, worker: WorkerId) {
        let mut peers = self.0.peers.lock();
        if !parlour_core::bug!("session_not_cleaned") {
            peers.remove(&worker);
        }
        self.change(|directory| directory.remove(worker));
    }

    /// Whether this connection has not left.
    pub(crate) fn knows(&self, peer: &Peer) -> bool {
        self.0.peers.lock().contains_key(&peer.id)
    }

    /// Every connection that can serve agents or receive events.
    pub(crate) fn peers(&self) -> Vec<Peer> {
        self.0.peers.lock().values().cloned().collect()
    }

    pub(crate) fn directory(&self) -> Arc<Directory<Peer>> {
        self.0.directory.load_full()
    }

    // Messages.

    /// Completes what a client says of a message with what only the host knows.
    pub(crate) fn stamp(&self, fields: HeaderFields, origin: &Origin, now: Instant) -> Header {
        let id = fields.id.unwrap_or_else(|| self.new_message_id(now));
        let sender = fields.sender.filter(|sender| {
            let directory = self.0.directory.load();
            let serves = origin.worker.is_some_and(|worker| directory.serves(worker, sender));
            if !serves {
                self.0.metrics.senders_refused.inc();
            }
            serves
        });
        Header {
            conversation: fields.conversation.unwrap_or_else(|| id.clone()),
            id,
            cause: fields.cause,
            principal: origin.principal.clone(),
            sender,
            traceparent: fields.traceparent,
            hops: fields.hops,
            idempotency_key: fields.idempotency_key,
        }
    }

    /// A new name for a message: a UUID of version 7 (RFC 9562).
    fn new_message_id(&self, now: Instant) -> MessageId {
        let millis = self.unix_time(now).as_millis() as u64;
        let mut random = [0; 10];
        fastrand::fill(&mut random);
        let uuid = uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid();
        let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
        uuid.hyphenated().encode_lower(&mut text);
        // Owned in this way, a second reference to it costs no second allocation.
        let text = ByteString::try_from(Bytes::from_owner(text)).expect("hexadecimal is UTF-8");
        MessageId::parse(text).expect("a UUID is a short text")
    }

    /// The deadline of a call that asks for `timeout` now.
    pub(crate) fn deadline(&self, timeout: Option<Duration>, now: Instant) -> Instant {
        let calls = &self.0.config.calls;
        now + timeout.unwrap_or(calls.default_timeout).min(calls.max_timeout)
    }

    /// Sends `call` on its way; its reply will go to `reply_to`, exactly once and by its deadline.
    ///
    /// Returns the ticket by which it can be given up, unless it has ended already.
    pub(crate) fn dispatch(&self, call: Call, reply_to: ReplyTo, now: Instant) -> Option<Ticket> {
        match self.admit(&call, now) {
            Ok(()) => {
                let work = Dispatched { id: self.next_call(), call, reply_to: None };
                self.send_call(Box::new(work), reply_to)
            }
            Err(fault) => {
                reply_to.send(Err(fault));
                None
            }
        }
    }

    /// Sends an attempt of a durable call on its way. What comes of it goes to `attempt`.
    pub(crate) fn attempt(&self, call: Call, attempt: AttemptTo) -> Option<Ticket> {
        let reply_to = ReplyTo::attempt(attempt, &self.0.metrics);
        let directory = self.0.directory.load();
        if let Some(topic) = &call.topic
            && let Some((_, peer)) = directory.route(&call.target)
            && peer.protocol == dialect::NAME
        {
            // It has no words for an event that is acknowledged: what its queue takes it has.
            let (agents, topic) = (vec![call.target.agent_type], topic.clone());
            let recipients = Arc::new(Recipients { agents, listeners: Vec::new() });
            let event = Event { header: call.header, topic, payload: call.payload };
            let event = SharedEvent::new(event, self.unix_time(Instant::now()), None);
            reply_to.send(match peer.offer(Outgoing::Event(Arc::new(event), recipients)) {
                Ok(()) => Ok(Payload::default()),
                Err(_) => {
                    let detail = "the queue of the agent's worker is full";
                    Err(Fault::new(FaultKind::Overloaded, detail).may_have_run_if(false))
                }
            });
            return None;
        }
        let work = Dispatched { id: self.next_call(), call, reply_to: None };
        self.send_call(Box::new(work), reply_to)
    }

    /// Sends a call on, under its name, that its worker left without having had it.
    pub(crate) fn move_on(&self, from: &Peer, work: Box<Dispatched>, reply_to: ReplyTo) {
        if self.0.directory.load().route(&work.call.target).is_some() {
            if let Some(ticket) = self.send_call(work, reply_to) {
                from.moved(&ticket);
            }
            return;
        }
        let detail = "the worker left before it had the call, and there is no other";
        let fault = Fault::new(FaultKind::WorkerLost, detail).may_have_run_if(false);
        reply_to.send(Err(fault));
    }

    /// The host's name for the next message: in the order in which it takes them.
    fn next_call(&self) -> CallId {
        CallId(self.0.next_call.fetch_add(1, Relaxed))
    }

    /// Sends `call` on its way, and returns what waits for its reply.
    /// What comes before it goes to `progress`, if the call asks for it.
    pub(crate) fn call(&self, call: Call, progress: Option<ProgressTo>) -> Waiting {
        let (reply_to, reply) = ReplyTo::waiter(&self.0.metrics, progress);
        Waiting { ticket: self.dispatch(call, reply_to, Instant::now()), reply }
    }

    /// Tells those who listen of an event that a log has, at `place`. What agents are owed goes another
    /// way.
    pub(crate) fn announce(&self, event: Event, place: ByteString, time: Duration) {
        let directory = self.0.directory.load();
        let found = directory.recipients(&event.topic, |_, _, _| None);
        if found.is_empty() {
            return;
        }
        let metrics = &self.0.metrics;
        let event = Arc::new(SharedEvent::new(event, time, Some(place)));
        for (_, peer, recipients) in &*found {
            let count = recipients.listeners.len() as u64;
            match peer.offer(Outgoing::Event(event.clone(), recipients.clone())) {
                Ok(()) => drop(metrics.events_delivered.inc_by(count)),
                Err(Refused::Full(_, (key, _))) => {
                    metrics.limit_hit(key);
                    metrics.events_dropped.inc_by(count);
                }
                // It left while the event was on its way.
                Err(_) => {}
            }
        }
    }

    /// Sends `event` to every recipient but those at the connection `except`.
    pub(crate) fn publish(
        &self,
        event: Event,
        except: Option<WorkerId>,
        now: Instant,
    ) -> Result<Published, Fault> {
        self.admit_message(&event.header, &event.payload)?;
        let metrics = &self.0.metrics;
        metrics.events.inc();
        let directory = self.0.directory.load();
        let mut moving = Vec::new();
        let found = directory.recipients(&event.topic, |agent, home, peer| {
            let place = self.event_place(&directory, agent, home, peer);
            if place.is_none() && Some(home) != except {
                moving.push(agent.clone());
            }
            place
        });
        let limit = self.0.config.limits.fan_out;
        if found.len() > limit {
            let detail = format!("the event would go to {} connections", found.len());
            let fault =
                Fault::new(FaultKind::TooLarge, detail).hint("split the topic, or raise the limit");
            return Err(metrics.limit_met(limits::fan_out, Some(limit), fault));
        }
        let mut published = Published {
            id: event.header.id.clone(),
            conversation: event.header.conversation.clone(),
            recipients: 0,
            dropped: Vec::new(),
        };
        let event = Arc::new(SharedEvent::new(event, self.unix_time(now), None));
        let mut unnamed = 0;
        for (id, peer, recipients) in &*found {
            if Some(*id) == except {
                continue;
            }
            let count = (recipients.agents.len() + recipients.listeners.len()) as u64;
            match peer.offer(Outgoing::Event(event.clone(), recipients.clone())) {
                Ok(()) => {
                    published.recipients += count;
                }
                Err(Refused::Full(..)) if parlour_core::bug!("refusal_not_named") => {}
                Err(Refused::Full(Outgoing::Event(event, recipients), (key, _))) => {
                    metrics.limit_hit(key);
                    metrics.events_dropped.inc_by(count);
                    let source = &event.event().topic.source;
                    let agents = recipients.agents.iter().map(|agent| format!("{agent}/{source}"));
                    let id = peer.id.0;
                    let listeners =
                        recipients.listeners.iter().map(|n| format!("listener:{id}:{n}"));
                    for name in agents.chain(listeners) {
                        if published.dropped.len() < DROPPED_NAMES {
                            published.dropped.push(name.into());
                        } else {
                            unnamed += 1;
                        }
                    }
                }
                // It left while the event was on its way: it is no recipient any more.
                Err(_) => {}
            }
        }
        metrics.events_delivered.inc_by(published.recipients);
        for agent in moving {
            match self.send_event_later(&event, agent) {
                Ok(count) => published.recipients += count,
                Err(agent) if published.dropped.len() < DROPPED_NAMES => {
                    published.dropped.push(agent.to_string().into());
                }
                Err(_) => unnamed += 1,
            }
        }
        if unnamed > 0 {
            published.dropped.push(format!("{unnamed} more").into());
        }
        Ok(published)
    }

    fn admit(&self, call: &Call, now: Instant) -> Result<(), Fault> {
        self.admit_message(&call.header, &call.payload)?;
        if call.deadline <= now.into_std() {
            return Err(Fault::new(
                FaultKind::DeadlineExceeded,
                "the deadline had passed when the call arrived",
            )
            .hint("allow more time"));
        }
        Ok(())
    }

    pub(crate) fn admit_message(&self, header: &Header, payload: &Payload) -> Result<(), Fault> {
        let limits = &self.0.config.limits;
        if self.is_draining() && header.cause.is_none() && header.sender.is_none() {
            return Err(Fault::new(FaultKind::Unavailable, "the host is shutting down")
                .hint("try another host, or wait until it is back")
                .retry_after(Duration::from_secs(1)));
        }
        if usize::from(header.hops) > limits.hops {
            let detail = format!("this conversation is {} messages deep", header.hops);
            let fault = Fault::new(FaultKind::Invalid, detail)
                .hint("do agents call each other in a loop? If not, raise the limit");
            return Err(self.0.metrics.limit_met(limits::hops, Some(limits.hops), fault));
        }
        let texts = [&header.traceparent, &header.idempotency_key];
        if texts.into_iter().flatten().any(|text| text.len() > MAX_TEXT) {
            // No frame can carry it.
            let detail =
                format!("a trace context or idempotency key is longer than {MAX_TEXT} bytes");
            return Err(Fault::new(FaultKind::Invalid, detail).hint("send a shorter one"));
        }
        self.admit_payload(payload)
    }

    /// Whether the host passes this payload on.
    pub(crate) fn admit_payload(&self, payload: &Payload) -> Result<(), Fault> {
        let limit = self.0.config.limits.payload_bytes;
        if payload.bytes.len() > limit.0 {
            let length = payload.bytes.len();
            let detail = format!("the payload has {length} bytes, {limit} are allowed");
            let fault =
                Fault::new(FaultKind::TooLarge, detail).hint("send less, or raise the limit");
            return Err(self.0.metrics.limit_met(limits::payload_bytes, Some(limit.0), fault));
        }
        if payload.content_type.len().max(payload.data_type.len()) > MAX_TYPE {
            let detail = format!("a content type or data type is longer than {MAX_TYPE} bytes");
            return Err(Fault::new(FaultKind::Invalid, detail).hint("name the type more briefly"));
        }
        Ok(())
    }

    /// Answers a call that a worker's queue did not take.
    fn refuse(&self, refused: Refused) {
        let (item, fault) = match refused {
            Refused::Closed(item) => {
                let fault = Fault::new(FaultKind::WorkerLost, "the worker has just left");
                (item, fault.may_have_run_if(false))
            }
            Refused::Full(item, (key, limit)) => {
                let fault = Fault::new(FaultKind::Overloaded, "the worker's queue is full")
                    .hint("try again later, or start another worker for this agent type")
                    .retry_after(RETRY_AFTER);
                (item, self.0.metrics.limit_met(key, Some(limit), fault))
            }
        };
        item.refuse(fault);
    }
}

fn close_for_good(peer: &Peer) {
    let close = Close::new(Close::GOING_AWAY, "the host is shutting down");
    peer.push(Outgoing::Close(Box::new(close)));
}

/// A call that a task waits for. Dropped before its end, it gives the call up.
#[derive(Debug)]
pub(crate) struct Waiting {
    ticket: Option<Ticket>,
    reply: oneshot::Receiver<Reply>,
}

impl Future for Waiting {
    type Output = Reply;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Reply> {
        let reply = ready!(Pin::new(&mut self.reply).poll(cx));
        self.ticket = None;
        Poll::Ready(
            reply.unwrap_or_else(|_| Err(Fault::new(FaultKind::Internal, "a reply was lost"))),
        )
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(ticket) = &self.ticket
            && !parlour_core::bug!("waiter_forgotten")
        {
            ticket.cancel();
        }
    }
}

/// The address of an event.
pub(crate) fn topic(topic_type: &str, source: &str) -> Result<TopicId, parlour_core::InvalidName> {
    let topic_type = parlour_core::TopicType::parse(topic_type)?;
    Ok(TopicId::new(topic_type, parlour_core::Key::parse(source)?))
}
