//! What a peer asks of durable messages. It takes its time, and so is answered by tasks of its own,
//! each once and through the peer's queue: the task that reads the socket does not wait for them.

use bytestring::ByteString;
use parlour_core::durable::{DeliveryId, Level};
use parlour_core::wire::{AcceptedFrame, DeliveryFrame, Done, Frame, SendFrame, WaitFrame};
use parlour_core::{CallId, Fault, FaultKind};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Connection;
use crate::config::limits;
use crate::durable::{Found, Sending};
use crate::link::Link;
use crate::peer::{Close, Outgoing, Peer, RETRY_AFTER, Refused, unread_replies};

impl<L: Link> Connection<L> {
    pub(super) fn handle_send(&mut self, frame: SendFrame, now: Instant) -> Result<(), Close> {
        let SendFrame { request, target, delay, deliver_at, ttl, max_attempts, .. } = frame;
        let SendFrame { header, payload, .. } = frame;
        self.check_number(request)?;
        if let Err(fault) = self.admit_request() {
            self.answer(request, Err(fault));
            return Ok(());
        }
        let header = self.exchange.stamp(header, &self.origin, now);
        let agent = target;
        let sending = Sending { agent, header, payload, delay, deliver_at, ttl, max_attempts };
        // Handed over here and now, so that what a peer sends is accepted in its order.
        let accepted = self.durable.send(sending, now);
        let (peer, ack) = (self.peer.clone(), self.durable.ack().name());
        self.made.insert(request, None);
        tokio::spawn(async move {
            let accepted = accepted.await.map(|accepted| {
                Frame::from(AcceptedFrame {
                    request,
                    delivery: accepted.id,
                    conversation: accepted.conversation,
                    ack: ack.into(),
                    generation: 1,
                    known: !accepted.is_new,
                })
            });
            answer(&peer, request, accepted);
        });
        Ok(())
    }

    pub(super) fn handle_wait(&mut self, frame: WaitFrame) -> Result<(), Close> {
        let WaitFrame { request, delivery, generation, level, timeout } = frame;
        self.check_number(request)?;
        let limit = self.exchange.config().limits.caller_waits;
        if self.waits.len() >= limit {
            let detail = "this connection waits for as many deliveries as it may";
            let fault = Fault::new(FaultKind::Overloaded, detail)
                .hint("wait for fewer at once")
                .retry_after(RETRY_AFTER);
            let metrics = self.exchange.metrics();
            let fault = metrics.limit_met(limits::caller_waits, Some(limit), fault);
            self.answer(request, Err(fault));
            return Ok(());
        }
        let level = match level.as_deref().map(level_of).transpose() {
            Ok(level) => level,
            Err(fault) => {
                self.answer(request, Err(fault));
                return Ok(());
            }
        };
        let (peer, durable) = (self.peer.clone(), self.durable.clone());
        // Dropped when the peer gives the wait up, and when the connection ends.
        let (wanted, unwanted) = oneshot::channel();
        self.waits.insert(request, Some(wanted));
        tokio::spawn(async move {
            let found = tokio::select! {
                biased;
                _ = unwanted => Err(Fault::new(FaultKind::Cancelled, "the wait was given up")),
                found = durable.wait(delivery, generation, level, timeout) => {
                    found.map(|found| describe(request, &found, generation).into())
                }
            };
            answer(&peer, request, found);
        });
        Ok(())
    }

    pub(super) fn handle_cancel_delivery(
        &mut self,
        request: CallId,
        delivery: DeliveryId,
        reason: ByteString,
    ) -> Result<(), Close> {
        self.check_number(request)?;
        if let Err(fault) = self.admit_request() {
            self.answer(request, Err(fault));
            return Ok(());
        }
        let (peer, durable) = (self.peer.clone(), self.durable.clone());
        self.made.insert(request, None);
        tokio::spawn(async move {
            let done = Done { request, recipients: 0, dropped: Vec::new() };
            let cancelled = durable.cancel(delivery, reason).await;
            answer(&peer, request, cancelled.map(|()| Frame::Done(done)));
        });
        Ok(())
    }
}

fn level_of(name: &str) -> Result<Level, Fault> {
    Level::from_name(name).ok_or_else(|| {
        let detail = format!("`{}` is no level", name.escape_debug());
        let levels = Level::ALL.map(Level::name).join(", ");
        Fault::new(FaultKind::Invalid, detail).hint(format!("the levels: {levels}"))
    })
}

/// Ends a request that took its time.
fn answer(peer: &Peer, request: CallId, answer: Result<Frame, Fault>) {
    let refused = |fault| Outgoing::Reply(request, Box::new(Err(fault)));
    match answer {
        // It can be asked for again, and the reply of an agent can be large.
        Ok(frame @ Frame::Delivery(_)) => {
            let offered = peer.offer(Outgoing::Answer(request, Box::new(frame)));
            if let Err(Refused::Full(..)) = offered {
                peer.push(refused(unread_replies()));
            }
        }
        Ok(frame) => peer.push(Outgoing::Answer(request, Box::new(frame))),
        Err(fault) => peer.push(refused(fault)),
    }
}

fn describe(request: CallId, found: &Found, after: u64) -> DeliveryFrame {
    let delivery = found.delivery();
    let mut levels: Vec<ByteString> = Vec::new();
    for step in delivery.known_steps().filter(|step| step.generation > after) {
        let name = ByteString::from_static(step.level.name());
        if !levels.contains(&name) {
            levels.push(name);
        }
    }
    DeliveryFrame {
        request,
        delivery: delivery.id,
        state: delivery.state.name().into(),
        generation: delivery.generation,
        attempt: delivery.attempt,
        levels,
        details: delivery.steps.last().map(|step| step.details.clone()).unwrap_or_default(),
        fault: delivery.fault().cloned(),
        reply: found.reply().cloned(),
    }
}
