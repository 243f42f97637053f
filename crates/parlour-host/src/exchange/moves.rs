//! Where agents have calls in flight, and what waits for one to move to another worker.

use std::collections::HashMap;
use std::fmt;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use foldhash::fast::RandomState;
use parking_lot::{Mutex, MutexGuard};
use parlour_core::{
    AgentId, AgentType, CallId, Directory, Fault, FaultKind, Places, Recipients, Standing, Way,
    WorkerId,
};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};

use super::{Exchange, Ticket, To};
use crate::config::limits;
use crate::event::SharedEvent;
use crate::peer::{Dispatched, Outgoing, Peer, RETRY_AFTER, Refused, ReplyTo};

/// Where agents are, apart so that two calls seldom need the same lock.
#[derive(Default)]
pub(super) struct Moves {
    hasher: RandomState,
    shards: [Mutex<Places<Held>>; SHARDS],
    /// Messages that wait, and their bytes.
    messages: AtomicUsize,
    bytes: AtomicUsize,
}

const SHARDS: usize = 32;

impl Moves {
    /// By which number an agent goes. Seeded at random against chosen names.
    fn number(&self, agent: &AgentId) -> u64 {
        self.hasher.hash_one((agent.agent_type.as_str(), agent.key.as_str()))
    }

    fn shard(&self, agent: u64) -> MutexGuard<'_, Places<Held>> {
        self.shards[(agent >> 48) as usize % SHARDS].lock()
    }
}

/// The stay of an agent at a worker, for as long as a call is in flight there.
pub(crate) struct Stay {
    exchange: Exchange,
    agent: u64,
    worker: WorkerId,
}

impl Drop for Stay {
    fn drop(&mut self) {
        self.exchange.end_stay(self.agent, self.worker);
    }
}

/// A message that waits for its agent to move.
struct Held {
    /// Tells in which order the host took the messages.
    id: CallId,
    message: Message,
    _room: Room,
}

enum Message {
    Call {
        work: Box<Dispatched>,
        reply_to: ReplyTo,
        /// Where its caller finds it once it has been sent.
        sent_to: Arc<OnceLock<Peer>>,
        /// Ends it at its deadline.
        timer: AbortHandle,
    },
    Event(Arc<SharedEvent>, AgentType),
}

/// What a message takes of the bounds while it waits.
struct Room {
    exchange: Exchange,
    weight: usize,
}

impl Drop for Room {
    fn drop(&mut self) {
        let moves = &self.exchange.0.moves;
        moves.messages.fetch_sub(1, Relaxed);
        moves.bytes.fetch_sub(self.weight, Relaxed);
        self.exchange.metrics().moving.dec();
    }
}

/// How a caller finds a call that waits, or waited, for its agent to move.
#[derive(Clone)]
pub(super) struct Moving {
    exchange: Exchange,
    agent: u64,
    sent_to: Arc<OnceLock<Peer>>,
}

impl Moving {
    pub(super) fn cancel(&self, id: CallId) {
        let fault = || Fault::new(FaultKind::Cancelled, "the caller gave the call up");
        if !self.exchange.fail_held(self.agent, id, fault)
            && let Some(peer) = self.sent_to.get()
        {
            peer.cancel(id);
        }
    }
}

impl fmt::Debug for Moving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Moving").field("sent_to", &self.sent_to).finish_non_exhaustive()
    }
}

/// A message that could not be sent when its agent had moved. Its end is told without a lock held.
enum Unsent {
    Call(ReplyTo, Fault),
    /// An event for an agent whose type no worker serves any more.
    Event,
    Refused(Refused),
}

impl Exchange {
    /// Sends a call to where its agent is, or has it wait until the agent has moved.
    ///
    /// One that was at a worker before has `reply_to` from there.
    pub(super) fn send_call(
        &self,
        mut work: Box<Dispatched>,
        mut reply_to: ReplyTo,
    ) -> Option<Ticket> {
        let Dispatched { id, ref call, .. } = *work;
        let directory = self.0.directory.load();
        let Some((home, home_peer)) = directory.route(&call.target) else {
            reply_to.send(Err(unknown_agent(&call.target.agent_type)));
            return None;
        };
        let agent = self.0.moves.number(&call.target);
        // Ends after the new one has begun, so that nothing that waits comes before this call.
        let former = reply_to.stay.take();
        let mut places = self.0.moves.shard(agent);
        let standing = |worker| self.standing(&directory, worker, &call.target);
        let (worker, peer) = match places.begin(agent, home, standing) {
            Way::Home => (home, home_peer.clone()),
            Way::There(worker) => {
                let peer = directory.served_by(worker, &call.target).unwrap_or(home_peer);
                (worker, peer.clone())
            }
            Way::Waits(queue) => {
                let held = self.hold_call(queue, agent, work, reply_to);
                drop(places);
                drop(former);
                return match held {
                    Ok(ticket) => Some(ticket),
                    Err((reply_to, fault)) => {
                        reply_to.send(Err(fault));
                        None
                    }
                };
            }
        };
        drop(places);
        reply_to.stay = Some(Stay { exchange: self.clone(), agent, worker });
        drop(former);
        let ticket = Ticket { id, to: To::Peer(peer.clone()) };
        work.reply_to = Some(reply_to);
        match peer.offer(Outgoing::Call(work)) {
            Ok(()) => Some(ticket),
            Err(refused) => {
                self.refuse(refused);
                None
            }
        }
    }

    /// Which worker an event for `agent` goes to now. None if it has to wait: see
    /// [`send_event_later`](Self::send_event_later).
    pub(super) fn event_place(
        &self,
        directory: &Directory<Peer>,
        agent: &AgentId,
        home: WorkerId,
        home_peer: &Peer,
    ) -> Option<(WorkerId, Peer)> {
        let number = self.0.moves.number(agent);
        let standing = |worker| self.standing(directory, worker, agent);
        match self.0.moves.shard(number).follow(number, home, standing) {
            Way::Home => Some((home, home_peer.clone())),
            Way::There(worker) => {
                directory.served_by(worker, agent).map(|peer| (worker, peer.clone()))
            }
            Way::Waits(_) => None,
        }
    }

    /// Has an event wait until `agent` has moved, unless it has by now. Returns how many agents will
    /// receive it, or `agent` if there is no room for it.
    pub(super) fn send_event_later(
        &self,
        event: &Arc<SharedEvent>,
        agent: AgentId,
    ) -> Result<u64, AgentId> {
        let number = self.0.moves.number(&agent);
        let directory = self.0.directory.load();
        // A type that has just lost its last worker receives nothing.
        let Some((home, _)) = directory.route(&agent) else { return Ok(0) };
        let mut places = self.0.moves.shard(number);
        let standing = |worker| self.standing(&directory, worker, &agent);
        if let Way::Waits(queue) = places.follow(number, home, standing) {
            let Ok(room) = self.room(event.weight()) else {
                self.0.metrics.events_dropped.inc();
                return Err(agent);
            };
            let message = Message::Event(event.clone(), agent.agent_type);
            push(queue, Held { id: self.next_call(), message, _room: room });
            return Ok(1);
        }
        let unsent = self.send_event(&mut places, number, event, &agent.agent_type);
        drop(places);
        match unsent {
            Some(Unsent::Refused(Refused::Full(..))) => {
                self.give_back(unsent);
                Err(agent)
            }
            // It left while the event was on its way: it is no recipient any more.
            Some(_) => Ok(0),
            None => Ok(1),
        }
    }

    /// How many agents have calls in flight at each worker.
    pub(crate) fn agents_in_flight(&self) -> HashMap<WorkerId, usize> {
        let mut counts = HashMap::new();
        for shard in &self.0.moves.shards {
            for worker in shard.lock().workers() {
                *counts.entry(worker).or_default() += 1;
            }
        }
        counts
    }

    /// Ends the calls that wait for their agents to move: the host goes now.
    pub(super) fn fail_all_held(&self) {
        let shards = self.0.moves.shards.iter();
        let mut held: Vec<_> = shards.flat_map(|shard| shard.lock().take_all_waiting()).collect();
        held.sort_unstable_by_key(|held| held.id);
        for held in held {
            if let Message::Call { reply_to, timer, .. } = held.message {
                timer.abort();
                let detail = "the host shut down before the agent had moved";
                let fault = Fault::new(FaultKind::Unavailable, detail);
                reply_to.send(Err(fault.may_have_run_if(false)));
            }
        }
    }

    /// What a worker that an agent does not belong to can still do for it.
    fn standing(&self, directory: &Directory<Peer>, worker: WorkerId, agent: &AgentId) -> Standing {
        if directory.served_by(worker, agent).is_some() {
            Standing::Serves
        } else if self.0.peers.lock().contains_key(&worker) {
            Standing::Leaving
        } else {
            Standing::Gone
        }
    }

    fn hold_call(
        &self,
        queue: &mut Vec<Held>,
        agent: u64,
        work: Box<Dispatched>,
        reply_to: ReplyTo,
    ) -> Result<Ticket, (ReplyTo, Fault)> {
        let Dispatched { id, ref call, .. } = *work;
        let room = match self.room(call.payload.weight() + call.header.weight()) {
            Ok(room) => room,
            Err(fault) => return Err((reply_to, fault)),
        };
        let deadline = Instant::from_std(call.deadline);
        let exchange = self.clone();
        let timer = tokio::spawn(async move {
            sleep_until(deadline).await;
            let detail = "the deadline passed before the agent had moved to another worker";
            exchange.fail_held(agent, id, || {
                Fault::new(FaultKind::DeadlineExceeded, detail)
                    .hint("allow more time, or see what it still does at its former worker")
            });
        });
        let sent_to = Arc::<OnceLock<Peer>>::default();
        let moving = Moving { exchange: self.clone(), agent, sent_to: sent_to.clone() };
        let timer = timer.abort_handle();
        let message = Message::Call { work, reply_to, sent_to, timer };
        push(queue, Held { id, message, _room: room });
        Ok(Ticket { id, to: To::Moving(moving) })
    }

    /// Takes room for a message that has to wait.
    fn room(&self, weight: usize) -> Result<Room, Fault> {
        let (moves, limits) = (&self.0.moves, &self.0.config.limits);
        let (messages, bytes) = (moves.messages.load(Relaxed), moves.bytes.load(Relaxed));
        let met = if messages >= limits.queue_messages {
            Some((limits::queue_messages, limits.queue_messages))
        } else if messages > 0 && bytes + weight > limits.queue_bytes.0 {
            Some((limits::queue_bytes, limits.queue_bytes.0))
        } else {
            None
        };
        if let Some((key, limit)) = met {
            let detail = "too much waits for agents to move to another worker";
            let fault = Fault::new(FaultKind::Overloaded, detail)
                .hint("try again when what they do at the worker that drains has ended")
                .retry_after(RETRY_AFTER)
                .may_have_run_if(false);
            return Err(self.0.metrics.limit_met(key, Some(limit), fault));
        }
        moves.messages.fetch_add(1, Relaxed);
        moves.bytes.fetch_add(weight, Relaxed);
        self.0.metrics.moving.inc();
        Ok(Room { exchange: self.clone(), weight })
    }

    /// Ends a call that waits with `fault`. Returns false if it does not wait any more.
    fn fail_held(&self, agent: u64, id: CallId, fault: impl FnOnce() -> Fault) -> bool {
        let held = self.0.moves.shard(agent).take_waiting(agent, |held| held.id == id);
        let Some(Held { message: Message::Call { reply_to, timer, .. }, .. }) = held else {
            return false;
        };
        timer.abort();
        reply_to.send(Err(fault().may_have_run_if(false)));
        true
    }

    /// A call to `agent` at `worker` has ended. After the last one what waits is sent on.
    fn end_stay(&self, agent: u64, worker: WorkerId) {
        let mut places = self.0.moves.shard(agent);
        let held = places.end(agent, worker);
        if held.is_empty() {
            return;
        }
        // Under the lock, so that nothing that comes now is sent before.
        let send = |held| self.send_held(&mut places, agent, held);
        let unsent: Vec<_> = held.into_iter().filter_map(send).collect();
        drop(places);
        self.give_back(unsent);
    }

    fn send_held(&self, places: &mut Places<Held>, agent: u64, held: Held) -> Option<Unsent> {
        let Held { id, message, _room } = held;
        let (mut work, mut reply_to, sent_to, timer) = match message {
            Message::Event(event, agent_type) => {
                return self.send_event(places, agent, &event, &agent_type);
            }
            Message::Call { work, reply_to, sent_to, timer } => (work, reply_to, sent_to, timer),
        };
        let target = &work.call.target;
        let directory = self.0.directory.load();
        let Some((home, home_peer)) = directory.route(target) else {
            timer.abort();
            return Some(Unsent::Call(reply_to, unknown_agent(&target.agent_type)));
        };
        let standing = |worker| self.standing(&directory, worker, target);
        let (worker, peer) = match places.begin(agent, home, standing) {
            Way::Home => (home, home_peer),
            Way::There(worker) => {
                (worker, directory.served_by(worker, target).unwrap_or(home_peer))
            }
            // Another agent of the same number has just begun elsewhere.
            Way::Waits(queue) => {
                let message = Message::Call { work, reply_to, sent_to, timer };
                push(queue, Held { id, message, _room });
                return None;
            }
        };
        timer.abort();
        reply_to.stay = Some(Stay { exchange: self.clone(), agent, worker });
        // Set once: a call waits in one queue at a time, and leaves it for good when it is sent.
        let _ = sent_to.set(peer.clone());
        work.reply_to = Some(reply_to);
        peer.offer(Outgoing::Call(work)).err().map(Unsent::Refused)
    }

    fn send_event(
        &self,
        places: &mut Places<Held>,
        number: u64,
        event: &Arc<SharedEvent>,
        agent_type: &AgentType,
    ) -> Option<Unsent> {
        let agent = AgentId::new(agent_type.clone(), event.event().topic.source.clone());
        let directory = self.0.directory.load();
        let Some((home, home_peer)) = directory.route(&agent) else { return Some(Unsent::Event) };
        let standing = |worker| self.standing(&directory, worker, &agent);
        let peer = match places.follow(number, home, standing) {
            Way::There(worker) => directory.served_by(worker, &agent).unwrap_or(home_peer),
            _ => home_peer,
        };
        let to = Recipients { agents: vec![agent.agent_type], listeners: Vec::new() };
        let unsent = peer.offer(Outgoing::Event(event.clone(), Arc::new(to))).err();
        if unsent.is_none() {
            self.0.metrics.events_delivered.inc();
        }
        unsent.map(Unsent::Refused)
    }

    /// Tells the end of what could not be sent.
    fn give_back(&self, unsent: impl IntoIterator<Item = Unsent>) {
        for unsent in unsent {
            match unsent {
                Unsent::Call(reply_to, fault) => reply_to.send(Err(fault)),
                Unsent::Refused(Refused::Full(Outgoing::Event(..), (key, _))) => {
                    self.0.metrics.limit_hit(key);
                    self.0.metrics.events_dropped.inc();
                }
                Unsent::Event | Unsent::Refused(Refused::Closed(Outgoing::Event(..))) => {
                    self.0.metrics.events_dropped.inc();
                }
                Unsent::Refused(refused) => self.refuse(refused),
            }
        }
    }
}

/// Adds a message to those that wait, in the order in which the host took them: one that was at the
/// former worker already, and comes from there unsent, is older than others.
fn push(queue: &mut Vec<Held>, held: Held) {
    let index = queue.partition_point(|other| other.id < held.id);
    queue.insert(index, held);
}

fn unknown_agent(agent_type: &AgentType) -> Fault {
    Fault::new(FaultKind::UnknownAgent, format!("agent type {agent_type} not registered"))
        .hint(format!("start one: parlour worker {agent_type} --echo"))
}
