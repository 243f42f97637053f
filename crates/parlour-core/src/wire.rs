//! The frames of `parlour.v1`, and how they are written; `docs/protocol.md` is the contract.
//!
//! One WebSocket message (binary) carries one or more frames, one after the other:
//!
//! ```text
//! frame   = kind:u8  header-length:varint  header  payload-length:varint  payload
//! header  = field*
//! field   = tag:varint  value          tag = number << 3 | type
//! value   = varint                     type 0
//!         | 8 bytes                    type 1, skipped
//!         | length:varint  bytes       type 2
//!         | 4 bytes                    type 5, skipped
//! ```
//!
//! A header is thus a Protocol Buffers message; a field number means the same in every frame.
//! Varints are those of Protocol Buffers too: seven bits a byte, low bits first. A frame of an
//! unknown kind is skipped, and so is an unknown field; a known field of the wrong type, a text that
//! is not UTF-8, or a frame that does not end within its message is an error.

mod decode;
mod encode;
mod frame;
mod number;
mod raw;
#[cfg(test)]
mod tests;

pub use decode::{
    DecodeError, MAX_HEADER, MAX_TEXT, decode, frame_length, is_for_later, split_frame,
};
pub(crate) use encode::resend;
pub use encode::{encode, encode_call, encode_event, encode_reply, is_counted};
pub use frame::{
    AcceptedFrame, CallFrame, DeliveryFrame, Done, EventFrame, Frame, HeaderFields, Hello, Outcome,
    PublishFrame, PublishedFrame, Register, SendFrame, SharedEvent, Subscribe, WaitFrame, Welcome,
};
pub use number::{FIELDS, FieldType, KINDS};
pub use raw::{RawFrame, RawValue, fields};

/// The WebSocket subprotocol that asks for these frames.
pub const SUBPROTOCOL: &str = "parlour.v1";

/// The WebSocket subprotocol of the same frames as JSON, for people.
pub const TEXT_SUBPROTOCOL: &str = "parlour.v1+json";

/// The feature of sessions that survive a socket, with credit.
pub const RESUME: &str = "resume";

/// The feature of messages and events that the host keeps until they are delivered.
pub const DELIVERIES: &str = "deliveries";

/// The versions of the frames that this code speaks, newest last.
pub const VERSIONS: &[u64] = &[1];
