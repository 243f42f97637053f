//! A whole room in memory, for the tests of agents: a host, clients and workers that join it, and a
//! network between them that can be told to misbehave.
//!
//! Nothing here binds a port or waits for a real clock. Under a paused one (tokio's feature
//! `test-util`) an hour of heartbeats takes milliseconds, and the same test always takes the same
//! course.
//!
//! ```
//! use parlour::{ErrorKind, FaultKind, Worker};
//! use parlour_test::Room;
//! use std::time::Duration;
//!
//! #[tokio::main(flavor = "current_thread", start_paused = true)]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let room = Room::open();
//!     let slow = Worker::builder(room.url()).agent("slow", async || {
//!         tokio::time::sleep(Duration::from_secs(5)).await;
//!         "done"
//!     });
//!     let worker = room.worker(slow).await?;
//!     let client = room.client().await?;
//!
//!     assert_eq!(client.call("slow", "").await?.bytes, "done");
//!
//!     // What a caller hears when the worker dies in the middle:
//!     let call = tokio::spawn(client.call("slow", "").into_future());
//!     tokio::time::sleep(Duration::from_secs(1)).await;
//!     worker.crash();
//!     let error = call.await?.unwrap_err();
//!     assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::WorkerLost));
//!     assert!(error.may_have_run());
//!     Ok(())
//! }
//! ```
//!
//! A worker can also be [cut](RunningWorker::cut) off, [partitioned](RunningWorker::partition) and
//! [delayed](RunningWorker::delay), the host can [crash](Room::crash) and [start](Room::start) again, and
//! a [`Network`], which [`Room::join`] gives for a client, does all that a line can do to either.

mod network;
mod room;
mod worker;

pub use network::{Direction, Network, Pipe};
pub use parlour_host::Config;
pub use room::Room;
pub use worker::RunningWorker;
