//! An event on its way to many connections, written once for each protocol.

use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use parlour_core::{Event, wire};

use crate::channel::dialect;
use crate::http::sse;

/// An event and its forms on the wire, each made when the first recipient needs it.
#[derive(Debug)]
pub(crate) struct SharedEvent {
    event: Event,
    native: OnceLock<wire::SharedEvent>,
    dialect: OnceLock<Option<ByteString>>,
    sse: OnceLock<Bytes>,
    weight: usize,
    /// When it was published, since the Unix epoch.
    time: Duration,
}

impl SharedEvent {
    pub(crate) fn new(event: Event, time: Duration) -> Self {
        let (native, dialect, sse) = Default::default();
        let weight = event.payload.weight() + event.header.weight();
        Self { event, native, dialect, sse, weight, time }
    }

    pub(crate) fn event(&self) -> &Event {
        &self.event
    }

    pub(crate) fn weight(&self) -> usize {
        self.weight
    }

    /// The lines of a server-sent event.
    pub(crate) fn sse(&self) -> &Bytes {
        self.sse.get_or_init(|| sse::write(&self.event, self.time))
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
