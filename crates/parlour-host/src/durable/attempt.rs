//! The return address of an attempt.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use parlour_core::durable::DeliveryId;
use parlour_core::{Attempt, Payload, Reply};
use tokio::sync::mpsc;

use super::gate::Slot;
use super::owner::Input;

/// Where the outcome of one attempt goes: to the owner of the delivery.
pub(crate) struct AttemptTo {
    pub(super) id: DeliveryId,
    /// Which attempt it is, as its agent is told.
    pub(super) number: u32,
    pub(super) token: u64,
    pub(super) owner: mpsc::UnboundedSender<Input>,
    /// The place that it has at its worker.
    pub(super) slot: Slot,
    /// Whether its agent has said that it has the message.
    pub(super) is_received: AtomicBool,
    /// What it has told that the owner has not taken yet.
    pub(super) untaken: Arc<AtomicUsize>,
}

/// How much of an attempt's progress may wait for the owner.
const UNTAKEN: usize = 256;

/// Something that is taken into account until it is dropped.
pub(crate) struct Taken(Arc<AtomicUsize>);

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl AttemptTo {
    /// The attempt, as its worker knows it.
    pub(crate) fn attempt(&self) -> Attempt {
        Attempt { delivery: self.id, number: self.number }
    }

    /// The agent has the message. Once is enough.
    pub(crate) fn received(&self) {
        if self.is_received.swap(true, Relaxed) {
            return;
        }
        let _ = self.owner.send(Input::Received(self.id, self.token));
    }

    /// The agent tells of its progress. Returns whether there was room for that.
    pub(crate) fn progress(&self, payload: Payload) -> bool {
        // There is one connection that says it.
        if self.untaken.fetch_add(1, Relaxed) >= UNTAKEN {
            self.untaken.fetch_sub(1, Relaxed);
            return false;
        }
        let taken = Taken(self.untaken.clone());
        let _ = self.owner.send(Input::Processing(self.id, self.token, payload, taken));
        true
    }

    /// The attempt has ended.
    pub(crate) fn end(self, reply: Reply) {
        let Self { id, token, owner, slot, .. } = self;
        let _ = owner.send(Input::Ended(id, token, Box::new(reply)));
        // Behind the end, so that what begins in its place finds it ended.
        drop(slot);
    }
}
