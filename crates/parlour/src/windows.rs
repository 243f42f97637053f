//! The session that a client goes on with when its connection breaks.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use parlour_core::wire::{self, Hello, Welcome};
use parlour_core::{ByteString, Credit, Received, Sent, WrongCount};

use crate::{Error, ErrorKind};

/// How much may be unacknowledged each way, unless the host wants less.
const CREDIT: Credit = Credit { messages: 4096, bytes: 8 * 1024 * 1024 };

/// Both directions of a session, across connections.
#[derive(Debug)]
pub(crate) struct Windows {
    name: ByteString,
    sent: Sent,
    received: Received,
    /// For how long after a connection is lost the host keeps the session.
    pub(crate) grace: Duration,
}

impl Windows {
    /// Of the session that `welcome` begins; `None` if that ends with its connection.
    pub(crate) fn begin(welcome: &Welcome) -> Option<Self> {
        let name = welcome.session.clone()?;
        let (sent, received) = (Sent::new(welcome.credit), Received::new(welcome.credit));
        Some(Self { name, sent, received, grace: welcome.grace })
    }

    /// Asks in `hello` for a session, and for `earlier` if there is one.
    pub(crate) fn ask(hello: &mut Hello, earlier: Option<&Self>) {
        hello.features = vec![ByteString::from_static(wire::RESUME)];
        hello.credit = CREDIT;
        if let Some(earlier) = earlier {
            hello.session = Some(earlier.name.clone());
            hello.received = earlier.received.frames();
        }
    }

    /// What the host lacks of what was sent, when it goes on with the session.
    pub(crate) fn resume(&mut self, welcome: &Welcome) -> Result<Vec<Bytes>, Error> {
        let again = self.sent.resend(welcome.received).map_err(wrong_count)?;
        let _ = self.received.acknowledge();
        Ok(again)
    }

    /// Takes the host's count of frames.
    pub(crate) fn handle_ack(&mut self, received: u64) -> Result<(), Error> {
        self.sent.acknowledge(received).map_err(wrong_count)
    }

    /// Counts a frame that came.
    pub(crate) fn receive(&mut self, frame: &[u8]) {
        self.received.push(frame);
    }

    /// Whether another frame may be sent.
    pub(crate) fn has_credit(&self) -> bool {
        self.sent.has_credit()
    }

    /// Counts a frame of the message that is being made.
    pub(crate) fn add(&mut self, frame: &[u8]) {
        self.sent.add(frame);
    }

    /// Keeps the message, which is about to be written.
    pub(crate) fn push(&mut self, message: Bytes) {
        self.sent.push(message);
    }

    /// Acknowledges what came, if so much did, or if `now`.
    pub(crate) fn acknowledge(&mut self, now: bool, message: &mut BytesMut) {
        if (now || self.received.is_due())
            && let Some(received) = self.received.acknowledge()
        {
            wire::encode(&wire::Frame::Ack(received), message);
        }
    }
}

fn wrong_count(error: WrongCount) -> Error {
    Error::new(ErrorKind::Protocol, "the host lost count of the session's frames")
        .with_source(error)
}
