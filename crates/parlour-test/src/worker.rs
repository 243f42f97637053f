use std::fmt;
use std::time::Duration;

use parlour::Error;

use crate::Network;

/// A worker in a [`Room`](crate::Room), as a process of its own would be: it can crash, and its
/// network can fail.
///
/// Dropping this ends the worker, which the host sees as it would see a crash.
pub struct RunningWorker {
    pub(crate) network: Network,
    pub(crate) worker: parlour::RunningWorker,
}

impl RunningWorker {
    /// The way between it and the host.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Its process dies: handlers are aborted, memory is gone, and the host's end of the connection
    /// fails.
    pub fn crash(self) {
        drop(self.worker);
        self.network.cut();
    }

    /// Its connection fails, and it makes a new one.
    pub fn cut(&self) {
        self.network.cut();
    }

    /// From now on nothing passes between it and the host, and neither is told; see
    /// [`Network::partition`].
    pub fn partition(&self) {
        self.network.partition();
    }

    /// Ends [`partition`](Self::partition) and [`delay`](Self::delay).
    pub fn heal(&self) {
        self.network.heal();
    }

    /// From now on each byte takes so long, each way.
    pub fn delay(&self, delay: Duration) {
        self.network.delay(delay);
    }

    /// Shuts it down in order: what runs ends, and nothing new comes.
    pub async fn drain(self) -> Result<(), Error> {
        self.worker.shutdown().await
    }

    /// Whether it has ended, by itself or because it was told to.
    pub fn has_ended(&self) -> bool {
        self.worker.has_ended()
    }
}

impl fmt::Debug for RunningWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunningWorker")
            .field("network", &self.network)
            .field("has_ended", &self.has_ended())
            .finish_non_exhaustive()
    }
}
