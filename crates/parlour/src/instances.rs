use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use futures_util::future::{BoxFuture, ready};
use parlour_core::{AgentType, Fault, FaultKind, Key, Payload, Reply, TopicId};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, RwLock, Semaphore};

use crate::describe::{DESCRIBE, PASSIVATE, RESERVED, unanswered};
use crate::handle::now;
use crate::handler::BoxHandler;
use crate::reply::late;
use crate::{Agent, AgentError, Cx, Message};

/// An agent type of whatever state, with its instances.
pub(crate) trait Serve: fmt::Debug + Send + Sync {
    /// Gives a call its place among the messages for its key. What this returns answers it.
    fn call(self: Arc<Self>, cx: Cx, payload: Payload) -> BoxFuture<'static, Reply>;

    /// The same for an event. What this returns handles it.
    fn event(
        self: Arc<Self>,
        cx: Cx,
        topic: TopicId,
        payload: Payload,
    ) -> BoxFuture<'static, Reply>;

    /// Whether instances are let go because they are idle.
    fn passivates(&self) -> bool;

    /// When [`passivate`](Self::passivate) next has something to do.
    fn poll_timeout(&self) -> Option<Instant>;

    /// Lets go of the instances that have been idle for long enough.
    fn passivate(&self, now: Instant);
}

/// An agent type with its instances.
pub(crate) struct Served<S> {
    agent_type: AgentType,
    agent: Agent<S>,
    instances: Mutex<Instances<S>>,
}

struct Instances<S> {
    by_key: HashMap<Key, Instance<S>>,
    /// How many messages have come.
    uses: u64,
    /// When to look whether an instance is idle.
    due: BinaryHeap<Reverse<(Instant, Key)>>,
}

struct Instance<S> {
    // Nobody else has it: it is idle.
    slot: Arc<Slot<S>>,
    /// The number of the message that was its latest.
    last_use: u64,
    /// Its one entry in `due` that counts.
    due: Option<Instant>,
}

/// One agent.
struct Slot<S> {
    /// Held by a message while it begins or, one at a time, until it ends. Serves in order.
    turn: Arc<Semaphore>,
    /// Read by each message that runs; written to let the state go.
    state: RwLock<OnceLock<Arc<S>>>,
    /// When its latest message ended, where that is of interest.
    idle_since: Mutex<Option<Instant>>,
}

/// A place in the order of a key.
enum Place {
    Held(OwnedSemaphorePermit),
    Queued(BoxFuture<'static, Result<OwnedSemaphorePermit, AcquireError>>),
}

impl<S: Send + Sync + 'static> Served<S> {
    pub(crate) fn new(agent_type: AgentType, agent: Agent<S>) -> Self {
        let instances = Instances { by_key: HashMap::new(), uses: 0, due: BinaryHeap::new() };
        Self { agent_type, agent, instances: Mutex::new(instances) }
    }

    /// The agent for `key`, which counts as busy as long as what this returns lives, and the next
    /// place in its order.
    fn enter(&self, key: &Key) -> (Arc<Slot<S>>, Place) {
        let mut instances = self.lock();
        instances.uses += 1;
        let last_use = instances.uses;
        if let Some(instance) = instances.by_key.get_mut(key) {
            instance.last_use = last_use;
            return (Arc::clone(&instance.slot), Place::take(&instance.slot.turn));
        }
        let dropped = instances.make_room(self.agent.max_instances);
        let slot = Arc::new(Slot {
            turn: Arc::new(Semaphore::new(1)),
            state: RwLock::default(),
            idle_since: Mutex::default(),
        });
        let key = key.to_kept();
        let due = self.agent.idle_timeout.and_then(|idle| now().checked_add(idle));
        instances.due.extend(due.map(|due| Reverse((due, key.clone()))));
        instances.by_key.insert(key, Instance { slot: Arc::clone(&slot), last_use, due });
        // What an agent does when it is dropped holds up no other.
        drop(instances);
        drop(dropped);
        let place = Place::take(&slot.turn);
        (slot, place)
    }

    fn handler(&self, data_type: &str) -> Result<&BoxHandler<S>, Fault> {
        if let Some(handler) = self.agent.calls.get(data_type) {
            return Ok(handler);
        }
        if data_type.starts_with(RESERVED) {
            return Err(unanswered(&self.agent_type, data_type));
        }
        self.agent.other_calls.as_ref().ok_or_else(|| {
            let agent_type = &self.agent_type;
            let detail = match (self.agent.calls.is_empty(), data_type) {
                (true, _) => format!("{agent_type} receives events and answers no calls"),
                (false, "") => format!("{agent_type} answers no calls without a data type"),
                (false, _) => format!("{agent_type} answers no calls of data type {data_type}"),
            };
            let fault = Fault::new(FaultKind::Invalid, detail);
            match self.data_types().collect::<Vec<_>>() {
                names if names.is_empty() => fault,
                mut names => {
                    names.sort_unstable();
                    fault.hint(format!("it answers {}", names.join(", ")))
                }
            }
        })
    }

    /// The data types of calls that are answered, but for reserved ones.
    fn data_types(&self) -> impl Iterator<Item = &str> {
        let any = self.agent.other_calls.as_ref().map(|_| "");
        let named = self.agent.calls.keys().map(|name| &**name);
        named.filter(|name| !name.starts_with(RESERVED)).chain(any)
    }

    /// Waits for its turn, and handles a message.
    async fn handle(
        &self,
        slot: &Slot<S>,
        place: Place,
        handler: &BoxHandler<S>,
        (cx, topic, payload): (Cx, Option<TopicId>, Payload),
    ) -> Reply {
        let _in_use = InUse { slot, noted: self.agent.idle_timeout.is_some() };
        let deadline = cx.deadline();
        let Some(turn) = until(deadline, place.turn()).await else { return Err(late(false)) };
        let state = slot.state.read().await;
        let kept = state.get_or_init(|| Arc::new((self.agent.factory)(&cx.agent().key)));
        let mut work = handler(Message { cx, topic, payload, state: Arc::clone(kept) });
        let work = async {
            if self.agent.one_at_a_time {
                let reply = work.await;
                drop(turn);
                return reply;
            }
            let begun = poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx))).await;
            drop(turn);
            match begun {
                Poll::Ready(reply) => reply,
                Poll::Pending => work.await,
            }
        };
        match until(deadline, work).await {
            Some(reply) => reply.map_err(AgentError::into_fault),
            None => Err(late(true)),
        }
    }

    /// Lets go of the state of one agent, once what runs there has ended.
    fn let_go(&self, cx: &Cx) -> BoxFuture<'static, Reply> {
        let instances = self.lock();
        let Some(instance) = instances.by_key.get(&cx.agent().key) else {
            return Box::pin(ready(Ok(Payload::default())));
        };
        let (slot, deadline) = (Arc::clone(&instance.slot), cx.deadline());
        let place = Place::take(&slot.turn);
        Box::pin(async move {
            let alone = async {
                let turn = place.turn().await;
                let state = slot.state.write().await.take();
                drop((state, turn));
            };
            match until(deadline, alone).await {
                Some(()) => Ok(Payload::default()),
                None => Err(late(false)),
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, Instances<S>> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Send + Sync + 'static> Serve for Served<S> {
    fn call(self: Arc<Self>, cx: Cx, payload: Payload) -> BoxFuture<'static, Reply> {
        match &*payload.data_type {
            DESCRIBE => {
                let description = self.agent.about.describe(&self.agent_type, self.data_types());
                let fault = |error| AgentError::from(error).into_fault();
                return Box::pin(ready(description.map_err(fault)));
            }
            PASSIVATE => return self.let_go(&cx),
            _ => {}
        }
        if let Err(fault) = self.handler(&payload.data_type) {
            return Box::pin(ready(Err(fault)));
        }
        let (slot, place) = self.enter(&cx.agent().key);
        Box::pin(async move {
            let handler = self.handler(&payload.data_type)?;
            self.handle(&slot, place, handler, (cx, None, payload)).await
        })
    }

    fn event(
        self: Arc<Self>,
        cx: Cx,
        topic: TopicId,
        payload: Payload,
    ) -> BoxFuture<'static, Reply> {
        if self.agent.events.is_none() {
            return Box::pin(ready(Ok(Payload::default())));
        }
        let (slot, place) = self.enter(&cx.agent().key);
        Box::pin(async move {
            let Some(handler) = &self.agent.events else { return Ok(Payload::default()) };
            self.handle(&slot, place, handler, (cx, Some(topic), payload)).await
        })
    }

    fn passivates(&self) -> bool {
        self.agent.idle_timeout.is_some()
    }

    fn poll_timeout(&self) -> Option<Instant> {
        self.lock().due.peek().map(|Reverse((due, _))| *due)
    }

    fn passivate(&self, now: Instant) {
        let Some(idle) = self.agent.idle_timeout else { return };
        let mut dropped = Vec::new();
        let mut instances = self.lock();
        let Instances { by_key, due: queue, .. } = &mut *instances;
        while queue.peek().is_some_and(|Reverse((due, _))| *due <= now) {
            let Some(Reverse((due, key))) = queue.pop() else { break };
            // Of one that was dropped for another reason, perhaps made anew since.
            let Some(instance) = by_key.get_mut(&key).filter(|known| known.due == Some(due)) else {
                continue;
            };
            let since = if instance.is_idle() { instance.slot.idle_since() } else { Some(now) };
            match since.unwrap_or(now).checked_add(idle) {
                Some(until) if until <= now => dropped.extend(by_key.remove(&key)),
                later => {
                    instance.due = later;
                    queue.extend(later.map(|later| Reverse((later, key))));
                }
            }
        }
        // As in `enter`.
        drop(instances);
        drop(dropped);
    }
}

impl<S> Instances<S> {
    /// Takes out the idle instances that were unused longest, if there are `max` in all: an eighth at
    /// once, so that looking through all of them is rare.
    fn make_room(&mut self, max: usize) -> Vec<Instance<S>> {
        if self.by_key.len() < max {
            return Vec::new();
        }
        let idle = self.by_key.values().filter(|instance| instance.is_idle());
        let mut uses: Vec<u64> = idle.map(|instance| instance.last_use).collect();
        if uses.is_empty() {
            return Vec::new();
        }
        let surplus = self.by_key.len() - max + max / 8;
        let index = surplus.min(uses.len() - 1);
        let (_, &mut latest, _) = uses.select_nth_unstable(index);
        let old =
            |_: &Key, instance: &mut Instance<S>| instance.is_idle() && instance.last_use <= latest;
        self.by_key.extract_if(old).map(|(_, instance)| instance).collect()
    }
}

impl<S> Instance<S> {
    /// Whether it handles nothing. Nobody can begin to use it while the instances are borrowed.
    fn is_idle(&self) -> bool {
        Arc::strong_count(&self.slot) == 1
    }
}

impl<S> Slot<S> {
    fn idle_since(&self) -> Option<Instant> {
        *self.idle_since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Notes when a message ends, however it does.
struct InUse<'a, S> {
    slot: &'a Slot<S>,
    noted: bool,
}

impl<S> Drop for InUse<'_, S> {
    fn drop(&mut self) {
        if self.noted {
            *self.slot.idle_since.lock().unwrap_or_else(PoisonError::into_inner) = Some(now());
        }
    }
}

impl Place {
    /// The next place. Whoever comes later gets a later one.
    fn take(turn: &Arc<Semaphore>) -> Self {
        if let Ok(turn) = Arc::clone(turn).try_acquire_owned() {
            return Self::Held(turn);
        }
        // Polled once it stands in the queue, unless this task's budget keeps it from that.
        let turn = Arc::clone(turn).acquire_owned();
        let mut turn: BoxFuture<'static, _> = Box::pin(tokio::task::unconstrained(turn));
        match Pin::new(&mut turn).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(turn)) => Self::Held(turn),
            Poll::Ready(Err(_)) | Poll::Pending => Self::Queued(turn),
        }
    }

    /// Waits until it is this one's turn, which lasts until what this returns is dropped.
    async fn turn(self) -> Option<OwnedSemaphorePermit> {
        match self {
            Self::Held(turn) => Some(turn),
            // Fails when a semaphore is closed, which these never are.
            Self::Queued(turn) => turn.await.ok(),
        }
    }
}

/// What comes of `work`, unless the deadline passes first.
async fn until<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match deadline {
        Some(deadline) => tokio::time::timeout_at(deadline.into(), work).await.ok(),
        None => Some(work.await),
    }
}

impl<S> fmt::Debug for Served<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Served")
            .field("agent_type", &self.agent_type)
            .field("agent", &self.agent)
            .finish_non_exhaustive()
    }
}
