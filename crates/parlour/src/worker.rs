use std::collections::HashMap;
use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use parlour_core::{AgentType, Registration, TopicFilter};
use tokio::sync::{Notify, oneshot};
use tokio::task::{JoinError, JoinHandle};

use crate::agent::Unnamed;
use crate::client::DEFAULT_TIMEOUT;
use crate::driver::Driver;
use crate::handle::Handle;
use crate::handlers::Handlers;
use crate::instances::Serve;
use crate::signals::Signals;
use crate::state::State;
use crate::transport::{Connect, Endpoint, Tcp};
use crate::{Error, ErrorKind, IntoAgent};

/// How many messages a worker runs at a time.
const MAX_IN_FLIGHT: usize = 1024;
/// How long a worker that shuts down waits for what runs.
const DRAIN_TIME: Duration = Duration::from_secs(20);

/// Serves agents over one connection to a host.
///
/// Each message runs in a task of its own. A connection that is lost is made anew, with waits of random
/// length up to 5 s in between. Within the host's grace time, 5 s unless it is set otherwise, the worker
/// goes on where it was: what runs goes on, and its reply reaches the caller. After that, or at a host
/// that was started anew, everything is registered again, and calls that still run are aborted, as their
/// callers have been told already.
///
/// ```no_run
/// # async fn example() -> Result<(), parlour::Error> {
/// use parlour::Worker;
///
/// Worker::builder("http://127.0.0.1:9000")
///     .agent("upper", async |text: String| text.to_uppercase())
///     .run_until_signal()
///     .await
/// # }
/// ```
pub struct Worker {
    endpoint: Endpoint,
    agents: HashMap<AgentType, Arc<dyn Serve>>,
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
            name: format!("worker-{:08x}", fastrand::u32(..)),
            agents: Vec::new(),
            subscriptions: Vec::new(),
            capacity: 1,
            default_timeout: DEFAULT_TIMEOUT,
            drain_time: DRAIN_TIME,
            max_in_flight: MAX_IN_FLIGHT,
            on_connected: None,
        }
    }

    /// Serves until the process ends, or an operator has the worker leave (`parlour workers drain`).
    ///
    /// Fails if at first there is no host, or it goes away or refuses a registration, such as with a
    /// fault of kind `conflict`; later, all that is tried again.
    ///
    /// Dropping the future aborts every handler and the connection, without a goodbye. To the host that
    /// is a connection that broke: callers wait until its `timeouts.grace` is over before they are
    /// told. [`run_until`](Self::run_until) ends in order.
    pub async fn run(self) -> Result<(), Error> {
        self.run_until(std::future::pending()).await
    }

    /// Serves until `shutdown` completes or an operator has the worker leave (`parlour workers drain`),
    /// and then until what runs has ended, but no longer than the drain time. The host sends nothing new
    /// meanwhile. Where the connection was just lost, it tries within the host's grace time to bring out
    /// what ran; after that, what runs are the handlers of events, and what they still send fails.
    ///
    /// Fails as [`run`](Self::run) does.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), parlour::Error> {
    /// use parlour::Worker;
    /// use std::time::Duration;
    ///
    /// Worker::builder("http://127.0.0.1:9000")
    ///     .agent("upper", async |text: String| text.to_uppercase())
    ///     .run_until(tokio::time::sleep(Duration::from_secs(3600)))
    ///     .await
    /// # }
    /// ```
    pub async fn run_until(self, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
        self.run_with(Tcp, shutdown).await
    }

    /// Serves until the process gets SIGTERM or SIGINT, and then until what runs has ended, as
    /// [`run_until`](Self::run_until) does. From the call of this function on, these signals end the
    /// process in no other way.
    ///
    /// Fails as [`run`](Self::run) does; and with [`ErrorKind::Interrupted`] if a second signal comes
    /// first: then what still runs is aborted.
    pub async fn run_until_signal(self) -> Result<(), Error> {
        let mut signals = Signals::install()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let mut worker = pin!(self.run_until(async {
            let _ = stopped.await;
        }));
        tokio::select! {
            ended = &mut worker => return ended,
            () = signals.next() => drop(stop),
        }
        tokio::select! {
            ended = worker => ended,
            () = signals.next() => {
                let text = "a second signal came before what ran had ended";
                Err(Error::new(ErrorKind::Interrupted, text).may_have_run_if(true))
            }
        }
    }

    /// Serves in a task of its own. Returns once the host has confirmed everything that the worker
    /// serves; must be called within a tokio runtime.
    ///
    /// Fails as [`run`](Self::run) does.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), parlour::Error> {
    /// use parlour::{Client, Worker};
    ///
    /// let url = "http://127.0.0.1:9000";
    /// let upper = async |text: String| text.to_uppercase();
    /// let worker = Worker::builder(url).agent("upper", upper).start().await?;
    /// Client::connect(url).await?.call("upper", "hello").await?; // is served by now
    /// worker.shutdown().await
    /// # }
    /// ```
    pub async fn start(self) -> Result<RunningWorker, Error> {
        self.start_with(Tcp).await
    }

    /// Serves in a task of its own, over streams that `connector` makes.
    #[doc(hidden)]
    pub async fn start_with<C: Connect>(mut self, connector: C) -> Result<RunningWorker, Error> {
        let connected = Arc::new(Notify::new());
        let (is_connected, told) = (Arc::clone(&connected), self.on_connected.take());
        self.on_connected = Some(Arc::new(move || {
            if let Some(told) = &told {
                told();
            }
            connected.notify_one();
        }));
        let (stop, stopped) = oneshot::channel::<()>();
        let work = self.run_with(connector, async {
            let _ = stopped.await;
        });
        let mut worker = RunningWorker { stop: Some(stop), task: tokio::spawn(work), told: false };
        tokio::select! {
            biased;
            () = is_connected.notified() => Ok(worker),
            ended = &mut worker.task => {
                let lost = || Error::new(ErrorKind::ConnectionLost, "the worker ended");
                Err(outcome(ended).err().unwrap_or_else(lost))
            }
        }
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

/// A worker that runs in a task of its own, made by [`Worker::start`].
///
/// Dropping it aborts every handler and the connection, without a goodbye. To the host that is a
/// connection that broke: callers wait until its `timeouts.grace` is over before they are told.
/// [`shutdown`](Self::shutdown) ends in order.
#[derive(Debug)]
#[must_use = "the worker ends when this is dropped"]
pub struct RunningWorker {
    /// The worker serves until this is dropped.
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), Error>>,
    /// Whether it was said how it ended.
    told: bool,
}

impl RunningWorker {
    /// Has the worker end as [`Worker::run_until`] does: it is given nothing new, and what runs may
    /// end.
    pub async fn shutdown(mut self) -> Result<(), Error> {
        drop(self.stop.take());
        self.wait().await
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.task.is_finished()
    }

    /// Waits until the worker ends by itself: when an operator has it leave (`parlour workers drain`),
    /// and what it ran has ended. That is `Ok`. A host that goes away, or refuses what is served, does
    /// not end it: both are tried again.
    ///
    /// How it ended is said once; after that this is `Ok` at once.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing: the worker serves on.
    pub async fn wait(&mut self) -> Result<(), Error> {
        if self.told {
            return Ok(());
        }
        let ended = (&mut self.task).await;
        self.told = true;
        outcome(ended)
    }
}

impl Drop for RunningWorker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn outcome(ended: Result<Result<(), Error>, JoinError>) -> Result<(), Error> {
    match ended.map_err(JoinError::try_into_panic) {
        Ok(ended) => ended,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        Err(Err(_aborted)) => Err(Error::closed()),
    }
}

/// How a [`Worker`] is to be, and what it serves.
#[must_use = "nothing is served until it runs"]
pub struct WorkerBuilder {
    url: String,
    token: Option<String>,
    name: String,
    agents: Vec<(String, Unnamed)>,
    subscriptions: Vec<(String, String)>,
    capacity: u16,
    default_timeout: Duration,
    drain_time: Duration,
    max_in_flight: usize,
    on_connected: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl WorkerBuilder {
    /// The bearer token that the host asks for.
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// What the worker calls itself; `worker-` and a random number by default.
    ///
    /// Give it one that stays, and no two workers at a time the same: a worker that is started again
    /// under its name takes over at once from its former self, for whose return the host else waits.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Serves an agent type: an [`Agent`](crate::Agent), or one function that answers every call.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), parlour::Error> {
    /// use parlour::{Agent, State, Worker};
    /// use std::sync::atomic::{AtomicU64, Ordering};
    ///
    /// async fn upper(text: String) -> String {
    ///     text.to_uppercase()
    /// }
    /// async fn count(count: State<AtomicU64>) -> String {
    ///     (count.fetch_add(1, Ordering::Relaxed) + 1).to_string()
    /// }
    /// Worker::builder("http://127.0.0.1:9000")
    ///     .agent("upper", upper)
    ///     .agent("counter", Agent::new(|_key| AtomicU64::new(0)).on_call(count))
    ///     .run_until_signal()
    ///     .await
    /// # }
    /// ```
    pub fn agent<Parts>(
        mut self,
        agent_type: impl Into<String>,
        agent: impl IntoAgent<Parts>,
    ) -> Self {
        self.agents.push((agent_type.into(), Unnamed::new(agent.into_agent())));
        self
    }

    /// Has events of the topics that `pattern` matches (`news.tech`, or `news.*`) go to agents of
    /// this type, each to the one whose key is the topic's source.
    ///
    /// ```
    /// use parlour::{Agent, TopicId, Worker};
    ///
    /// async fn note(topic: TopicId, text: String) {
    ///     println!("{topic}: {text}");
    /// }
    /// let worker = Worker::builder("http://127.0.0.1:9000")
    ///     .agent("diary", Agent::stateless().on_event(note))
    ///     .subscribe("news.*", "diary"); // `news.tech/paper` is noted by `diary/paper`
    /// ```
    pub fn subscribe(mut self, pattern: impl Into<String>, agent_type: impl Into<String>) -> Self {
        self.subscriptions.push((pattern.into(), agent_type.into()));
        self
    }

    /// How much the worker takes beside others that serve the same types; 1 by default. One of capacity
    /// 2 gets twice as many keys as one of capacity 1.
    ///
    /// ```
    /// # use parlour::Worker;
    /// let large = Worker::builder("http://127.0.0.1:9000")
    ///     .name("large")
    ///     .capacity(4)
    ///     .agent("upper", async |text: String| text.to_uppercase())
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

    /// Is called each time the host has confirmed everything that this worker serves. Must not block.
    pub fn on_connected(mut self, callback: impl Fn() + Send + Sync + 'static) -> Self {
        self.on_connected = Some(Arc::new(callback));
        self
    }

    /// Checks the URL and all names, and makes the worker.
    ///
    /// ```
    /// use parlour::{ErrorKind, Worker};
    ///
    /// let worker = Worker::builder("http://127.0.0.1:9000").agent("not a name", async || ());
    /// assert_eq!(worker.build().unwrap_err().kind(), ErrorKind::InvalidName);
    /// ```
    pub fn build(self) -> Result<Worker, Error> {
        let endpoint = Endpoint::new(&self.url, self.token.as_deref(), &self.name)?;
        if self.capacity == 0 {
            let error =
                Error::new(ErrorKind::Invalid, "a worker of capacity 0 would serve nothing");
            return Err(error.with_hint("give it 1 or more, or do not start it"));
        }
        let (mut agents, mut registrations) = (HashMap::new(), Vec::new());
        for (name, agent) in self.agents {
            let agent_type = AgentType::parse(name)?;
            let (served, registration) = agent.named(&agent_type)?;
            let registration = Registration { capacity: self.capacity, ..registration };
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

    /// [`build`](Self::build), then [`Worker::run_until_signal`].
    pub async fn run_until_signal(self) -> Result<(), Error> {
        self.build()?.run_until_signal().await
    }

    /// [`build`](Self::build), then [`Worker::start`].
    pub async fn start(self) -> Result<RunningWorker, Error> {
        self.build()?.start().await
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
