use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::{Arc, OnceLock};

use bytestring::ByteString;
use foldhash::fast::RandomState;
use imbl::Vector;
use imbl::shared_ptr::DefaultSharedPtr;
use thiserror::Error;

use crate::{AgentId, AgentType, Key, TopicId, TopicType};

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
    subscriptions: HashMap<SubscriptionId, Arc<Owned<P>>>,
    /// Subscriptions by what they match, in the order in which they were made.
    topics: HashMap<TopicFilter, Topic<P>>,
    /// How many of `topics` are prefixes: without any, no prefix is looked up.
    prefixes: usize,
    workers: HashMap<WorkerId, Arc<Worker>>,
}

/// Names a worker, or another connection that subscribes, within one host. Never reused.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[expect(clippy::exhaustive_structs, reason = "a number with a name")]
pub struct WorkerId(pub u64);

/// The workers of one agent type.
#[derive(Clone)]
struct Pool<P> {
    exclusive: bool,
    /// Whether all members have the same capacity.
    even: bool,
    members: Vec<Member<P>>,
}

#[derive(Clone)]
struct Member<P> {
    id: WorkerId,
    peer: P,
    capacity: u16,
    capabilities: Vec<ByteString>,
}

struct Topic<P> {
    subscriptions: Vector<Arc<Owned<P>>>,
    /// How many of them are for agents.
    agents: usize,
    /// Where events go if all that match are these, and none is for agents: the same for each.
    listeners: OnceLock<Destinations<P>>,
}

struct Owned<P> {
    id: SubscriptionId,
    owner: WorkerId,
    peer: P,
    subscription: Subscription,
    /// What of an event goes to a worker that gets it for this subscription alone.
    alone: Arc<Recipients>,
}

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

/// Names a subscription within one host.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum SubscriptionId {
    /// By a text that its maker chose for the whole host.
    Named(ByteString),
    /// By a number that its owner chose.
    Numbered(WorkerId, u64),
}

impl fmt::Display for SubscriptionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name) => f.write_str(name),
            Self::Numbered(worker, number) => write!(f, "{}:{number}", worker.0),
        }
    }
}

/// A wish to receive events.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "built by every binding, field by field")]
pub struct Subscription {
    /// Which topics.
    pub filter: TopicFilter,
    /// Who receives them.
    pub target: Target,
}

impl Subscription {
    /// The same in memory of its own, for keeping it longer than the message it came in.
    fn to_kept(&self) -> Self {
        let filter = match &self.filter {
            TopicFilter::Exact(topic_type) => TopicFilter::Exact(topic_type.to_kept()),
            TopicFilter::Prefix(prefix) => TopicFilter::Prefix(ByteString::from(&**prefix)),
        };
        let target = match &self.target {
            Target::Agent(agent_type) => Target::Agent(agent_type.to_kept()),
            Target::Listener(number) => Target::Listener(*number),
        };
        Self { filter, target }
    }
}

/// Which topics a subscription matches.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "the two kinds of subscription that AutoGen knows")]
pub enum TopicFilter {
    /// Topics of just this type.
    Exact(TopicType),
    /// Topics whose type begins with this.
    Prefix(ByteString),
}

impl TopicFilter {
    /// Reads `news.tech` as that type and `news.*` as all that begin with `news.`.
    pub fn parse(pattern: &str) -> Result<Self, crate::InvalidName> {
        match pattern.strip_suffix('*') {
            None => TopicType::parse(pattern).map(Self::Exact),
            Some(prefix) => Self::prefix(prefix),
        }
    }

    /// All types that begin with `prefix`; a trailing `*` stands for the rest and is dropped.
    pub fn prefix(prefix: &str) -> Result<Self, crate::InvalidName> {
        let prefix = prefix.strip_suffix('*').unwrap_or(prefix);
        // `.` alone is no type, but is a fine beginning of one.
        if !prefix.is_empty() {
            TopicType::parse(format!("{prefix}_"))?;
        }
        Ok(Self::Prefix(prefix.into()))
    }
}

impl fmt::Display for TopicFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(topic_type) => write!(f, "{topic_type}"),
            Self::Prefix(prefix) => write!(f, "{prefix}*"),
        }
    }
}

/// Who receives the events of a subscription.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "an event goes to an agent or to a connection")]
pub enum Target {
    /// The agent of this type whose key is the topic's source.
    Agent(AgentType),
    /// The connection that subscribed.
    Listener(Listener),
}

/// The number by which a listening connection knows its subscription.
pub type Listener = u64;

/// What of an event goes to one worker or listening connection.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "taken apart by every binding")]
pub struct Recipients {
    /// Agent types that receive it, each with the topic's source as key.
    pub agents: Vec<AgentType>,
    /// Subscriptions of the connection's own.
    pub listeners: Vec<Listener>,
}

/// Where an event goes: each worker once, with all that it gets there.
pub type Destinations<P> = Arc<[(WorkerId, P, Arc<Recipients>)]>;

impl Recipients {
    fn add(&mut self, target: &Target) {
        match target {
            Target::Listener(number) => {
                let swapped = 2 * u64::from(crate::bug!("wrong_subscriber"));
                self.listeners.push(*number ^ swapped);
            }
            Target::Agent(agent_type) => self.agents.push(agent_type.clone()),
        }
    }
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
                self.forget_subscription(id);
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
        let same_filter = self.topics.get(&subscription.filter);
        let twin = |owned: &Arc<Owned<P>>| owned.subscription == *subscription;
        let is_taken =
            unique && same_filter.is_some_and(|topic| topic.subscriptions.iter().any(twin));
        if is_taken || self.subscriptions.contains_key(&id) {
            return Err(RegisterError::SubscriptionTaken);
        }
        let is_same = |s: &Arc<Owned<P>>| match (&s.subscription.target, &subscription.target) {
            (Target::Agent(a), Target::Agent(b)) => a == b,
            (Target::Listener(_), Target::Listener(_)) => true,
            _ => false,
        };
        let owned = self.workers.get(&owner).into_iter().flat_map(|worker| &worker.subscriptions);
        let same = owned.filter(|&id| self.subscriptions.get(id).is_some_and(is_same));
        if same.count() >= max {
            return Err(RegisterError::TooManySubscriptions);
        }
        let subscription = subscription.to_kept();
        if !self.topics.contains_key(&subscription.filter) {
            self.prefixes += usize::from(matches!(subscription.filter, TopicFilter::Prefix(_)));
        }
        self.worker(owner).subscriptions.push(id.clone());
        let mut alone = Recipients::default();
        alone.add(&subscription.target);
        let (peer, alone) = (peer.clone(), Arc::new(alone));
        let owned = Arc::new(Owned { id: id.clone(), owner, peer, subscription, alone });
        let filter = owned.subscription.filter.clone();
        let topic = self.topics.entry(filter).or_default();
        topic.agents += usize::from(owned.is_for_agents());
        topic.listeners = OnceLock::new();
        topic.subscriptions.push_back(owned.clone());
        self.subscriptions.insert(id, owned);
        Ok(())
    }

    /// Removes a subscription of `owner`.
    pub fn unsubscribe(
        &mut self,
        owner: WorkerId,
        id: &SubscriptionId,
    ) -> Result<(), RegisterError> {
        if self.subscriptions.get(id).is_none_or(|owned| owned.owner != owner) {
            return Err(RegisterError::Unknown("Subscription".into()));
        }
        self.forget_subscription(id);
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
        let member = match &pool.members[..] {
            [only] => Some(only),
            members => {
                let key = hash(&agent.key);
                match pool.even {
                    // With equal capacities the greatest score is that of the greatest hash.
                    true => members.iter().max_by_key(|member| member.rank(key)),
                    false => heaviest(members, key),
                }
            }
        };
        member.map(|member| (member.id, &member.peer))
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
        place: impl FnMut(&AgentId, WorkerId, &P) -> Option<(WorkerId, P)>,
    ) -> Destinations<P> {
        let exact = TopicFilter::Exact(id.topic_type.clone());
        match self.topics.get(&exact) {
            None if self.prefixes == 0 => Destinations::default(),
            Some(topic) if self.prefixes == 0 && topic.agents == 0 => topic
                .listeners
                .get_or_init(|| self.find(topic.subscriptions.iter(), &id.source, place))
                .clone(),
            exact => {
                let exact = exact.into_iter().flat_map(|topic| &topic.subscriptions);
                self.find(exact.chain(self.by_prefix(&id.topic_type)), &id.source, place)
            }
        }
    }

    fn find<'a>(
        &'a self,
        matching: impl Iterator<Item = &'a Arc<Owned<P>>>,
        source: &Key,
        mut place: impl FnMut(&AgentId, WorkerId, &P) -> Option<(WorkerId, P)>,
    ) -> Destinations<P>
    where
        P: 'a,
    {
        let mut found: Vec<(WorkerId, P, Arc<Recipients>)> = Vec::new();
        let mut indices = std::collections::HashMap::<WorkerId, usize, RandomState>::default();
        let mut seen = std::collections::HashSet::<&AgentType, RandomState>::default();
        for owned in matching {
            let (id, peer) = match &owned.subscription.target {
                Target::Listener(_) => (owned.owner, owned.peer.clone()),
                Target::Agent(agent_type) => {
                    if !seen.insert(agent_type) {
                        continue;
                    }
                    let agent = AgentId::new(agent_type.clone(), source.clone());
                    match self.route(&agent).and_then(|(id, peer)| place(&agent, id, peer)) {
                        Some(worker) => worker,
                        None => continue,
                    }
                }
            };
            match indices.entry(id) {
                Entry::Vacant(entry) => {
                    entry.insert(found.len());
                    found.push((id, peer, owned.alone.clone()));
                }
                Entry::Occupied(entry) => {
                    Arc::make_mut(&mut found[*entry.get()].2).add(&owned.subscription.target);
                }
            }
        }
        found.into()
    }

    fn by_prefix(&self, topic_type: &TopicType) -> impl Iterator<Item = &Arc<Owned<P>>> {
        let ends = if self.prefixes == 0 { 0..0 } else { 0..topic_type.as_str().len() + 1 };
        // Topic types are ASCII, so that each place in one is a boundary.
        let prefixes = ends.filter_map(|end| {
            self.topics.get(&TopicFilter::Prefix(topic_type.as_str()[..end].into()))
        });
        prefixes.flat_map(|topic| &topic.subscriptions)
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
        self.subscriptions.iter().map(|(id, owned)| (id, owned.owner, &owned.subscription))
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

    fn forget_subscription(&mut self, id: &SubscriptionId) {
        let Some(owned) = self.subscriptions.remove(id) else { return };
        let filter = &owned.subscription.filter;
        if let Some(topic) = self.topics.get_mut(filter) {
            topic.agents -= usize::from(owned.is_for_agents());
            topic.listeners = OnceLock::new();
            topic.subscriptions.retain(|known| known.id != *id);
            if topic.subscriptions.is_empty() {
                self.topics.remove(filter);
                self.prefixes -= usize::from(matches!(filter, TopicFilter::Prefix(_)));
            }
        }
    }
}

impl<P> Owned<P> {
    fn is_for_agents(&self) -> bool {
        matches!(self.subscription.target, Target::Agent(_))
    }
}

impl<P: Clone> Clone for Topic<P> {
    fn clone(&self) -> Self {
        let (subscriptions, listeners) = (self.subscriptions.clone(), self.listeners.clone());
        Self { subscriptions, agents: self.agents, listeners }
    }
}

impl<P: Clone> Default for Topic<P> {
    fn default() -> Self {
        Self { subscriptions: Vector::new(), agents: 0, listeners: OnceLock::new() }
    }
}

impl<P> Default for Directory<P> {
    fn default() -> Self {
        Self {
            pools: HashMap::default(),
            instances: HashMap::default(),
            subscriptions: HashMap::default(),
            topics: HashMap::default(),
            prefixes: 0,
            workers: HashMap::default(),
        }
    }
}

impl<P> Default for Pool<P> {
    fn default() -> Self {
        Self { exclusive: false, even: true, members: Vec::new() }
    }
}

impl<P> Pool<P> {
    /// Looks at the members' capacities again.
    fn weigh(&mut self) {
        let all = &self.members;
        self.even = all.windows(2).all(|two| two[0].capacity == two[1].capacity);
    }
}

impl<P> Member<P> {
    /// What decides between members of the same capacity: the greater hash, then the lower number.
    fn rank(&self, key: u64) -> (u64, Reverse<WorkerId>) {
        (mix(key ^ mix(self.id.0)), Reverse(self.id))
    }
}

impl<P> fmt::Debug for Directory<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Directory")
            .field("agent_types", &self.pools.len())
            .field("instances", &self.instances.len())
            .field("subscriptions", &self.subscriptions.len())
            .finish_non_exhaustive()
    }
}

/// The member with the greatest score for `key`.
///
/// This is weighted rendezvous hashing (J. Schindelhauer and G. Schomaker, "Weighted Distributed Hash
/// Tables", SPAA 2005): with `u` a member's hash as a part of 1, its score is
/// `capacity / -log(u)`. The base of the logarithm does not matter; with 2 it can be had in whole
/// numbers, which are the same on every machine.
fn heaviest<P>(members: &[Member<P>], key: u64) -> Option<&Member<P>> {
    let mut best: Option<(&Member<P>, u64)> = None;
    for member in members {
        let (hash, _) = member.rank(key);
        let Some((leader, leaders)) = best else {
            best = Some((member, minus_log2(hash)));
            continue;
        };
        // Scores as products: at most 2^38 by 2^16.
        let beats = |log: u64| {
            let (mine, theirs) =
                (log * u64::from(leader.capacity), leaders * u64::from(member.capacity));
            mine < theirs || mine == theirs && member.rank(key) > leader.rank(key)
        };
        // As -log2(u) is at least 1 - u, most are out without their logarithm.
        if beats(u64::from(u32::MAX) - (hash >> 32)) {
            let log = minus_log2(hash);
            if beats(log) {
                best = Some((member, log));
            }
        }
    }
    best.map(|(member, _)| member)
}

/// `-log2(hash / 2^64)` in units of 2^-32, by repeated squaring: each gives the next binary digit.
fn minus_log2(hash: u64) -> u64 {
    let hash = hash.max(1);
    let zeros = hash.leading_zeros();
    let mut mantissa = hash << zeros;
    let mut digits = 0;
    for _ in 0..32 {
        let square = u128::from(mantissa) * u128::from(mantissa);
        let carry = (square >> 127) as u64;
        digits = digits << 1 | carry;
        mantissa = (square >> (63 + carry)) as u64;
    }
    (u64::from(zeros + 1) << 32) - digits
}

/// FNV-1a with 64 bits (Fowler, Noll and Vo), of a key's UTF-8.
fn hash(key: &Key) -> u64 {
    key.as_str().bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Spreads a number's bits, after the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod spread;
#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!((room.subscriptions().count(), room.prefixes), (0, 0));
    }

    fn kind(name: &'static str) -> AgentType {
        AgentType::parse(name).unwrap()
    }

    fn agent(agent_type: &'static str, key: u32) -> AgentId {
        AgentId::new(kind(agent_type), Key::parse(key.to_string()).unwrap())
    }
}
