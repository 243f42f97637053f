use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parlour_core::{AgentType, ByteString, Key, Registration};

use crate::describe::{About, LOAD_STATE, RESERVED, SAVE_STATE};
use crate::handler::{BoxHandler, boxed};
use crate::instances::{Serve, Served};
use crate::{Error, ErrorKind, FromMessage, Handler, IntoReply};

/// How many agents of a type a worker keeps.
const MAX_INSTANCES: usize = 10_000;

/// An agent type: how the agent for a key is made, and which functions handle its messages.
///
/// A worker makes the state for a key when the first message for it comes, and keeps it as the memory
/// of that agent: until it was idle for [`idle_timeout`](Self::idle_timeout), or more keys are in use
/// than [`max_instances`](Self::max_instances). Callers choose the keys. The next message for a key
/// whose state was let go makes it anew, so what an agent must not forget belongs elsewhere.
///
/// Messages for one key begin in the order in which the host took them, and several run at once, each
/// in a task of its own, unless the agent is [`one_at_a_time`](Self::one_at_a_time). A handler is
/// dropped in the middle when its caller gives up, its deadline passes, or the connection is lost for
/// longer than the host's grace time. A panic is caught and reported like an error.
///
/// ```
/// use parlour::{Agent, Json, State, TopicId};
/// use std::sync::Mutex;
///
/// #[derive(Default)]
/// struct Diary(Mutex<Vec<String>>);
///
/// async fn read(State(diary): State<Diary>) -> Json<Vec<String>> {
///     Json(diary.0.lock().unwrap().clone())
/// }
/// async fn write(State(diary): State<Diary>, topic: TopicId, text: String) {
///     diary.0.lock().unwrap().push(format!("{topic}: {text}"));
/// }
/// let diary = Agent::new(|_key| Diary::default()).on_call(read).on_event(write);
/// ```
#[must_use = "it is served once a worker has it"]
pub struct Agent<S = ()> {
    pub(crate) factory: Box<dyn Fn(&Key) -> S + Send + Sync>,
    /// By data type.
    pub(crate) calls: HashMap<ByteString, BoxHandler<S>>,
    /// Of every other data type.
    pub(crate) other_calls: Option<BoxHandler<S>>,
    pub(crate) events: Option<BoxHandler<S>>,
    pub(crate) one_at_a_time: bool,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) max_instances: usize,
    pub(crate) about: About,
    registration: Registration,
    /// The first thing that is wrong with it.
    error: Option<Error>,
}

impl Agent<()> {
    /// An agent type whose agents remember nothing.
    ///
    /// For one with a single handler of calls, the function itself will do; see [`IntoAgent`].
    pub fn stateless() -> Self {
        Self::new(|_key| ())
    }
}

impl<S: Send + Sync + 'static> Agent<S> {
    /// An agent type. `factory` makes the state for a key, and should not take long.
    ///
    /// Handlers get at it through [`State`](crate::State). What all keys share, such as a connection
    /// pool, the factory can hand to each.
    pub fn new(factory: impl Fn(&Key) -> S + Send + Sync + 'static) -> Self {
        Self {
            factory: Box::new(factory),
            calls: HashMap::new(),
            other_calls: None,
            events: None,
            one_at_a_time: false,
            idle_timeout: None,
            max_instances: MAX_INSTANCES,
            about: About::default(),
            registration: Registration::default(),
            error: None,
        }
    }

    /// Answers calls of every data type that has no handler of its own.
    ///
    /// Without one they are refused with a fault of kind `invalid`.
    pub fn on_call<H, Parts>(mut self, handler: H) -> Self
    where
        H: Handler<Parts>,
        Parts: FromMessage<S>,
        H::Future: Future<Output: IntoReply> + Send + 'static,
    {
        self.other_calls = Some(boxed(handler));
        self
    }

    /// Answers calls of this data type, which callers name with
    /// [`data_type`](crate::Request::data_type).
    ///
    /// ```
    /// # use parlour::{Agent, Json};
    /// let sums = Agent::stateless()
    ///     .on_call_of("Add", async |Json((a, b)): Json<(i64, i64)>| Json(a + b))
    ///     .on_call_of("Negate", async |Json(a): Json<i64>| Json(-a));
    /// ```
    pub fn on_call_of<H, Parts>(mut self, data_type: impl Into<ByteString>, handler: H) -> Self
    where
        H: Handler<Parts>,
        Parts: FromMessage<S>,
        H::Future: Future<Output: IntoReply> + Send + 'static,
    {
        let data_type = data_type.into();
        if data_type.starts_with(RESERVED) {
            self.refuse(format!("the data type `{}` is reserved", data_type.escape_debug()));
        }
        self.calls.insert(data_type, boxed(handler));
        self
    }

    /// Receives the events that the worker
    /// [subscribes](crate::WorkerBuilder::subscribe) this agent type to. An error is logged, and
    /// reaches nobody.
    ///
    /// Without one they are ignored.
    ///
    /// ```
    /// # use parlour::{Agent, TopicId};
    /// let diary = Agent::stateless().on_event(async |topic: TopicId, text: String| {
    ///     println!("{topic}: {text}");
    /// });
    /// ```
    pub fn on_event<H, Parts>(mut self, handler: H) -> Self
    where
        H: Handler<Parts>,
        Parts: FromMessage<S>,
        H::Future: Future<Output: IntoReply> + Send + 'static,
    {
        self.events = Some(boxed(handler));
        self
    }

    /// Answers `parlour.save_state`: returns what [`on_load_state`](Self::on_load_state) can make the
    /// agent from again.
    ///
    /// ```
    /// # use parlour::{Agent, Json, State};
    /// # use std::sync::Mutex;
    /// type Names = Mutex<Vec<String>>;
    ///
    /// async fn save(names: State<Names>) -> Json<Vec<String>> {
    ///     Json(names.lock().unwrap().clone())
    /// }
    /// async fn load(names: State<Names>, Json(saved): Json<Vec<String>>) {
    ///     *names.lock().unwrap() = saved;
    /// }
    /// let agent = Agent::new(|_key| Names::default()).on_save_state(save).on_load_state(load);
    /// ```
    pub fn on_save_state<H, Parts>(mut self, handler: H) -> Self
    where
        H: Handler<Parts>,
        Parts: FromMessage<S>,
        H::Future: Future<Output: IntoReply> + Send + 'static,
    {
        self.calls.insert(ByteString::from_static(SAVE_STATE), boxed(handler));
        self
    }

    /// Answers `parlour.load_state`, whose message is what `parlour.save_state` returned.
    pub fn on_load_state<H, Parts>(mut self, handler: H) -> Self
    where
        H: Handler<Parts>,
        Parts: FromMessage<S>,
        H::Future: Future<Output: IntoReply> + Send + 'static,
    {
        self.calls.insert(ByteString::from_static(LOAD_STATE), boxed(handler));
        self
    }

    /// Handles the messages of each key one after the other, in the order in which the host took
    /// them.
    ///
    /// Time spent waiting counts towards a call's deadline. An agent that calls itself, through others
    /// or not, waits for itself until the deadline.
    ///
    /// ```
    /// # use parlour::{Agent, State};
    /// # use tokio::sync::Mutex;
    /// // The lock is never waited for: it only lets the compiler see that nobody else has it.
    /// async fn append(State(log): State<Mutex<String>>, line: String) -> String {
    ///     let mut log = log.lock().await;
    ///     tokio::task::yield_now().await;
    ///     log.push_str(&line);
    ///     log.clone()
    /// }
    /// let log = Agent::new(|_key| Mutex::default()).on_call(append).one_at_a_time();
    /// ```
    pub fn one_at_a_time(mut self) -> Self {
        self.one_at_a_time = true;
        self
    }

    /// Lets go of the state of a key that has handled nothing for so long; by default, never.
    ///
    /// The state is dropped; what has to be done then belongs into its [`Drop`].
    ///
    /// ```
    /// # use parlour::{Agent, Key, State};
    /// # use std::time::Duration;
    /// struct Session(Key);
    /// impl Drop for Session {
    ///     fn drop(&mut self) {
    ///         println!("{} has gone", self.0);
    ///     }
    /// }
    /// async fn greet(session: State<Session>) -> String {
    ///     format!("hello {}", session.0.0)
    /// }
    /// let sessions = Agent::new(|key| Session(key.clone()))
    ///     .on_call(greet)
    ///     .idle_timeout(Duration::from_secs(600));
    /// ```
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = Some(timeout);
        self
    }

    /// How many keys have a state at a time; 10,000 by default, and `usize::MAX` keeps all.
    ///
    /// When another key comes, the state of those that handle nothing and were unused longest is
    /// dropped, up to an eighth of the bound at a time. Keys that handle a message keep theirs even
    /// beyond it.
    pub fn max_instances(mut self, instances: usize) -> Self {
        self.max_instances = instances;
        self
    }

    /// Asks for the worker to be the only one that serves the type. If another does, the host refuses
    /// with a fault of kind `conflict`.
    pub fn exclusive(mut self) -> Self {
        self.registration.exclusive = true;
        self
    }

    /// Adds what the agents can do, in words that callers look for.
    pub fn capability(mut self, capability: impl Into<ByteString>) -> Self {
        self.registration.capabilities.push(capability.into());
        self
    }

    /// The version that `parlour.describe` names; empty by default.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.about.version = version.into();
        self
    }

    /// A text that `parlour.describe` has under `metadata`.
    pub fn metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.about.metadata.insert(name.into(), value.into());
        self
    }

    /// Has `parlour.describe` show the JSON Schemas of calls of this data type and of their replies.
    /// An empty data type stands for the handler of all others.
    ///
    /// ```
    /// # use parlour::{Agent, Json};
    /// let sums = Agent::stateless()
    ///     .on_call_of("Add", async |Json((a, b)): Json<(i64, i64)>| Json(a + b))
    ///     .schema::<(i64, i64), i64>("Add");
    /// ```
    #[cfg(feature = "schemars")]
    pub fn schema<Request, Reply>(mut self, data_type: impl Into<String>) -> Self
    where
        Request: schemars::JsonSchema,
        Reply: schemars::JsonSchema,
    {
        use schemars::generate::SchemaSettings;

        let takes = SchemaSettings::draft2020_12().for_deserialize().into_generator();
        let gives = SchemaSettings::draft2020_12().for_serialize().into_generator();
        let schemas = crate::describe::Schemas {
            schema: Some(takes.into_root_schema_for::<Request>().into()),
            reply_schema: Some(gives.into_root_schema_for::<Reply>().into()),
        };
        self.about.schemas.insert(data_type.into(), schemas);
        self
    }

    fn refuse(&mut self, message: String) {
        self.error.get_or_insert_with(|| Error::new(ErrorKind::Invalid, message));
    }
}

/// What a worker can serve: an [`Agent`], or one function that answers every call.
///
/// `worker.agent("upper", upper)` says the same as
/// `worker.agent("upper", Agent::stateless().on_call(upper))`.
///
/// ```compile_fail,E0277
/// # use parlour::Worker;
/// fn upper(text: String) -> String {
///     text.to_uppercase()
/// }
/// let worker = Worker::builder("http://127.0.0.1:9000").agent("upper", upper); // is not `async`
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an agent",
    label = "neither an `Agent` nor an async function",
    note = "an agent is an `Agent`, or an async function or closure of up to eight arguments, with \
            their types written out, each of which implements `FromMessage`"
)]
pub trait IntoAgent<Parts> {
    /// The memory of one agent.
    type State: Send + Sync + 'static;

    /// Makes the agent.
    fn into_agent(self) -> Agent<Self::State>;
}

/// In place of the parts of a handler, for what is an agent already.
#[derive(Debug)]
#[non_exhaustive]
pub struct Itself;

impl<S: Send + Sync + 'static> IntoAgent<Itself> for Agent<S> {
    type State = S;

    fn into_agent(self) -> Self {
        self
    }
}

impl<H, Parts> IntoAgent<Parts> for H
where
    H: Handler<Parts>,
    Parts: FromMessage<()>,
    H::Future: Future<Output: IntoReply> + Send + 'static,
{
    type State = ();

    fn into_agent(self) -> Agent {
        Agent::stateless().on_call(self)
    }
}

type Name = dyn FnOnce(&AgentType) -> Arc<dyn Serve> + Send + Sync;

/// An agent type of whatever state, as a worker keeps it until it is built.
pub(crate) struct Unnamed {
    registration: Registration,
    error: Option<Error>,
    serve: Box<Name>,
}

impl Unnamed {
    pub(crate) fn new<S: Send + Sync + 'static>(mut agent: Agent<S>) -> Self {
        let registration = std::mem::take(&mut agent.registration);
        for data_type in agent.about.schemas.keys() {
            let handled = match data_type.as_str() {
                "" => agent.other_calls.is_some(),
                data_type => agent.calls.contains_key(data_type),
            };
            if !handled && agent.error.is_none() {
                let text = format!("there is a schema for `{data_type}`, and no handler");
                agent.error = Some(Error::new(ErrorKind::Invalid, text));
            }
        }
        let error = agent.error.take();
        let serve = |agent_type: &AgentType| {
            Arc::new(Served::new(agent_type.clone(), agent)) as Arc<dyn Serve>
        };
        Self { registration, error, serve: Box::new(serve) }
    }

    /// Gives it its name, or says what is wrong with it.
    pub(crate) fn named(
        self,
        agent_type: &AgentType,
    ) -> Result<(Arc<dyn Serve>, Registration), Error> {
        match self.error {
            Some(error) => Err(error),
            None => Ok(((self.serve)(agent_type), self.registration)),
        }
    }
}

impl<S> fmt::Debug for Agent<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent")
            .field("calls", &self.calls.keys())
            .field("one_at_a_time", &self.one_at_a_time)
            .field("idle_timeout", &self.idle_timeout)
            .field("max_instances", &self.max_instances)
            .field("about", &self.about)
            .field("registration", &self.registration)
            .finish_non_exhaustive()
    }
}
