//! All subscriptions, by what they match.

use std::collections::hash_map::Entry;
use std::sync::{Arc, OnceLock};

use foldhash::fast::RandomState;
use imbl::Vector;

use super::{
    Destinations, HashMap, Recipients, Subscription, SubscriptionId, Target, TopicFilter, WorkerId,
};
use crate::{AgentId, AgentType, Key, TopicId, TopicType};

/// Subscriptions of workers that are reached by `P`. Copies share them.
#[derive(Clone)]
pub(super) struct Topics<P> {
    subscriptions: HashMap<SubscriptionId, Arc<Owned<P>>>,
    /// By what they match, in the order in which they were made.
    topics: HashMap<TopicFilter, Topic<P>>,
    /// How many of `topics` are prefixes: without any, no prefix is looked up.
    prefixes: usize,
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

impl<P> Topics<P> {
    /// The owner of a subscription, and what it is.
    pub(super) fn get(&self, id: &SubscriptionId) -> Option<(WorkerId, &Subscription)> {
        self.subscriptions.get(id).map(|owned| (owned.owner, &owned.subscription))
    }

    /// All subscriptions.
    pub(super) fn subscriptions(
        &self,
    ) -> impl Iterator<Item = (&SubscriptionId, WorkerId, &Subscription)> {
        self.subscriptions.iter().map(|(id, owned)| (id, owned.owner, &owned.subscription))
    }

    #[cfg(test)]
    pub(super) fn has_prefixes(&self) -> bool {
        self.prefixes > 0
    }

    pub(super) fn len(&self) -> usize {
        self.subscriptions.len()
    }

    /// Whether one matches the same for the same target.
    pub(super) fn has_twin(&self, subscription: &Subscription) -> bool {
        let same_filter = self.topics.get(&subscription.filter);
        let twin = |owned: &Arc<Owned<P>>| owned.subscription == *subscription;
        same_filter.is_some_and(|topic| topic.subscriptions.iter().any(twin))
    }
}

impl<P: Clone> Topics<P> {
    pub(super) fn insert(
        &mut self,
        id: SubscriptionId,
        owner: WorkerId,
        peer: P,
        subscription: Subscription,
    ) {
        let mut alone = Recipients::default();
        alone.add(&subscription.target);
        let filter = subscription.filter.clone();
        let alone = Arc::new(alone);
        let owned = Arc::new(Owned { id: id.clone(), owner, peer, subscription, alone });
        if !self.topics.contains_key(&filter) {
            self.prefixes += usize::from(matches!(filter, TopicFilter::Prefix(_)));
        }
        let topic = self.topics.entry(filter).or_default();
        topic.agents += usize::from(owned.is_for_agents());
        topic.listeners = OnceLock::new();
        topic.subscriptions.push_back(owned.clone());
        self.subscriptions.insert(id, owned);
    }

    pub(super) fn remove(&mut self, id: &SubscriptionId) {
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

    /// Where an event on the topic `id` goes. `place` says for each agent which worker gets it, if any.
    pub(super) fn recipients(
        &self,
        id: &TopicId,
        place: impl FnMut(&AgentId) -> Option<(WorkerId, P)>,
    ) -> Destinations<P> {
        let exact = TopicFilter::Exact(id.topic_type.clone());
        match self.topics.get(&exact) {
            None if self.prefixes == 0 => Destinations::default(),
            Some(topic) if self.prefixes == 0 && topic.agents == 0 => topic
                .listeners
                .get_or_init(|| find(topic.subscriptions.iter(), &id.source, place))
                .clone(),
            exact => {
                let exact = exact.into_iter().flat_map(|topic| &topic.subscriptions);
                find(exact.chain(self.by_prefix(&id.topic_type)), &id.source, place)
            }
        }
    }

    /// The agent types with a subscription that matches, as often as they have one.
    pub(super) fn agent_types(&self, topic_type: &TopicType) -> impl Iterator<Item = &AgentType> {
        let exact = self.topics.get(&TopicFilter::Exact(topic_type.clone()));
        let exact = exact.into_iter().flat_map(|topic| &topic.subscriptions);
        let matching = exact.chain(self.by_prefix(topic_type));
        matching.filter_map(|owned| match &owned.subscription.target {
            Target::Agent(agent_type) => Some(agent_type),
            Target::Listener(_) => None,
        })
    }

    fn by_prefix(&self, topic_type: &TopicType) -> impl Iterator<Item = &Arc<Owned<P>>> {
        let ends = if self.prefixes == 0 { 0..0 } else { 0..topic_type.as_str().len() + 1 };
        // Topic types are ASCII, so that each place in one is a boundary.
        let prefixes = ends.filter_map(|end| {
            self.topics.get(&TopicFilter::Prefix(topic_type.as_str()[..end].into()))
        });
        prefixes.flat_map(|topic| &topic.subscriptions)
    }
}

/// Where an event from `source` goes that has these subscribers.
fn find<'a, P: Clone + 'a>(
    matching: impl Iterator<Item = &'a Arc<Owned<P>>>,
    source: &Key,
    mut place: impl FnMut(&AgentId) -> Option<(WorkerId, P)>,
) -> Destinations<P> {
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
                match place(&AgentId::new(agent_type.clone(), source.clone())) {
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

impl<P> Default for Topics<P> {
    fn default() -> Self {
        Self { subscriptions: HashMap::default(), topics: HashMap::default(), prefixes: 0 }
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

impl<P> Owned<P> {
    fn is_for_agents(&self) -> bool {
        matches!(self.subscription.target, Target::Agent(_))
    }
}
