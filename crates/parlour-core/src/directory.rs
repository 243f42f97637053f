mod pool;
mod subscription;
mod topics;

use std::fmt;
use std::sync::Arc;

use bytestring::ByteString;
use foldhash::fast::RandomState;
use imbl::shared_ptr::DefaultSharedPtr;
use thiserror::Error;

use crate::{AgentId, AgentType, TopicId};
pub(crate) use pool::fnv1a;
use pool::{Member, Pool};
use topics::Topics;

pub use subscription::{
    Destinations, Listener, Recipients, Subscription, SubscriptionId, Target, TopicFilter,
};

/// A map whose copies share their entries, seeded at random against chosen names.
type HashMap<K, V> = imbl::GenericHashMap<K, V, RandomState, DefaultSharedPtr>;

/// Who serves which agents, and who wants which topics.
///
/// `P` is a way to reach a worker. A directory is a plain value whose copies share their entries: a
/// host keeps the current one behind an atomic pointer, so that routing a message reads it without a
/// lock, and a registration replaces it with a changed copy at the cost of a few entries.
#[derive(Clone)]
pub struct Directory<P> {
    pools: HashMap<AgentType, Arc<Pool<P>>>,
    instances: HashMap<AgentId, (WorkerId, P)>,
    topics: Topics<P>,
    workers: HashMap<WorkerId, Arc<Worker>>,
}

/// Names a worker, or another connection that subscribes, within one host. Never reused.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[expect(clippy::exhaustive_structs, reason = "a number with a name")]
pub struct WorkerId(pub u64);

/// What one worker has in the directory, so that its death costs no search.
#[derive(Clone, Default)]
struct Worker {
    types: Vec<AgentType>,
    instances: Vec<AgentId>,
    subscriptions: Vec<SubscriptionId>,
}

/// How a worker serves an agent type.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "built by every binding, field by field")]
pub struct Registration {
    /// Whether it must be the only one.
    pub exclusive: bool,
    /// How much it takes beside the others: one of capacity 2 gets twice the keys of one of
    /// capacity 1. 0 counts as 1.
    pub capacity: u16,
    /// What its agents can do, in words that callers look for.
    pub capabilities: Vec<ByteString>,
}

impl Default for Registration {
    /// Shared, of capacity 1, and able to do nothing in particular.
    fn default() -> Self {
        Self { exclusive: false, capacity: 1, capabilities: Vec::new() }
    }
}

/// Why a registration or subscription is refused.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[non_exhaustive]
pub enum RegisterError {
    /// Another worker serves this type, and one of the two asked to be the only one.
    #[error("agent type {0} already registered.")]
    TypeTaken(AgentType),
    /// Another worker serves this one agent.
    #[error("agent {0} already registered.")]
    AgentTaken(AgentId),
    /// This subscription exists.
    #[error("Subscription already exists")]
    SubscriptionTaken,
    /// There is no such registration or subscription of this worker.
    #[error("{0} does not exist")]
    Unknown(String),
    /// The connection has as many subscriptions of this kind as it may have.
    #[error("the connection has as many such subscriptions as it may have")]
    TooManySubscriptions,
    /// The connection serves as many types and agents as it may.
    #[error("the connection serves as many agent types and agents as it may")]
    TooManyRegistrations,
}

impl<P: Clone> Directory<P> {
    /// Records that `worker` serves `agent_type`, as one of at most `max` registrations. Registering
    /// it again changes how.
    pub fn register(
        &mut self,
        worker: WorkerId,
        peer: &P,
        agent_type: &AgentType,
        registration: &Registration,
        max: usize,
    ) -> Result<(), RegisterError> {
        let agent_type = agent_type.to_kept();
        let pool = self.pools.get(&agent_type);
        let others = pool.is_some_and(|pool| pool.members.iter().any(|member| member.id != worker));
        if others && (registration.exclusive || pool.is_some_and(|pool| pool.exclusive)) {
            return Err(RegisterError::TypeTaken(agent_type));
        }
        let is_others = |(agent, (owner, _)): (&AgentId, &(WorkerId, P))| {
            agent.agent_type == agent_type && *owner != worker
        };
        if registration.exclusive && self.instances.iter().any(is_others) {
            return Err(RegisterError::TypeTaken(agent_type));
        }
        if !self.serves_type(worker, &agent_type) {
            self.check_registrations(worker, max)?;
        }
        let pool = Arc::make_mut(self.pools.entry(agent_type.clone()).or_default());
        pool.exclusive = registration.exclusive;
        let capabilities = registration.capabilities.iter().map(|name| ByteString::from(&**name));
        let capabilities = capabilities.collect();
        let capacity = registration.capacity.max(1);
        let member = Member { id: worker, peer: peer.clone(), capacity, capabilities };
        match pool.members.iter_mut().find(|member| member.id == worker) {
            Some(known) => {
                *known = member;
                pool.weigh();
            }
            None => {
                pool.members.push(member);
                pool.weigh();
                self.worker(worker).types.push(agent_type);
            }
        }
        Ok(())
    }

    /// Records that `worker` serves just this one agent, as one of at most `max` registrations.
    pub fn register_instance(
        &mut self,
        worker: WorkerId,
        peer: &P,
        agent: &AgentId,
        max: usize,
    ) -> Result<(), RegisterError> {
        let agent = AgentId::new(agent.agent_type.to_kept(), agent.key.to_kept());
        match self.instances.get(&agent) {
            Some((owner, _)) if *owner == worker => return Ok(()),
            Some(_) => return Err(RegisterError::AgentTaken(agent)),
            None => {}
        }
        let pool = self.pools.get(&agent.agent_type).filter(|pool| pool.exclusive);
        if pool.is_some_and(|pool| pool.members.iter().any(|member| member.id != worker)) {
            return Err(RegisterError::TypeTaken(agent.agent_type));
        }
        self.check_registrations(worker, max)?;
        self.instances.insert(agent.clone(), (worker, peer.clone()));
        self.worker(worker).instances.push(agent);
        Ok(())
    }

    /// Forgets that `worker` serves `agent_type`.
    pub fn unregister(
        &mut self,
        worker: WorkerId,
        agent_type: &AgentType,
    ) -> Result<(), RegisterError> {
        if !self.serves_type(worker, agent_type) {
            return Err(RegisterError::Unknown(format!("registration of {agent_type}")));
        }
        self.leave_pool(worker, agent_type);
        self.worker(worker).types.retain(|known| known != agent_type);
        Ok(())
    }

    /// Forgets that `worker` serves this one agent.
    pub fn unregister_instance(
        &mut self,
        worker: WorkerId,
        agent: &AgentId,
    ) -> Result<(), RegisterError> {
        if self.instances.get(agent).is_none_or(|(owner, _)| *owner != worker) {
            return Err(RegisterError::Unknown(format!("registration of {agent}")));
        }
        self.instances.remove(agent);
        self.worker(worker).instances.retain(|known| known != agent);
        Ok(())
    }

    /// Takes `worker` out of everything it serves, so that nothing new goes to it; what it
    /// subscribes to as a connection stays.
    pub fn drain(&mut self, worker: WorkerId) {
        if self.workers.contains_key(&worker) {
            let owned = self.worker(worker);
            let types = std::mem::take(&mut owned.types);
            let instances = std::mem::take(&mut owned.instances);
            for agent_type in &types {
                self.leave_pool(worker, agent_type);
            }
            for agent in &instances {
                self.instances.remove(agent);
            }
        }
    }

    /// Forgets everything about `worker`.
    pub fn remove(&mut self, worker: WorkerId) {
        self.drain(worker);
        if let Some(owned) = self.workers.remove(&worker) {
            for id in &owned.subscriptions {
                self.topics.remove(id);
            }
        }
    }

    /// Adds a subscription that lives as long as its worker.
    ///
    /// With `unique`, one that matches the same for the same agents is refused; without, each worker
    /// of a pool may have its own, and an agent still gets each event once. At most `max` of one
    /// owner are for the same agent type, or for the owner itself.
    pub fn subscribe(
        &mut self,
        owner: WorkerId,
        peer: &P,
        id: SubscriptionId,
        subscription: &Subscription,
        unique: bool,
        max: usize,
    ) -> Result<(), RegisterError> {
        if self.topics.get(&id).is_some() || unique && self.topics.has_twin(subscription) {
            return Err(RegisterError::SubscriptionTaken);
        }
        let is_same = |s: &Subscription| match (&s.target, &subscription.target) {
            (Target::Agent(a), Target::Agent(b)) => a == b,
            (Target::Listener(_), Target::Listener(_)) => true,
            _ => false,
        };
        let owned = self.workers.get(&owner).into_iter().flat_map(|worker| &worker.subscriptions);
        let same = owned.filter(|&id| self.topics.get(id).is_some_and(|(_, s)| is_same(s)));
        if same.count() >= max {
            return Err(RegisterError::TooManySubscriptions);
        }
        self.worker(owner).subscriptions.push(id.clone());
        self.topics.insert(id, owner, peer.clone(), subscription.to_kept());
        Ok(())
    }

    /// Removes a subscription of `owner`.
    pub fn unsubscribe(
        &mut self,
        owner: WorkerId,
        id: &SubscriptionId,
    ) -> Result<(), RegisterError> {
        if self.topics.get(id).is_none_or(|(subscriber, _)| subscriber != owner) {
            return Err(RegisterError::Unknown("Subscription".into()));
        }
        self.topics.remove(id);
        self.worker(owner).subscriptions.retain(|known| known != id);
        Ok(())
    }

    /// The worker that `agent` belongs to.
    ///
    /// Of several that serve the type, a key sticks to one by weighted rendezvous hashing: when a
    /// worker joins or leaves, only the keys move that must, and each has as many of all keys as its
    /// share of all capacity.
    pub fn route(&self, agent: &AgentId) -> Option<(WorkerId, &P)> {
        if !self.instances.is_empty()
            && let Some((id, peer)) = self.instances.get(agent)
        {
            return Some((*id, peer));
        }
        let pool = self.pools.get(&agent.agent_type)?;
        pool.find(&agent.key).map(|member| (member.id, &member.peer))
    }

    /// The way to `worker`, if it serves `agent`, whether or not the agent belongs there.
    pub fn served_by(&self, worker: WorkerId, agent: &AgentId) -> Option<&P> {
        if let Some((owner, peer)) = self.instances.get(agent)
            && *owner == worker
        {
            return Some(peer);
        }
        let members = &self.pools.get(&agent.agent_type)?.members;
        members.iter().find(|member| member.id == worker).map(|member| &member.peer)
    }

    /// Where an event on the topic `id` goes.
    ///
    /// `place` hears for each agent which worker it belongs to, and says which one gets the event
    /// for it, if any.
    pub fn recipients(
        &self,
        id: &TopicId,
        mut place: impl FnMut(&AgentId, WorkerId, &P) -> Option<(WorkerId, P)>,
    ) -> Destinations<P> {
        self.topics.recipients(id, |agent| {
            let (home, peer) = self.route(agent)?;
            place(agent, home, peer)
        })
    }

    /// The agents that have subscribed to the topic `id`, each once, whether or not they are served.
    pub fn subscribed(&self, id: &TopicId) -> Vec<AgentId> {
        let mut agents = Vec::new();
        for agent_type in self.topics.agent_types(&id.topic_type) {
            let agent = AgentId::new(agent_type.clone(), id.source.clone());
            if !agents.contains(&agent) {
                agents.push(agent);
            }
        }
        agents
    }

    /// Whether `worker` serves this agent, and so may speak in its name.
    pub fn serves(&self, worker: WorkerId, agent: &AgentId) -> bool {
        self.serves_type(worker, &agent.agent_type)
            || self.instances.get(agent).is_some_and(|(owner, _)| *owner == worker)
    }

    fn serves_type(&self, worker: WorkerId, agent_type: &AgentType) -> bool {
        self.pools
            .get(agent_type)
            .is_some_and(|pool| pool.members.iter().any(|member| member.id == worker))
    }

    /// Every agent type with its workers and their capabilities, and whether it is exclusive.
    pub fn agent_types(
        &self,
    ) -> impl Iterator<Item = (&AgentType, bool, impl Iterator<Item = (WorkerId, &[ByteString])>)>
    {
        self.pools.iter().map(|(agent_type, pool)| {
            let members = pool.members.iter();
            let members = members.map(|member| (member.id, member.capabilities.as_slice()));
            (agent_type, pool.exclusive, members)
        })
    }

    /// Every agent that is served by itself, apart from its type.
    pub fn instances(&self) -> impl Iterator<Item = (&AgentId, WorkerId)> {
        self.instances.iter().map(|(agent, (worker, _))| (agent, *worker))
    }

    /// Every subscription with its owner.
    pub fn subscriptions(
        &self,
    ) -> impl Iterator<Item = (&SubscriptionId, WorkerId, &Subscription)> {
        self.topics.subscriptions()
    }

    /// Agent types that `worker` serves, each with the capacity it has for them.
    pub fn types_of(&self, worker: WorkerId) -> impl Iterator<Item = (&AgentType, u16)> {
        let types = self.workers.get(&worker).into_iter().flat_map(|worker| &worker.types);
        types.filter_map(move |agent_type| {
            let members = &self.pools.get(agent_type)?.members;
            let member = members.iter().find(|member| member.id == worker)?;
            Some((agent_type, member.capacity))
        })
    }

    /// Whether `worker` serves anything.
    pub fn serves_any(&self, worker: WorkerId) -> bool {
        let owned = self.workers.get(&worker);
        owned.is_some_and(|owned| !owned.types.is_empty() || !owned.instances.is_empty())
    }

    fn check_registrations(&self, worker: WorkerId, max: usize) -> Result<(), RegisterError> {
        let owned = self.workers.get(&worker);
        let count = owned.map_or(0, |owned| owned.types.len() + owned.instances.len());
        if count < max { Ok(()) } else { Err(RegisterError::TooManyRegistrations) }
    }

    fn worker(&mut self, id: WorkerId) -> &mut Worker {
        Arc::make_mut(self.workers.entry(id).or_default())
    }

    fn leave_pool(&mut self, worker: WorkerId, agent_type: &AgentType) {
        if let Some(pool) = self.pools.get_mut(agent_type) {
            let pool = Arc::make_mut(pool);
            pool.members.retain(|member| member.id != worker);
            if pool.members.is_empty() {
                self.pools.remove(agent_type);
            } else {
                pool.weigh();
            }
        }
    }
}

impl<P> Default for Directory<P> {
    fn default() -> Self {
        Self {
            pools: HashMap::default(),
            instances: HashMap::default(),
            topics: Topics::default(),
            workers: HashMap::default(),
        }
    }
}

impl<P> fmt::Debug for Directory<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Directory")
            .field("agent_types", &self.pools.len())
            .field("instances", &self.instances.len())
            .field("subscriptions", &self.topics.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Key, TopicType};

    #[test]
    fn an_exclusive_registration_admits_no_other_and_is_freed_by_death() {
        let mut room = Directory::default();
        let only = Registration { exclusive: true, ..Default::default() };
        room.register(WorkerId(1), &1, &kind("a"), &only, 9).unwrap();
        let taken = RegisterError::TypeTaken(kind("a"));
        for wish in [only.clone(), Registration::default()] {
            assert_eq!(room.register(WorkerId(2), &2, &kind("a"), &wish, 9), Err(taken.clone()));
        }
        room.remove(WorkerId(1));
        assert_eq!(room.register(WorkerId(2), &2, &kind("a"), &only, 9), Ok(()));
    }

    #[test]
    fn an_exclusive_type_has_no_agents_elsewhere() {
        let only = Registration { exclusive: true, ..Default::default() };
        let taken = Err(RegisterError::TypeTaken(kind("a")));
        let mut room = Directory::default();
        room.register(WorkerId(1), &1, &kind("a"), &only, 9).unwrap();
        assert_eq!(room.register_instance(WorkerId(2), &2, &agent("a", 7), 9), taken);
        let mut room = Directory::default();
        room.register_instance(WorkerId(2), &2, &agent("a", 7), 9).unwrap();
        assert_eq!(room.register(WorkerId(1), &1, &kind("a"), &only, 9), taken);
    }

    #[test]
    fn a_worker_serves_no_more_than_it_may() {
        let mut room = Directory::default();
        room.register_instance(WorkerId(1), &1, &agent("a", 7), 1).unwrap();
        let shared = Registration::default();
        let full = Err(RegisterError::TooManyRegistrations);
        assert_eq!(room.register(WorkerId(1), &1, &kind("b"), &shared, 1), full);
        assert_eq!(room.register_instance(WorkerId(1), &1, &agent("a", 8), 1), full);
        assert_eq!(room.register_instance(WorkerId(1), &1, &agent("a", 7), 1), Ok(()));
    }

    #[test]
    fn one_agent_can_live_apart_from_its_type() {
        let mut room = Directory::default();
        room.register(WorkerId(1), &1, &kind("a"), &Registration::default(), 9).unwrap();
        room.register_instance(WorkerId(2), &2, &agent("a", 7), 9).unwrap();
        assert_eq!(room.route(&agent("a", 7)), Some((WorkerId(2), &2)));
        assert_eq!(room.route(&agent("a", 8)), Some((WorkerId(1), &1)));
        assert!(room.serves(WorkerId(2), &agent("a", 7)));
        assert!(!room.serves(WorkerId(2), &agent("a", 8)));
    }

    #[test]
    fn who_listens_is_asked_anew_whenever_that_changes() {
        let mut room = Directory::<i32>::default();
        let topic = TopicId::new(TopicType::parse("news.tech").unwrap(), Key::parse("k").unwrap());
        let workers = |room: &Directory<i32>| {
            let found = room.recipients(&topic, |_, id, peer| Some((id, *peer)));
            found.iter().map(|(id, ..)| id.0).collect::<Vec<_>>()
        };
        let id = |worker| SubscriptionId::Numbered(WorkerId(worker), 0);
        let listen = |room: &mut Directory<i32>, worker: u64, pattern: &str| {
            let filter = TopicFilter::parse(pattern).unwrap();
            let subscription = Subscription { filter, target: Target::Listener(0) };
            room.subscribe(WorkerId(worker), &0, id(worker), &subscription, false, 9).unwrap();
        };
        assert_eq!(workers(&room), [0; 0]);
        listen(&mut room, 1, "news.tech");
        assert_eq!(workers(&room), [1]);
        let before = room.clone();
        listen(&mut room, 2, "news.tech");
        assert_eq!((workers(&room), workers(&before)), (vec![1, 2], vec![1]));
        listen(&mut room, 3, "news.*");
        assert_eq!(workers(&room), [1, 2, 3]);
        room.remove(WorkerId(3));
        assert_eq!(workers(&room), [1, 2]);
        room.unsubscribe(WorkerId(1), &id(1)).unwrap();
        assert_eq!(workers(&room), [2]);
    }

    #[test]
    fn an_agent_gets_an_event_once_however_many_subscriptions_match() {
        let mut room = Directory::default();
        room.register(WorkerId(1), &1, &kind("a"), &Registration::default(), 9).unwrap();
        let filters = ["news.tech", "news.*", "*", "weather", "newsp*"];
        for (n, filter) in filters.into_iter().enumerate() {
            let filter = TopicFilter::parse(filter).unwrap();
            let subscription = Subscription { filter, target: Target::Agent(kind("a")) };
            let id = SubscriptionId::Numbered(WorkerId(1), n as u64);
            room.subscribe(WorkerId(1), &1, id, &subscription, true, 9).unwrap();
        }
        let topic =
            TopicId::new(TopicType::parse("news.tech").unwrap(), Key::parse("server").unwrap());
        let to_a = Recipients { agents: vec![kind("a")], listeners: vec![] };
        let home = |_: &AgentId, id, peer: &i32| Some((id, *peer));
        assert_eq!(*room.recipients(&topic, home), [(WorkerId(1), 1, to_a.into())]);
        assert_eq!(*room.recipients(&topic, |_, _, _| None), []);
        let away = |_: &AgentId, _, _: &i32| Some((WorkerId(2), 2));
        assert_eq!(room.recipients(&topic, away)[0].0, WorkerId(2));

        room.remove(WorkerId(1));
        assert_eq!(*room.recipients(&topic, home), []);
        assert_eq!((room.subscriptions().count(), room.topics.has_prefixes()), (0, false));
    }

    fn kind(name: &'static str) -> AgentType {
        AgentType::parse(name).unwrap()
    }

    fn agent(agent_type: &'static str, key: u32) -> AgentId {
        AgentId::new(kind(agent_type), Key::parse(key.to_string()).unwrap())
    }
}
