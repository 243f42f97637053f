use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;

use crate::WorkerId;

/// Where agents have calls that have not ended: so one that belongs to another worker from now on
/// finishes where it began, and moves between two calls.
///
/// The [`Directory`](crate::Directory) says where an agent belongs. This says where it is while it has
/// calls in flight, and keeps the messages, of type `W`, that wait for it to move. Agents go by a
/// number, such as a good hash of their names: two with the same number are where the first is, or
/// wait for each other, and nothing worse.
pub struct Places<W> {
    places: HashMap<u64, Place<W>, foldhash::fast::RandomState>,
}

struct Place<W> {
    worker: WorkerId,
    calls: u32,
    waiting: Vec<W>,
}

/// What the worker where an agent is can still do for it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "there is no fourth way to stand")]
pub enum Standing {
    /// It serves the agent's type, though the agent belongs elsewhere: it may get more.
    Serves,
    /// It finishes what it has, and gets nothing new.
    Leaving,
    /// It is gone, and what it had has ended or is about to.
    Gone,
}

/// Where a message goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "every sender has to deal with each")]
pub enum Way<Q> {
    /// To the worker that the agent belongs to.
    Home,
    /// To this worker, where the agent has calls in flight.
    There(WorkerId),
    /// To nobody yet: it is to be added to this queue, until the agent has moved.
    Waits(Q),
}

/// Beyond this an empty map gives its memory back.
const SPARE: usize = 64;

impl<W> Places<W> {
    /// Finds the way of a call to `agent`, which belongs to the worker `home`, and counts it there
    /// unless it waits. `standing` is asked about another worker, where the agent is now.
    pub fn begin(
        &mut self,
        agent: u64,
        home: WorkerId,
        standing: impl FnOnce(WorkerId) -> Standing,
    ) -> Way<&mut Vec<W>> {
        if crate::bug!("key_moved_too_early") {
            return Way::Home;
        }
        let place = match self.places.entry(agent) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                entry.insert(Place { worker: home, calls: 1, waiting: Vec::new() });
                return Way::Home;
            }
        };
        match place.way(home, standing) {
            // What the worker that is gone had counts no more.
            Way::Home if place.worker != home => {
                (place.worker, place.calls) = (home, 1);
                Way::Home
            }
            Way::Waits(()) => Way::Waits(&mut place.waiting),
            Way::There(worker) => {
                place.calls += 1;
                Way::There(worker)
            }
            Way::Home => {
                place.calls += 1;
                Way::Home
            }
        }
    }

    /// Finds the way of an event for `agent`: that of its calls. An event has no end that a host
    /// hears of, so it is not counted and keeps no agent where it is.
    pub fn follow(
        &mut self,
        agent: u64,
        home: WorkerId,
        standing: impl FnOnce(WorkerId) -> Standing,
    ) -> Way<&mut Vec<W>> {
        let Some(place) = self.places.get_mut(&agent) else { return Way::Home };
        match place.way(home, standing) {
            Way::Waits(()) => Way::Waits(&mut place.waiting),
            Way::There(worker) => Way::There(worker),
            Way::Home => Way::Home,
        }
    }

    /// Records that a call to `agent` that [`begin`](Self::begin) counted at `worker` has ended.
    ///
    /// If it was the last one, the agent may move now: what waited is returned in its order, and is
    /// to be sent anew before anything else for this agent.
    #[must_use]
    pub fn end(&mut self, agent: u64, worker: WorkerId) -> Vec<W> {
        let Entry::Occupied(mut entry) = self.places.entry(agent) else { return Vec::new() };
        let place = entry.get_mut();
        // One at a worker that was gone before has been forgotten with it.
        if place.worker != worker {
            return Vec::new();
        }
        place.calls -= 1;
        if place.calls > 0 {
            return Vec::new();
        }
        let place = entry.remove();
        if self.places.is_empty() && self.places.capacity() > SPARE {
            self.places.shrink_to_fit();
        }
        place.waiting
    }

    /// Takes the first message out that waits for `agent` to move and for which `wanted` holds.
    pub fn take_waiting(&mut self, agent: u64, wanted: impl Fn(&W) -> bool) -> Option<W> {
        let waiting = &mut self.places.get_mut(&agent)?.waiting;
        let index = waiting.iter().position(wanted)?;
        Some(waiting.remove(index))
    }

    /// Takes out all that waits.
    pub fn take_all_waiting(&mut self) -> Vec<W> {
        self.places.values_mut().flat_map(|place| std::mem::take(&mut place.waiting)).collect()
    }

    /// Where `agent` is, if it has calls in flight.
    pub fn place(&self, agent: u64) -> Option<WorkerId> {
        self.places.get(&agent).map(|place| place.worker)
    }

    /// The worker of each agent that has calls in flight.
    pub fn workers(&self) -> impl Iterator<Item = WorkerId> {
        self.places.values().map(|place| place.worker)
    }
}

impl<W> Place<W> {
    fn way(&self, home: WorkerId, standing: impl FnOnce(WorkerId) -> Standing) -> Way<()> {
        // What comes later passes nothing that waits.
        if !self.waiting.is_empty() {
            return Way::Waits(());
        }
        if self.worker == home {
            return Way::Home;
        }
        match standing(self.worker) {
            Standing::Serves => Way::There(self.worker),
            Standing::Leaving => Way::Waits(()),
            Standing::Gone => Way::Home,
        }
    }
}

impl<W> Default for Places<W> {
    fn default() -> Self {
        Self { places: HashMap::default() }
    }
}

impl<W> fmt::Debug for Places<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Places").field("agents", &self.places.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const A: WorkerId = WorkerId(1);
    const B: WorkerId = WorkerId(2);

    /// For agents that are where they belong: nobody asks about another worker.
    fn unasked(_: WorkerId) -> Standing {
        panic!("the agent is at home")
    }

    #[test]
    fn an_agent_with_calls_in_flight_stays_until_the_last_has_ended() {
        let mut places = Places::<&str>::default();
        assert_eq!(places.begin(7, A, unasked), Way::Home);
        assert_eq!(places.begin(7, B, |_| Standing::Serves), Way::There(A));
        assert_eq!(places.end(7, A), [""; 0]);
        assert_eq!(places.follow(7, B, |_| Standing::Serves), Way::There(A));
        assert_eq!(places.end(7, A), [""; 0]);
        assert_eq!(places.follow(7, B, unasked), Way::Home);
        assert_eq!(places.begin(7, B, unasked), Way::Home);
        assert_eq!(places.place(7), Some(B));
    }

    #[test]
    fn what_comes_while_the_worker_leaves_waits_in_its_order() {
        let mut places = Places::default();
        assert_eq!(places.begin(7, A, unasked), Way::Home);
        for text in ["one", "two", "three"] {
            let Way::Waits(queue) = places.begin(7, B, |_| Standing::Leaving) else { panic!() };
            queue.push(text);
        }
        // Even if the worker comes back: nothing is overtaken.
        let Way::Waits(queue) = places.follow(7, A, unasked) else { panic!() };
        queue.push("four");
        assert_eq!(places.take_waiting(7, |text| *text == "two"), Some("two"));
        assert_eq!(places.end(7, A), ["one", "three", "four"]);
        assert_eq!((places.place(7), places.workers().count()), (None, 0));
    }

    #[test]
    fn a_worker_that_is_gone_holds_nothing_up() {
        let mut places = Places::<&str>::default();
        assert_eq!(places.begin(7, A, unasked), Way::Home);
        assert_eq!(places.begin(7, B, |_| Standing::Gone), Way::Home);
        assert_eq!(places.end(7, A), [""; 0], "it ended with its worker");
        assert_eq!(places.place(7), Some(B));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Call(u64),
        Reply(u64),
        Stand(u64, Standing),
        Home(u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let (agent, worker) = (0..4_u64, 0..3_u64);
        let standing = prop_oneof![Just(Standing::Serves), Just(Standing::Leaving)];
        prop_oneof![
            4 => agent.clone().prop_map(Step::Call),
            4 => agent.clone().prop_map(Step::Reply),
            1 => (worker.clone(), standing).prop_map(|(who, how)| Step::Stand(who, how)),
            1 => (agent, worker).prop_map(|(agent, home)| Step::Home(agent, home)),
        ]
    }

    /// What one agent's calls may do, checked beside: which run, and in which order they began.
    #[derive(Default)]
    struct Seen {
        running: Vec<WorkerId>,
        asked: u32,
        begun: Vec<u32>,
    }

    proptest! {
        #[test]
        fn an_agent_is_at_one_worker_at_a_time_and_its_calls_begin_in_order(
            steps in prop::collection::vec(step(), 0..120),
        ) {
            run(&steps, false)?;
        }
    }

    /// The same check notices a host that moves agents without waiting.
    #[test]
    fn moving_at_once_would_be_noticed() {
        let steps = [Step::Call(0), Step::Home(0, 1), Step::Call(0)];
        run(&steps, false).unwrap();
        run(&steps, true).unwrap_err();
    }

    fn run(steps: &[Step], moves_at_once: bool) -> Result<(), TestCaseError> {
        let mut places = Places::<u32>::default();
        let mut standings = [Standing::Serves; 3];
        let (mut homes, mut seen) = ([0_u64; 4], BTreeMap::<u64, Seen>::new());
        for step in steps {
            match *step {
                Step::Home(agent, home) => homes[agent as usize] = home,
                Step::Stand(worker, standing) => standings[worker as usize] = standing,
                Step::Call(agent) => {
                    let seen = seen.entry(agent).or_default();
                    seen.asked += 1;
                    let home = WorkerId(homes[agent as usize]);
                    let standing = |worker: WorkerId| match moves_at_once {
                        true => Standing::Gone,
                        false => standings[worker.0 as usize],
                    };
                    match places.begin(agent, home, standing) {
                        Way::Waits(queue) => queue.push(seen.asked),
                        Way::Home => seen.begin(home, seen.asked),
                        Way::There(worker) => seen.begin(worker, seen.asked),
                    }
                }
                Step::Reply(agent) => {
                    let seen = seen.entry(agent).or_default();
                    let Some(worker) = seen.running.pop() else { continue };
                    let waited = places.end(agent, worker);
                    let may_move = waited.is_empty() || seen.running.is_empty();
                    prop_assert!(may_move, "moved before its calls had ended");
                    for number in waited {
                        let home = WorkerId(homes[agent as usize]);
                        places.begin(agent, home, unasked);
                        seen.begin(home, number);
                    }
                }
            }
            for seen in seen.values() {
                prop_assert!(seen.running.windows(2).all(|two| two[0] == two[1]), "at two workers");
                prop_assert!(seen.begun.is_sorted(), "out of order: {:?}", seen.begun);
            }
        }
        // All that was asked begins, if what runs ends.
        for (agent, mut seen) in seen {
            while let Some(worker) = seen.running.pop() {
                for number in places.end(agent, worker) {
                    places.begin(agent, WorkerId(9), unasked);
                    seen.begin(WorkerId(9), number);
                }
            }
            prop_assert_eq!(seen.begun.len(), seen.asked as usize);
            prop_assert_eq!(places.place(agent), None);
        }
        Ok(())
    }

    impl Seen {
        fn begin(&mut self, worker: WorkerId, number: u32) {
            self.running.push(worker);
            self.begun.push(number);
        }
    }
}
