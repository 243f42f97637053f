//! An event on its way to many connections, written once for each protocol.

use std::sync::OnceLock;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use bytestring::ByteString;
use parlour_core::{Event, wire};

use crate::channel::dialect;
use crate::http::sse;
use crate::io::SMALL;

/// An event and its forms on the wire, each made when the first recipient needs it.
#[derive(Debug)]
pub(crate) struct SharedEvent {
    event: Event,
    native: OnceLock<wire::SharedEvent>,
    /// The whole frame for the one subscription of that number: most clients number theirs alike.
    frame: OnceLock<(u64, Bytes)>,
    dialect: OnceLock<Option<ByteString>>,
    sse: OnceLock<Bytes>,
    weight: usize,
    /// When it was published, since the Unix epoch.
    time: Duration,
    /// What a stream of server-sent events goes on behind, if a log has it.
    place: Option<ByteString>,
}

impl SharedEvent {
    pub(crate) fn new(event: Event, time: Duration, place: Option<ByteString>) -> Self {
        let (native, frame, dialect, sse) = Default::default();
        let weight = event.payload.weight() + event.header.weight();
        Self { event, native, frame, dialect, sse, weight, time, place }
    }

    /// Whether a log has it.
    pub(crate) fn is_durable(&self) -> bool {
        self.place.is_some()
    }

    pub(crate) fn event(&self) -> &Event {
        &self.event
    }

    pub(crate) fn weight(&self) -> usize {
        self.weight
    }

    /// The lines of a server-sent event.
    pub(crate) fn sse(&self) -> &Bytes {
        self.sse.get_or_init(|| sse::write(&self.event, self.time, None))
    }

    /// The part of a `parlour.v1` frame that all recipients share.
    pub(crate) fn native(&self) -> &wire::SharedEvent {
        self.native.get_or_init(|| wire::SharedEvent::new(&self.event))
    }

    /// Appends the frame for one subscription to `out`.
    pub(crate) fn write_to(&self, subscription: u64, out: &mut BytesMut) {
        let write = |out: &mut BytesMut| {
            wire::encode_event(self.native(), &[], &[subscription], out);
        };
        if self.weight >= SMALL {
            return write(out);
        }
        let (number, frame) = self.frame.get_or_init(|| {
            let mut frame = BytesMut::new();
            write(&mut frame);
            (subscription, frame.freeze())
        });
        if *number == subscription { out.extend_from_slice(frame) } else { write(out) }
    }

    /// The frame of the 0.1.0 dialect, if the event fits into one.
    pub(crate) fn dialect(&self) -> Option<&ByteString> {
        self.dialect.get_or_init(|| dialect::event(&self.event)).as_ref()
    }
}
