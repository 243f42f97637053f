use std::fmt;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use parlour::{Client, ClientBuilder, Connect, Error, WorkerBuilder};
use parlour_host::{Config, Host, Io, Listener};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::{Network, Pipe, RunningWorker};

/// The host's name, which it lets requests name.
const URL: &str = "http://localhost";

/// A host in memory. Clones are the same one, which ends with the runtime.
///
/// ```
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use parlour::Client;
/// use parlour_test::{Config, Room};
///
/// let mut config = Config::default();
/// config.set("limits.payload_bytes", "1KiB")?;
/// let room = Room::with_config(config);
///
/// let (client, network) = room.join(Client::builder(room.url()).name("far away")).await?;
/// network.delay(std::time::Duration::from_millis(200));
/// assert!(client.call("echo", vec![0; 2000]).await.is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Room(Arc<Inner>);

struct Inner {
    config: Config,
    state: Mutex<State>,
}

struct State {
    /// Takes connections to the host; none while it is down.
    host: Option<Running>,
    /// Of every member there was.
    networks: Vec<Network>,
}

struct Running {
    door: mpsc::UnboundedSender<Pipe>,
    shutdown: oneshot::Sender<()>,
    serving: JoinHandle<io::Result<()>>,
}

struct Door(mpsc::UnboundedReceiver<Pipe>);

impl Listener for Door {
    async fn accept(&mut self) -> io::Result<Box<dyn Io>> {
        match self.0.recv().await {
            Some(pipe) => Ok(Box::new(pipe)),
            None => std::future::pending().await,
        }
    }
}

/// Makes a member's connections.
struct Connector {
    room: Room,
    network: Network,
}

impl Connect for Connector {
    type Io = Pipe;

    async fn connect(&self, _host: &str, _port: u16) -> io::Result<Pipe> {
        self.room.dial(&self.network).await
    }
}

impl Room {
    /// Starts a host. Must be called within a tokio runtime.
    pub fn open() -> Self {
        Self::with_config(Config::default())
    }

    /// Starts a host with these settings.
    pub fn with_config(config: Config) -> Self {
        let state = Mutex::new(State { host: None, networks: Vec::new() });
        let room = Self(Arc::new(Inner { config, state }));
        room.start();
        room
    }

    /// What to give to `Worker::builder` and `Client::builder`.
    pub fn url(&self) -> &'static str {
        URL
    }

    /// Starts the host after [`crash`](Self::crash) or [`stop`](Self::stop); it knows nothing of
    /// before.
    pub fn start(&self) {
        let mut state = self.0.state.lock();
        if state.host.is_none() {
            let (door, incoming) = mpsc::unbounded_channel();
            let (shutdown, shut) = oneshot::channel();
            let host = Host::new(self.0.config.clone());
            let serving = tokio::spawn(host.serve(Door(incoming), async {
                // A room that is dropped is no reason to shut the host down.
                if shut.await.is_err() {
                    std::future::pending::<()>().await;
                }
            }));
            state.host = Some(Running { door, shutdown, serving });
        }
    }

    /// The host dies: every connection fails, and new ones are refused until [`start`](Self::start).
    pub async fn crash(&self) {
        let (host, networks) = {
            let mut state = self.0.state.lock();
            (state.host.take(), state.networks.clone())
        };
        if let Some(host) = host {
            host.serving.abort();
            // It ended by being aborted.
            let _ = host.serving.await;
        }
        // The tasks of the host that was end as their sockets do.
        networks.iter().for_each(Network::cut);
    }

    /// Shuts the host down in order, as a signal would: what is in flight ends, but no later than
    /// after `server.drain_timeout`.
    pub async fn stop(&self) {
        let host = self.0.state.lock().host.take();
        if let Some(Running { door, shutdown, serving }) = host {
            let _ = shutdown.send(());
            let _ = serving.await;
            drop(door);
        }
    }

    /// A client on a network without faults.
    pub async fn client(&self) -> Result<Client, Error> {
        Ok(self.join(Client::builder(URL)).await?.0)
    }

    /// Connects a client, and returns with it the way between it and the host.
    pub async fn join(&self, client: ClientBuilder) -> Result<(Client, Network), Error> {
        let network = self.network();
        Ok((self.join_over(client, &network).await?, network))
    }

    /// Connects a client over `network`.
    pub async fn join_over(
        &self,
        client: ClientBuilder,
        network: &Network,
    ) -> Result<Client, Error> {
        let connector = Connector { room: self.clone(), network: network.clone() };
        client.connect_with(connector).await
    }

    /// Runs a worker, and returns once the host has confirmed everything it serves.
    ///
    /// Fails as `Worker::run` does.
    pub async fn worker(&self, worker: WorkerBuilder) -> Result<RunningWorker, Error> {
        self.worker_over(worker, &self.network()).await
    }

    /// Runs a worker over `network`.
    pub async fn worker_over(
        &self,
        worker: WorkerBuilder,
        network: &Network,
    ) -> Result<RunningWorker, Error> {
        let connector = Connector { room: self.clone(), network: network.clone() };
        let worker = worker.build()?.start_with(connector).await?;
        Ok(RunningWorker { network: network.clone(), worker })
    }

    /// A network between a new member and this host.
    pub fn network(&self) -> Network {
        let mut state = self.0.state.lock();
        let network = Network::new(fastrand::u64(..));
        state.networks.push(network.clone());
        network
    }

    /// A connection to the host as a stream of bytes. Waits while `network` is partitioned; refused
    /// while the host is down.
    pub async fn dial(&self, network: &Network) -> io::Result<Pipe> {
        network.reach().await;
        let state = self.0.state.lock();
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        let host = state.host.as_ref().ok_or_else(refused)?;
        let (member, host_end) = network.connect();
        host.door.send(host_end).map_err(|_| refused())?;
        Ok(member)
    }

    /// The body of the host's answer to `GET path`, such as `/metrics` or `/v1/workers`.
    pub async fn get(&self, path: &str) -> io::Result<String> {
        let mut pipe = self.dial(&Network::new(0)).await?;
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        pipe.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        pipe.read_to_string(&mut answer).await?;
        let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
        body.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state.lock();
        f.debug_struct("Room")
            .field("is_up", &state.host.is_some())
            .field("members", &state.networks.len())
            .finish_non_exhaustive()
    }
}
