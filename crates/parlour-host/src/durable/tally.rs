//! How many deliveries there are, over all partitions, for the limits on them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use parlour_core::AgentType;
use parlour_core::durable::{PartitionId, Standing, Tally};

/// What the owners of all partitions have told of what they have.
pub(super) struct Tallies {
    partitions: usize,
    types: Mutex<HashMap<AgentType, Box<[Tally]>, RandomState>>,
    /// Idempotency keys.
    keys: AtomicUsize,
}

impl Tallies {
    pub(super) fn new(partitions: u16) -> Self {
        let partitions = usize::from(partitions);
        Self { partitions, types: Mutex::default(), keys: AtomicUsize::new(0) }
    }

    /// A partition has so many now.
    pub(super) fn set(
        &self,
        partition: PartitionId,
        tallies: impl IntoIterator<Item = (AgentType, Tally)>,
    ) {
        let mut types = self.types.lock();
        for (agent_type, tally) in tallies {
            let nothing = || vec![Tally::default(); self.partitions].into();
            let of_type = types.entry(agent_type.clone()).or_insert_with(nothing);
            of_type[usize::from(partition.0)] = tally;
            if of_type.iter().all(|tally| *tally == Tally::default()) {
                types.remove(&agent_type);
            }
        }
    }

    /// How many there are of a type, without those of one partition.
    pub(super) fn beside(&self, partition: Option<PartitionId>, agent_type: &AgentType) -> Tally {
        let types = self.types.lock();
        let of_type = types.get(agent_type).map_or(&[][..], |tallies| tallies);
        let others = of_type
            .iter()
            .enumerate()
            .filter(|(number, _)| partition.is_none_or(|it| usize::from(it.0) != *number));
        others.fold(Tally::default(), |sum, (_, tally)| add(sum, *tally))
    }

    /// A partition remembers so many keys, and had told of so many before.
    pub(super) fn set_keys(&self, before: usize, now: usize) {
        self.keys.fetch_add(now.wrapping_sub(before), Relaxed);
    }

    /// How many keys all partitions remember.
    pub(super) fn keys(&self) -> usize {
        self.keys.load(Relaxed)
    }
}

pub(super) fn add(a: Tally, b: Tally) -> Tally {
    Tally {
        standing: Standing {
            waiting: a.standing.waiting + b.standing.waiting,
            in_flight: a.standing.in_flight + b.standing.in_flight,
            dead: a.standing.dead + b.standing.dead,
            owed: a.standing.owed + b.standing.owed,
        },
        dead_bytes: a.dead_bytes + b.dead_bytes,
    }
}
