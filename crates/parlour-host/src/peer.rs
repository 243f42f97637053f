//! The way to a connection: a bounded queue that never makes its sender wait, and the return
//! address of a call.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytestring::ByteString;
use parking_lot::Mutex;
use parlour_core::wire::Frame;
use parlour_core::{
    Attempt, Call, CallId, CallMap, Fault, FaultKind, Payload, Principal, Recipients, Reply,
    WorkerId,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::config::limits;
use crate::durable::AttemptTo;
use crate::event::SharedEvent;
use crate::exchange::{Stay, Ticket};
use crate::link::Resumption;
use crate::metrics::Metrics;

/// A way to reach one connection. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Peer(Arc<Shared>);

/// What is known of a connection outside of its task.
pub(crate) struct Shared {
    pub(crate) id: WorkerId,
    pub(crate) protocol: &'static str,
    pub(crate) principal: Principal,
    pub(crate) opened: Instant,
    name: Mutex<ByteString>,
    pub(crate) connected: AtomicBool,
    pub(crate) draining: AtomicBool,
    /// Whether an operator drains it, which it is told once.
    pub(crate) asked_to_leave: AtomicBool,
    /// Calls that the peer has been given and that have not ended.
    pub(crate) in_flight: AtomicUsize,
    /// Frames that the peer takes beside those it was sent; `u64::MAX` if it did not say.
    pub(crate) credit: AtomicU64,
    queue: mpsc::UnboundedSender<Outgoing>,
    /// What the socket's queue has not taken yet, whether in `queue` or behind it.
    messages: AtomicUsize,
    bytes: AtomicUsize,
    bounds: Bounds,
    /// Calls that the peer never had and that went elsewhere when it left, for callers who know them
    /// by this peer.
    moved: Mutex<CallMap<Moved>>,
}

/// What is known of a call at a peer that has left.
enum Moved {
    /// It went on, and is found so.
    To(Ticket),
    /// It was given up, perhaps before it went on.
    GivenUp,
}

/// How much may wait for one connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) messages: usize,
    pub(crate) bytes: usize,
}

/// Something on its way to a peer.
#[derive(Debug)]
pub(crate) enum Outgoing {
    /// A call to an agent there, under the host's name for it.
    Call(Box<Dispatched>),
    /// The caller of the call of that name has given it up.
    Cancel(CallId),
    /// The peer is told so.
    Withdraw(CallId),
    /// What there is to say of a call that the peer made and that goes on, under its own name.
    Progress(CallId, Box<Payload>),
    /// The peer is back on another socket.
    Resume(Box<Resumption>),
    /// The end of a call that the peer made, or why a request of its was refused, under its own name.
    Reply(CallId, Box<Reply>),
    /// The end of another request that the peer made, under its own name.
    Answer(CallId, Box<Frame>),
    /// An event.
    Event(Arc<SharedEvent>, Arc<Recipients>),
    /// Something that only this protocol says.
    Frame(Box<Frame>),
    /// The host is going away.
    Drain,
    /// The host goes now: what the peer has not answered ends.
    GiveUp,
    /// The channel is to be closed, once what waits before this has been written.
    Close(Box<Close>),
}

/// A call with its name and, until the connection's session keeps it, its return address.
#[derive(Debug)]
pub(crate) struct Dispatched {
    pub(crate) id: CallId,
    pub(crate) call: Call,
    pub(crate) reply_to: Option<ReplyTo>,
}

/// Why a host closes a channel: a WebSocket close code (RFC 6455 §7.4) and a reason.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Close {
    pub(crate) code: u16,
    pub(crate) reason: Box<str>,
}

impl Close {
    pub(crate) const GOING_AWAY: u16 = 1001;
    pub(crate) const PROTOCOL: u16 = 1002;
    pub(crate) const UNSUPPORTED: u16 = 1003;
    pub(crate) const POLICY: u16 = 1008;
    pub(crate) const TOO_BIG: u16 = 1009;

    pub(crate) fn new(code: u16, reason: impl Into<Box<str>>) -> Self {
        Self { code, reason: reason.into() }
    }
}

/// What a message costs in the queue beside its payload.
pub(crate) const OVERHEAD: usize = 256;

impl Outgoing {
    /// Ends it with `fault` if it is a call that nobody has begun; nobody waits for anything else.
    pub(crate) fn refuse(self, fault: Fault) {
        if let Self::Call(mut dispatched) = self
            && let Some(reply_to) = dispatched.reply_to.take()
        {
            reply_to.send(Err(fault));
        }
    }

    /// Roughly the memory it holds while it waits.
    pub(crate) fn weight(&self) -> usize {
        OVERHEAD
            + match self {
                Self::Call(dispatched) => {
                    dispatched.call.payload.weight() + dispatched.call.header.weight()
                }
                Self::Progress(_, payload) => payload.weight(),
                Self::Reply(_, reply) => match &**reply {
                    Ok(payload) => payload.weight(),
                    Err(fault) => fault.weight(),
                },
                Self::Answer(_, frame) => match &**frame {
                    Frame::Delivery(delivery) => {
                        let texts = delivery.details.len()
                            + delivery.fault.as_ref().map_or(0, Fault::weight);
                        texts + delivery.reply.as_ref().map_or(0, Payload::weight)
                    }
                    _ => 0,
                },
                Self::Event(event, to) => {
                    event.weight() + to.agents.len() * 32 + to.listeners.len() * 8
                }
                _ => 0,
            }
    }
}

impl Peer {
    /// A peer and the queue in which everything for it arrives.
    pub(crate) fn new(
        id: WorkerId,
        protocol: &'static str,
        principal: Principal,
        bounds: Bounds,
    ) -> (Self, mpsc::UnboundedReceiver<Outgoing>) {
        let (queue, inbox) = mpsc::unbounded_channel();
        let shared = Shared {
            id,
            protocol,
            principal,
            opened: Instant::now(),
            name: Mutex::default(),
            connected: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            asked_to_leave: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            credit: AtomicU64::new(u64::MAX),
            queue,
            messages: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            bounds,
            moved: Mutex::default(),
        };
        (Self(Arc::new(shared)), inbox)
    }

    /// Queues `item`, unless too much waits already: then gives it back.
    ///
    /// Never waits: the caller is another connection's task, and must go on reading its own socket
    /// however slow this peer is.
    pub(crate) fn offer(&self, item: Outgoing) -> Result<(), Refused> {
        let weight = item.weight();
        // Looking first and counting then lets a few senders at once pass a little over the bound,
        // but a refusal leaves no trace that another could see.
        // A message larger than the whole bound passes when nothing else waits.
        if let Some(limit) = self.bound_met(weight)
            && self.waiting().0 > 0
        {
            return Err(Refused::Full(item, limit));
        }
        self.added(weight);
        self.0.queue.send(item).map_err(|mpsc::error::SendError(item)| {
            self.released(weight);
            Refused::Closed(item)
        })
    }

    /// Queues what must not be refused. There is at most one for each request that the peer made or
    /// was given, and while much of it waits the peer's requests are not read.
    pub(crate) fn push(&self, item: Outgoing) {
        self.try_push(item);
    }

    /// Has the call of this name end because its caller gave it up, here or where it went.
    pub(crate) fn cancel(&self, id: CallId) {
        if !self.try_push(Outgoing::Cancel(id)) {
            self.cancel_moved(id);
        }
    }

    /// The same for a call that went elsewhere.
    pub(crate) fn cancel_moved(&self, id: CallId) {
        // One that is on its way is found by `moved`.
        let former = self.0.moved.lock().insert(id, Moved::GivenUp);
        if let Some(Moved::To(ticket)) = former {
            ticket.cancel();
        }
    }

    /// Notes where a call went that the peer never had.
    pub(crate) fn moved(&self, ticket: &Ticket) {
        let former = self.0.moved.lock().insert(ticket.id, Moved::To(ticket.clone()));
        if let Some(Moved::GivenUp) = former {
            ticket.cancel();
        }
    }

    /// Returns whether the peer is still there.
    fn try_push(&self, item: Outgoing) -> bool {
        let weight = item.weight();
        self.added(weight);
        let is_there = self.0.queue.send(item).is_ok();
        if !is_there {
            self.released(weight);
        }
        is_there
    }

    /// Records that a message of this weight waits.
    pub(crate) fn added(&self, weight: usize) {
        self.0.messages.fetch_add(1, Relaxed);
        self.0.bytes.fetch_add(weight, Relaxed);
    }

    /// Records that a message of this weight no longer waits.
    pub(crate) fn released(&self, weight: usize) {
        if parlour_core::bug!("queue_not_released") {
            return;
        }
        self.0.messages.fetch_sub(1, Relaxed);
        self.0.bytes.fetch_sub(weight, Relaxed);
    }

    /// Messages and bytes that wait.
    pub(crate) fn waiting(&self) -> (usize, usize) {
        (self.0.messages.load(Relaxed), self.0.bytes.load(Relaxed))
    }

    /// The limit that what waits would exceed with `weight` more bytes: its key and its value.
    fn bound_met(&self, weight: usize) -> Option<(&'static str, usize)> {
        let (messages, bytes) = self.waiting();
        let bounds = &self.0.bounds;
        if messages >= bounds.messages {
            Some((limits::queue_messages, bounds.messages))
        } else if bytes + weight > bounds.bytes {
            Some((limits::queue_bytes, bounds.bytes))
        } else {
            None
        }
    }

    /// Whether the peer's requests are read: not while too much waits for it. One that gave no credit
    /// is read further, up to twice as much, as its acknowledgement may be next.
    pub(crate) fn may_ask(&self, has_credit: bool) -> bool {
        let (messages, bytes) = self.waiting();
        let times = if has_credit { 1 } else { 2 };
        messages < times * self.0.bounds.messages && bytes < times * self.0.bounds.bytes
    }

    pub(crate) fn name(&self) -> ByteString {
        self.0.name.lock().clone()
    }

    /// What it is called in the story of a delivery: by its name, or else its number.
    pub(crate) fn label(&self) -> ByteString {
        let name = self.name();
        if name.is_empty() { self.0.id.0.to_string().into() } else { name }
    }

    pub(crate) fn set_name(&self, name: &str) {
        *self.0.name.lock() = name.into();
    }
}

impl std::ops::Deref for Peer {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Peer").field(&self.0.id.0).finish()
    }
}

/// Why a peer does not take a message, and the message.
#[derive(Debug)]
pub(crate) enum Refused {
    /// Too much waits already; the limit that was met.
    Full(Outgoing, (&'static str, usize)),
    /// The connection is gone.
    Closed(Outgoing),
}

/// Where a reply goes.
///
/// A call cannot be forgotten: dropping its return address answers that the worker is lost.
pub(crate) struct ReplyTo {
    address: Option<Address>,
    /// Keeps the agent where it is until the call has ended.
    pub(crate) stay: Option<Stay>,
    metrics: Arc<Metrics>,
}

enum Address {
    /// Back down the connection that the call came in on, under the name its caller gave it.
    Peer { peer: Peer, id: CallId, progress: bool },
    /// To a task that waits, such as a request's, and perhaps wants to hear of its progress.
    Waiter(oneshot::Sender<Reply>, Option<ProgressTo>),
    /// To the owner of the delivery whose attempt it is.
    Attempt(Box<AttemptTo>),
}

/// The way to somebody who is no peer and wants to hear of a call before its end.
pub(crate) struct ProgressTo {
    queue: mpsc::Sender<Payload>,
    /// What waits there.
    bytes: Arc<AtomicUsize>,
    bounds: Bounds,
}

/// Where that arrives.
pub(crate) struct ProgressOf {
    queue: mpsc::Receiver<Payload>,
    bytes: Arc<AtomicUsize>,
}

/// Both ends of a queue for the progress of a call.
pub(crate) fn progress(bounds: Bounds) -> (ProgressTo, ProgressOf) {
    let (sender, receiver) = mpsc::channel(bounds.messages);
    let bytes = Arc::<AtomicUsize>::default();
    let progress_to = ProgressTo { queue: sender, bytes: bytes.clone(), bounds };
    (progress_to, ProgressOf { queue: receiver, bytes })
}

impl ProgressTo {
    /// Queues `payload`, or returns the limit that was met: how many messages may wait is no setting.
    /// There is one sender, so that nothing can come between looking and counting.
    fn offer(&self, payload: Payload) -> Result<(), Option<(&'static str, usize)>> {
        let (weight, bytes) = (payload.weight(), self.bytes.load(Relaxed));
        // One that is larger than the whole bound passes when nothing else waits.
        if bytes > 0 && bytes + weight > self.bounds.bytes {
            return Err(Some((limits::queue_bytes, self.bounds.bytes)));
        }
        self.bytes.fetch_add(weight, Relaxed);
        match self.queue.try_send(payload) {
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.bytes.fetch_sub(weight, Relaxed);
                Err(None)
            }
            // Whoever wanted to hear it may have gone.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
        }
    }
}

impl ProgressOf {
    /// The next that was said. `None` once the call has ended, and all was taken.
    pub(crate) fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<Payload>> {
        let payload = ready!(self.queue.poll_recv(cx));
        if let Some(payload) = &payload {
            self.bytes.fetch_sub(payload.weight(), Relaxed);
        }
        Poll::Ready(payload)
    }
}

impl ReplyTo {
    /// With `progress` the caller hears of that too.
    pub(crate) fn peer(peer: Peer, id: CallId, progress: bool, metrics: &Arc<Metrics>) -> Self {
        Self::new(Address::Peer { peer, id, progress }, metrics)
    }

    pub(crate) fn waiter(
        metrics: &Arc<Metrics>,
        progress: Option<ProgressTo>,
    ) -> (Self, oneshot::Receiver<Reply>) {
        let (waiter, reply) = oneshot::channel();
        (Self::new(Address::Waiter(waiter, progress), metrics), reply)
    }

    pub(crate) fn attempt(attempt: AttemptTo, metrics: &Arc<Metrics>) -> Self {
        Self::new(Address::Attempt(Box::new(attempt)), metrics)
    }

    /// Whether it is the address of this attempt.
    pub(crate) fn is_of(&self, it: Attempt) -> bool {
        matches!(&self.address, Some(Address::Attempt(attempt)) if attempt.attempt() == it)
    }

    /// The agent has the message.
    pub(crate) fn received(&self) {
        if let Some(Address::Attempt(attempt)) = &self.address {
            attempt.received();
        }
    }

    /// Hands on what the agent says before it has ended. Nothing of it is left out: if the caller's
    /// queue is full, the fault returned is the end of the call.
    pub(crate) fn progress(&self, payload: Payload) -> Result<(), Fault> {
        let offered = match &self.address {
            Some(Address::Peer { peer, id, progress: true }) => {
                match peer.offer(Outgoing::Progress(*id, Box::new(payload))) {
                    Err(Refused::Full(_, met)) => Err(Some(met)),
                    Ok(()) | Err(Refused::Closed(_)) => Ok(()),
                }
            }
            Some(Address::Waiter(_, Some(progress))) => progress.offer(payload),
            Some(Address::Attempt(attempt)) if !attempt.progress(payload) => Err(None),
            _ => Ok(()),
        };
        match offered {
            Err(_) if parlour_core::bug!("progress_left_out") => Ok(()),
            Err(Some((key, max))) => Err(self.metrics.limit_met(key, Some(max), unread_progress())),
            Err(None) => Err(unread_progress()),
            Ok(()) => Ok(()),
        }
    }

    fn new(address: Address, metrics: &Arc<Metrics>) -> Self {
        metrics.calls_in_flight.inc();
        Self { address: Some(address), stay: None, metrics: metrics.clone() }
    }

    /// Hands the reply on. Whether anyone still wants it is their affair.
    pub(crate) fn send(mut self, reply: Reply) {
        self.settle(reply);
    }

    fn settle(&mut self, reply: Reply) {
        let Some(address) = self.address.take() else { return };
        let reply = match &address {
            Address::Waiter(..) | Address::Attempt(_) => reply,
            Address::Peer { peer, .. } => {
                let is_small = reply.as_ref().is_err_and(|fault| fault.weight() <= OVERHEAD);
                // One more byte: as soon as a bound is reached the peer counts as slow.
                match peer.bound_met(1).filter(|_| !is_small) {
                    Some((key, limit)) => {
                        Err(self.metrics.limit_met(key, Some(limit), unread_replies()))
                    }
                    None => reply,
                }
            }
        };
        self.metrics.calls_in_flight.dec();
        self.metrics.call_ended(reply.as_ref().err().map(Fault::kind));
        match address {
            // Whoever asked and has gone has no use for it.
            Address::Waiter(waiter, _) => drop(waiter.send(reply)),
            Address::Attempt(attempt) => attempt.end(reply),
            Address::Peer { peer, id, .. } => {
                if parlour_core::bug!("reply_sent_twice") {
                    peer.push(Outgoing::Reply(id, Box::new(reply.clone())));
                }
                peer.push(Outgoing::Reply(id, Box::new(reply)));
            }
        }
    }
}

impl Drop for ReplyTo {
    fn drop(&mut self) {
        if self.address.is_some() && !parlour_core::bug!("reply_to_dropped") {
            self.settle(Err(Fault::new(FaultKind::WorkerLost, "the worker is gone")));
        }
    }
}

impl fmt::Debug for ReplyTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplyTo").finish_non_exhaustive()
    }
}

/// How long to wait before a full queue is worth another try.
pub(crate) const RETRY_AFTER: Duration = Duration::from_millis(250);

fn unread_progress() -> Fault {
    Fault::new(FaultKind::Overloaded, "too much of the call's progress waits to be read")
        .may_have_run_if(true)
        .hint("read progress faster, or make the call without")
}

fn unread_replies() -> Fault {
    Fault::new(FaultKind::Overloaded, "the agent answered, but too many replies wait to be read")
        .may_have_run_if(true)
        .hint("read replies faster, or have fewer calls in flight")
        .retry_after(RETRY_AFTER)
}
