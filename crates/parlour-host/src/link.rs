//! What a channel's task needs of a socket, and how a WebSocket gives it.

#[cfg(test)]
mod echo;

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use bytestring::ByteString;
use futures_util::{Sink as _, Stream as _};
use parlour_core::wire::{Frame, Hello, Welcome};
use parlour_core::{Call, CallId, Fault, Payload, Recipients, Reply};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_websockets::{CloseCode, Error, Message, WebSocketStream};

use crate::event::SharedEvent;
use crate::io::{Socket, is_stalled};
use crate::peer::Close;

/// A socket that carries whole frames, whatever protocol they are written in.
pub(crate) trait Link: Send {
    /// Whether the first frame must be [`Frame::Hello`].
    const GREETS: bool;

    /// Takes frames that came into `frames`, and meanwhile writes what was sent.
    ///
    /// Reading and writing are driven together so that neither can starve the other. Without `read`
    /// nothing is taken; with `wants_room` it also returns as soon as there is room to send more.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no frame.
    fn receive(
        &mut self,
        read: bool,
        wants_room: bool,
        frames: &mut Vec<Frame>,
    ) -> impl Future<Output = Received> + Send;

    /// Queues `item` to be written, or says why this protocol cannot carry it.
    fn send(&mut self, item: Sendable<'_>) -> Result<(), Fault>;

    /// Whether more may be sent without keeping much in memory.
    fn has_room(&self) -> bool;

    /// Whether since this was last asked bytes moved that only a living peer moves: some that came from
    /// it, also of a message that is not whole yet, or some that waited to be written.
    fn has_moved(&mut self) -> bool;

    /// How many more frames it takes, if it said so.
    fn credit(&self) -> Option<u64>;

    /// Closes the socket without a word: its peer is to come back on another.
    fn cut(&mut self);

    /// Goes on over another socket: greets the peer there, and sends again what it lacks.
    fn resume(&mut self, resumption: Resumption) -> Result<(), Close>;

    /// Begins to close; [`receive`](Self::receive) says when that is done.
    fn close(&mut self, close: &Close);

    /// Lets the peer read what was written last before the socket goes.
    fn linger(self) -> impl Future<Output = ()> + Send;
}

/// What [`Link::receive`] returns with.
#[derive(Debug)]
pub(crate) enum Received {
    /// The peer is alive; its frames, if any, were taken. If there is `more`, the others get their turn
    /// first.
    Heard { more: bool },
    /// There is room to send more.
    Room,
    /// The peer said something that ends the channel.
    Refused(Close),
    /// The socket was closed by the peer, which said so.
    Closed,
    /// The socket broke.
    Dropped,
    /// The peer took nothing for too long.
    Stalled,
}

/// What can be sent.
#[derive(Debug)]
pub(crate) enum Sendable<'a> {
    Call(CallId, &'a Call, Duration),
    Withdraw(CallId),
    Progress(CallId, &'a Payload),
    Reply(CallId, &'a Reply),
    Event(&'a SharedEvent, &'a Recipients),
    Frame(&'a Frame),
    Drain,
    Ping,
}

/// A protocol on a WebSocket: its translation to and from frames.
pub(crate) trait Protocol: Send {
    const GREETS: bool;

    /// Hears of a message's kind before its frames are taken; one of the wrong kind ends the channel
    /// with the reason returned.
    fn begin(&mut self, is_text: bool) -> Result<(), &'static str>;

    /// Takes the next frame off `message`; none if that frame is to be skipped.
    fn decode(&mut self, message: &mut Bytes) -> Result<Option<Frame>, Close>;

    /// Writes one item.
    fn encode(&mut self, item: Sendable<'_>, out: &mut Outbox) -> Result<(), Fault>;

    /// How many more frames it takes, if it said so.
    fn credit(&self) -> Option<u64> {
        None
    }

    /// Ends a batch, which is about to be written and may have to be sent again.
    fn seal(&mut self, batch: BytesMut) -> Bytes {
        batch.freeze()
    }

    /// Hands on the messages of a batch.
    fn write(&self, batch: Bytes, mut give: impl FnMut(Message)) {
        give(Message::binary(batch));
    }

    /// What to write first on another socket of the same session.
    fn resume(&mut self, _hello: &Hello, _welcome: Welcome) -> Result<Vec<Bytes>, Close> {
        Err(Close::new(Close::PROTOCOL, "this protocol knows no sessions"))
    }
}

/// A socket on which a client goes on with its session: what it said, and what it is answered.
pub(crate) struct Resumption {
    pub(crate) socket: WebSocketStream<Socket>,
    pub(crate) hello: Hello,
    pub(crate) welcome: Welcome,
}

impl fmt::Debug for Resumption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resumption").field("hello", &self.hello).finish_non_exhaustive()
    }
}

/// Where a protocol writes to.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    /// Frames of one binary message to come.
    pub(crate) batch: BytesMut,
    /// Whole text messages.
    pub(crate) texts: Vec<ByteString>,
    /// A ping of the WebSocket's own is due.
    pub(crate) ping: bool,
}

/// Unwritten bytes up to which more is taken from the queue.
const ROOM: usize = 64 * 1024;
/// A binary message is not filled further than this: with one frame more it stays below what a peer
/// takes at the least.
const FULL_BATCH: usize = 32 * 1024;
/// Room in a new batch, beside what is usual, for what a frame asks for before it knows how long it is.
const SPARE: usize = 512;
/// What a WebSocket frame adds to a payload of common size (RFC 6455 §5.2).
const FRAME_HEADER: usize = 4;
/// Frames taken before what they ask for is begun.
const FRAMES_AT_ONCE: usize = 256;
/// A message counts as one frame more for each of so many bytes: 1 MiB in all.
const FRAME_BYTES: usize = 4096;
/// How long, and for how many bytes, a closed peer may go on sending before the socket goes.
const LINGER: (Duration, usize) = (Duration::from_secs(1), 8 * 1024 * 1024);

/// A WebSocket that speaks protocol `P`.
pub(crate) struct WebSocketLink<P> {
    socket: WebSocketStream<Socket>,
    protocol: P,
    outbox: Outbox,
    /// How long the last batches were: room for the next.
    usual: usize,
    /// What of a message has not been decoded yet.
    undecoded: Bytes,
    /// Bytes that the socket will have written when all that it was given is out.
    given: u64,
    failed: bool,
    /// The peer has said that it closes.
    goodbye: bool,
    /// How the socket ended, while what came before that is handled.
    ended: Option<Received>,
    /// Bytes of answers to pings that were not written when last all was.
    pongs: usize,
    moved: Moved,
}

/// Bytes that had moved when that was last asked, and that waited then.
#[derive(Debug, Default)]
struct Moved {
    read: u64,
    written: u64,
    backlog: u64,
}

impl<P: Protocol> WebSocketLink<P> {
    pub(crate) fn new(socket: WebSocketStream<Socket>, protocol: P) -> Self {
        let (outbox, usual, undecoded, given, failed, goodbye, ended, pongs, moved) =
            Default::default();
        Self {
            socket,
            protocol,
            outbox,
            usual,
            undecoded,
            given,
            failed,
            goodbye,
            ended,
            pongs,
            moved,
        }
    }

    /// Gives the socket up to the session that goes on over it.
    pub(crate) fn into_resumption(self, hello: Hello, welcome: Welcome) -> Resumption {
        Resumption { socket: self.socket, hello, welcome }
    }

    fn pending(&self) -> usize {
        let unwritten = self.given.saturating_sub(self.socket.get_ref().written());
        unwritten as usize + self.outbox.batch.len()
    }

    /// Hands what the protocol wrote to the socket's queue.
    fn seal(&mut self) {
        for text in std::mem::take(&mut self.outbox.texts) {
            self.give(Message::text(text.into_bytes()));
        }
        let batch = self.protocol.seal(std::mem::take(&mut self.outbox.batch));
        if !batch.is_empty() {
            self.usual = batch.len().max(self.usual / 2);
            self.write(batch);
        }
        if std::mem::take(&mut self.outbox.ping) {
            self.give(Message::ping(""));
        }
    }

    fn give(&mut self, message: Message) {
        give(&mut self.socket, &mut self.given, message);
    }

    fn write(&mut self, batch: Bytes) {
        let Self { socket, given, protocol, .. } = self;
        protocol.write(batch, |message| give(socket, given, message));
    }

    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        (read, wants_room): (bool, bool),
        frames: &mut Vec<Frame>,
    ) -> Poll<Received> {
        if let Some(ended) = self.ended.take() {
            return Poll::Ready(ended);
        }
        self.seal();
        match Pin::new(&mut self.socket).poll_flush(cx) {
            Poll::Ready(Ok(())) => {
                self.given = self.socket.get_ref().written();
                self.pongs = 0;
            }
            Poll::Ready(Err(error)) => return Poll::Ready(self.ended(&error)),
            Poll::Pending => {}
        }
        if wants_room && self.has_room() {
            return Poll::Ready(Received::Room);
        }
        // A peer that pings without end and reads no answer is not read from either.
        if !read || self.pongs > ROOM {
            return Poll::Pending;
        }
        let mut heard = false;
        // Counts also what is skipped, and what is the link's own.
        let mut taken = 0;
        while taken < FRAMES_AT_ONCE {
            if !self.undecoded.is_empty() {
                heard = true;
                taken += 1;
                match self.protocol.decode(&mut self.undecoded) {
                    Ok(frame) => frames.extend(frame),
                    Err(close) => {
                        self.undecoded = Bytes::new();
                        return Poll::Ready(Received::Refused(close));
                    }
                }
                continue;
            }
            match Pin::new(&mut self.socket).poll_next(cx) {
                Poll::Pending => break,
                Poll::Ready(None) if frames.is_empty() && !heard => {
                    return Poll::Ready(self.end());
                }
                Poll::Ready(None) => break,
                // After a breach of the WebSocket protocol the socket writes its close frame and
                // then ends.
                Poll::Ready(Some(Err(Error::PayloadTooLong { max_len, .. }))) => {
                    let reason = format!("a message has more than {max_len} bytes");
                    return Poll::Ready(Received::Refused(Close::new(Close::TOO_BIG, reason)));
                }
                Poll::Ready(Some(Err(error))) => {
                    if self.failed || matches!(error, Error::Io(_)) {
                        let ended = self.ended(&error);
                        if !heard || parlour_core::bug!("reset_drops_frames") {
                            return Poll::Ready(ended);
                        }
                        // The session counts what came before it as received.
                        self.ended = Some(ended);
                        break;
                    }
                    self.failed = true;
                }
                Poll::Ready(Some(Ok(message))) => {
                    heard = true;
                    if message.is_text() || message.is_binary() {
                        if let Err(reason) = self.protocol.begin(message.is_text()) {
                            let close = Close::new(Close::UNSUPPORTED, reason);
                            return Poll::Ready(Received::Refused(close));
                        }
                        self.undecoded = Bytes::from(message.into_payload());
                        taken += self.undecoded.len() / FRAME_BYTES;
                    } else if message.is_close() {
                        self.goodbye = true;
                    } else if message.is_ping() {
                        // The socket has put its answer behind what it was given.
                        self.pongs += message.as_payload().len() + FRAME_HEADER;
                        break;
                    }
                    taken += usize::from(self.undecoded.is_empty());
                }
            }
        }
        let more = taken >= FRAMES_AT_ONCE;
        if heard { Poll::Ready(Received::Heard { more }) } else { Poll::Pending }
    }

    fn ended(&self, error: &Error) -> Received {
        match error {
            Error::Io(error) if is_stalled(error) => Received::Stalled,
            _ => self.end(),
        }
    }

    /// How a socket ended on which nothing more comes. A breach of the WebSocket protocol is no
    /// accident of the network.
    fn end(&self) -> Received {
        if self.goodbye || self.failed { Received::Closed } else { Received::Dropped }
    }
}

fn give(socket: &mut WebSocketStream<Socket>, given: &mut u64, message: Message) {
    let length = message.as_payload().len() + FRAME_HEADER;
    // A socket that is closed already takes nothing, and reading from it will say so.
    if Pin::new(socket).start_send(message).is_ok() {
        *given += length as u64;
    }
}

impl<P: Protocol> Link for WebSocketLink<P> {
    const GREETS: bool = P::GREETS;

    async fn receive(&mut self, read: bool, wants_room: bool, frames: &mut Vec<Frame>) -> Received {
        poll_fn(|cx| self.poll_receive(cx, (read, wants_room), frames)).await
    }

    fn send(&mut self, item: Sendable<'_>) -> Result<(), Fault> {
        if self.outbox.batch.capacity() == 0 {
            self.outbox.batch.reserve(self.usual + SPARE);
        }
        self.protocol.encode(item, &mut self.outbox)?;
        if self.outbox.batch.len() >= FULL_BATCH || !self.outbox.texts.is_empty() {
            self.seal();
        }
        Ok(())
    }

    fn has_room(&self) -> bool {
        self.pending() < ROOM && self.credit() != Some(0)
    }

    fn has_moved(&mut self) -> bool {
        let (read, written) = (self.socket.get_ref().read(), self.socket.get_ref().written());
        let backlog = self.given.saturating_sub(written);
        let now = Moved { read, written, backlog };
        let then = std::mem::replace(&mut self.moved, now);
        read != then.read || (then.backlog > 0 && written != then.written)
    }

    fn credit(&self) -> Option<u64> {
        self.protocol.credit()
    }

    fn cut(&mut self) {
        self.socket.get_mut().cut();
    }

    fn resume(&mut self, resumption: Resumption) -> Result<(), Close> {
        let Resumption { socket, hello, welcome } = resumption;
        // What was encoded and did not reach the old socket counts as sent there.
        let _ = self.protocol.seal(std::mem::take(&mut self.outbox.batch));
        self.outbox = Outbox::default();
        self.undecoded = Bytes::new();
        (self.failed, self.goodbye, self.ended, self.pongs, self.moved) = Default::default();
        self.given = socket.get_ref().written();
        self.socket = socket;
        for batch in self.protocol.resume(&hello, welcome)? {
            self.write(batch);
        }
        Ok(())
    }

    fn close(&mut self, close: &Close) {
        self.seal();
        let code = CloseCode::try_from(close.code).unwrap_or(CloseCode::NORMAL_CLOSURE);
        // A control frame has room for 123 bytes of reason.
        let end = close.reason.floor_char_boundary(123);
        self.give(Message::close(Some(code), &close.reason[..end]));
    }

    async fn linger(self) {
        // Closing a socket with unread bytes resets it, and what was written last may be lost.
        let mut socket = self.socket.into_inner();
        let (time, mut left) = LINGER;
        let discard = async {
            if socket.shutdown().await.is_err() {
                return;
            }
            let mut buffer = vec![0; 16 * 1024];
            while left > 0 {
                match AsyncReadExt::read(&mut socket, &mut buffer).await {
                    Ok(n) if n > 0 => left = left.saturating_sub(n),
                    _ => return,
                }
            }
        };
        let _ = tokio::time::timeout(time, discard).await;
    }
}
