use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use parlour_core::Key;

use crate::agent::ErasedAgent;

type Factory = dyn Fn(&Key) -> Arc<dyn ErasedAgent> + Send + Sync;

/// An agent type with its instances.
pub(crate) struct Served {
    factory: Box<Factory>,
    /// How many instances are kept while some of them are idle.
    max_agents: usize,
    instances: Mutex<Instances>,
}

#[derive(Default)]
struct Instances {
    agents: HashMap<Key, Instance>,
    /// How many messages have been handled.
    uses: u64,
}

struct Instance {
    agent: Arc<dyn ErasedAgent>,
    /// The number of the message that was its latest.
    last_use: u64,
}

impl Served {
    pub(crate) fn new(
        factory: impl Fn(&Key) -> Arc<dyn ErasedAgent> + Send + Sync + 'static,
    ) -> Self {
        Self { factory: Box::new(factory), max_agents: usize::MAX, instances: Mutex::default() }
    }

    pub(crate) fn max_agents(mut self, agents: usize) -> Self {
        self.max_agents = agents;
        self
    }

    /// The agent for `key`, made if none is kept. It counts as busy as long as what this returns
    /// lives.
    pub(crate) fn instance(&self, key: &Key) -> Arc<dyn ErasedAgent> {
        let mut instances = self.lock();
        instances.uses += 1;
        let last_use = instances.uses;
        if let Some(instance) = instances.agents.get_mut(key) {
            instance.last_use = last_use;
            return Arc::clone(&instance.agent);
        }
        let agent = (self.factory)(key);
        let dropped = instances.make_room(self.max_agents);
        let instance = Instance { agent: Arc::clone(&agent), last_use };
        instances.agents.insert(key.to_kept(), instance);
        // What an agent does when it is dropped holds up no other.
        drop(instances);
        drop(dropped);
        agent
    }

    fn lock(&self) -> MutexGuard<'_, Instances> {
        // A factory that panics has added nothing.
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Instances {
    /// Takes out the idle instances that were unused longest, if there are `max` in all: an eighth at
    /// once, so that looking through all of them is rare.
    fn make_room(&mut self, max: usize) -> Vec<Instance> {
        if self.agents.len() < max {
            return Vec::new();
        }
        // Nobody else can begin to use one while this borrows the map.
        let is_idle = |instance: &Instance| Arc::strong_count(&instance.agent) == 1;
        let idle = self.agents.values().filter(|instance| is_idle(instance));
        let mut uses: Vec<u64> = idle.map(|instance| instance.last_use).collect();
        if uses.is_empty() {
            return Vec::new();
        }
        let surplus = self.agents.len() - max + max / 8;
        let index = surplus.min(uses.len() - 1);
        let (_, &mut latest, _) = uses.select_nth_unstable(index);
        let old =
            |_: &Key, instance: &mut Instance| is_idle(instance) && instance.last_use <= latest;
        self.agents.extract_if(old).map(|(_, instance)| instance).collect()
    }
}

impl fmt::Debug for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Served").field("agents", &self.lock().agents.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AgentError, Cx, Payload};

    fn served(max_agents: usize) -> Served {
        let agent = |_cx: Cx, _message: Payload| async { Ok::<_, AgentError>("") };
        Served::new(move |_key| Arc::new(agent)).max_agents(max_agents)
    }

    fn kept(served: &Served) -> Vec<String> {
        let mut keys: Vec<_> = served.lock().agents.keys().map(Key::to_string).collect();
        keys.sort();
        keys
    }

    #[test]
    fn of_too_many_agents_those_that_are_idle_longest_are_dropped() {
        let served = served(3);
        let use_one = |key: &str| served.instance(&Key::parse(key).unwrap());
        let _busy = use_one("a");
        for key in ["b", "c", "b", "d"] {
            drop(use_one(key));
        }
        assert_eq!(kept(&served), ["a", "b", "d"], "a is busy, and b was used after c");
        drop(use_one("e"));
        assert_eq!(kept(&served), ["a", "d", "e"]);
    }

    #[test]
    fn busy_agents_are_kept_beyond_the_bound_until_they_are_idle() {
        let served = served(2);
        let busy: Vec<_> =
            ["a", "b", "c", "d"].map(|key| served.instance(&Key::parse(key).unwrap())).into();
        assert_eq!(kept(&served), ["a", "b", "c", "d"]);
        drop(busy);
        served.instance(&Key::parse("e").unwrap());
        assert_eq!(kept(&served), ["d", "e"]);
    }

    #[test]
    fn however_many_keys_come_no_more_agents_are_kept_than_may_be() {
        let served = served(100);
        for key in 0..1000 {
            served.instance(&Key::parse(key.to_string()).unwrap());
            assert!(served.lock().agents.len() <= 100);
        }
        assert!(kept(&served).contains(&"999".to_owned()));
        assert!(kept(&served).len() > 80);
    }
}
