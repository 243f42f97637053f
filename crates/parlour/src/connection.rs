use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use parlour_core::wire::Welcome;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{self, Sleep};
use tokio_websockets::{CloseCode, Message, WebSocketStream};

use crate::handle::{after, now};
use crate::transport::Counted;
use crate::{Error, ErrorKind};

/// How late a host may be beyond two heartbeats: less than the time for which it keeps a session.
const HEARTBEAT_SLACK: Duration = Duration::from_secs(1);
/// How long a goodbye may take.
const CLOSE_TIME: Duration = Duration::from_secs(1);

/// A WebSocket while it is served. Its halves are driven by one task.
pub(crate) struct Connection<Io> {
    sink: SplitSink<WebSocketStream<Counted<Io>>, Message>,
    stream: SplitStream<WebSocketStream<Counted<Io>>>,
    /// How many bytes have come, and how many when the host was last heard.
    read: Arc<AtomicU64>,
    heard: u64,
    /// How long a host that is listened to may be silent; `None` if it sends no heartbeats.
    patience: Option<Duration>,
    /// When it has been.
    silent_at: Instant,
    reading: bool,
    /// Whether a message is on its way to the socket.
    writing: bool,
}

/// What a connection's socket did.
pub(crate) enum Progress {
    /// The host sent this.
    Received(Message),
    /// What was to be written is written.
    Written,
}

impl<Io: AsyncRead + AsyncWrite + Unpin> Connection<Io> {
    pub(crate) fn new(
        socket: WebSocketStream<Counted<Io>>,
        read: Arc<AtomicU64>,
        welcome: &Welcome,
    ) -> Self {
        let (sink, stream) = socket.split();
        let heartbeat = Some(welcome.heartbeat).filter(|heartbeat| !heartbeat.is_zero());
        let patience =
            heartbeat.map(|heartbeat| heartbeat.saturating_mul(2).saturating_add(HEARTBEAT_SLACK));
        let mut connection = Self {
            sink,
            stream,
            read,
            heard: 0,
            patience,
            silent_at: now(),
            reading: true,
            writing: false,
        };
        connection.hear();
        connection
    }

    fn hear(&mut self) {
        self.heard = self.read.load(Relaxed);
        self.silent_at = after(self.patience.unwrap_or_default());
    }

    /// Whether the host has said nothing for too long. A large message may come slowly.
    pub(crate) fn is_silent(&mut self, now: Instant) -> bool {
        let is_over = self.silent_until().is_some_and(|at| at <= now);
        if is_over && self.read.load(Relaxed) != self.heard {
            self.hear();
            return false;
        }
        is_over
    }

    /// Reads from the host, or pauses. Its silence counts from when it is listened to.
    pub(crate) fn set_reading(&mut self, reading: bool) {
        if reading && !self.reading {
            self.hear();
        }
        self.reading = reading;
    }

    /// Whether a message is still being written: then no other may be begun.
    pub(crate) fn is_writing(&self) -> bool {
        self.writing
    }

    /// Begins to write a message; [`progress`](Self::progress) carries on.
    pub(crate) fn write(&mut self, message: Bytes) -> Result<(), Error> {
        self.writing = true;
        self.sink.start_send_unpin(Message::binary(message)).map_err(lost)
    }

    /// Writes on, and unless reading is paused, waits for what the host sends. Cancel safe.
    pub(crate) async fn progress(&mut self) -> Result<Progress, Error> {
        tokio::select! {
            biased;
            written = self.sink.flush(), if self.writing => {
                self.writing = false;
                written.map(|()| Progress::Written).map_err(lost)
            }
            message = self.stream.next(), if self.reading => {
                self.hear();
                let message = message.ok_or_else(|| Error::connection_lost(false))?;
                message.map(Progress::Received).map_err(lost)
            }
            else => std::future::pending().await,
        }
    }

    /// When the host counts as gone if nothing more is heard of it.
    pub(crate) fn silent_until(&self) -> Option<Instant> {
        (self.reading && self.patience.is_some()).then_some(self.silent_at)
    }

    /// Writes what `rest` still gives, says goodbye, and waits for the host to say it too, but all
    /// that not for long.
    pub(crate) async fn close(mut self, code: CloseCode, rest: impl FnMut() -> Option<Bytes>) {
        // A host that has gone, or is too slow for a goodbye, learns from the socket.
        let _ = time::timeout(CLOSE_TIME, self.say_goodbye(code, rest)).await;
    }

    async fn say_goodbye(
        &mut self,
        code: CloseCode,
        mut rest: impl FnMut() -> Option<Bytes>,
    ) -> Result<(), tokio_websockets::Error> {
        self.sink.flush().await?;
        while let Some(message) = rest() {
            self.sink.send(Message::binary(message)).await?;
        }
        self.sink.send(Message::close(Some(code), "")).await?;
        while let Some(Ok(_)) = self.stream.next().await {}
        Ok(())
    }
}

fn lost(error: tokio_websockets::Error) -> Error {
    let (kind, text) = match &error {
        tokio_websockets::Error::Io(_) | tokio_websockets::Error::AlreadyClosed => {
            (ErrorKind::ConnectionLost, "the connection to the host failed")
        }
        _ => (ErrorKind::Protocol, "the host sent what is no message"),
    };
    Error::new(kind, text).with_source(error)
}

/// Makes `timer` fire no later than `deadline`. One that fires early does no harm, so a later
/// deadline leaves it alone.
pub(crate) fn arm(timer: Pin<&mut Sleep>, deadline: Option<Instant>) {
    const NEVER: Duration = Duration::from_secs(3600);
    let at = deadline.map_or_else(|| time::Instant::now() + NEVER, Into::into);
    if timer.is_elapsed() || at < timer.deadline() {
        timer.reset(at);
    }
}
