//! What the workers can take of durable work, and how much the room lets begin.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use parlour_core::durable::{self, AgentSettings, Bucket, PartitionId};
use parlour_core::{AgentId, AgentType, WorkerId};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::Durable;
use super::owner::Input;
use super::room;
use super::slots::Slots;

/// Counts the attempts under way, over all partitions. Cloning gives another handle to the same.
///
/// A partition that is refused waits in a row, and is told when there is room. For room of a type it
/// takes what it can, and then has whoever is behind it told (`pass_on`), if there is room still; a
/// place at a worker is kept for it.
#[derive(Clone)]
pub(super) struct Gate(Arc<Inner>);

struct Inner {
    durable: Durable,
    rooms: Mutex<Rooms>,
    /// A timer was set before all others.
    sooner: Notify,
}

#[derive(Default)]
struct Rooms {
    workers: HashMap<WorkerId, Slots, RandomState>,
    types: HashMap<AgentType, OfType, RandomState>,
    /// When types are to be looked at again.
    timers: BTreeSet<(Instant, AgentType)>,
}

#[derive(Default)]
struct Room {
    running: usize,
    /// The partitions that have something of the type, each once.
    waiting: VecDeque<PartitionId>,
}

#[derive(Default)]
struct OfType {
    room: Room,
    bucket: Bucket,
    /// Its entry among the timers.
    timer: Option<Instant>,
}

impl Room {
    fn wait(&mut self, partition: PartitionId) {
        if !self.waiting.contains(&partition) {
            self.waiting.push_back(partition);
        }
    }

    fn is_idle(&self) -> bool {
        self.running == 0 && self.waiting.is_empty()
    }
}

impl Rooms {
    /// Has a type looked at no later than `at`. Returns whether that is before all others.
    fn set_timer(&mut self, agent_type: &AgentType, at: Instant) -> bool {
        let Some(of_type) = self.types.get_mut(agent_type) else { return false };
        if of_type.timer.is_some_and(|timer| timer <= at) {
            return false;
        }
        if let Some(timer) = of_type.timer.replace(at) {
            self.timers.remove(&(timer, agent_type.clone()));
        }
        self.timers.insert((at, agent_type.clone()));
        self.timers.first().is_some_and(|(first, _)| *first == at)
    }
}

/// A place at a worker for one attempt. Dropping it makes room for another.
pub(super) struct Slot {
    gate: Gate,
    worker: WorkerId,
    agent_type: AgentType,
}

impl Gate {
    pub(super) fn new(durable: Durable) -> Self {
        Self(Arc::new(Inner { durable, rooms: Mutex::default(), sooner: Notify::new() }))
    }

    /// Tells partitions when a rate lets something begin again, until `closing` is cancelled.
    pub(super) async fn run(self, closing: CancellationToken) {
        loop {
            let next = self.0.rooms.lock().timers.first().map(|(at, _)| *at);
            let due = async {
                match next {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = closing.cancelled() => return,
                () = self.0.sooner.notified() => continue,
                () = due => {}
            }
            let now = Instant::now();
            let mut rooms = self.0.rooms.lock();
            while let Some((at, agent_type)) = rooms.timers.pop_first() {
                if at > now {
                    rooms.timers.insert((at, agent_type));
                    break;
                }
                if let Some(of_type) = rooms.types.get_mut(&agent_type) {
                    of_type.timer = None;
                }
                self.pass_on_in(&mut rooms, &agent_type);
            }
        }
    }

    /// Asks for a place for an attempt of `agent`, a name that is kept. Where its type has no room,
    /// `partition` is told when there may be; where its worker is busy, it is to
    /// [`settle`](Self::settle) there.
    pub(super) fn ask(
        &self,
        partition: PartitionId,
        agent: &AgentId,
    ) -> (durable::Gate, Option<Slot>) {
        let exchange = &self.0.durable.0.exchange;
        let said = self.0.durable.0.room.said();
        let asked = said.agents.get(&agent.agent_type);
        // Partitions are told of every change of the room.
        if exchange.is_draining() || asked.is_some_and(|it| it.paused) {
            return (durable::Gate::Closed, None);
        }
        let directory = exchange.directory();
        // Partitions are told of every change of the directory.
        let Some((worker, peer)) = directory.route(agent) else {
            return (durable::Gate::Closed, None);
        };
        let mut rooms = self.0.rooms.lock();
        let Rooms { workers, types, .. } = &mut *rooms;
        let of_type = types.entry(agent.agent_type.clone()).or_default();
        if of_type.room.running >= self.concurrency(asked) {
            of_type.room.wait(partition);
            return (durable::Gate::Closed, None);
        }
        let slots = workers.entry(worker).or_default();
        if !slots.is_open_to(partition, self.worker_in_flight()) {
            return (durable::Gate::Busy(worker), None);
        }
        if let Some(rate) = asked.and_then(|it| it.rate)
            && let Err(at) = of_type.bucket.take(rate, Instant::now().into_std())
        {
            of_type.room.wait(partition);
            if rooms.set_timer(&agent.agent_type, at.into()) {
                self.0.sooner.notify_one();
            }
            return (durable::Gate::Closed, None);
        }
        of_type.room.running += 1;
        slots.take(partition);
        let agent_type = agent.agent_type.clone();
        let slot = Slot { gate: self.clone(), worker, agent_type };
        (durable::Gate::Open(worker, peer.label()), Some(slot))
    }

    /// Keeps places at `worker` for `partition`, which was told of one and wants so many. Returns how
    /// many it may take.
    pub(super) fn claim(&self, partition: PartitionId, worker: WorkerId, wanted: usize) -> usize {
        let most = self.worker_in_flight();
        let mut rooms = self.0.rooms.lock();
        let slots = rooms.workers.get_mut(&worker);
        slots.map_or(0, |slots| slots.claim(partition, wanted, most))
    }

    /// Lets go of the places at `worker` that `partition` did not take. If it wants more, it is told
    /// when there are.
    pub(super) fn settle(&self, partition: PartitionId, worker: WorkerId, wants_more: bool) {
        let mut rooms = self.0.rooms.lock();
        rooms.workers.entry(worker).or_default().settle(partition, wants_more);
        self.pass_on_at(&mut rooms, worker);
    }

    /// Lets go of all that is kept for `partition`, which begins nothing any more.
    pub(super) fn leave(&self, partition: PartitionId) {
        let mut rooms = self.0.rooms.lock();
        let workers: Vec<_> = rooms.workers.keys().copied().collect();
        for worker in workers {
            if let Some(slots) = rooms.workers.get_mut(&worker) {
                slots.leave(partition);
            }
            self.pass_on_at(&mut rooms, worker);
        }
    }

    /// Tells who waits for room of a type, if there is some.
    pub(super) fn pass_on(&self, agent_type: &AgentType) {
        self.pass_on_in(&mut self.0.rooms.lock(), agent_type);
    }

    fn pass_on_in(&self, rooms: &mut Rooms, agent_type: &AgentType) {
        let Some(of_type) = rooms.types.get_mut(agent_type) else { return };
        let said = self.0.durable.0.room.said();
        let asked = said.agents.get(agent_type);
        let now = Instant::now();
        let mut timer = None;
        if of_type.room.waiting.is_empty() {
            // Kept until what the bucket says is of no interest any more.
            let full_at = of_type.bucket.full_at().map(Instant::from_std);
            timer = full_at.filter(|at| *at > now && of_type.room.is_idle());
        } else if of_type.room.running < self.concurrency(asked) {
            let rate = asked.and_then(|it| it.rate);
            let begins = rate.map_or(Ok(()), |rate| of_type.bucket.look(rate, now.into_std()));
            match begins {
                Err(at) => timer = Some(at.into()),
                Ok(()) => {
                    if let Some(partition) = of_type.room.waiting.pop_front() {
                        self.tell(partition, Input::Wake(agent_type.clone()));
                    }
                }
            }
        }
        match timer {
            Some(at) => {
                if rooms.set_timer(agent_type, at) {
                    self.0.sooner.notify_one();
                }
            }
            None => {
                let of_type = rooms.types.get(agent_type);
                if of_type.is_some_and(|it| it.room.is_idle() && it.timer.is_none()) {
                    rooms.types.remove(agent_type);
                }
            }
        }
    }

    /// Tells who waits for places at a worker, of those that are free.
    fn pass_on_at(&self, rooms: &mut Rooms, worker: WorkerId) {
        let Some(slots) = rooms.workers.get_mut(&worker) else { return };
        let most = self.worker_in_flight();
        while let Some(partition) = slots.next(most) {
            self.tell(partition, Input::WakeWorker(worker));
        }
        if slots.is_idle() {
            rooms.workers.remove(&worker);
        }
    }

    fn worker_in_flight(&self) -> usize {
        self.0.durable.0.exchange.config().durable.worker_in_flight
    }

    fn concurrency(&self, asked: Option<&AgentSettings>) -> usize {
        room::concurrency(self.0.durable.0.exchange.config(), asked)
    }

    fn tell(&self, partition: PartitionId, input: Input) {
        // A partition whose owner is gone starts nothing.
        let _ = self.0.durable.inbox(partition).queue.send(input);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut rooms = self.gate.0.rooms.lock();
        if let Some(slots) = rooms.workers.get_mut(&self.worker) {
            slots.end();
        }
        if let Some(of_type) = rooms.types.get_mut(&self.agent_type) {
            of_type.room.running -= 1;
        }
        self.gate.pass_on_at(&mut rooms, self.worker);
        self.gate.pass_on_in(&mut rooms, &self.agent_type);
    }
}
