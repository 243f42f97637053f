//! What a peer asks of durable messages. It takes its time, and so is answered by tasks of its own,
//! each once and through the peer's queue: the task that reads the socket does not wait for them.

use std::sync::Arc;

use bytestring::ByteString;
use parlour_core::durable::{DeliveryId, Level, Published};
use parlour_core::wire::{
    AcceptedFrame, DeliveryFrame, Done, Frame, PublishFrame, PublishedFrame, SendFrame, WaitFrame,
};
use parlour_core::{CallId, Fault, FaultKind};
use tokio::sync::oneshot::{self, error::TryRecvError};
use tokio::time::Instant;

use super::Connection;
use crate::config::limits;
use crate::durable::{Found, Publishing, Sending};
use crate::link::Link;
use crate::metrics::Metrics;
use crate::peer::{Close, Outgoing, Peer, RETRY_AFTER, Refused};

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
        let (asker, ack) = (self.asker(request), self.durable.ack().name());
        self.made.insert(request, None);
        // Handed over here and now, so that what a peer sends is accepted in its order.
        self.durable.send_and_tell(sending, now, move |accepted| {
            asker.answer(accepted.map(|accepted| {
                Frame::from(AcceptedFrame {
                    request,
                    delivery: accepted.id,
                    conversation: accepted.conversation,
                    ack: ack.into(),
                    generation: 1,
                    known: !accepted.is_new,
                })
            }));
        });
        Ok(())
    }

    /// Takes an event that is to be kept.
    pub(super) fn handle_kept(
        &mut self,
        request: CallId,
        frame: PublishFrame,
        now: Instant,
    ) -> Result<(), Close> {
        let PublishFrame { topic, header, payload, .. } = frame;
        self.check_number(request)?;
        if let Err(fault) = self.admit_request() {
            self.answer(request, Err(fault));
            return Ok(());
        }
        let header = self.exchange.stamp(header, &self.origin, now);
        let publishing = Publishing { topic, header, payload };
        let (asker, ack) = (self.asker(request), self.durable.ack().name());
        self.made.insert(request, None);
        let tell = move |published: Result<Published, Fault>| {
            asker.answer(published.map(|published| {
                Frame::from(PublishedFrame {
                    request,
                    id: published.id,
                    conversation: published.conversation,
                    ack: ack.into(),
                    recipients: published.recipients.into(),
                    known: !published.is_new,
                })
            }));
        };
        // What a peer publishes is accepted in its order, too, but has to wait while logs are read.
        let before = self.published.take_if(|it| it.try_recv() == Err(TryRecvError::Empty));
        if before.is_none() && self.durable.is_open() {
            self.durable.publish_and_tell(publishing, tell);
            return Ok(());
        }
        let (begun, begins) = oneshot::channel::<()>();
        self.published = Some(begins);
        let durable = self.durable.clone();
        self.durable.spawn(async move {
            if let Some(before) = before {
                let _ = before.await;
            }
            durable.are_open().await;
            durable.publish_and_tell(publishing, tell);
            drop(begun);
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
        let (asker, durable) = (self.asker(request), self.durable.clone());
        // Dropped when the peer gives the wait up, and when the connection ends.
        let (wanted, unwanted) = oneshot::channel();
        self.waits.insert(request, Some(wanted));
        self.durable.spawn(async move {
            let found = tokio::select! {
                biased;
                _ = unwanted => Err(Fault::new(FaultKind::Cancelled, "the wait was given up")),
                found = durable.wait(delivery, generation, level, timeout) => {
                    found.map(|found| describe(request, &found, generation).into())
                }
            };
            asker.answer(found);
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
        let (asker, durable) = (self.asker(request), self.durable.clone());
        self.made.insert(request, None);
        self.durable.spawn(async move {
            let done = Done { request, recipients: 0, dropped: Vec::new() };
            let cancelled = durable.cancel(delivery, reason).await;
            asker.answer(cancelled.map(|()| Frame::Done(done)));
        });
        Ok(())
    }

    fn asker(&self, request: CallId) -> Asker {
        let metrics = self.exchange.metrics().clone();
        Asker { peer: self.peer.clone(), request, metrics }
    }
}

fn level_of(name: &str) -> Result<Level, Fault> {
    Level::from_name(name).ok_or_else(|| {
        let detail = format!("`{}` is no level", name.escape_debug());
        let levels = Level::ALL.map(Level::name).join(", ");
        Fault::new(FaultKind::Invalid, detail).hint(format!("the levels: {levels}"))
    })
}

/// Who asked for something that takes its time, and is answered once.
struct Asker {
    peer: Peer,
    request: CallId,
    metrics: Arc<Metrics>,
}

impl Asker {
    fn answer(self, answer: Result<Frame, Fault>) {
        let Self { peer, request, metrics } = self;
        let item = |frame| Outgoing::Answer(request, Box::new(frame));
        let refused = |fault| Outgoing::Reply(request, Box::new(Err(fault)));
        match answer {
            // The reply of an agent can be large, and can be asked for again.
            Ok(frame @ Frame::Delivery(_)) => {
                if let Err(Refused::Full(_, (key, limit))) = peer.offer(item(frame)) {
                    let detail = "too much waits to be read to tell what became of the delivery";
                    let fault = Fault::new(FaultKind::Overloaded, detail)
                        .hint("read what came, and ask again")
                        .retry_after(RETRY_AFTER);
                    peer.push(refused(metrics.limit_met(key, Some(limit), fault)));
                }
            }
            Ok(frame) => peer.push(item(frame)),
            Err(fault) => peer.push(refused(fault)),
        }
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
