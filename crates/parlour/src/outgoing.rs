use std::time::Instant;

use parlour_core::Payload;
use parlour_core::wire::Frame;
use tokio::sync::OwnedSemaphorePermit;

use crate::handle::Request;

/// A frame that waits to be written.
#[derive(Debug)]
pub(crate) enum Outgoing {
    /// Is answered, unless it ended while it waited.
    Request { request: Box<Request>, deadline: Instant },
    /// Is not answered, and makes sense in this session only. Its place in the queue is free again
    /// when it is written.
    Plain(Box<Frame>, Option<OwnedSemaphorePermit>),
}

impl Outgoing {
    pub(crate) fn frame(&self) -> &Frame {
        match self {
            Self::Request { request, .. } => &request.frame,
            Self::Plain(frame, _) => frame,
        }
    }
}

/// What of a frame a host limits.
pub(crate) fn payload(frame: &Frame) -> Option<&Payload> {
    match frame {
        Frame::Call(call) => Some(&call.payload),
        Frame::Publish(publish) => Some(&publish.payload),
        Frame::Send(send) => Some(&send.payload),
        Frame::Reply(_, Ok(payload)) | Frame::Progress(_, payload) => Some(payload),
        Frame::Outcome(outcome) => outcome.reply.as_ref().ok(),
        _ => None,
    }
}

/// About the bytes that a frame takes.
pub(crate) fn weight(frame: &Frame) -> usize {
    payload(frame).map_or(0, Payload::weight) + 256
}
