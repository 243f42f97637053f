//! `parlour.v1` on a WebSocket; `parlour_core::wire` has the frames, `docs/protocol.md` the contract.

use bytes::Bytes;
use parlour_core::wire::{self, CallFrame, Frame};
use parlour_core::{Fault, Reply};

use crate::io::SMALL;
use crate::link::{Outbox, Protocol, Sendable};
use crate::peer::Close;

/// The name under which the protocol is listed.
pub(crate) const NAME: &str = wire::SUBPROTOCOL;

/// Agents, and subscriptions, that one event frame names at the most.
const RECIPIENTS: usize = 64;

/// The translation, which keeps nothing between two frames but the number of pings.
#[derive(Debug, Default)]
pub(crate) struct Native {
    pings: u64,
}

impl Protocol for Native {
    const GREETS: bool = true;

    fn begin(&mut self, is_text: bool) -> Result<(), &'static str> {
        if is_text { Err("parlour.v1 is binary: send frames in binary messages") } else { Ok(()) }
    }

    fn decode(&mut self, message: &mut Bytes) -> Result<Option<Frame>, Close> {
        let broken = |error: wire::DecodeError| Close::new(Close::PROTOCOL, error.to_string());
        let whole = message.len();
        let mut frame = wire::split_frame(message).map_err(broken)?;
        // What is read from the frame are slices of it, which would keep the message around it.
        if frame.len() < whole / 4 || whole < SMALL {
            frame = Bytes::copy_from_slice(&frame);
        }
        wire::decode(&mut frame).map_err(broken)
    }

    fn encode(&mut self, item: Sendable<'_>, out: &mut Outbox) -> Result<(), Fault> {
        let batch = &mut out.batch;
        match item {
            Sendable::Call(id, call, remaining) => {
                let frame = Frame::Call(CallFrame {
                    id,
                    target: call.target.clone(),
                    timeout: Some(remaining),
                    header: (&call.header).into(),
                    payload: call.payload.clone(),
                });
                wire::encode(&frame, batch);
            }
            Sendable::Withdraw(id) => wire::encode(&Frame::Cancel(id), batch),
            Sendable::Reply(id, reply) => {
                wire::encode(&Frame::Reply(id, Reply::clone(reply)), batch)
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
                    wire::encode_event(event.native(), agents, some, batch);
                }
            }
            Sendable::Frame(frame) => wire::encode(frame, batch),
            Sendable::Drain => wire::encode(&Frame::Drain, batch),
            Sendable::Ping => {
                self.pings += 1;
                wire::encode(&Frame::Ping(self.pings), batch);
            }
        }
        Ok(())
    }
}
