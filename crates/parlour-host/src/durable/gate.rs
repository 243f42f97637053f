//! What the workers can take of durable work.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use parlour_core::durable::{self, PartitionId};
use parlour_core::{AgentId, AgentType, WorkerId};

use super::Durable;
use super::owner::Input;

/// Counts the attempts under way, over all partitions. Cloning gives another handle to the same.
#[derive(Clone)]
pub(super) struct Gate(Arc<Inner>);

struct Inner {
    durable: Durable,
    rooms: Mutex<Rooms>,
}

#[derive(Default)]
struct Rooms {
    workers: HashMap<WorkerId, Room>,
    types: HashMap<AgentType, Room>,
}

#[derive(Default)]
struct Room {
    running: usize,
    /// The partitions that have something for it, each once.
    waiting: VecDeque<PartitionId>,
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

/// A place at a worker for one attempt. Dropping it makes room for another.
pub(super) struct Slot {
    gate: Gate,
    worker: WorkerId,
    agent_type: AgentType,
}

impl Gate {
    pub(super) fn new(durable: Durable) -> Self {
        Self(Arc::new(Inner { durable, rooms: Mutex::default() }))
    }

    /// Asks for a place for an attempt of `agent`. Where there is none, `partition` is told when there
    /// may be.
    pub(super) fn ask(
        &self,
        partition: PartitionId,
        agent: &AgentId,
    ) -> (durable::Gate, Option<Slot>) {
        let exchange = &self.0.durable.0.exchange;
        let room = self.0.durable.0.room.said();
        let asked = room.agents.get(&agent.agent_type);
        // Partitions are told of every change of the room.
        if exchange.is_draining() || asked.is_some_and(|it| it.paused) {
            return (durable::Gate::Closed, None);
        }
        let directory = exchange.directory();
        // Partitions are told of every change of the directory.
        let Some((worker, peer)) = directory.route(agent) else {
            return (durable::Gate::Closed, None);
        };
        let settings = &exchange.config().durable;
        let mut rooms = self.0.rooms.lock();
        let Rooms { workers, types } = &mut *rooms;
        let of_type = types.entry(agent.agent_type.clone()).or_default();
        if of_type.running >= settings.type_in_flight {
            of_type.wait(partition);
            return (durable::Gate::Closed, None);
        }
        let of_worker = workers.entry(worker).or_default();
        if of_worker.running >= settings.worker_in_flight {
            of_worker.wait(partition);
            return (durable::Gate::Busy(worker), None);
        }
        of_type.running += 1;
        of_worker.running += 1;
        let agent_type = agent.agent_type.to_kept();
        let slot = Slot { gate: self.clone(), worker, agent_type };
        (durable::Gate::Open(worker, peer.label()), Some(slot))
    }

    /// Has `partition` told when `worker` has ended something.
    pub(super) fn wait(&self, partition: PartitionId, worker: WorkerId) {
        self.0.rooms.lock().workers.entry(worker).or_default().wait(partition);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let Inner { durable, rooms } = &*self.gate.0;
        let mut rooms = rooms.lock();
        let Rooms { workers, types } = &mut *rooms;
        let tell = |partition: PartitionId, input| {
            // A partition whose owner is gone starts nothing.
            let _ = durable.inbox(partition).queue.send(input);
        };
        if let Some(room) = workers.get_mut(&self.worker) {
            room.running -= 1;
            if let Some(partition) = room.waiting.pop_front() {
                tell(partition, Input::WakeWorker(self.worker));
            }
            if room.is_idle() {
                workers.remove(&self.worker);
            }
        }
        if let Some(room) = types.get_mut(&self.agent_type) {
            room.running -= 1;
            if let Some(partition) = room.waiting.pop_front() {
                tell(partition, Input::Wake(self.agent_type.clone()));
            }
            if room.is_idle() {
                types.remove(&self.agent_type);
            }
        }
    }
}
