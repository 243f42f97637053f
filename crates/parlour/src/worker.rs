use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parlour_core::{AgentType, ByteString, Key, Registration, TopicFilter};

use crate::agent::ErasedAgent;
use crate::client::DEFAULT_TIMEOUT;
use crate::driver::Driver;
use crate::handle::Handle;
use crate::handlers::Handlers;
use crate::served::Served;
use crate::state::State;
use crate::transport::{Connect, Endpoint, Tcp};
use crate::{Agent, Error, ErrorKind};

/// How many messages a worker runs at a time.
const MAX_IN_FLIGHT: usize = 1024;
/// How many agents of a type a worker keeps.
const MAX_AGENTS: usize = 10_000;
/// How long a worker that shuts down waits for what runs.
const DRAIN_TIME: Duration = Duration::from_secs(20);

/// Serves agents over one connection to a host.
///
/// It makes the agent for a key when the first message for it comes, and keeps it, up to 10,000 of a
/// type. Each message runs in a task of its own. A connection that is lost is made anew, with waits of
/// random length up to 5 s in between, and everything is registered again; calls that ran for the old
/// one are aborted, as their callers have been told already.
///
/// ```no_run
/// # async fn example() -> Result<(), parlour::Error> {
/// use parlour::{Cx, Payload, PayloadExt, Worker};
///
/// Worker::builder("http://127.0.0.1:9000")
///     .agent("upper", |_key| |_cx: Cx, message: Payload| async move {
///         Ok(message.to_text()?.to_uppercase())
///     })
///     .run()
///     .await
/// # }
/// ```
pub struct Worker {
    endpoint: Endpoint,
    agents: HashMap<AgentType, Arc<Served>>,
    registrations: Vec<(AgentType, Registration)>,
    subscriptions: Vec<(TopicFilter, AgentType)>,
    default_timeout: Duration,
    drain_time: Duration,
    max_in_flight: usize,
    on_connected: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl Worker {
    /// Begins a worker for the host at `url`, such as `http://127.0.0.1:9000`.
    pub fn builder(url: &str) -> WorkerBuilder {
        WorkerBuilder {
            url: url.to_owned(),
            token: None,
            name: "worker".to_owned(),
            agents: Vec::new(),
            subscriptions: Vec::new(),
            capacity: 1,
            default_timeout: DEFAULT_TIMEOUT,
            drain_time: DRAIN_TIME,
            max_in_flight: MAX_IN_FLIGHT,
            max_agents: MAX_AGENTS,
            on_connected: None,
        }
    }

    /// Serves until the process ends, or an operator has the worker leave (`parlour workers drain`).
    ///
    /// Fails if at first there is no host, or it goes away or refuses a registration, such as with a
    /// fault of kind `conflict`; later, all that is tried again. Dropping the future drops the
    /// connection and aborts every handler.
    pub async fn run(self) -> Result<(), Error> {
        self.run_until(std::future::pending()).await
    }

    /// Serves until `shutdown` completes or an operator has the worker leave (`parlour workers drain`),
    /// and then until what runs has ended, but no longer than the drain time. The host sends nothing new meanwhile. Without a connection, what runs are the
    /// handlers of events; what they still send fails.
    ///
    /// Fails as [`run`](Self::run) does.
    pub async fn run_until(self, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
        self.run_with(Tcp, shutdown).await
    }

    pub(crate) async fn run_with<C: Connect>(
        self,
        connector: C,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), Error> {
        let (handle, commands, ids) = Handle::new(self.default_timeout);
        let driver = Driver {
            connector: Arc::new(connector),
            endpoint: Arc::new(self.endpoint),
            commands,
            state: State::new(ids, self.registrations, self.subscriptions),
            handlers: Handlers::new(handle, self.agents, self.max_in_flight),
            drain_time: self.drain_time,
            on_connected: self.on_connected,
        };
        let mut shutdown = std::pin::pin!(shutdown);
        let link = tokio::select! {
            link = driver.connect() => link?,
            () = &mut shutdown => return Ok(()),
        };
        driver.run(link, shutdown).await
    }
}

/// How an agent type is served.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct AgentOptions {
    /// Whether this worker must be the only one that serves the type.
    pub exclusive: bool,
    /// What the agents can do, in words that callers look for.
    pub capabilities: Vec<String>,
}

impl AgentOptions {
    /// Served together with other workers, with no capabilities named.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks to be the only worker that serves the type.
    #[must_use]
    pub fn exclusive(mut self, exclusive: bool) -> Self {
        self.exclusive = exclusive;
        self
    }

    /// Adds what the agents can do.
    #[must_use]
    pub fn capability(mut self, capability: impl Into<String>) -> Self {
        self.capabilities.push(capability.into());
        self
    }
}

/// How a [`Worker`] is to be, and what it serves.
#[must_use = "nothing is served until it runs"]
pub struct WorkerBuilder {
    url: String,
    token: Option<String>,
    name: String,
    agents: Vec<(String, AgentOptions, Served)>,
    subscriptions: Vec<(String, String)>,
    capacity: u16,
    default_timeout: Duration,
    drain_time: Duration,
    max_in_flight: usize,
    max_agents: usize,
    on_connected: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl WorkerBuilder {
    /// The bearer token that the host asks for.
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// What the worker calls itself, for people who look at the host; `worker` by default.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Serves the agents of a type. `factory` makes the one for a key, and should not take long.
    ///
    /// An agent is kept between messages, so that its fields are its memory, until the worker ends or
    /// more keys are in use than [`max_agents`](Self::max_agents) allows. Callers choose the keys.
    pub fn agent<A, F>(self, agent_type: impl Into<String>, factory: F) -> Self
    where
        A: Agent,
        F: Fn(&Key) -> A + Send + Sync + 'static,
    {
        self.agent_with(agent_type, AgentOptions::default(), factory)
    }

    /// Serves the agents of a type, in a way that is not as most are.
    pub fn agent_with<A, F>(
        mut self,
        agent_type: impl Into<String>,
        options: AgentOptions,
        factory: F,
    ) -> Self
    where
        A: Agent,
        F: Fn(&Key) -> A + Send + Sync + 'static,
    {
        let served = Served::new(move |key| Arc::new(factory(key)) as Arc<dyn ErasedAgent>);
        self.agents.push((agent_type.into(), options, served));
        self
    }

    /// Has events of the topics that `pattern` matches (`news.tech`, or `news.*`) go to agents of
    /// this type, each to the one whose key is the topic's source.
    pub fn subscribe(mut self, pattern: impl Into<String>, agent_type: impl Into<String>) -> Self {
        self.subscriptions.push((pattern.into(), agent_type.into()));
        self
    }

    /// How much the worker takes beside others that serve the same types; 1 by default. One of capacity
    /// 2 gets twice as many keys as one of capacity 1.
    ///
    /// ```
    /// # use parlour::{Cx, Payload, PayloadExt, Worker};
    /// let large = Worker::builder("http://127.0.0.1:9000")
    ///     .name("large")
    ///     .capacity(4)
    ///     .agent("upper", |_key| |_cx: Cx, message: Payload| async move {
    ///         Ok(message.to_text()?.to_uppercase())
    ///     })
    ///     .build()?;
    /// # Ok::<(), parlour::Error>(())
    /// ```
    pub fn capacity(mut self, capacity: u16) -> Self {
        self.capacity = capacity;
        self
    }

    /// How long what a handler sends may take unless it says otherwise; 30 s by default.
    pub fn default_timeout(mut self, timeout: Duration) -> Self {
        self.default_timeout = timeout;
        self
    }

    /// How long a shutdown waits for what runs; 20 s by default.
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.drain_time = timeout;
        self
    }

    /// How many messages may run at a time; 1,024 by default. Calls beyond are answered with a fault
    /// of kind `overloaded`; as many events wait, and those beyond are dropped.
    pub fn max_in_flight(mut self, messages: usize) -> Self {
        self.max_in_flight = messages;
        self
    }

    /// How many agents of each type are kept; 10,000 by default.
    ///
    /// When another key comes, those that handle nothing and were unused longest are dropped, up to
    /// an eighth of the bound at a time; the next message for such a key makes its agent anew. So what
    /// an agent must not forget belongs elsewhere, or the bound above the number of keys:
    /// `usize::MAX` keeps all. Agents that handle a message are kept even beyond it.
    pub fn max_agents(mut self, agents: usize) -> Self {
        self.max_agents = agents;
        self
    }

    /// Is called each time the host has confirmed everything that this worker serves. Must not block.
    pub fn on_connected(mut self, callback: impl Fn() + Send + Sync + 'static) -> Self {
        self.on_connected = Some(Arc::new(callback));
        self
    }

    /// Checks the URL and all names, and makes the worker.
    pub fn build(self) -> Result<Worker, Error> {
        let endpoint = Endpoint::new(&self.url, self.token.as_deref(), &self.name)?;
        if self.capacity == 0 {
            let error =
                Error::new(ErrorKind::Invalid, "a worker of capacity 0 would serve nothing");
            return Err(error.with_hint("give it 1 or more, or do not start it"));
        }
        let (mut agents, mut registrations) = (HashMap::new(), Vec::new());
        for (name, options, served) in self.agents {
            let agent_type = AgentType::parse(name)?;
            let capabilities = options.capabilities.into_iter().map(ByteString::from).collect();
            let capacity = self.capacity;
            let registration =
                Registration { exclusive: options.exclusive, capacity, capabilities };
            let served = Arc::new(served.max_agents(self.max_agents));
            if agents.insert(agent_type.clone(), served).is_some() {
                let text = format!("the worker serves {agent_type} twice");
                return Err(Error::new(ErrorKind::Invalid, text));
            }
            registrations.push((agent_type, registration));
        }
        let mut subscriptions = Vec::new();
        for (pattern, agent_type) in self.subscriptions {
            let (filter, agent_type) =
                (TopicFilter::parse(&pattern)?, AgentType::parse(agent_type)?);
            if !agents.contains_key(&agent_type) {
                let text =
                    format!("`{pattern}` is to go to {agent_type}, which is not served here");
                return Err(Error::new(ErrorKind::Invalid, text)
                    .with_hint("add the agent type, or correct its name"));
            }
            subscriptions.push((filter, agent_type));
        }
        Ok(Worker {
            endpoint,
            agents,
            registrations,
            subscriptions,
            default_timeout: self.default_timeout,
            drain_time: self.drain_time,
            max_in_flight: self.max_in_flight,
            on_connected: self.on_connected,
        })
    }

    /// [`build`](Self::build), then [`Worker::run`].
    pub async fn run(self) -> Result<(), Error> {
        self.build()?.run().await
    }

    /// [`build`](Self::build), then [`Worker::run_until`].
    pub async fn run_until(self, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
        self.build()?.run_until(shutdown).await
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("url", &self.endpoint.url())
            .field("registrations", &self.registrations)
            .field("subscriptions", &self.subscriptions)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for WorkerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerBuilder")
            .field("url", &self.url)
            .field("name", &self.name)
            .field("subscriptions", &self.subscriptions)
            .finish_non_exhaustive()
    }
}
