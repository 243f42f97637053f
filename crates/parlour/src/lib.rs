//! Agents that talk: call them, serve them, publish and subscribe, over one connection to a Parlour
//! host.
//!
//! An agent is anything that answers calls and receives events, named `type/key`. A [`Worker`] serves
//! agents; a [`Client`] calls them. Neither needs to know where the other runs.
//!
//! ```no_run
//! use parlour::{Client, Cx, Worker, typed};
//!
//! #[tokio::main(flavor = "current_thread")]
//! async fn main() -> Result<(), parlour::Error> {
//!     let url = "http://127.0.0.1:9000"; // where `parlour serve` listens
//!     let worker = Worker::builder(url)
//!         .agent("greeter", |_key| typed(|_cx: Cx, who: String| async move {
//!             Ok(format!("hello {who}"))
//!         }));
//!     tokio::spawn(worker.run());
//!
//!     let client = Client::connect(url).await?;
//!     let greeting: String = client.call("greeter", parlour::Json("Ada")).json().await?;
//!     println!("{greeting}");
//!     Ok(())
//! }
//! ```
//!
//! What holds everywhere: each request has a deadline, 30 s unless it says otherwise; it ends with an
//! answer or an [`Error`], and an error says whether an agent [may have run](Error::may_have_run);
//! dropping a future gives up what it waited for; a lost connection is made anew without being asked.
//!
//! Connections are plain `http://` or `ws://`. For a host on another machine, put a tunnel or a proxy
//! that adds TLS in between.

mod agent;
mod backoff;
mod client;
mod connection;
mod cx;
mod driver;
mod error;
mod handle;
mod handlers;
mod outgoing;
mod payload;
mod request;
mod served;
mod state;
mod subscription;
#[cfg(test)]
mod tests;
mod transport;
mod windows;
mod worker;

pub use agent::{Agent, AgentError, OnEvent, Typed, on_event, typed};
pub use client::{Client, ClientBuilder};
pub use cx::Cx;
pub use error::{Error, ErrorKind};
pub use parlour_core::{
    AgentId, AgentType, ByteString, Bytes, Event, Fault, FaultKind, Header, InvalidName, Key,
    MAX_HOPS, MessageId, Metadata, MetadataError, Payload, Principal, TopicFilter, TopicId,
    TopicType,
};
pub use payload::{IntoAgentId, IntoPayload, IntoTopicId, Json, PayloadExt};
pub use request::{CallRequest, PublishRequest, Published, Request};
pub use subscription::Subscription;
pub use worker::{AgentOptions, Worker, WorkerBuilder};
