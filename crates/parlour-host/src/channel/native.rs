//! `parlour.v1` on a WebSocket; `parlour_core::wire` has the frames, `docs/protocol.md` the contract.

use bytes::{Buf as _, Bytes, BytesMut};
use parlour_core::wire::{self, DecodeError, Frame, Hello, Welcome};
use parlour_core::{Fault, Windows, WrongCount};

use crate::io::SMALL;
use crate::link::{Outbox, Protocol, Sendable};
use crate::peer::Close;

/// The name under which the protocol is listed.
pub(crate) const NAME: &str = wire::SUBPROTOCOL;

/// Agents, and subscriptions, that one event frame names at the most.
const RECIPIENTS: usize = 64;

/// The translation, and what of its frames may have to be sent again.
#[derive(Debug, Default)]
pub(crate) struct Native {
    pings: u64,
    /// What is left of the frames of the message that are decoded now, and how long they were together.
    frames: Bytes,
    frames_length: usize,
    session: Option<Windows>,
}

impl Protocol for Native {
    const GREETS: bool = true;

    fn begin(&mut self, is_text: bool) -> Result<(), &'static str> {
        self.frames = Bytes::new();
        if is_text {
            Err("parlour.v1 is binary: send binary messages, or ask for parlour.v1+json")
        } else {
            Ok(())
        }
    }

    fn decode(&mut self, message: &mut Bytes) -> Result<Option<Frame>, Close> {
        let broken = |error: DecodeError| Close::new(Close::PROTOCOL, error.to_string());
        if self.frames.is_empty() {
            self.frames = own(message).map_err(broken)?;
            self.frames_length = self.frames.len();
        }
        let frame = match &mut self.session {
            Some(windows) => windows.decode(&mut self.frames),
            None => wire::decode(&mut self.frames),
        };
        let frame = frame.map_err(broken)?;
        if self.frames.is_empty() {
            message.advance(self.frames_length);
        }
        if let (Some(Frame::Ack(received)), Some(windows)) = (&frame, &mut self.session) {
            windows.handle_ack(*received).map_err(wrong_count)?;
            return Ok(None);
        }
        Ok(frame)
    }

    fn encode(&mut self, item: Sendable<'_>, out: &mut Outbox) -> Result<(), Fault> {
        let batch = &mut out.batch;
        let begin = batch.len();
        match item {
            Sendable::Call(id, call, remaining) => {
                wire::encode_call(id, call, remaining, batch);
            }
            Sendable::Withdraw(id) => wire::encode(&Frame::Cancel(id), batch),
            Sendable::Progress(id, payload) => {
                wire::encode(&Frame::Progress(id, payload.clone()), batch);
            }
            Sendable::Reply(id, reply) => wire::encode_reply(id, reply, batch),
            Sendable::Event(event, to) if to.agents.is_empty() && to.listeners.len() == 1 => {
                event.write_to(to.listeners[0], batch);
            }
            Sendable::Event(event, to) => {
                let mut listeners = &to.listeners[..];
                let mut agents = to.agents.chunks(RECIPIENTS);
                // More than fit into one header come in further frames.
                loop {
                    let agents = agents.next().unwrap_or_default();
                    let (some, rest) = listeners.split_at(listeners.len().min(RECIPIENTS));
                    listeners = rest;
                    if agents.is_empty() && some.is_empty() {
                        break;
                    }
                    let begin = batch.len();
                    wire::encode_event(event.native(), agents, some, batch);
                    self.count(&batch[begin..]);
                }
                return Ok(());
            }
            Sendable::Frame(Frame::Welcome(welcome)) => {
                // What is counted begins behind it.
                wire::encode(&Frame::Welcome(welcome.clone()), batch);
                self.session = welcome.session.is_some().then(|| Windows::new(welcome.credit));
                return Ok(());
            }
            Sendable::Frame(frame) => wire::encode(frame, batch),
            Sendable::Drain => wire::encode(&Frame::Drain, batch),
            Sendable::Ping => {
                self.pings += 1;
                wire::encode(&Frame::Ping(self.pings), batch);
                if let Some(windows) = &mut self.session {
                    windows.acknowledge(true, batch);
                }
            }
        }
        self.count(&batch[begin..]);
        Ok(())
    }

    fn credit(&self) -> Option<u64> {
        self.session.as_ref().map(Windows::credit)
    }

    fn seal(&mut self, mut batch: BytesMut) -> Bytes {
        let Some(windows) = &mut self.session else { return batch.freeze() };
        windows.acknowledge(false, &mut batch);
        let batch = batch.freeze();
        windows.push(batch.clone());
        batch
    }

    fn resume(&mut self, hello: &Hello, welcome: Welcome) -> Result<Vec<Bytes>, Close> {
        let Some(windows) = &mut self.session else {
            return Err(Close::new(Close::PROTOCOL, "this session cannot be resumed"));
        };
        let again = windows.resume(hello.received).map_err(wrong_count)?;
        let (received, credit) = (windows.received(), windows.whole_credit());
        let mut greeting = BytesMut::new();
        wire::encode(&Frame::from(Welcome { received, credit, ..welcome }), &mut greeting);
        Ok(std::iter::once(greeting.freeze()).chain(again).collect())
    }
}

impl Native {
    /// Counts what was just encoded.
    fn count(&mut self, frame: &[u8]) {
        if let Some(windows) = &mut self.session {
            windows.add(frame);
        }
    }
}

/// The next frame of `message`, or the next few, to be decoded.
///
/// What is read from a frame are slices of it, which keep all memory around it: so small frames are
/// copied out of their message, a few at a time, and what is for later each by itself.
fn own(message: &Bytes) -> Result<Bytes, DecodeError> {
    let first = wire::frame_length(message)?;
    if first < message.len() && wire::is_for_later(message) {
        return Ok(Bytes::copy_from_slice(&message[..first]));
    }
    if first >= SMALL {
        let frame = message.slice(..first);
        let is_small_part = first < message.len() / 4;
        return Ok(if is_small_part { Bytes::copy_from_slice(&frame) } else { frame });
    }
    let mut end = first;
    while let Ok(length) = wire::frame_length(&message[end..])
        && end + length <= SMALL
        && !wire::is_for_later(&message[end..])
    {
        end += length;
    }
    Ok(Bytes::copy_from_slice(&message[..end]))
}

fn wrong_count(error: WrongCount) -> Close {
    Close::new(Close::PROTOCOL, error.to_string())
}
