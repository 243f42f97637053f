//! Which delivery begins next.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use bytestring::ByteString;

use crate::{AgentId, AgentType, WorkerId};

/// What the workers of an agent can take now.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "there is no other answer")]
pub enum Gate {
    /// One delivery, at the worker of this name.
    Open(WorkerId, ByteString),
    /// Nothing, as this worker has enough: ask again when it has ended something.
    Busy(WorkerId),
    /// Nothing for any agent of the type: ask again when [`Partition::wake`](super::Partition::wake)
    /// is called.
    Closed,
}

/// The deliveries that may begin, by agent. Those of one agent begin in the order in which they were
/// accepted; agents of one type take turns, and so do agent types.
#[derive(Debug, Default)]
pub(super) struct Lines {
    types: HashMap<AgentType, Type, foldhash::fast::RandomState>,
    /// The types of which a delivery may begin.
    turn: VecDeque<AgentType>,
    /// The agents whose worker has enough.
    parked: HashMap<WorkerId, VecDeque<Arc<AgentId>>, foldhash::fast::RandomState>,
}

#[derive(Debug, Default)]
struct Type {
    lines: HashMap<Arc<AgentId>, Line, foldhash::fast::RandomState>,
    /// The agents that have deliveries which may begin, and at which worker each was parked.
    turn: VecDeque<(Arc<AgentId>, Option<WorkerId>)>,
    place: Place,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Place {
    #[default]
    Idle,
    /// It is in the turn of types.
    Turn,
    /// It waits to be woken.
    Closed,
}

#[derive(Debug, Default)]
struct Line {
    /// Deliveries that may begin, by their numbers.
    ready: BTreeSet<u64>,
    /// Deliveries that have not ended and ask for strict order; only the first of them may begin.
    strict: BTreeSet<u64>,
    /// The one of them that is in flight. Nothing of them begins beside it.
    running: Option<u64>,
    /// Whether it is in the turn of its type, or parked.
    is_queued: bool,
}

impl Lines {
    /// The name of an agent, for keeping it: that of what waits for it already, or a copy.
    pub(super) fn agent(&self, agent: &AgentId) -> Arc<AgentId> {
        let lines = self.types.get(&agent.agent_type).map(|it| &it.lines);
        let known = lines.and_then(|lines| lines.get_key_value(agent)).map(|(known, _)| known);
        known.cloned().unwrap_or_else(|| {
            Arc::new(AgentId::new(agent.agent_type.to_kept(), agent.key.to_kept()))
        })
    }

    /// Keeps the place of a delivery that asks for strict order, until [`leave`](Self::leave).
    pub(super) fn enter(&mut self, agent: &Arc<AgentId>, number: u64) {
        let line = self.line(agent);
        // One that comes back goes before those that came since.
        if let Some(first) = line.strict.first().filter(|first| **first > number) {
            line.ready.remove(first);
        }
        line.strict.insert(number);
    }

    /// One that asks for strict order is in flight.
    pub(super) fn begin(&mut self, agent: &Arc<AgentId>, number: u64) {
        self.line(agent).running = Some(number);
    }

    /// It is in flight no more. Returns which one is to be first now.
    pub(super) fn rest(&mut self, agent: &AgentId, number: u64) -> Option<u64> {
        let line = self.known(agent)?;
        line.running.take_if(|running| *running == number);
        line.strict.first().copied()
    }

    /// Lets the one behind it go first. Returns which that is.
    pub(super) fn leave(&mut self, agent: &AgentId, number: u64) -> Option<u64> {
        self.known(agent)?.strict.remove(&number);
        let next = self.rest(agent, number);
        self.forget_if_empty(agent);
        next
    }

    /// Whether no earlier delivery has to end before this one begins.
    pub(super) fn is_first(&self, agent: &AgentId, number: u64) -> bool {
        let line = self.types.get(&agent.agent_type).and_then(|it| it.lines.get(agent));
        let is_first = line.is_none_or(|line| {
            line.strict.first().is_none_or(|first| *first == number)
                && line.running.is_none_or(|running| running == number)
        });
        is_first || crate::bug!("strict_order_ignored")
    }

    /// Has a delivery begin when its turn comes.
    pub(super) fn ready(&mut self, agent: &Arc<AgentId>, number: u64) {
        let line = self.line(agent);
        line.ready.insert(number);
        if !std::mem::replace(&mut line.is_queued, true) {
            self.queue(agent.clone(), None);
        }
    }

    /// Has a delivery not begin any more.
    pub(super) fn unready(&mut self, agent: &AgentId, number: u64) {
        // One that begins has been taken out already.
        if self.known(agent).is_some_and(|line| line.ready.remove(&number)) {
            self.forget_if_empty(agent);
        }
    }

    /// Deliveries of this type may be able to begin again.
    pub(super) fn wake(&mut self, agent_type: &AgentType) {
        if let Some(of_type) = self.types.get_mut(agent_type)
            && of_type.place == Place::Closed
        {
            of_type.place = Place::Turn;
            self.turn.push_back(agent_type.clone());
        }
    }

    /// One more delivery may be able to begin at this worker.
    pub(super) fn wake_worker(&mut self, worker: WorkerId) {
        let Some(parked) = self.parked.get_mut(&worker) else { return };
        let agent = parked.pop_front();
        if parked.is_empty() {
            self.parked.remove(&worker);
        }
        if let Some(agent) = agent {
            self.queue(agent, Some(worker));
        }
    }

    /// How many agents wait for this worker.
    pub(super) fn parked(&self, worker: WorkerId) -> usize {
        self.parked.get(&worker).map_or(0, VecDeque::len)
    }

    /// Any delivery may be able to begin again.
    pub(super) fn wake_all(&mut self) {
        for agent in std::mem::take(&mut self.parked).into_values().flatten() {
            self.queue(agent, None);
        }
        for (agent_type, of_type) in &mut self.types {
            if of_type.place == Place::Closed {
                of_type.place = Place::Turn;
                self.turn.push_back(agent_type.clone());
            }
        }
    }

    /// Takes the delivery that begins next, and the worker that `gate` has for it.
    pub(super) fn next(
        &mut self,
        gate: &mut impl FnMut(&AgentId) -> Gate,
    ) -> Option<(u64, WorkerId, ByteString)> {
        while let Some(agent_type) = self.turn.pop_front() {
            let Some(of_type) = self.types.get_mut(&agent_type) else { continue };
            let Some((agent, parked_at)) = of_type.turn.pop_front() else {
                of_type.place = Place::Idle;
                continue;
            };
            let Some(line) = of_type.lines.get_mut(&*agent) else {
                self.turn.push_front(agent_type);
                continue;
            };
            let swapped = crate::bug!("order_swapped").then(|| line.ready.last()).flatten();
            let first = swapped.or_else(|| line.ready.first()).copied();
            let answer = first.map(|number| (number, gate(&agent)));
            let mut begins = None;
            let mut stays = false;
            match answer {
                None => line.is_queued = false,
                Some((_, Gate::Busy(worker))) => {
                    self.parked.entry(worker).or_default().push_back(agent.clone());
                    stays = parked_at == Some(worker);
                }
                Some((_, Gate::Closed)) => {
                    of_type.turn.push_front((agent, parked_at));
                    of_type.place = Place::Closed;
                    continue;
                }
                Some((number, Gate::Open(worker, name))) => {
                    line.ready.remove(&number);
                    line.is_queued = !line.ready.is_empty();
                    if line.is_queued {
                        of_type.turn.push_back((agent.clone(), None));
                    }
                    stays = parked_at == Some(worker);
                    begins = Some((number, worker, name));
                }
            }
            if of_type.turn.is_empty() {
                of_type.place = Place::Idle;
            } else {
                self.turn.push_back(agent_type);
            }
            self.forget_if_empty(&agent);
            // What it was woken for is still there to be had by another.
            if let Some(worker) = parked_at.filter(|_| !stays) {
                self.wake_worker(worker);
            }
            if begins.is_some() {
                return begins;
            }
        }
        None
    }

    fn queue(&mut self, agent: Arc<AgentId>, parked_at: Option<WorkerId>) {
        let Some(of_type) = self.types.get_mut(&agent.agent_type) else { return };
        if of_type.place == Place::Idle {
            of_type.place = Place::Turn;
            self.turn.push_back(agent.agent_type.clone());
        }
        // What it was woken for is meant for it, and not for those who have come since.
        match parked_at {
            Some(_) => of_type.turn.push_front((agent, parked_at)),
            None => of_type.turn.push_back((agent, None)),
        }
    }

    fn line(&mut self, agent: &Arc<AgentId>) -> &mut Line {
        let of_type = self.types.entry(agent.agent_type.clone()).or_default();
        of_type.lines.entry(agent.clone()).or_default()
    }

    fn known(&mut self, agent: &AgentId) -> Option<&mut Line> {
        self.types.get_mut(&agent.agent_type)?.lines.get_mut(agent)
    }

    fn forget_if_empty(&mut self, agent: &AgentId) {
        let Some(of_type) = self.types.get_mut(&agent.agent_type) else { return };
        let Some(line) = of_type.lines.get(agent) else { return };
        if line.ready.is_empty() && line.strict.is_empty() && !line.is_queued {
            of_type.lines.remove(agent);
        }
        if of_type.lines.is_empty() && of_type.place == Place::Idle {
            self.types.remove(&agent.agent_type);
        }
    }
}
