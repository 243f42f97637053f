//! What the peer says, and what comes of it.

use bytestring::ByteString;
use parlour_core::wire::{
    self, CallFrame, Done, Frame, Hello, Outcome, PublishFrame, Register, Welcome,
};
use parlour_core::{
    AgentId, Call, CallId, Credit, Event, Fault, FaultKind, Payload, Reply, Subscription,
    SubscriptionId, Target,
};
use tokio::time::Instant;

use super::{Connection, HandOver};
use crate::config::limits;
use crate::durable::no_ack;
use crate::exchange::Published;
use crate::link::Link;
use crate::peer::{Close, Outgoing, RETRY_AFTER, ReplyTo};

/// The most bytes of an agent's error that are passed on: escaped, they still fit into a frame of the
/// 0.1.0 dialect.
const MAX_FAULT_TEXT: usize = 64 * 1024;

impl<L: Link> Connection<L> {
    pub(super) fn handle(&mut self, frame: Frame, now: Instant) -> Result<(), Close> {
        if !self.greeted {
            return match frame {
                Frame::Hello(hello) => self.greet(&hello),
                _ => Err(Close::new(Close::PROTOCOL, "the first frame must be HELLO")),
            };
        }
        match frame {
            Frame::Call(call) => return self.handle_call(*call, now),
            Frame::Outcome(outcome) => {
                let Outcome { id, attempt, reply } = *outcome;
                let is_its = self.session.progress_to(id).is_some_and(|it| it.is_of(attempt))
                    || parlour_core::bug!("late_outcome_taken");
                if !is_its || !self.session.handle_reply(id, self.checked(reply)) {
                    self.exchange.metrics().replies_unasked.inc();
                    if !parlour_core::bug!("stale_not_told") {
                        self.push(Outgoing::Frame(Box::new(Frame::Stale(id, attempt))));
                    }
                }
            }
            Frame::Reply(id, reply) => {
                let id = CallId(id.0 ^ u64::from(parlour_core::bug!("ids_mixed")));
                if !self.session.handle_reply(id, self.checked(reply)) {
                    self.exchange.metrics().replies_unasked.inc();
                }
            }
            Frame::Progress(id, payload) => self.handle_progress(id, payload),
            Frame::Received(id) => {
                if let Some(reply_to) = self.session.progress_to(id) {
                    reply_to.received();
                }
            }
            Frame::Cancel(id) => {
                // Taken, so that a call is given up once however often that is said.
                if let Some(ticket) = self.made.get_mut(&id).and_then(Option::take) {
                    ticket.cancel();
                }
                drop(self.waits.get_mut(&id).and_then(Option::take));
            }
            Frame::Send(send) => return self.handle_send(*send, now),
            Frame::Wait(wait) => return self.handle_wait(*wait),
            Frame::CancelDelivery { request, delivery, reason } => {
                return self.handle_cancel_delivery(request, delivery, reason);
            }
            Frame::Publish(publish) => return self.handle_publish(*publish, now),
            Frame::Register(register) => {
                let Register { request, agent_type, key, registration } = register;
                let done = match key {
                    None => self.exchange.register(&self.peer, &agent_type, &registration),
                    Some(key) => {
                        let agent = AgentId::new(agent_type, key);
                        self.exchange.register_instance(&self.peer, &agent)
                    }
                };
                self.answer(request, done);
            }
            Frame::Unregister { request, agent_type, key } => {
                let done = match key {
                    None => self.exchange.unregister(&self.peer, &agent_type),
                    Some(key) => {
                        let agent = AgentId::new(agent_type, key);
                        self.exchange.unregister_instance(&self.peer, &agent)
                    }
                };
                self.answer(request, done);
            }
            Frame::Subscribe(subscribe) => {
                let number = subscribe.subscription;
                let id = SubscriptionId::Numbered(self.peer.id, number);
                let target = subscribe.agent_type.map_or(Target::Listener(number), Target::Agent);
                let subscription = Subscription { filter: subscribe.filter, target };
                let done = self.exchange.subscribe(&self.peer, id, &subscription, false);
                self.answer(subscribe.request, done);
            }
            Frame::Unsubscribe { request, subscription } => {
                let id = SubscriptionId::Numbered(self.peer.id, subscription);
                let done = self.exchange.unsubscribe(&self.peer, &id);
                self.answer(request, done);
            }
            // Through the inbox, so that it comes after all that was queued before.
            Frame::Ping(number) => self.peer.push(Outgoing::Frame(Box::new(Frame::Pong(number)))),
            Frame::Pong(_) => {}
            Frame::Drain if parlour_core::bug!("drain_forgets_calls") => {
                self.session.handle_disconnect();
                self.exchange.drain(&self.peer);
            }
            Frame::Drain => self.exchange.drain(&self.peer),
            Frame::Hello(_) => return Err(Close::new(Close::PROTOCOL, "a second HELLO")),
            Frame::Ack(_) => return Err(Close::new(Close::PROTOCOL, "an ACK without a session")),
            _ => return Err(Close::new(Close::PROTOCOL, "a frame that only a host sends")),
        }
        Ok(())
    }

    fn greet(&mut self, hello: &Hello) -> Result<(), Close> {
        let spoken = |version: &&u64| wire::VERSIONS.contains(version);
        let Some(&version) = hello.versions.iter().filter(spoken).max() else {
            let reason = format!(
                "no common version: the client speaks {:?}, the host {:?}",
                hello.versions,
                wire::VERSIONS
            );
            return Err(Close::new(Close::PROTOCOL, reason));
        };
        self.greeted = true;
        self.peer.set_name(&hello.name.chars().take(128).collect::<String>());
        let config = self.exchange.config();
        let mut welcome = Welcome {
            version,
            name: config.server.name.as_str().into(),
            max_payload: config.limits.payload_bytes.0 as u64,
            heartbeat: config.timeouts.heartbeat,
            ..Welcome::default()
        };
        let features = [wire::RESUME, wire::DELIVERIES].into_iter();
        let common = features.filter(|name| hello.features.iter().any(|asked| asked == name));
        welcome.features = common.map(ByteString::from_static).collect();
        if hello.features.iter().any(|feature| feature == wire::RESUME) {
            welcome.grace = config.timeouts.grace;
            // A client that asks for no credit in particular gets all.
            let unless_0 = |asked: u64, most: usize| match asked {
                0 => most as u64,
                asked => asked.min(most as u64),
            };
            welcome.credit = Credit {
                messages: unless_0(hello.credit.messages, config.limits.queue_messages),
                bytes: unless_0(hello.credit.bytes, config.limits.queue_bytes.0),
            };
            let asked = hello.session.as_ref();
            let known = asked.and_then(|name| self.exchange.session(name, &self.peer));
            if let Some(to) = known {
                welcome.session = hello.session.clone();
                welcome.resumed = true;
                let hello = hello.clone();
                self.hand_over = Some(Box::new(HandOver { to, hello, welcome }));
                return Ok(());
            }
            self.name = Some(self.exchange.name_session(&self.peer));
            welcome.session = self.name.clone();
        }
        self.push(Outgoing::Frame(Box::new(welcome.into())));
        if self.exchange.is_draining() {
            self.push(Outgoing::Drain);
        }
        Ok(())
    }

    fn handle_call(&mut self, frame: CallFrame, now: Instant) -> Result<(), Close> {
        let CallFrame { id, target, timeout, progress, header, payload, .. } = frame;
        self.check_number(id)?;
        let metrics = self.exchange.metrics();
        let reply_to = ReplyTo::peer(self.peer.clone(), id, progress, metrics);
        if let Err(fault) = self.admit_request() {
            reply_to.send(Err(fault));
            return Ok(());
        }
        let header = self.exchange.stamp(header, &self.origin, now);
        let deadline = self.exchange.deadline(timeout, now).into_std();
        let call = Call { header, target, deadline, progress, attempt: None, topic: None, payload };
        let ticket = self.exchange.dispatch(call, reply_to, now);
        self.made.insert(id, ticket);
        Ok(())
    }

    /// Refuses a number that names another call or request of the peer's.
    pub(super) fn check_number(&self, id: CallId) -> Result<(), Close> {
        if self.made.contains_key(&id) || self.waits.contains_key(&id) {
            let reason = format!("call {} is in flight already", id.0);
            return Err(Close::new(Close::PROTOCOL, reason));
        }
        Ok(())
    }

    /// Whether the peer may have one more call or request in flight.
    pub(super) fn admit_request(&self) -> Result<(), Fault> {
        let limit = self.exchange.config().limits.caller_in_flight;
        if self.made.len() < limit {
            return Ok(());
        }
        let detail = "this connection has as many calls in flight as it may have";
        let fault = Fault::new(FaultKind::Overloaded, detail)
            .hint("wait for replies before sending more")
            .retry_after(RETRY_AFTER);
        Err(self.exchange.metrics().limit_met(limits::caller_in_flight, Some(limit), fault))
    }

    /// What an agent says of a call before it ends. Of no interest once it has ended.
    fn handle_progress(&mut self, id: CallId, payload: Payload) {
        let admitted = self.exchange.admit_payload(&payload);
        let Some(reply_to) = self.session.progress_to(id) else { return };
        if let Err(fault) = admitted.and_then(|()| reply_to.progress(payload)) {
            self.session.fail(id, fault);
        }
    }

    fn handle_publish(&mut self, frame: PublishFrame, now: Instant) -> Result<(), Close> {
        match (frame.request, frame.ack.as_deref()) {
            (_, None | Some("memory")) => {}
            (Some(request), Some("durable")) => return self.handle_kept(request, frame, now),
            (request, Some(other)) => {
                let fault = no_ack("ack", other);
                request.into_iter().for_each(|request| self.answer(request, Err(fault.clone())));
                return Ok(());
            }
        }
        let header = self.exchange.stamp(frame.header, &self.origin, now);
        let event = Event { header, topic: frame.topic, payload: frame.payload };
        // The dialect's publishers get nothing of their own.
        let except = (!L::GREETS).then_some(self.peer.id);
        let published = self.exchange.publish(event, except, now);
        let Some(request) = frame.request else { return Ok(()) };
        match published {
            Ok(Published { recipients, dropped, .. }) => {
                let done = Done { request, recipients, dropped };
                self.push(Outgoing::Frame(Box::new(Frame::Done(done))));
            }
            Err(fault) => self.answer(request, Err(fault)),
        }
        Ok(())
    }

    /// A worker's reply, as it may be passed on.
    fn checked(&self, reply: Reply) -> Reply {
        match reply {
            Err(fault) => Err(fault.shortened(MAX_FAULT_TEXT)),
            Ok(payload) => match self.exchange.admit_payload(&payload) {
                Ok(()) => Ok(payload),
                Err(fault) => Err(fault.may_have_run_if(true)),
            },
        }
    }

    pub(super) fn answer(&mut self, request: CallId, done: Result<(), Fault>) {
        match done {
            Ok(()) => {
                let done = Done { request, recipients: 0, dropped: Vec::new() };
                self.push(Outgoing::Frame(Box::new(Frame::Done(done))));
            }
            // Not as the end of a call: that would forget a call of the same number.
            Err(fault) => self.push(Outgoing::Frame(Box::new(Frame::Reply(request, Err(fault))))),
        }
    }
}
