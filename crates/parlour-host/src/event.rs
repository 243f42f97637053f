//! An event on its way to many connections, written once for each protocol.

use std::sync::OnceLock;

use bytestring::ByteString;
use parlour_core::{Event, wire};

use crate::channel::dialect;

/// An event and its forms on the wire, each made when the first recipient needs it.
#[derive(Debug)]
pub(crate) struct SharedEvent {
    event: Event,
    native: OnceLock<wire::SharedEvent>,
    dialect: OnceLock<Option<ByteString>>,
}

impl SharedEvent {
    pub(crate) fn new(event: Event) -> Self {
        Self { event, native: OnceLock::new(), dialect: OnceLock::new() }
    }

    pub(crate) fn event(&self) -> &Event {
        &self.event
    }

    pub(crate) fn weight(&self) -> usize {
        self.event.payload.weight()
    }

    /// The part of a `parlour.v1` frame that all recipients share.
    pub(crate) fn native(&self) -> &wire::SharedEvent {
        self.native.get_or_init(|| wire::SharedEvent::new(&self.event))
    }

    /// The frame of the 0.1.0 dialect, if the event fits into one.
    pub(crate) fn dialect(&self) -> Option<&ByteString> {
        self.dialect.get_or_init(|| dialect::event(&self.event)).as_ref()
    }
}
