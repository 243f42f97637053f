//! Agents that talk: call them, serve them, publish and subscribe, over one connection to a Parlour
//! host.
//!
//! ```no_run
//! use parlour::{Error, Worker};
//!
//! async fn greet(who: String) -> String {
//!     format!("hello {who}")
//! }
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Error> {
//!     Worker::builder("http://127.0.0.1:9000") // where `parlour serve` listens
//!         .agent("greeter", greet)
//!         .run_until_signal()
//!         .await
//! }
//! ```
//!
//! That is an agent, silent while all is well. `parlour call greeter Ada` answers `hello Ada`, and so
//! does a program:
//!
//! ```no_run
//! use parlour::{Client, Error, PayloadExt};
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Error> {
//!     let client = Client::connect("http://127.0.0.1:9000").await?;
//!     println!("{}", client.call("greeter", "Ada").await?.to_text()?);
//!     Ok(())
//! }
//! ```
//!
//! What they need, in a new project beside a clone of Parlour:
//!
//! ```sh
//! cargo add --path ../parlour/crates/parlour
//! cargo add tokio --features macros,rt-multi-thread
//! cargo add serde --features derive       # for messages of types of your own
//! ```
//!
//! Both fail at once if there is no host yet.
//!
//! # Serving
//!
//! An agent is anything that answers calls and receives events. It is named `type/key`: a [`Worker`]
//! serves types, and callers choose keys. A handler is an async function; its arguments are the parts of
//! the message that it wants ([`FromMessage`]), and what it returns is the reply ([`IntoReply`]). An
//! [`Agent`] puts handlers together with a memory for each key:
//!
//! ```
//! use parlour::{Agent, AgentError, Cx, Json, State, TopicId};
//! use serde::{Deserialize, Serialize};
//! use std::sync::Mutex;
//!
//! #[derive(Deserialize)]
//! struct Order {
//!     dish: String,
//! }
//!
//! #[derive(Serialize)]
//! struct Bill {
//!     dishes: usize,
//! }
//!
//! /// What one table has ordered.
//! #[derive(Default)]
//! struct Table(Mutex<Vec<String>>);
//!
//! async fn order(
//!     State(table): State<Table>,
//!     cx: Cx,
//!     Json(order): Json<Order>,
//! ) -> Result<Json<Bill>, AgentError> {
//!     cx.call("kitchen", order.dish.as_str()).await?; // of the same conversation, within its deadline
//!     let mut dishes = table.0.lock().map_err(|_| "the table is broken")?;
//!     dishes.push(order.dish);
//!     Ok(Json(Bill { dishes: dishes.len() }))
//! }
//!
//! async fn closing_time(State(table): State<Table>, topic: TopicId) {
//!     println!("{topic}: {} dishes", table.0.lock().map_or(0, |dishes| dishes.len()));
//! }
//!
//! let table = Agent::new(|_key| Table::default()).on_call(order).on_event(closing_time);
//! let worker = parlour::Worker::builder("http://127.0.0.1:9000")
//!     .agent("table", table)
//!     .subscribe("restaurant.closes", "table");
//! ```
//!
//! What a handler sends through its [`Cx`] carries on the conversation, the cause, the trace and the
//! deadline of the message that it handles. [`Cx::progress`] tells the caller something before the
//! reply.
//!
//! Messages for one key begin in the order in which the host took them, and run side by side;
//! [`Agent::one_at_a_time`] has each end before the next begins. An error or a panic of a handler
//! reaches its caller as a fault of kind `agent_failed`. On Ctrl-C or SIGTERM,
//! [`run_until_signal`](WorkerBuilder::run_until_signal) takes nothing new and ends what runs.
//!
//! # Calling
//!
//! A [`Client`] calls agents and publishes events. [`Client::typed`] gives a call of Rust types,
//! [`Client::call_each`] one to many agents, [`with_progress`](CallRequest::with_progress) one that is
//! heard of before its end, [`Client::subscribe`] events as they come.
//!
//! What must not be lost is sent for later, with [`Client::send`]: it is on the host's disk when that
//! returns, is delivered at least once, and ends with a reply or with a fault for good. An event that
//! must not be lost is published with [`durable`](PublishRequest::durable), and is delivered like that
//! to each who has subscribed. A handler sees in [`Cx::attempt`] and [`Cx::delivery`] whether it may
//! have seen the message before.
//!
//! What holds everywhere: each request has a deadline, 30 s unless it says otherwise; it ends with an
//! answer or an [`Error`], whose [`kind`](Error::kind) is what to decide on, and which says whether an
//! agent [may have run](Error::may_have_run); dropping a future gives up what it waited for; a lost
//! connection is made anew without being asked.
//!
//! Connections are plain `http://` or `ws://`. For a host on another machine, put a tunnel or a proxy
//! that adds TLS in between.
//!
//! # Testing and watching
//!
//! The crate `parlour-test` has a whole host in memory, for tests in which workers crash and networks
//! fail.
//!
//! What nobody can be told, such as an error of a handler of events or a lost connection, is logged with
//! `tracing`: `tracing_subscriber::fmt::init()` shows it.
//!
//! # Features
//!
//! `schemars` adds `Agent::schema`, which puts JSON Schemas into what `parlour.describe` answers.

mod agent;
mod backoff;
mod client;
mod connection;
mod cx;
mod describe;
mod driver;
mod error;
mod extract;
mod handle;
mod handler;
mod handlers;
mod instances;
mod kept;
mod outgoing;
mod payload;
mod publishing;
mod reply;
mod request;
mod sending;
mod signals;
mod state;
mod subscription;
#[cfg(test)]
mod tests;
mod transport;
mod typed;
mod worker;

pub use agent::{Agent, IntoAgent, Itself};
pub use client::{Client, ClientBuilder};
pub use cx::Cx;
pub use error::{Error, ErrorKind};
pub use extract::{FromMessage, Message, State};
pub use handler::Handler;
pub use parlour_core::durable::{DeliveryId, Level, State as DeliveryState};
pub use parlour_core::{
    AgentId, AgentType, ByteString, Bytes, Event, Fault, FaultKind, Header, InvalidName, Key,
    MAX_HOPS, MessageId, Metadata, MetadataError, Payload, Principal, TopicFilter, TopicId,
    TopicType,
};
pub use payload::{IntoAgentId, IntoPayload, IntoTopicId, Json, PayloadExt};
pub use publishing::{AcceptedEvent, DurablePublishRequest, Durably};
pub use reply::{AgentError, IntoReply};
pub use request::{
    Answer, CallEachRequest, CallRequest, FromReply, Progress, PublishRequest, Published, Request,
};
pub use sending::{Ack, Later, SendRequest, Sent, Status, Wait};
pub use subscription::Subscription;
#[doc(hidden)]
pub use transport::Connect;
pub use typed::TypedAgent;
pub use worker::{RunningWorker, Worker, WorkerBuilder};
