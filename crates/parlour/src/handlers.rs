use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parlour_core::wire::{CallFrame, EventFrame};
use parlour_core::{AgentId, AgentType, CallId, Fault, FaultKind, Header, Payload, Reply, TopicId};
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};

use crate::cx::Cx;
use crate::handle::{Handle, after, now};
use crate::instances::Serve;
use crate::state::header;

/// Runs the agents of a worker: each message in a task of its own.
pub(crate) struct Handlers {
    /// `None` without agents: a client's connection ends when nobody else has a handle.
    handle: Option<Handle>,
    agents: HashMap<AgentType, Arc<dyn Serve>>,
    /// Those of them whose instances are let go when they are idle.
    passivating: Vec<Arc<dyn Serve>>,
    max_in_flight: usize,
    tasks: JoinSet<Reply>,
    /// The call that a task answers; `None` for an event.
    running: HashMap<Id, Option<CallId>>,
    calls: BTreeMap<CallId, AbortHandle>,
    /// Events that wait for a task, at most as many as may run.
    waiting: VecDeque<(AgentId, Header, TopicId, Payload)>,
}

impl Handlers {
    /// Of a client, which serves nothing.
    pub(crate) fn none() -> Self {
        Self::make(None, HashMap::new(), 0)
    }

    pub(crate) fn new(
        handle: Handle,
        agents: HashMap<AgentType, Arc<dyn Serve>>,
        max_in_flight: usize,
    ) -> Self {
        Self::make(Some(handle), agents, max_in_flight)
    }

    fn make(
        handle: Option<Handle>,
        agents: HashMap<AgentType, Arc<dyn Serve>>,
        max_in_flight: usize,
    ) -> Self {
        let passivating = agents.values().filter(|agent| agent.passivates());
        Self {
            handle,
            passivating: passivating.map(Arc::clone).collect(),
            agents,
            max_in_flight,
            tasks: JoinSet::new(),
            running: HashMap::new(),
            calls: BTreeMap::new(),
            waiting: VecDeque::new(),
        }
    }

    /// Begins to answer a call, or says why not. `unwritten` counts the answers that the host has
    /// not taken yet: they hold a place as if they still ran.
    pub(crate) fn call(&mut self, call: CallFrame, unwritten: usize) -> Result<(), Fault> {
        let agent_type = &call.target.agent_type;
        let (Some(handle), Some(served)) = (&self.handle, self.agents.get(agent_type)) else {
            let detail = format!("this worker does not serve {agent_type}");
            return Err(Fault::new(FaultKind::UnknownAgent, detail));
        };
        if self.running.len() + unwritten >= self.max_in_flight {
            let detail = format!("the worker runs {} messages already", self.max_in_flight);
            return Err(Fault::new(FaultKind::Overloaded, detail)
                .hint("wait, add a worker, or raise this one's max_in_flight")
                .retry_after(Duration::from_millis(100)));
        }
        let Some(header) = header(&call.header) else {
            return Err(Fault::new(FaultKind::Invalid, "the call has no id or no conversation"));
        };
        let timeout = call.timeout.unwrap_or_else(|| handle.default_timeout());
        let deadline = after(timeout);
        let served = Arc::clone(served);
        let progress = call.progress.then_some(call.id);
        let cx =
            Cx::new(handle.clone(), call.target, header, Some(deadline), progress, call.attempt);
        let task = self.tasks.spawn(match call.topic {
            Some(topic) => served.event(cx, topic, call.payload),
            None => served.call(cx, call.payload),
        });
        self.running.insert(task.id(), Some(call.id));
        self.calls.insert(call.id, task);
        Ok(())
    }

    /// Hands an event to the agents that it is for.
    pub(crate) fn event(&mut self, event: &EventFrame) {
        let Some(header) = header(&event.header) else { return };
        for agent_type in &event.agents {
            let agent = AgentId::new(agent_type.clone(), event.topic.source.clone());
            if self.waiting.len() >= self.max_in_flight {
                tracing::warn!(%agent, topic = %event.topic, "too many events wait; one is dropped");
                continue;
            }
            let (header, topic) = (header.clone(), event.topic.clone());
            self.waiting.push_back((agent, header, topic, event.payload.clone()));
        }
        self.begin_events();
    }

    fn begin_events(&mut self) {
        while self.running.len() < self.max_in_flight
            && let Some((agent, header, topic, payload)) = self.waiting.pop_front()
        {
            // Not served any more, or never: the host's routing was behind.
            let served = self.agents.get(&agent.agent_type).map(Arc::clone);
            let (Some(handle), Some(served)) = (&self.handle, served) else { continue };
            let cx = Cx::new(handle.clone(), agent, header, None, None, None);
            let task = self.tasks.spawn(served.event(cx, topic, payload));
            self.running.insert(task.id(), None);
        }
    }

    /// Aborts a call that nobody waits for. It is not answered.
    pub(crate) fn cancel(&mut self, id: CallId) {
        if let Some(task) = self.calls.remove(&id) {
            task.abort();
        }
    }

    /// Aborts every call, because the connection that they came over is gone.
    pub(crate) fn abort_calls(&mut self) {
        std::mem::take(&mut self.calls).into_values().for_each(|task| task.abort());
    }

    /// Aborts everything, and returns what to tell those who wait.
    pub(crate) fn give_up(&mut self) -> Vec<(CallId, Reply)> {
        self.waiting.clear();
        self.tasks.abort_all();
        self.running.clear();
        let gone =
            || Fault::new(FaultKind::WorkerLost, "the worker shut down before the agent answered");
        std::mem::take(&mut self.calls).into_keys().map(|id| (id, Err(gone()))).collect()
    }

    /// Waits until a message has been handled, or agents were let go. Returns the reply if the message
    /// was a call that is still wanted. Waits for ever while there is nothing to do. Cancel safe.
    pub(crate) async fn next(&mut self) -> Option<(CallId, Reply)> {
        let due = self.passivating.iter().filter_map(|agent| agent.poll_timeout()).min();
        tokio::select! {
            Some(ended) = self.tasks.join_next_with_id() => self.ended(ended),
            () = tokio::time::sleep_until(due.unwrap_or_else(now).into()), if due.is_some() => {
                self.passivating.iter().for_each(|agent| agent.passivate(now()));
                None
            }
            else => std::future::pending().await,
        }
    }

    /// The replies of all other messages that have been handled by now.
    pub(crate) fn ready(&mut self) -> Vec<(CallId, Reply)> {
        let mut replies = Vec::new();
        while let Some(ended) = self.tasks.try_join_next_with_id() {
            replies.extend(self.ended(ended));
        }
        replies
    }

    fn ended(&mut self, ended: Result<(Id, Reply), JoinError>) -> Option<(CallId, Reply)> {
        let (task, reply) = match ended {
            Ok((task, reply)) => (task, reply),
            Err(error) if error.is_cancelled() => {
                self.running.remove(&error.id());
                self.begin_events();
                return None;
            }
            Err(error) => (error.id(), Err(panicked(error))),
        };
        let call = self.running.remove(&task).flatten();
        self.begin_events();
        match (call, reply) {
            // One that was given up just as it ended is not answered. Its number can be that of
            // another call by now, from a host that was started again.
            (Some(id), reply) => match self.calls.entry(id) {
                Entry::Occupied(call) if call.get().id() == task => {
                    call.remove();
                    Some((id, reply))
                }
                _ => None,
            },
            (None, Err(fault)) => {
                tracing::warn!(%fault, "an agent failed at an event");
                None
            }
            (None, Ok(_)) => None,
        }
    }

    /// Whether nothing runs, or waits to.
    pub(crate) fn is_empty(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }
}

fn panicked(error: JoinError) -> Fault {
    let panic = error.into_panic();
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    let detail = format!("the agent panicked: {}", text.unwrap_or("no text given"));
    Fault::new(FaultKind::AgentFailed, detail)
}

impl fmt::Debug for Handlers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handlers")
            .field("agents", &self.agents.keys())
            .field("running", &self.running.len())
            .finish_non_exhaustive()
    }
}
