use std::fmt;
use std::ops::ControlFlow;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parlour_core::CallId;
use parlour_core::wire::{Frame, Hello, Welcome};
use tokio::sync::mpsc;
use tokio::time;
use tokio_websockets::{CloseCode, Message};

use crate::backoff::Backoff;
use crate::connection::{Connection, Progress, arm};
use crate::handle::{Command, after, now};
use crate::handlers::Handlers;
use crate::state::{Answered, State};
use crate::transport::{Connect, Endpoint, Link};
use crate::{Error, ErrorKind};

/// How long connecting and the handshake may take.
const CONNECT_TIME: Duration = Duration::from_secs(10);
/// While so many frames wait to be written, and may be, the host is not read from.
const MAX_OUTBOX: usize = 8192;
/// The longest pause between two attempts to connect is not shorter than this, in milliseconds, however
/// little time is left.
const LEAST_PAUSE: u64 = 50;
/// How many commands are taken at a time.
const COMMANDS: usize = 256;
/// How many pings a host answers before it counts as having sent all calls from before a drain.
///
/// The first answer comes after all that was queued when the host took the drain. The second gives
/// those a round trip who had found this worker before and had not queued their call yet. A call that
/// comes later still is answered by the host, with a fault, when the connection ends.
const BARRIERS: u32 = 2;

/// Owns a connection, and makes a new one when it is lost. Serves clients and workers alike.
pub(crate) struct Driver<C> {
    pub(crate) connector: Arc<C>,
    pub(crate) endpoint: Arc<Endpoint>,
    pub(crate) commands: mpsc::UnboundedReceiver<Command>,
    pub(crate) state: State,
    pub(crate) handlers: Handlers,
    pub(crate) drain_time: Duration,
    pub(crate) on_connected: Option<Arc<dyn Fn() + Send + Sync>>,
}

/// A shutdown under way.
struct Draining {
    deadline: Instant,
    /// How many answers to pings are missing before no call is expected any more.
    barriers: u32,
}

/// Why a connection is no longer served.
enum End {
    /// It was asked for.
    Closed,
    /// The host did not want what the connection began with.
    Refused(Error),
    /// It failed in a way from which the session does not recover.
    Lost(Error),
    /// Its socket broke.
    Broken(Error),
}

impl End {
    /// What a connection that cannot be read or written ends with.
    fn socket(error: Error) -> Self {
        match error.kind() {
            ErrorKind::ConnectionLost => Self::Broken(error),
            _ => Self::Lost(error),
        }
    }
}

impl<C: Connect> Driver<C> {
    /// Makes one attempt to connect.
    pub(crate) async fn connect(&self) -> Result<Link<C::Io>, Error> {
        let hello = self.state.ask(self.endpoint.hello());
        connect(&*self.connector, &self.endpoint, hello).await
    }

    /// Serves `link` and those that follow it, until it is closed, all handles are dropped, or
    /// `shutdown` completes and what runs has ended.
    ///
    /// Fails if the first connection is lost or refused before it is set up. Dropping the future drops
    /// the connection and aborts every handler.
    pub(crate) async fn run(
        mut self,
        link: Link<C::Io>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), Error> {
        let mut shutdown = pin!(shutdown);
        let mut backoff = Backoff::default();
        let (mut link, mut was_set_up) = (link, false);
        // There is no coming back from a shutdown.
        let mut draining = None;
        loop {
            let began = now();
            let end = self.serve(link, shutdown.as_mut(), &mut draining, &mut was_set_up).await;
            let broke = matches!(end, End::Broken(_));
            match end {
                End::Closed => break,
                End::Refused(error) | End::Lost(error) | End::Broken(error) if !was_set_up => {
                    return Err(error);
                }
                End::Refused(error) | End::Lost(error) | End::Broken(error) => {
                    tracing::warn!(url = self.endpoint.url(), %error, "connection lost");
                }
            }
            if !(broke && self.state.handle_disconnect(now())) {
                self.end_session();
                if draining.is_some() {
                    break;
                }
            }
            // A host that takes connections only to end them is spared as one that takes none.
            if now().duration_since(began) > Backoff::CAP {
                backoff.reset();
            }
            match self.reconnect(&mut backoff, shutdown.as_mut(), &mut draining).await {
                Some(next) => link = next,
                None => break,
            }
        }
        self.handlers.abort_calls();
        if let Some(Draining { deadline, .. }) = draining {
            self.finish_events(deadline).await;
        }
        self.state.handle_closed();
        Ok(())
    }

    /// What runs for the session's callers is of no use any more: they have been told that it is lost.
    fn end_session(&mut self) {
        self.state.end_session();
        self.handlers.abort_calls();
    }

    /// Connects again. Meanwhile requests wait, each within its deadline, and calls go on as long as
    /// the host may still know the session. `None` if it is to end.
    async fn reconnect(
        &mut self,
        backoff: &mut Backoff,
        mut shutdown: Pin<&mut impl Future<Output = ()>>,
        draining: &mut Option<Draining>,
    ) -> Option<Link<C::Io>> {
        let connector = Arc::clone(&self.connector);
        let endpoint = Arc::clone(&self.endpoint);
        let mut attempt = |hello, grace: Option<Duration>| {
            // Several attempts fit into what is left for the session.
            let part = |grace: Duration| (grace.as_millis() as u64 / 4).max(LEAST_PAUSE);
            let most = grace.map_or(u64::MAX, part);
            let pause = fastrand::u64(0..=most.min(*backoff.next_range().end()));
            let pause = Duration::from_millis(pause);
            let (connector, endpoint) = (Arc::clone(&connector), Arc::clone(&endpoint));
            Box::pin(async move {
                time::sleep(pause).await;
                connect(&*connector, &endpoint, hello).await
            })
        };
        let left = |grace: Option<Instant>| grace.map(|at| at.saturating_duration_since(now()));
        let mut attempted =
            attempt(self.state.ask(endpoint.hello()), left(self.state.grace_until()));
        let mut timer = pin!(time::sleep(Duration::ZERO));
        loop {
            let grace = self.state.grace_until();
            let drained_by = draining.as_ref().map(|draining| draining.deadline);
            let deadlines = [self.state.poll_timeout(), grace, drained_by];
            arm(timer.as_mut(), deadlines.into_iter().flatten().min());
            tokio::select! {
                biased;
                link = &mut attempted => match link {
                    Ok(link) => return Some(link),
                    Err(error) => {
                        tracing::debug!(url = endpoint.url(), %error, "cannot reconnect");
                        attempted = attempt(self.state.ask(endpoint.hello()), left(grace));
                    }
                },
                () = &mut shutdown, if draining.is_none() => {
                    *draining = Some(self.drain());
                    grace?;
                }
                command = self.commands.recv() => match command {
                    None | Some(Command::Close) => return None,
                    Some(command) => self.state.handle_command(command),
                },
                ended = self.handlers.next() => {
                    if self.handle_queued_commands().is_break() {
                        return None;
                    }
                    // The answer to a call of a session that is over goes nowhere.
                    if let Some((id, reply)) = ended && grace.is_some() {
                        self.state.push_reply(id, reply);
                    }
                }
                () = &mut timer => {
                    let now = now();
                    self.state.handle_timeout(now);
                    if grace.is_some_and(|at| at <= now) {
                        self.end_session();
                        if draining.is_some() {
                            return None;
                        }
                        // One under way would go on with a session that is forgotten here.
                        attempted = attempt(self.state.ask(endpoint.hello()), None);
                    }
                    if drained_by.is_some_and(|at| at <= now) {
                        return None;
                    }
                }
            }
        }
    }

    /// Begins to shut down: asks for no new work.
    fn drain(&mut self) -> Draining {
        self.state.push(Frame::Drain);
        self.state.push(Frame::Ping(BARRIERS.into()));
        Draining { deadline: after(self.drain_time), barriers: BARRIERS }
    }

    /// Waits without a connection until the events that came have been handled, but no longer than
    /// until `deadline`. What their handlers send meanwhile fails at once.
    async fn finish_events(&mut self, deadline: Instant) {
        let mut time = pin!(time::sleep_until(deadline.into()));
        while !self.handlers.is_empty() {
            self.state.handle_closed();
            tokio::select! {
                biased;
                _ = self.handlers.next() => {}
                command = self.commands.recv() => match command {
                    Some(command) => self.state.handle_command(command),
                    None => return,
                },
                () = &mut time => {
                    tracing::warn!("events still handled after the drain time are aborted");
                    return;
                }
            }
        }
    }

    /// Serves one connection, and returns why it ended.
    async fn serve(
        &mut self,
        link: Link<C::Io>,
        shutdown: Pin<&mut impl Future<Output = ()>>,
        draining: &mut Option<Draining>,
        was_set_up: &mut bool,
    ) -> End {
        let mut connection = Connection::new(link.socket, link.read, &link.welcome);
        let end = match self.begin(&link.welcome, link.rest, draining) {
            Ok(resumed) => {
                self.exchange(&mut connection, shutdown, draining, was_set_up, resumed).await
            }
            Err(error) => End::Lost(error),
        };
        let code = match &end {
            // A goodbye, if it came through, would end the session at the host.
            End::Broken(_) => return end,
            End::Closed | End::Refused(_) => CloseCode::NORMAL_CLOSURE,
            End::Lost(error) if error.kind() == ErrorKind::Protocol => CloseCode::PROTOCOL_ERROR,
            End::Lost(_) => CloseCode::GOING_AWAY,
        };
        // What waits after a loss is for the next connection.
        let (ends, state) = (matches!(end, End::Closed), &mut self.state);
        connection.close(code, || if ends { state.poll_message(now()) } else { None }).await;
        end
    }

    /// Takes the host's welcome, and the frames that came with it. Returns whether the session goes on.
    fn begin(
        &mut self,
        welcome: &Welcome,
        frames: Bytes,
        draining: &mut Option<Draining>,
    ) -> Result<bool, Error> {
        let resumed = self.state.handle_connected(welcome, now())?;
        match draining {
            // What was to be finished is lost.
            Some(_) if !resumed => return Err(Error::connection_lost(false)),
            // A ping belongs to its connection, and so does its answer.
            Some(draining) if draining.barriers > 0 => {
                self.state.push(Frame::Ping(draining.barriers.into()));
            }
            _ if !resumed => self.handlers.abort_calls(),
            _ => {}
        }
        self.handle_frames(frames, draining)?;
        Ok(resumed)
    }

    async fn exchange(
        &mut self,
        connection: &mut Connection<C::Io>,
        mut shutdown: Pin<&mut impl Future<Output = ()>>,
        draining: &mut Option<Draining>,
        was_set_up: &mut bool,
        resumed: bool,
    ) -> End {
        let mut is_set_up = resumed && self.state.is_set_up();
        let mut timer = pin!(time::sleep(Duration::ZERO));
        loop {
            if let Some(error) = self.state.poll_refused() {
                return End::Refused(error);
            }
            if self.state.is_set_up() && !is_set_up {
                (is_set_up, *was_set_up) = (true, true);
                if let Some(connected) = &self.on_connected {
                    connected();
                }
            }
            if !connection.is_writing()
                && let Some(message) = self.state.poll_message(now())
                && let Err(error) = connection.write(message)
            {
                return End::socket(error);
            }
            if let Some(draining) = draining
                && draining.barriers == 0
                && self.handlers.is_empty()
                && self.state.outbox_len() == 0
                && !connection.is_writing()
            {
                return End::Closed;
            }
            let drained_by = draining.as_ref().map(|draining| draining.deadline);
            // What the host acknowledges comes behind the rest.
            let reads = self.state.outbox_len() < MAX_OUTBOX || !self.state.has_credit();
            connection.set_reading(reads);
            let deadlines = [self.state.poll_timeout(), connection.silent_until(), drained_by];
            arm(timer.as_mut(), deadlines.into_iter().flatten().min());
            tokio::select! {
                // The socket last: one that always has more to read must not starve the rest.
                biased;
                () = &mut timer => {
                    let now = now();
                    self.state.handle_timeout(now);
                    if connection.is_silent(now) {
                        let error = "the host has been silent for longer than two heartbeats";
                        return End::Broken(Error::new(ErrorKind::ConnectionLost, error));
                    }
                    if drained_by.is_some_and(|at| at <= now) {
                        tracing::warn!("what still runs after the drain time is aborted");
                        for (id, reply) in self.handlers.give_up() {
                            self.state.push_reply(id, reply);
                        }
                        return End::Closed;
                    }
                }
                () = &mut shutdown, if draining.is_none() => {
                    *draining = Some(self.drain());
                }
                command = self.commands.recv() => {
                    if command.is_none() || self.handle_commands(command, COMMANDS).is_break() {
                        return End::Closed;
                    }
                }
                first = self.handlers.next() => {
                    let closes = self.handle_queued_commands().is_break();
                    for (id, reply) in first.into_iter().chain(self.handlers.ready()) {
                        self.state.push_reply(id, reply);
                    }
                    if closes {
                        return End::Closed;
                    }
                }
                progress = connection.progress() => {
                    let handled = match progress {
                        Ok(Progress::Received(message)) => self.handle_message(message, draining),
                        Ok(Progress::Written) => Ok(()),
                        Err(error) => return End::socket(error),
                    };
                    if let Err(error) = handled {
                        return End::Lost(error);
                    }
                }
            }
        }
    }

    /// Takes what the host sent. Fails with the reason for which the connection ends.
    fn handle_message(
        &mut self,
        message: Message,
        draining: &mut Option<Draining>,
    ) -> Result<(), Error> {
        if let Some((code, reason)) = message.as_close() {
            let text = format!("the host closed the connection ({}) {reason}", u16::from(code));
            return Err(Error::new(ErrorKind::ConnectionLost, text.trim_end()));
        }
        match message.is_binary() {
            true => self.handle_frames(message.into_payload().into(), draining),
            // The socket itself answers the WebSocket's own pings.
            false => Ok(()),
        }
    }

    fn handle_frames(
        &mut self,
        mut frames: Bytes,
        draining: &mut Option<Draining>,
    ) -> Result<(), Error> {
        while !frames.is_empty() {
            let Some(frame) = self.state.receive(&mut frames)? else { continue };
            match frame {
                Frame::Reply(CallId(0), Err(fault)) => return Err(fault.into()),
                Frame::Reply(id, reply) => self.state.handle_reply(id, reply),
                Frame::Progress(id, payload) => self.state.handle_progress(id, payload),
                // A host answers no attempts; one that did would answer a call.
                Frame::Outcome(outcome) => self.state.handle_reply(outcome.id, outcome.reply),
                Frame::Done(done) => self.state.handle_answer(Answered::Done(done)),
                Frame::Accepted(it) => self.state.handle_answer(Answered::Accepted(it)),
                Frame::Published(it) => self.state.handle_answer(Answered::Published(it)),
                Frame::Delivery(it) => self.state.handle_answer(Answered::Delivery(it)),
                Frame::Stale(_, attempt) => {
                    let (delivery, attempt) = (attempt.delivery, attempt.number);
                    tracing::warn!(%delivery, attempt, "an agent's answer came too late to count");
                }
                Frame::Call(call) => {
                    let (id, is_durable) = (call.id, call.attempt.is_some());
                    if let Some(attempt) = call.attempt {
                        self.state.begin_attempt(id, attempt);
                    }
                    let unwritten = self.state.unwritten_replies();
                    match self.handlers.call(*call, unwritten) {
                        Ok(()) if is_durable => self.state.push(Frame::Received(id)),
                        Ok(()) => {}
                        Err(fault) => self.state.push_reply(id, Err(fault)),
                    }
                }
                Frame::Event(event) => {
                    self.state.handle_event(&event);
                    self.handlers.event(&event);
                }
                Frame::Cancel(id) => {
                    self.handlers.cancel(id);
                    self.state.end_attempt(id);
                }
                Frame::Pong(number) => {
                    if let Some(draining) = draining
                        && number == u64::from(draining.barriers)
                        && number > 0
                    {
                        draining.barriers -= 1;
                        if draining.barriers > 0 {
                            self.state.push(Frame::Ping(draining.barriers.into()));
                        }
                    }
                }
                Frame::Drain => tracing::info!(url = self.endpoint.url(), "the host shuts down"),
                Frame::Leave => {
                    tracing::info!(url = self.endpoint.url(), "the host has this worker leave");
                    if draining.is_none() {
                        *draining = Some(self.drain());
                    }
                }
                // The others are a client's, or come once.
                _ => {
                    let text = "the host sent a frame that it may not send";
                    return Err(Error::new(ErrorKind::Protocol, text));
                }
            }
        }
        Ok(())
    }

    /// Takes what was asked for before: a handler that has ended spoke of its progress first.
    fn handle_queued_commands(&mut self) -> ControlFlow<()> {
        self.handle_commands(None, self.commands.len())
    }

    /// Takes `first` and what waits behind it, up to `most` commands. Breaks if the connection is to be
    /// closed.
    fn handle_commands(&mut self, first: Option<Command>, most: usize) -> ControlFlow<()> {
        let behind = std::iter::from_fn(|| self.commands.try_recv().ok());
        for command in first.into_iter().chain(behind).take(most) {
            match command {
                Command::Close => return ControlFlow::Break(()),
                command => self.state.handle_command(command),
            }
        }
        ControlFlow::Continue(())
    }
}

async fn connect<C: Connect>(
    connector: &C,
    endpoint: &Endpoint,
    hello: Hello,
) -> Result<Link<C::Io>, Error> {
    match time::timeout(CONNECT_TIME, endpoint.open(connector, hello)).await {
        Ok(link) => link,
        Err(_) => {
            let text = format!("{} did not answer within {CONNECT_TIME:?}", endpoint.url());
            Err(endpoint.unreachable(text))
        }
    }
}

impl<C> fmt::Debug for Driver<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("state", &self.state).finish_non_exhaustive()
    }
}
