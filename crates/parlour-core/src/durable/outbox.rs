//! What the log of a topic owes to those who had subscribed when an event was published.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Timestamp;
use super::log::Spot;
use super::record::{Message, Owed};

/// Events that have not been accepted yet by the partitions of all whom they are owed to.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// By their numbers, the earliest first.
    events: BTreeMap<u64, Owing>,
    /// The number of the event that was handed over last.
    handed: u64,
    /// Bytes of the events that were handed over and are not taken by all.
    out: usize,
    /// How many deliveries are owed.
    pub(super) owed: u64,
    /// When it is to be written that the first events are owed to nobody any more.
    pub(super) due: Option<Timestamp>,
}

#[derive(Debug)]
pub(super) struct Owing {
    pub(super) spot: Spot,
    pub(super) message: Option<Arc<Message>>,
    /// Those whose partitions have not said that they have it.
    pub(super) left: BTreeMap<u32, Owed>,
    /// What it counts among those that were handed over.
    pub(super) out: u32,
}

/// How many bytes of events may be handed over before those are taken.
const MOST_OUT: usize = 16 << 20;

impl Outbox {
    pub(super) fn insert(&mut self, number: u64, mut owing: Owing) -> Option<Owing> {
        self.owed += owing.left.len() as u64;
        owing.out = self.events.get(&number).map_or(0, |old| old.out);
        let old = self.events.insert(number, owing);
        self.owed -= old.as_ref().map_or(0, |old| old.left.len() as u64);
        old
    }

    /// The next event that is to be handed over, since this owner began, unless much is under way.
    pub(super) fn poll(&mut self) -> Option<(u64, &Owing)> {
        if self.out >= MOST_OUT {
            return None;
        }
        let (number, owing) = self.events.range_mut(self.handed + 1..).next()?;
        self.handed = *number;
        if !owing.left.is_empty() {
            owing.out = owing.spot.weight;
            self.out += owing.out as usize;
        }
        Some((*number, owing))
    }

    pub(super) fn get(&self, number: u64) -> Option<&Owing> {
        self.events.get(&number)
    }

    /// Somebody has it. Returns whether there are events at the front that nobody is owed any more.
    pub(super) fn taken(&mut self, number: u64, index: u32) -> bool {
        let Some(owing) = self.events.get_mut(&number) else { return false };
        if owing.left.remove(&index).is_some() {
            self.owed -= 1;
        }
        if owing.left.is_empty() {
            self.out -= std::mem::take(&mut owing.out) as usize;
        }
        self.events.first_key_value().is_some_and(|(_, first)| first.left.is_empty())
    }

    /// The last of the events at the front that nobody is owed any more.
    pub(super) fn passed(&self) -> Option<u64> {
        let passed = self.events.iter().take_while(|(_, owing)| owing.left.is_empty());
        passed.last().map(|(number, _)| *number)
    }

    /// Forgets the events up to this one.
    pub(super) fn pass(&mut self, number: u64) -> impl Iterator<Item = Owing> + use<> {
        self.due = None;
        let rest = self.events.split_off(&(number + 1));
        let passed = std::mem::replace(&mut self.events, rest);
        for owing in passed.values() {
            self.owed -= owing.left.len() as u64;
            self.out -= owing.out as usize;
        }
        passed.into_values()
    }

    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = (&u64, &Owing)> {
        self.events.iter()
    }
}
