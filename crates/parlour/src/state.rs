use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use parlour_core::wire::{
    self, AcceptedFrame, DeliveryFrame, Done, EventFrame, Frame, Hello, MAX_TEXT, Outcome,
    PublishedFrame, Register, Subscribe, Welcome,
};
use parlour_core::{
    AgentType, Attempt, CallId, Event, Fault, FaultKind, Header, Payload, Registration, Reply,
    Session, Settled, TopicFilter,
};

use tokio::sync::mpsc;

use crate::handle::{Command, Ids, LocalSubscription, Request, Waiting, after};
use crate::kept::{Kept, wrong_count};
use crate::outgoing::{Outgoing, payload, weight};
use crate::transport::protocol;
use crate::{Error, ErrorKind};

/// How much of small frames is put into one message: as the protocol asks.
const BATCH_BYTES: usize = 32 * 1024;
/// How many requests may be unanswered.
const MAX_IN_FLIGHT: usize = 65_536;
/// How long the host may take to confirm registrations and subscriptions.
const SETUP_TIME: Duration = Duration::from_secs(10);

/// How long after a subscription could not be made anew it is tried again.
const SETUP_PAUSE: Duration = Duration::from_secs(1);

/// What a client and its host owe each other, across connections. Decides; reads and writes nothing.
///
/// A request waits in the outbox until it is written. One that was not written when a connection
/// ended waits for the next. What was written is the session's, which goes on over the next connection
/// if the host still knows it.
#[derive(Debug)]
pub(crate) struct State {
    ids: Arc<Ids>,
    session: Session<Waiting>,
    outbox: VecDeque<Outgoing>,
    /// What every connection begins with.
    registrations: Vec<(AgentType, Registration)>,
    agent_subscriptions: Vec<(TopicFilter, AgentType)>,
    subscriptions: BTreeMap<u64, LocalSubscription>,
    /// Whether the host knows the registrations and subscriptions, or will when it has read on.
    in_session: bool,
    connected: bool,
    kept: Option<Kept>,
    /// Messages that are written before any other: the host has not received them over an earlier
    /// connection.
    resend: VecDeque<Bytes>,
    /// Frames that wait for nothing: they belong to this connection.
    urgent: BytesMut,
    /// Until when the host keeps the session, while there is no connection.
    grace_until: Option<Instant>,
    /// Requests of the setup that the host has not confirmed.
    setup: usize,
    refused: Option<Error>,
    /// The subscriptions of the setup to be tried again, and when.
    again: VecDeque<(Instant, u64)>,
    max_payload: u64,
    /// Whether the host keeps messages for later.
    takes_deliveries: bool,
    /// Answers to calls of the host that wait to be written.
    replies: usize,
    /// Which attempts the host's durable calls are, until they are answered.
    attempts: HashMap<CallId, Attempt>,
}

/// The answer to a request other than a call.
#[derive(Debug)]
pub(crate) enum Answered {
    Done(Done),
    Accepted(Box<AcceptedFrame>),
    Published(Box<PublishedFrame>),
    Delivery(Box<DeliveryFrame>),
}

impl State {
    pub(crate) fn new(
        ids: Arc<Ids>,
        registrations: Vec<(AgentType, Registration)>,
        agent_subscriptions: Vec<(TopicFilter, AgentType)>,
    ) -> Self {
        Self {
            ids,
            session: Session::new(MAX_IN_FLIGHT),
            outbox: VecDeque::new(),
            registrations,
            agent_subscriptions,
            subscriptions: BTreeMap::new(),
            in_session: false,
            connected: false,
            kept: None,
            resend: VecDeque::new(),
            urgent: BytesMut::new(),
            grace_until: None,
            setup: 0,
            refused: None,
            again: VecDeque::new(),
            max_payload: u64::MAX,
            takes_deliveries: false,
            replies: 0,
            attempts: HashMap::new(),
        }
    }

    /// Takes what an application asks for. [`Command::Close`] is the driver's business.
    pub(crate) fn handle_command(&mut self, command: Command) {
        match command {
            Command::Request { request, deadline, waiting } => {
                if let Waiting::Subscribe(subscription, _) = &waiting {
                    self.subscriptions.insert(subscription.number, subscription.clone());
                }
                match self.session.begin(request.id, deadline, waiting) {
                    Ok(()) => self.outbox.push_back(Outgoing::Request { request, deadline }),
                    Err(waiting) => self.answer(waiting, Err(too_many_in_flight()), None),
                }
            }
            // One of a session that is over goes nowhere.
            Command::Progress { call, payload, permit } if self.in_session => {
                if let Some(fault) = self.refused_payload(&payload) {
                    tracing::warn!(%fault, "progress is left out");
                    return;
                }
                let frame = Box::new(Frame::Progress(call, payload));
                self.outbox.push_back(Outgoing::Plain(frame, Some(permit)));
            }
            Command::Progress { .. } => {}
            Command::Abandon(id) => {
                self.session.cancel(id);
                self.settle(None);
            }
            Command::Unsubscribe(number) => {
                self.subscriptions.remove(&number);
                // Said even if the host may not know it: one that timed out can have been made.
                if self.in_session {
                    let request = CallId(self.ids.next());
                    self.push(Frame::Unsubscribe { request, subscription: number });
                }
            }
            Command::Close => {}
        }
    }

    /// Asks in `hello` for a session that outlives its connection, or to go on with the one there is.
    pub(crate) fn ask(&self, mut hello: Hello) -> Hello {
        Kept::ask(&mut hello, self.kept.as_ref());
        hello
    }

    /// Begins a connection. Returns whether the session goes on over it.
    ///
    /// In a new session registrations and subscriptions go out first.
    pub(crate) fn handle_connected(
        &mut self,
        welcome: &Welcome,
        now: Instant,
    ) -> Result<bool, Error> {
        self.urgent.clear();
        self.grace_until = None;
        if let Some(kept) = self.kept.as_mut().filter(|_| welcome.resumed) {
            self.resend = kept.windows.resume(welcome.received).map_err(wrong_count)?.into();
            self.connected = true;
            return Ok(true);
        }
        self.end_session();
        self.kept = Kept::begin(welcome);
        (self.in_session, self.connected) = (true, true);
        self.max_payload = welcome.max_payload;
        self.takes_deliveries = welcome.features.iter().any(|name| name == wire::DELIVERIES);
        self.set_up(now);
        Ok(false)
    }

    fn set_up(&mut self, now: Instant) {
        let mut frames = Vec::new();
        for (agent_type, registration) in &self.registrations {
            let request = CallId(self.ids.next());
            let (agent_type, registration) = (agent_type.clone(), registration.clone());
            let register = Register { request, agent_type, key: None, registration };
            frames.push((request, Frame::Register(register), None));
        }
        for (filter, agent_type) in &self.agent_subscriptions {
            let (request, subscription) = (CallId(self.ids.next()), self.ids.next());
            let (filter, agent_type) = (filter.clone(), Some(agent_type.clone()));
            let subscribe = Subscribe { request, subscription, filter, agent_type };
            frames.push((request, Frame::Subscribe(subscribe), None));
        }
        for subscription in self.subscriptions.values() {
            // One whose first request still waits in the outbox is sent by that.
            let waits = |outgoing: &Outgoing| match outgoing.frame() {
                Frame::Subscribe(subscribe) => subscribe.subscription == subscription.number,
                _ => false,
            };
            if !self.outbox.iter().any(waits) {
                let request = CallId(self.ids.next());
                let frame = subscribe_frame(request, subscription);
                frames.push((request, frame, Some(subscription.clone())));
            }
        }
        self.setup = frames.len();
        let deadline = now + SETUP_TIME;
        for (id, frame, subscription) in frames.into_iter().rev() {
            let request = Box::new(Request { id, frame, _permit: None });
            match self.session.begin(id, deadline, Waiting::Setup(subscription)) {
                Ok(()) => self.outbox.push_front(Outgoing::Request { request, deadline }),
                Err(_) => self.refused = Some(too_many_in_flight().into()),
            }
        }
    }

    /// Ends a connection that broke. Returns whether the session may go on over another.
    pub(crate) fn handle_disconnect(&mut self, now: Instant) -> bool {
        self.connected = false;
        self.grace_until = self.kept.as_ref().map(|kept| now + kept.grace);
        self.grace_until.is_some()
    }

    /// Ends the session. What was written and not answered has failed; the rest waits on.
    pub(crate) fn end_session(&mut self) {
        if !std::mem::take(&mut self.in_session) {
            return;
        }
        self.connected = false;
        self.kept = None;
        self.grace_until = None;
        self.resend.clear();
        self.setup = 0;
        self.again.clear();
        self.replies = 0;
        self.attempts.clear();
        let mut waiting = HashMap::new();
        self.outbox.retain(|outgoing| match outgoing {
            Outgoing::Request { request, deadline } => {
                waiting.insert(request.id, *deadline);
                true
            }
            Outgoing::Plain(..) => false,
        });
        self.session.handle_disconnect();
        let mut dropped = Vec::new();
        while let Some(Settled { id, reply_to, reply, .. }) = self.session.poll_settled() {
            let sent = reply.as_ref().is_err_and(Fault::may_have_run);
            match (waiting.get(&id), reply_to) {
                (_, Waiting::Setup(_)) => dropped.push(id),
                (Some(&deadline), reply_to) => {
                    // Has room: the session is empty but for those put back.
                    let _ = self.session.begin(id, deadline, reply_to);
                }
                (None, reply_to) => self.fail(reply_to, Error::connection_lost(sent)),
            }
        }
        self.outbox.retain(|outgoing| match outgoing {
            Outgoing::Request { request, .. } => !dropped.contains(&request.id),
            Outgoing::Plain(..) => false,
        });
    }

    /// Ends everything, because there will be no other connection.
    pub(crate) fn handle_closed(&mut self) {
        self.session.handle_disconnect();
        while let Some(settled) = self.session.poll_settled() {
            let sent = settled.reply.as_ref().is_err_and(Fault::may_have_run);
            if !matches!(settled.reply_to, Waiting::Setup(_)) {
                self.fail(settled.reply_to, Error::closed().may_have_run_if(sent));
            }
        }
    }

    /// Until when the session may go on over another connection, while there is none.
    pub(crate) fn grace_until(&self) -> Option<Instant> {
        self.grace_until
    }

    /// Takes the next frame off a message. `None` for one that is the session's own, or of a kind that
    /// is not known here.
    pub(crate) fn receive(&mut self, message: &mut Bytes) -> Result<Option<Frame>, Error> {
        let frame = match &mut self.kept {
            Some(Kept { windows, .. }) => windows.decode(message),
            None => wire::decode(message),
        };
        match frame.map_err(protocol)? {
            Some(Frame::Ack(received)) => {
                if let Some(Kept { windows, .. }) = &mut self.kept {
                    windows.handle_ack(received).map_err(wrong_count)?;
                }
                Ok(None)
            }
            Some(Frame::Ping(number)) => {
                wire::encode(&Frame::Pong(number), &mut self.urgent);
                self.acknowledge(true);
                Ok(None)
            }
            frame => Ok(frame),
        }
    }

    fn acknowledge(&mut self, now: bool) {
        if let Some(Kept { windows, .. }) = &mut self.kept {
            windows.acknowledge(now, &mut self.urgent);
        }
    }

    /// Takes the answer to a call, or the refusal of another request.
    pub(crate) fn handle_reply(&mut self, id: CallId, reply: Reply) {
        // One that nobody waits for any more goes nowhere.
        self.session.handle_reply(id, reply);
        self.settle(None);
    }

    /// Takes what an agent says of a call before its end. None is left out: a caller that has too much
    /// to read loses the call.
    pub(crate) fn handle_progress(&mut self, id: CallId, payload: Payload) {
        let Some(Waiting::Call(_, Some(progress))) = self.session.progress_to(id) else { return };
        if let Err(mpsc::error::TrySendError::Full(_)) = progress.try_send(payload) {
            let detail = "more progress of the call came than was read";
            let fault = Fault::new(FaultKind::Overloaded, detail).hint("read it as it comes");
            self.session.fail(id, fault);
            self.settle(None);
        }
    }

    /// Takes the answer to another request.
    pub(crate) fn handle_answer(&mut self, answer: Answered) {
        let request = match &answer {
            Answered::Done(done) => done.request,
            Answered::Accepted(accepted) => accepted.request,
            Answered::Published(published) => published.request,
            Answered::Delivery(delivery) => delivery.request,
        };
        if self.session.handle_reply(request, Ok(Payload::default())) {
            self.settle(Some(answer));
        }
    }

    /// Notes which attempt a call of the host is, for its answer.
    pub(crate) fn begin_attempt(&mut self, id: CallId, attempt: Attempt) {
        self.attempts.insert(id, attempt);
    }

    /// Forgets a call of the host that is not answered any more.
    pub(crate) fn end_attempt(&mut self, id: CallId) {
        self.attempts.remove(&id);
    }

    /// Hands an event to those of this client's subscriptions that it is for.
    pub(crate) fn handle_event(&mut self, event: &EventFrame) {
        let Some(header) = header(&event.header) else {
            tracing::warn!(topic = %event.topic, "an event came without an id and is dropped");
            return;
        };
        for number in &event.subscriptions {
            // One that has just ended gets events until the host knows.
            let Some(subscription) = self.subscriptions.get(number) else { continue };
            let (header, topic) = (header.clone(), event.topic.clone());
            let event = Event { header, topic, payload: event.payload.clone() };
            if subscription.events.try_send(event).is_err() {
                subscription.outcome.missed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Ends what has come to its deadline, and tries again what is due.
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        self.session.handle_timeout(now);
        self.settle(None);
        while let Some((_, number)) = self.again.pop_front_if(|(at, _)| *at <= now) {
            self.subscribe_again(number, now + SETUP_TIME);
        }
    }

    fn subscribe_again(&mut self, number: u64, deadline: Instant) {
        let Some(subscription) = self.subscriptions.get(&number).cloned() else {
            self.setup = self.setup.saturating_sub(1);
            return;
        };
        // One whose confirmation was late stands, and the host would refuse its number.
        let request = CallId(self.ids.next());
        self.push(Frame::Unsubscribe { request, subscription: number });
        let id = CallId(self.ids.next());
        let frame = subscribe_frame(id, &subscription);
        match self.session.begin(id, deadline, Waiting::Setup(Some(subscription))) {
            Ok(()) => {
                let request = Box::new(Request { id, frame, _permit: None });
                self.outbox.push_back(Outgoing::Request { request, deadline });
            }
            Err(waiting) => self.answer(waiting, Err(too_many_in_flight()), None),
        }
    }

    /// When [`handle_timeout`](Self::handle_timeout) next has something to do.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let again = self.again.front().map(|&(at, _)| at);
        self.session.poll_timeout().into_iter().chain(again).min()
    }

    /// Why the host refused a registration or subscription that this connection began with.
    pub(crate) fn poll_refused(&mut self) -> Option<Error> {
        self.refused.take()
    }

    /// Whether the host has confirmed everything that this connection began with.
    pub(crate) fn is_set_up(&self) -> bool {
        self.connected && self.setup == 0
    }

    /// Queues a frame of which nothing is awaited.
    pub(crate) fn push(&mut self, frame: Frame) {
        self.outbox.push_back(Outgoing::Plain(Box::new(frame), None));
    }

    /// Queues the answer to a call of the host.
    pub(crate) fn push_reply(&mut self, id: CallId, reply: Reply) {
        let reply = reply.and_then(|payload| match self.refused_payload(&payload) {
            // It ran, whatever became of its answer.
            Some(fault) => Err(fault.may_have_run_if(true)),
            None => Ok(payload),
        });
        let frame = match self.attempts.remove(&id) {
            Some(attempt) => Outcome { id, attempt, reply }.into(),
            None => Frame::Reply(id, reply),
        };
        self.push(frame);
        self.replies += 1;
    }

    /// How many answers to calls of the host wait to be written.
    pub(crate) fn unwritten_replies(&self) -> usize {
        self.replies
    }

    /// How many frames wait to be written.
    pub(crate) fn outbox_len(&self) -> usize {
        self.outbox.len()
    }

    /// Whether the host takes another frame of the session.
    pub(crate) fn has_credit(&self) -> bool {
        self.kept.as_ref().is_none_or(|kept| kept.windows.credit() > 0)
    }

    /// The next message to write: as many frames as fit into a batch, or one that is larger.
    pub(crate) fn poll_message(&mut self, now: Instant) -> Option<Bytes> {
        if let Some(message) = self.resend.pop_front() {
            return Some(message);
        }
        self.acknowledge(false);
        let mut message = std::mem::take(&mut self.urgent);
        while let Some(outgoing) = self.outbox.front() {
            let is_full =
                !message.is_empty() && message.len() + weight(outgoing.frame()) > BATCH_BYTES;
            if is_full || !self.has_credit() {
                break;
            }
            let begin = message.len();
            match self.outbox.pop_front() {
                Some(Outgoing::Plain(frame, _permit)) => {
                    if matches!(*frame, Frame::Reply(..) | Frame::Outcome(_)) {
                        self.replies -= 1;
                    }
                    wire::encode(&frame, &mut message);
                }
                Some(Outgoing::Request { mut request, deadline }) => {
                    let refused = self.refused(&request.frame);
                    if !self.session.send(request.id) {
                        continue;
                    }
                    if let Some(fault) = refused {
                        self.handle_reply(request.id, Err(fault));
                        continue;
                    }
                    let left = deadline.saturating_duration_since(now);
                    match &mut request.frame {
                        Frame::Call(call) => call.timeout = Some(left),
                        Frame::Wait(wait) => drop(wait.timeout.get_or_insert(left)),
                        _ => {}
                    }
                    wire::encode(&request.frame, &mut message);
                }
                None => break,
            }
            if let Some(Kept { windows, .. }) = &mut self.kept {
                windows.add(&message[begin..]);
            }
        }
        let message = message.freeze();
        if let Some(Kept { windows, .. }) = &mut self.kept {
            windows.push(message.clone());
        }
        (!message.is_empty()).then_some(message)
    }

    /// Why the host would not take a request.
    fn refused(&self, frame: &Frame) -> Option<Fault> {
        let for_later = match frame {
            Frame::Publish(publish) => publish.ack.is_some(),
            frame => {
                matches!(frame, Frame::Send(_) | Frame::Wait(_) | Frame::CancelDelivery { .. })
            }
        };
        if for_later && !self.takes_deliveries {
            let fault = Fault::new(FaultKind::Invalid, "this host keeps nothing for later");
            return Some(fault.hint("start a newer host, or do it now, in memory"));
        }
        payload(frame).and_then(|payload| self.refused_payload(payload))
    }

    /// Why the host would not take a payload, or not even the frame with it.
    fn refused_payload(&self, payload: &Payload) -> Option<Fault> {
        if payload.content_type.len().max(payload.data_type.len()) > MAX_TEXT {
            let detail = format!("a content type or data type is longer than {MAX_TEXT} bytes");
            let fault = Fault::new(FaultKind::Invalid, detail);
            return Some(fault.hint("name the type more briefly"));
        }
        let (length, limit) = (payload.bytes.len() as u64, self.max_payload);
        (length > limit).then(|| {
            let detail = format!("the payload has {length} bytes, and the host takes {limit}");
            Fault::new(FaultKind::TooLarge, detail)
                .hint("send less, or raise the host's limits.payload_bytes")
                .limit("limits.payload_bytes", Some(limit))
        })
    }

    /// Hands on what ended. `answer` belongs to the first of them, if any.
    fn settle(&mut self, mut answer: Option<Answered>) {
        while let Some(settled) = self.session.poll_settled() {
            if settled.cancel && matches!(settled.reply_to, Waiting::Call(..) | Waiting::Wait(_)) {
                self.push(Frame::Cancel(settled.id));
            }
            let unsent = settled.reply.as_ref().is_err_and(|fault| !fault.may_have_run());
            if unsent {
                // Frees its place in the queue, which may stand still while there is no connection.
                self.outbox.retain(|outgoing| {
                    !matches!(
                        outgoing,
                        Outgoing::Request { request, .. } if request.id == settled.id
                    )
                });
            }
            self.answer(settled.reply_to, settled.reply, answer.take());
        }
    }

    fn answer(&mut self, waiting: Waiting, reply: Reply, answered: Option<Answered>) {
        // Whoever waited may have gone meanwhile.
        match (waiting, reply, answered) {
            (Waiting::Setup(_), Ok(_), Some(Answered::Done(_))) => {
                self.setup = self.setup.saturating_sub(1);
            }
            (Waiting::Call(answer, _), Ok(payload), None) => drop(answer.send(Ok(payload))),
            (
                Waiting::Confirm(answer) | Waiting::Subscribe(_, answer),
                Ok(_),
                Some(Answered::Done(done)),
            ) => drop(answer.send(Ok(done))),
            (Waiting::Send(answer), Ok(_), Some(Answered::Accepted(accepted))) => {
                drop(answer.send(Ok(*accepted)));
            }
            (Waiting::Publish(answer), Ok(_), Some(Answered::Published(published))) => {
                drop(answer.send(Ok(*published)));
            }
            (Waiting::Wait(answer), Ok(_), Some(Answered::Delivery(delivery))) => {
                drop(answer.send(Ok(*delivery)));
            }
            (waiting, Err(fault), _) => self.fail(waiting, fault.into()),
            (waiting, Ok(_), _) => {
                let error = "the host answered a request as if it were one of another kind";
                self.fail(waiting, Error::new(ErrorKind::Protocol, error).may_have_run_if(true));
            }
        }
    }

    fn fail(&mut self, waiting: Waiting, error: Error) {
        match waiting {
            Waiting::Setup(Some(subscription)) if error.is_retryable() => {
                tracing::debug!(filter = ?subscription.filter, %error, "cannot subscribe again yet");
                self.again.push_back((after(SETUP_PAUSE), subscription.number));
            }
            // What the application subscribed to can be refused alone: its events end.
            Waiting::Setup(Some(subscription)) => {
                tracing::warn!(filter = ?subscription.filter, %error, "cannot subscribe again");
                // Was not set before: a subscription ends once.
                let _ = subscription.outcome.error.set(error);
                self.subscriptions.remove(&subscription.number);
                self.setup = self.setup.saturating_sub(1);
            }
            Waiting::Setup(None) => self.refused = Some(error),
            Waiting::Call(answer, _) => drop(answer.send(Err(error))),
            Waiting::Confirm(answer) => drop(answer.send(Err(error))),
            Waiting::Send(answer) => drop(answer.send(Err(error))),
            Waiting::Publish(answer) => drop(answer.send(Err(error))),
            Waiting::Wait(answer) => drop(answer.send(Err(error))),
            Waiting::Subscribe(subscription, answer) => {
                self.subscriptions.remove(&subscription.number);
                drop(answer.send(Err(error)));
            }
        }
    }
}

/// A subscription of the connection itself.
pub(crate) fn subscribe_frame(request: CallId, subscription: &LocalSubscription) -> Frame {
    let (number, filter) = (subscription.number, subscription.filter.clone());
    Frame::Subscribe(Subscribe { request, subscription: number, filter, agent_type: None })
}

/// What every message of a host carries; `None` if it names neither message nor conversation.
pub(crate) fn header(fields: &wire::HeaderFields) -> Option<Header> {
    Some(Header {
        id: fields.id.clone()?,
        conversation: fields.conversation.clone()?,
        cause: fields.cause.clone(),
        principal: fields.principal.clone().unwrap_or(parlour_core::Principal::ANONYMOUS),
        sender: fields.sender.clone(),
        traceparent: fields.traceparent.clone(),
        hops: fields.hops,
        idempotency_key: fields.idempotency_key.clone(),
    })
}

fn too_many_in_flight() -> Fault {
    let detail = format!("this client has {MAX_IN_FLIGHT} unanswered requests");
    Fault::new(FaultKind::Overloaded, detail).hint("wait for some answers before asking more")
}
