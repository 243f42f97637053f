//! The places for attempts at one worker, and which partition is next to have one.

use std::collections::{BTreeMap, VecDeque};

use parlour_core::durable::PartitionId;

/// The places at one worker.
///
/// A partition that finds none waits in a row. One that becomes free is kept for the first in the row,
/// who is told: whoever asks in the meantime does not get it. Once awake, the partition has kept for it
/// what else is free, takes what it can, and [`settle`](Self::settle)s.
#[derive(Debug, Default)]
pub(super) struct Slots {
    /// Slots with an attempt under way, and those that are kept.
    taken: usize,
    /// How many are kept for which partition.
    kept: BTreeMap<PartitionId, usize>,
    /// The partitions that wait, each once.
    waiting: VecDeque<PartitionId>,
}

impl Slots {
    /// Whether `partition` may begin an attempt: a place is kept for it or free, of `most`.
    pub(super) fn is_open_to(&self, partition: PartitionId, most: usize) -> bool {
        self.taken < most
            || self.kept.contains_key(&partition)
            || parlour_core::bug!("places_not_counted")
    }

    /// Takes a place for an attempt of `partition`, to whom it [is open](Self::is_open_to).
    pub(super) fn take(&mut self, partition: PartitionId) {
        match self.kept.get_mut(&partition) {
            None => self.taken += 1,
            Some(1) => drop(self.kept.remove(&partition)),
            Some(kept) => *kept -= 1,
        }
    }

    /// An attempt has ended.
    pub(super) fn end(&mut self) {
        self.taken -= 1;
    }

    /// Keeps what is free for `partition`, up to `wanted` with what is kept for it. Returns how many
    /// that are now.
    pub(super) fn claim(&mut self, partition: PartitionId, wanted: usize, most: usize) -> usize {
        let kept = self.kept.get(&partition).copied().unwrap_or_default();
        let more = wanted.saturating_sub(kept).min(most.saturating_sub(self.taken));
        if more > 0 {
            self.taken += more;
            self.kept.insert(partition, kept + more);
        }
        kept + more
    }

    /// Lets go of what `partition` did not take, and has it wait if it wants more.
    pub(super) fn settle(&mut self, partition: PartitionId, wants_more: bool) {
        let left = self.kept.remove(&partition).unwrap_or_default();
        self.taken -= left;
        if !wants_more || self.waiting.contains(&partition) {
            return;
        }
        // One that was told and has not looked yet keeps its turn.
        if left > 0 {
            self.waiting.push_front(partition);
        } else {
            self.waiting.push_back(partition);
        }
    }

    /// Lets go of all that is kept for `partition`, which wants nothing any more.
    pub(super) fn leave(&mut self, partition: PartitionId) {
        self.settle(partition, false);
        self.waiting.retain(|it| *it != partition);
    }

    /// Keeps a place for the first in the row, if one is free. Returns whom to tell.
    pub(super) fn next(&mut self, most: usize) -> Option<PartitionId> {
        if self.taken >= most {
            return None;
        }
        let partition = self.waiting.pop_front()?;
        self.taken += 1;
        *self.kept.entry(partition).or_default() += 1;
        Some(partition)
    }

    /// Whether nobody has or wants a place.
    pub(super) fn is_idle(&self) -> bool {
        self.taken == 0 && self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: PartitionId = PartitionId(1);
    const B: PartitionId = PartitionId(2);

    /// Takes a place if there is one.
    fn take(slots: &mut Slots, partition: PartitionId, most: usize) -> bool {
        let is_open = slots.is_open_to(partition, most);
        if is_open {
            slots.take(partition);
        }
        is_open
    }

    /// One place, of which A is told, and B behind it.
    fn told() -> Slots {
        let mut slots = Slots::default();
        assert!(take(&mut slots, A, 1));
        slots.settle(A, true);
        slots.settle(B, true);
        slots.end();
        assert_eq!(slots.next(1), Some(A));
        slots
    }

    #[test]
    fn a_place_that_becomes_free_is_not_for_whoever_asks_first() {
        let mut slots = Slots::default();
        assert!(take(&mut slots, A, 1));
        assert!(!take(&mut slots, B, 1));
        slots.settle(B, true);
        slots.end();
        assert_eq!(slots.next(1), Some(B));
        assert!(!take(&mut slots, A, 1));
        assert!(take(&mut slots, B, 1));
    }

    #[test]
    fn who_is_told_has_all_that_is_free_and_lets_go_of_what_it_does_not_take() {
        let mut slots = Slots::default();
        for _ in 0..4 {
            assert!(take(&mut slots, A, 4));
        }
        slots.settle(B, true);
        (0..3).for_each(|_| slots.end());
        assert_eq!(slots.next(4), Some(B));
        assert_eq!(slots.claim(B, 5, 4), 3);
        assert!(take(&mut slots, B, 4));
        assert!(!take(&mut slots, A, 4));
        slots.settle(A, true);
        slots.settle(B, false);
        assert_eq!(slots.next(4), Some(A));
        assert_eq!(slots.claim(A, 1, 4), 1);
        assert_eq!(slots.next(4), None);
    }

    #[test]
    fn who_was_told_and_has_not_looked_yet_keeps_its_turn() {
        let mut slots = told();
        slots.settle(A, true);
        assert_eq!(slots.next(1), Some(A));
    }

    #[test]
    fn what_was_kept_for_who_leaves_goes_to_the_next() {
        let mut slots = told();
        slots.leave(A);
        assert_eq!(slots.next(1), Some(B));
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// Partition `0` has so many more to begin, and looks.
        Wants(u16, usize),
        /// Partition `0` looks at what it was told.
        Wakes(u16),
        /// An attempt ends.
        Ends,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..4u16, 1..4usize).prop_map(|(partition, count)| Step::Wants(partition, count)),
            (0..4u16).prop_map(Step::Wakes),
            Just(Step::Ends),
        ]
    }

    proptest! {
        /// Whatever happens, no more run than there are places, and none is free that a partition wants
        /// which was not told of one.
        #[test]
        fn no_place_is_lost_and_none_is_given_twice(
            most in 1..5usize,
            steps in prop::collection::vec(step(), 0..200),
        ) {
            let mut slots = Slots::default();
            let (mut wants, mut told) = ([0; 4], [false; 4]);
            let mut running = 0;
            for step in steps {
                let looks = match step {
                    Step::Wants(partition, count) => {
                        wants[usize::from(partition)] += count;
                        Some(partition)
                    }
                    Step::Wakes(partition) => {
                        let number = usize::from(partition);
                        if std::mem::take(&mut told[number]) {
                            slots.claim(PartitionId(partition), wants[number], most);
                        }
                        Some(partition)
                    }
                    Step::Ends => {
                        if running > 0 {
                            running -= 1;
                            slots.end();
                        }
                        None
                    }
                };
                if let Some(partition) = looks {
                    let left = &mut wants[usize::from(partition)];
                    while *left > 0 && take(&mut slots, PartitionId(partition), most) {
                        *left -= 1;
                        running += 1;
                    }
                    slots.settle(PartitionId(partition), *left > 0);
                }
                while let Some(PartitionId(partition)) = slots.next(most) {
                    told[usize::from(partition)] = true;
                }
                prop_assert!(running <= most);
                let is_overlooked = (0..4).any(|it| wants[it] > 0 && !told[it]);
                prop_assert!(slots.taken >= most || !is_overlooked);
                prop_assert!(slots.taken - running <= told.iter().filter(|it| **it).count());
            }
        }
    }
}
