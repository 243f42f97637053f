use std::fmt;
use std::ops::ControlFlow;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use parlour_core::CallId;
use parlour_core::wire::{self, Frame};
use tokio::sync::mpsc;
use tokio::time::{self, Sleep};
use tokio_websockets::{CloseCode, Message, WebSocketStream};

use crate::backoff::Backoff;
use crate::handle::{Command, now};
use crate::handlers::Handlers;
use crate::state::State;
use crate::transport::{Connect, Endpoint, Link, protocol};
use crate::{Error, ErrorKind};

/// How long connecting and the handshake may take.
const CONNECT_TIME: Duration = Duration::from_secs(10);
/// How late a host may be beyond two heartbeats.
const HEARTBEAT_SLACK: Duration = Duration::from_secs(5);
/// How long a goodbye may take.
const CLOSE_TIME: Duration = Duration::from_secs(1);
/// Until the host has written this many frames off, it is not read from.
const MAX_OUTBOX: usize = 8192;
/// How many commands are taken at a time.
const COMMANDS: usize = 256;

/// Owns a connection, and makes a new one when it is lost. Serves clients and workers alike.
pub(crate) struct Driver<C> {
    pub(crate) connector: C,
    pub(crate) endpoint: Endpoint,
    pub(crate) commands: mpsc::UnboundedReceiver<Command>,
    pub(crate) state: State,
    pub(crate) handlers: Handlers,
    pub(crate) drain_time: Duration,
    pub(crate) on_connected: Option<Arc<dyn Fn() + Send + Sync>>,
}

/// One connection while it is served.
struct Connection<Io> {
    sink: SplitSink<WebSocketStream<Io>, Message>,
    stream: SplitStream<WebSocketStream<Io>>,
    heartbeat: Duration,
    heard: Instant,
    set_up: bool,
    /// Whether a message is on its way to the socket.
    flushing: bool,
}

/// A shutdown under way.
struct Draining {
    deadline: Instant,
    /// The host answers this ping after it has taken the drain: no call can come any more.
    barrier: u64,
    confirmed: bool,
}

/// Why a connection is no longer served.
enum End {
    /// It was asked for.
    Closed,
    /// The host did not want what the connection began with.
    Refused(Error),
    /// It failed.
    Lost(Error),
}

impl<C: Connect> Driver<C> {
    /// Makes one attempt to connect.
    pub(crate) async fn connect(&self) -> Result<Link<C::Io>, Error> {
        connect(&self.connector, &self.endpoint).await
    }

    /// Serves `link` and those that follow it, until it is closed, all handles are dropped, or
    /// `shutdown` completes and what runs has ended.
    ///
    /// Fails if the host refuses what the first connection begins with. Dropping the future drops the
    /// connection and aborts every handler.
    pub(crate) async fn run(
        mut self,
        link: Link<C::Io>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), Error> {
        let mut shutdown = pin!(shutdown);
        let mut backoff = Backoff::default();
        let (mut link, mut was_set_up) = (link, false);
        loop {
            let began = now();
            let (end, set_up) = self.serve(link, shutdown.as_mut()).await;
            self.handlers.abort_calls();
            was_set_up |= set_up;
            match end {
                End::Closed => {
                    self.state.handle_closed();
                    return Ok(());
                }
                End::Refused(error) if !was_set_up => return Err(error),
                End::Refused(error) | End::Lost(error) => {
                    tracing::warn!(url = self.endpoint.url(), %error, "connection lost");
                }
            }
            self.state.handle_disconnect();
            // A host that takes connections only to end them is spared as one that takes none.
            if now().duration_since(began) > Backoff::CAP {
                backoff.reset();
            }
            match self.reconnect(&mut backoff, shutdown.as_mut()).await {
                Some(next) => link = next,
                None => {
                    self.state.handle_closed();
                    return Ok(());
                }
            }
        }
    }

    /// Connects again. Meanwhile requests wait, each within its deadline. `None` if it is to end.
    async fn reconnect(
        &mut self,
        backoff: &mut Backoff,
        mut shutdown: Pin<&mut impl Future<Output = ()>>,
    ) -> Option<Link<C::Io>> {
        let Self { connector, endpoint, commands, state, handlers, .. } = self;
        let mut attempts = pin!(async {
            loop {
                time::sleep(Duration::from_millis(fastrand::u64(backoff.next_range()))).await;
                match connect(connector, endpoint).await {
                    Ok(link) => break link,
                    Err(error) => tracing::debug!(url = endpoint.url(), %error, "cannot reconnect"),
                }
            }
        });
        loop {
            let deadline = state.poll_timeout();
            tokio::select! {
                link = &mut attempts => return Some(link),
                () = &mut shutdown => return None,
                command = commands.recv() => match command {
                    None | Some(Command::Close) => return None,
                    Some(command) => state.handle_command(command),
                },
                // Events go on; the answers to calls of a connection that is gone go nowhere.
                _ = handlers.next() => {}
                () = sleep_until(deadline) => state.handle_timeout(now()),
            }
        }
    }

    /// Serves one connection. Returns why it ended, and whether it was ever set up.
    async fn serve(
        &mut self,
        link: Link<C::Io>,
        mut shutdown: Pin<&mut impl Future<Output = ()>>,
    ) -> (End, bool) {
        let (sink, stream) = link.socket.split();
        let mut connection = Connection {
            sink,
            stream,
            heartbeat: link.welcome.heartbeat,
            heard: now(),
            set_up: false,
            flushing: false,
        };
        self.state.handle_connected(&link.welcome, now());
        let mut draining = None;
        let end = match self.handle_frames(link.rest, &mut draining) {
            Ok(()) => self.exchange(&mut connection, shutdown.as_mut(), &mut draining).await,
            Err(error) => End::Lost(error),
        };
        // There is no coming back from a shutdown.
        let end = if draining.is_some() { End::Closed } else { end };
        let code = match &end {
            End::Closed => Some(CloseCode::NORMAL_CLOSURE),
            End::Refused(_) => Some(CloseCode::NORMAL_CLOSURE),
            End::Lost(error) if error.kind() == ErrorKind::Protocol => {
                Some(CloseCode::PROTOCOL_ERROR)
            }
            End::Lost(_) => None,
        };
        if let Some(code) = code {
            // The host has gone, or is too slow for a goodbye: then it learns from the socket.
            let _ = time::timeout(CLOSE_TIME, connection.close(code)).await;
        }
        (end, connection.set_up)
    }

    async fn exchange(
        &mut self,
        connection: &mut Connection<C::Io>,
        mut shutdown: Pin<&mut impl Future<Output = ()>>,
        draining: &mut Option<Draining>,
    ) -> End {
        let mut timer = pin!(time::sleep(Duration::ZERO));
        loop {
            if let Some(error) = self.state.poll_refused() {
                return End::Refused(error);
            }
            if self.state.is_set_up() && !connection.set_up {
                connection.set_up = true;
                self.on_connected.iter().for_each(|connected| connected());
            }
            if !connection.flushing
                && let Some(message) = self.state.poll_message(now())
            {
                if let Err(error) = connection.sink.start_send_unpin(Message::binary(message)) {
                    return End::Lost(lost(error));
                }
                connection.flushing = true;
            }
            let idle = !connection.flushing && self.state.outbox_len() == 0;
            if let Some(draining) = draining
                && draining.confirmed
                && idle
                && self.handlers.is_empty()
            {
                return End::Closed;
            }
            let deadlines = [
                self.state.poll_timeout(),
                connection.silent_until(),
                draining.as_ref().map(|draining| draining.deadline),
            ];
            arm(timer.as_mut(), deadlines.into_iter().flatten().min());
            tokio::select! {
                message = connection.stream.next(), if self.state.outbox_len() < MAX_OUTBOX => {
                    connection.heard = now();
                    match self.handle_message(message, draining) {
                        ControlFlow::Continue(()) => {}
                        ControlFlow::Break(error) => return End::Lost(error),
                    }
                }
                flushed = connection.sink.flush(), if connection.flushing => {
                    connection.flushing = false;
                    if let Err(error) = flushed {
                        return End::Lost(lost(error));
                    }
                }
                command = self.commands.recv() => {
                    if self.handle_commands(command).is_break() {
                        let _ = time::timeout(CLOSE_TIME, self.write_rest(connection)).await;
                        return End::Closed;
                    }
                }
                first = self.handlers.next() => {
                    for (id, reply) in first.into_iter().chain(self.handlers.ready()) {
                        self.state.push_reply(id, reply);
                    }
                }
                () = &mut timer => {
                    let now = now();
                    self.state.handle_timeout(now);
                    if connection.silent_until().is_some_and(|at| at <= now) {
                        let error = "the host has been silent for longer than two heartbeats";
                        return End::Lost(Error::new(ErrorKind::ConnectionLost, error));
                    }
                    if let Some(draining) = draining
                        && draining.deadline <= now
                    {
                        tracing::warn!("handlers did not end within the drain time and are aborted");
                        for (id, reply) in self.handlers.give_up() {
                            self.state.push_reply(id, reply);
                        }
                        let _ = time::timeout(CLOSE_TIME, self.write_rest(connection)).await;
                        return End::Closed;
                    }
                }
                () = &mut shutdown, if draining.is_none() => {
                    let barrier = fastrand::u64(1..);
                    self.state.push(Frame::Drain);
                    self.state.push(Frame::Ping(barrier));
                    let deadline = now() + self.drain_time;
                    *draining = Some(Draining { deadline, barrier, confirmed: false });
                }
            }
        }
    }

    /// Takes what the host sent. Breaks with the reason for which the connection ends.
    fn handle_message(
        &mut self,
        message: Option<Result<Message, tokio_websockets::Error>>,
        draining: &mut Option<Draining>,
    ) -> ControlFlow<Error> {
        let message = match message {
            Some(Ok(message)) => message,
            Some(Err(error)) => return ControlFlow::Break(lost(error)),
            None => return ControlFlow::Break(Error::connection_lost(false)),
        };
        if let Some((code, reason)) = message.as_close() {
            let text = format!("the host closed the connection ({}) {reason}", u16::from(code));
            return ControlFlow::Break(Error::new(ErrorKind::ConnectionLost, text.trim_end()));
        }
        if !message.is_binary() {
            return ControlFlow::Continue(());
        }
        match self.handle_frames(message.into_payload().into(), draining) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => ControlFlow::Break(error),
        }
    }

    fn handle_frames(
        &mut self,
        mut frames: Bytes,
        draining: &mut Option<Draining>,
    ) -> Result<(), Error> {
        while !frames.is_empty() {
            // One of a kind that is not known here is skipped.
            let Some(frame) = wire::decode(&mut frames).map_err(protocol)? else { continue };
            match frame {
                Frame::Reply(CallId(0), Err(fault)) => return Err(fault.into()),
                Frame::Reply(id, reply) => self.state.handle_reply(id, reply),
                Frame::Done(done) => self.state.handle_done(done),
                Frame::Call(call) => {
                    let id = call.id;
                    let unwritten = self.state.outbox_len();
                    if let Err(fault) = self.handlers.call(call, unwritten, now()) {
                        self.state.push_reply(id, Err(fault));
                    }
                }
                Frame::Event(event) => {
                    self.state.handle_event(&event);
                    self.handlers.event(&event);
                }
                Frame::Cancel(id) => self.handlers.cancel(id),
                Frame::Ping(number) => self.state.push(Frame::Pong(number)),
                Frame::Pong(number) => {
                    if let Some(draining) = draining
                        && draining.barrier == number
                    {
                        draining.confirmed = true;
                    }
                }
                Frame::Drain => tracing::info!(url = self.endpoint.url(), "the host shuts down"),
                // Only a client says the others: a host that does is wrong about who it is.
                frame => {
                    let text =
                        format!("the host sent a frame that only a client may: {frame:.40?}");
                    return Err(Error::new(ErrorKind::Protocol, text));
                }
            }
        }
        Ok(())
    }

    /// Takes a command, and those behind it. Breaks if the connection is to be closed.
    fn handle_commands(&mut self, first: Option<Command>) -> ControlFlow<()> {
        let mut next = first;
        for _ in 0..COMMANDS {
            match next {
                None | Some(Command::Close) => return ControlFlow::Break(()),
                Some(command) => self.state.handle_command(command),
            }
            match self.commands.try_recv() {
                Ok(command) => next = Some(command),
                Err(_) => break,
            }
        }
        ControlFlow::Continue(())
    }

    /// Writes what still waits to be written.
    async fn write_rest(&mut self, connection: &mut Connection<C::Io>) {
        while connection.sink.flush().await.is_ok() {
            let Some(message) = self.state.poll_message(now()) else { return };
            if connection.sink.start_send_unpin(Message::binary(message)).is_err() {
                return;
            }
        }
    }
}

impl<Io> Connection<Io>
where
    Io: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    /// When the host counts as gone if nothing more is heard of it.
    fn silent_until(&self) -> Option<Instant> {
        (!self.heartbeat.is_zero()).then(|| self.heard + self.heartbeat * 2 + HEARTBEAT_SLACK)
    }

    /// Says goodbye, and waits for the host to say it too.
    async fn close(&mut self, code: CloseCode) {
        if self.sink.send(Message::close(Some(code), "")).await.is_ok() {
            while let Some(Ok(_)) = self.stream.next().await {}
        }
    }
}

async fn connect<C: Connect>(connector: &C, endpoint: &Endpoint) -> Result<Link<C::Io>, Error> {
    match time::timeout(CONNECT_TIME, endpoint.open(connector)).await {
        Ok(link) => link,
        Err(_) => {
            let text = format!("{} did not answer within {CONNECT_TIME:?}", endpoint.url());
            Err(endpoint.unreachable(text))
        }
    }
}

fn lost(error: tokio_websockets::Error) -> Error {
    Error::new(ErrorKind::ConnectionLost, "the connection to the host failed").with_source(error)
}

/// Makes `timer` fire no later than `deadline`. One that fires early does no harm, so a later
/// deadline leaves it alone.
fn arm(mut timer: Pin<&mut Sleep>, deadline: Option<Instant>) {
    const NEVER: Duration = Duration::from_secs(3600);
    let at = deadline.map_or_else(|| time::Instant::now() + NEVER, Into::into);
    if timer.is_elapsed() || at < timer.deadline() {
        timer.as_mut().reset(at);
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

impl<C> fmt::Debug for Driver<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("state", &self.state).finish_non_exhaustive()
    }
}
