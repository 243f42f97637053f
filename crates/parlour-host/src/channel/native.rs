//! `parlour.v1` on a WebSocket; `parlour_core::wire` has the frames, `docs/protocol.md` the contract.

use bytes::Bytes;
use parlour_core::wire::{self, CallFrame, Frame};
use parlour_core::{Fault, Reply};
use tokio_websockets::Message;

use crate::io::kept;
use crate::link::{Outbox, Protocol, Sendable};
use crate::peer::Close;

/// The name under which the protocol is listed.
pub(crate) const NAME: &str = wire::SUBPROTOCOL;

/// The translation, which keeps nothing between two frames but the number of pings.
#[derive(Debug, Default)]
pub(crate) struct Native {
    pings: u64,
}

impl Protocol for Native {
    const GREETS: bool = true;

    fn decode(&mut self, message: Message, frames: &mut Vec<Frame>) -> Result<(), Close> {
        if message.is_text() {
            let reason = "parlour.v1 is binary: send frames in binary messages";
            return Err(Close::new(Close::UNSUPPORTED, reason));
        }
        let mut bytes = kept(Bytes::from(message.into_payload()));
        while !bytes.is_empty() {
            match wire::decode(&mut bytes) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => {}
                Err(error) => return Err(Close::new(Close::PROTOCOL, error.to_string())),
            }
        }
        Ok(())
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
                wire::encode_event(event.native(), &to.agents, &to.listeners, batch);
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
