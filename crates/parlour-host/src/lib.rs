//! The host: one program that routes calls and events between agents, over every door.
//!
//! ```no_run
//! # async fn example() -> std::io::Result<()> {
//! use parlour_host::{Config, Host};
//!
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
//! let host = Host::new(Config::default());
//! host.serve(listener, std::future::pending()).await
//! # }
//! ```
//!
//! `ARCHITECTURE.md` follows one call through these modules.

pub mod backbone;
mod channel;
pub mod config;
mod connection;
mod durable;
mod event;
mod exchange;
mod http;
mod io;
mod json;
mod link;
mod metrics;
mod peer;
pub mod store;
mod thread;
mod view;

use std::future::Future;
use std::sync::Arc;

use tokio::sync::Semaphore;

pub use crate::config::{Config, ConfigError, Setting};
pub use crate::http::problem::{JSON_RPC_FAULT, http_status};
pub use crate::http::server::Listener;
pub use crate::io::Io;

use crate::backbone::{Backbone, Memory};
use crate::durable::Durable;
use crate::exchange::Exchange;
use crate::http::guard::Guard;
use crate::http::router::{App, router};
use crate::http::tasks::Tasks;
use crate::http::upgrade::Lobby;

/// A host: the room in memory, and the doors to it.
pub struct Host {
    app: App,
}

impl Host {
    /// A host that lets in whoever can reach its port.
    pub fn new(config: Config) -> Self {
        Self::build(config, None)
    }

    /// A host that lets in only who shows `token` as a bearer token.
    pub fn with_token(config: Config, token: &str) -> Self {
        Self::build(config, Some(token))
    }

    fn build(config: Config, token: Option<&str>) -> Self {
        let backbone = Arc::new(Memory::new(config.durable.partitions as u16));
        let exchange = Exchange::new(Arc::new(config));
        let config = exchange.config();
        let guard = Arc::new(Guard::new(config, token, exchange.metrics().clone()));
        let places = Arc::new(Semaphore::new(config.limits.connections));
        let (lobby, tasks) = (Lobby::default(), Tasks::default());
        let durable = Durable::new(&exchange, &tasks, backbone);
        Self { app: App { exchange, durable, guard, lobby, tasks, places } }
    }

    /// Has what is durable kept by `backbone`. Without, it is kept in memory and ends with the host.
    #[must_use]
    pub fn keep(mut self, backbone: Arc<dyn Backbone>) -> Self {
        self.app.durable = Durable::new(&self.app.exchange, &self.app.tasks, backbone);
        self
    }

    /// Serves `listener` until `shutdown` completes, and then until what is in flight has ended.
    ///
    /// From the begin of the shutdown `/readyz` answers 503 and new calls are refused, but for those
    /// that running ones make; when all have ended, or after `server.drain_timeout`, the port
    /// closes and channels are closed with 1001. When it returns, no connection is open and no task
    /// of the host runs.
    pub async fn serve(
        self,
        listener: impl Listener,
        shutdown: impl Future<Output = ()>,
    ) -> std::io::Result<()> {
        let router = router(self.app.clone());
        http::server::serve(self.app, router, listener, shutdown).await
    }
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").finish_non_exhaustive()
    }
}
