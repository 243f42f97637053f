//! Frames to bytes.

use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::decode::{DecodeError, decode};
use super::frame::{Frame, HeaderFields, SharedEvent};
use super::number::{field, kind};
use crate::{
    AgentId, AgentType, Attempt, Call, CallId, Credit, Event, Fault, Key, MessageId, Payload,
    Principal, Reply, TopicFilter, TopicId,
};

/// The most bytes of a fault's detail, and of its hint; more is cut when it is written.
const MAX_FAULT_TEXT: usize = 8 * 1024;

/// Appends `frame` to `out`.
pub fn encode(frame: &Frame, out: &mut BytesMut) {
    let mut header = Header::begin(out);
    let mut payload = &Bytes::new();
    let kind = match frame {
        Frame::Hello(hello) => {
            header.text(field::NAME, &hello.name);
            hello.versions.iter().for_each(|&version| header.number(field::VERSION, version));
            hello.features.iter().for_each(|feature| header.text(field::FEATURE, feature));
            header.optional(field::SESSION, hello.session.as_deref());
            header.count(field::RECEIVED, hello.received);
            header.credit(hello.credit);
            kind::HELLO
        }
        Frame::Welcome(welcome) => {
            header.number(field::VERSION, welcome.version);
            welcome.features.iter().for_each(|feature| header.text(field::FEATURE, feature));
            header.text(field::NAME, &welcome.name);
            header.number(field::MAX_PAYLOAD, welcome.max_payload);
            header.number(field::HEARTBEAT_MS, millis(welcome.heartbeat));
            header.optional(field::SESSION, welcome.session.as_deref());
            header.flag(field::RESUMED, welcome.resumed);
            header.count(field::RECEIVED, welcome.received);
            header.credit(welcome.credit);
            header.count(field::GRACE_MS, millis(welcome.grace));
            kind::WELCOME
        }
        Frame::Register(register) => {
            header.number(field::ID, register.request.0);
            header.text(field::AGENT_TYPE, register.agent_type.as_str());
            header.optional(field::KEY, register.key.as_ref().map(Key::as_str));
            header.flag(field::EXCLUSIVE, register.registration.exclusive);
            if register.registration.capacity > 1 {
                header.number(field::CAPACITY, register.registration.capacity.into());
            }
            let capabilities = &register.registration.capabilities;
            capabilities.iter().for_each(|name| header.text(field::CAPABILITY, name));
            kind::REGISTER
        }
        Frame::Unregister { request, agent_type, key } => {
            header.number(field::ID, request.0);
            header.text(field::AGENT_TYPE, agent_type.as_str());
            header.optional(field::KEY, key.as_ref().map(Key::as_str));
            kind::UNREGISTER
        }
        Frame::Subscribe(subscribe) => {
            header.number(field::ID, subscribe.request.0);
            header.number(field::SUBSCRIPTION, subscribe.subscription);
            match &subscribe.filter {
                TopicFilter::Exact(topic) => header.text(field::TOPIC_TYPE, topic.as_str()),
                TopicFilter::Prefix(prefix) => header.text(field::TOPIC_PREFIX, prefix),
            }
            let agent_type = subscribe.agent_type.as_ref();
            header.optional(field::AGENT_TYPE, agent_type.map(AgentType::as_str));
            kind::SUBSCRIBE
        }
        Frame::Unsubscribe { request, subscription } => {
            header.number(field::ID, request.0);
            header.number(field::SUBSCRIPTION, *subscription);
            kind::UNSUBSCRIBE
        }
        Frame::Done(done) => {
            header.number(field::ID, done.request.0);
            header.number(field::RECIPIENTS, done.recipients);
            done.dropped.iter().for_each(|name| header.text(field::DROPPED, name));
            kind::DONE
        }
        Frame::Call(call) => {
            header.number(field::ID, call.id.0);
            header.text(field::AGENT_TYPE, call.target.agent_type.as_str());
            header.text(field::KEY, call.target.key.as_str());
            if let Some(timeout) = call.timeout {
                header.number(field::TIMEOUT_MS, millis(timeout));
            }
            header.flag(field::PROGRESS, call.progress);
            header.flag(field::RESENT, call.resent);
            header.attempt(call.attempt);
            call.topic.iter().for_each(|topic| header.topic(topic));
            header.common(Common::from(&call.header));
            header.payload(&call.payload);
            payload = &call.payload.bytes;
            kind::CALL
        }
        Frame::Reply(id, reply) => return header.reply(*id, None, reply),
        Frame::Outcome(outcome) => {
            return header.reply(outcome.id, Some(outcome.attempt), &outcome.reply);
        }
        Frame::Publish(publish) => {
            if let Some(request) = publish.request {
                header.number(field::ID, request.0);
            }
            header.optional(field::ACK, publish.ack.as_deref());
            header.topic(&publish.topic);
            header.common(Common::from(&publish.header));
            header.payload(&publish.payload);
            payload = &publish.payload.bytes;
            kind::PUBLISH
        }
        Frame::Event(event) => {
            header.topic(&event.topic);
            header.common(Common::from(&event.header));
            header.payload(&event.payload);
            header.recipients(&event.agents, &event.subscriptions);
            payload = &event.payload.bytes;
            kind::EVENT
        }
        Frame::Cancel(id) => {
            header.number(field::ID, id.0);
            kind::CANCEL
        }
        Frame::Ping(number) => {
            header.number(field::ID, *number);
            kind::PING
        }
        Frame::Pong(number) => {
            header.number(field::ID, *number);
            kind::PONG
        }
        Frame::Drain => kind::DRAIN,
        Frame::Leave => kind::LEAVE,
        Frame::Received(id) => {
            header.number(field::ID, id.0);
            kind::RECEIVED
        }
        Frame::Ack(received) => {
            header.number(field::RECEIVED, *received);
            kind::ACK
        }
        Frame::Progress(id, progress) => {
            header.number(field::ID, id.0);
            header.payload(progress);
            payload = &progress.bytes;
            kind::PROGRESS
        }
        Frame::Stale(id, attempt) => {
            header.number(field::ID, id.0);
            header.attempt(Some(*attempt));
            kind::STALE
        }
        Frame::Send(send) => {
            header.number(field::ID, send.request.0);
            header.text(field::AGENT_TYPE, send.target.agent_type.as_str());
            header.text(field::KEY, send.target.key.as_str());
            let ttl = send.ttl.map(millis);
            let times = [send.delay.map(millis), send.deliver_at.map(|at| at.0), ttl];
            for (number, value) in
                [field::DELAY_MS, field::DELIVER_AT, field::TTL_MS].iter().zip(times)
            {
                if let Some(value) = value {
                    header.number(*number, value);
                }
            }
            if let Some(most) = send.max_attempts {
                header.number(field::MAX_ATTEMPTS, most.into());
            }
            header.common(Common::from(&send.header));
            header.payload(&send.payload);
            payload = &send.payload.bytes;
            kind::SEND
        }
        Frame::Accepted(accepted) => {
            header.number(field::ID, accepted.request.0);
            header.text(field::DELIVERY, &accepted.delivery.to_string());
            header.text(field::CONVERSATION, accepted.conversation.as_str());
            header.text(field::ACK, &accepted.ack);
            header.number(field::GENERATION, accepted.generation);
            header.flag(field::KNOWN, accepted.known);
            kind::ACCEPTED
        }
        Frame::Published(published) => {
            header.number(field::ID, published.request.0);
            header.text(field::MESSAGE_ID, published.id.as_str());
            header.text(field::CONVERSATION, published.conversation.as_str());
            header.text(field::ACK, &published.ack);
            header.number(field::RECIPIENTS, published.recipients);
            header.flag(field::KNOWN, published.known);
            kind::ACCEPTED
        }
        Frame::Wait(wait) => {
            header.number(field::ID, wait.request.0);
            header.text(field::DELIVERY, &wait.delivery.to_string());
            header.count(field::GENERATION, wait.generation);
            header.optional(field::LEVEL, wait.level.as_deref());
            if let Some(timeout) = wait.timeout {
                header.number(field::TIMEOUT_MS, millis(timeout));
            }
            kind::WAIT
        }
        Frame::Delivery(delivery) => {
            header.number(field::ID, delivery.request.0);
            header.text(field::DELIVERY, &delivery.delivery.to_string());
            header.text(field::STATE, &delivery.state);
            header.number(field::GENERATION, delivery.generation);
            header.count(field::ATTEMPT, delivery.attempt.into());
            delivery.levels.iter().for_each(|level| header.text(field::LEVEL, level));
            header.optional(field::DETAILS, some(&delivery.details));
            if let Some(fault) = &delivery.fault {
                header.fault(&fault.clone().shortened(MAX_FAULT_TEXT));
            }
            if let Some(reply) = &delivery.reply {
                header.payload(reply);
                payload = &reply.bytes;
            }
            kind::DELIVERY
        }
        Frame::CancelDelivery { request, delivery, reason } => {
            header.number(field::ID, request.0);
            header.text(field::DELIVERY, &delivery.to_string());
            header.optional(field::DETAILS, some(reason));
            kind::CANCEL_DELIVERY
        }
    };
    header.finish(kind, payload);
}

/// Appends a call to an agent whose caller waits for `timeout` from now on.
pub fn encode_call(id: CallId, call: &Call, timeout: Duration, out: &mut BytesMut) {
    let mut header = Header::begin(out);
    header.number(field::ID, id.0);
    header.text(field::AGENT_TYPE, call.target.agent_type.as_str());
    header.text(field::KEY, call.target.key.as_str());
    header.number(field::TIMEOUT_MS, millis(timeout));
    header.flag(field::PROGRESS, call.progress);
    header.attempt(call.attempt);
    call.topic.iter().for_each(|topic| header.topic(topic));
    header.common(Common::from(&call.header));
    header.payload(&call.payload);
    header.finish(kind::CALL, &call.payload.bytes);
}

/// Appends the end of a call.
pub fn encode_reply(id: CallId, reply: &Reply, out: &mut BytesMut) {
    Header::begin(out).reply(id, None, reply);
}

/// Whether `frame` is one of the session: sent again if it is lost with a socket, and counted by both
/// sides. The others are those that only make sense on one socket.
pub fn is_counted(frame: &[u8]) -> bool {
    let of_socket = [kind::HELLO, kind::WELCOME, kind::PING, kind::PONG, kind::ACK];
    frame.first().is_some_and(|kind| !of_socket.contains(kind))
}

/// Appends `frame`, which may have been received already, as it is sent again.
pub(crate) fn resend(mut frame: Bytes, out: &mut BytesMut) -> Result<(), DecodeError> {
    if frame.first() != Some(&kind::CALL) {
        out.extend_from_slice(&frame);
    } else if let Some(Frame::Call(mut call)) = decode(&mut frame)? {
        call.resent = true;
        encode(&Frame::Call(call), out);
    }
    Ok(())
}

/// Appends an event frame to `out`: the part that all recipients share, and who receives it here.
pub fn encode_event(
    event: &SharedEvent,
    agents: &[AgentType],
    subscriptions: &[u64],
    out: &mut BytesMut,
) {
    let mut header = Header::begin(out);
    header.out.extend_from_slice(&event.header);
    header.recipients(agents, subscriptions);
    header.finish(kind::EVENT, &event.payload);
}

impl SharedEvent {
    /// Writes the shared part of `event`.
    pub fn new(event: &Event) -> Self {
        let mut out = BytesMut::with_capacity(256);
        let mut header = Header { start: 0, out: &mut out };
        header.topic(&event.topic);
        header.common(Common::from(&event.header));
        header.payload(&event.payload);
        Self { header: out.freeze(), payload: event.payload.bytes.clone() }
    }
}

/// What the headers of all messages have in common.
#[derive(Clone, Copy)]
struct Common<'a> {
    id: Option<&'a MessageId>,
    conversation: Option<&'a MessageId>,
    cause: Option<&'a MessageId>,
    principal: Option<&'a Principal>,
    sender: Option<&'a AgentId>,
    traceparent: Option<&'a str>,
    hops: u8,
    idempotency_key: Option<&'a str>,
}

impl<'a> From<&'a HeaderFields> for Common<'a> {
    fn from(header: &'a HeaderFields) -> Self {
        Self {
            id: header.id.as_ref(),
            conversation: header.conversation.as_ref(),
            cause: header.cause.as_ref(),
            principal: header.principal.as_ref(),
            sender: header.sender.as_ref(),
            traceparent: header.traceparent.as_deref(),
            hops: header.hops,
            idempotency_key: header.idempotency_key.as_deref(),
        }
    }
}

impl<'a> From<&'a crate::Header> for Common<'a> {
    fn from(header: &'a crate::Header) -> Self {
        Self {
            id: Some(&header.id),
            conversation: Some(&header.conversation),
            cause: header.cause.as_ref(),
            principal: Some(&header.principal),
            sender: header.sender.as_ref(),
            traceparent: header.traceparent.as_deref(),
            hops: header.hops,
            idempotency_key: header.idempotency_key.as_deref(),
        }
    }
}

/// Appends a frame whose header is written already.
pub(super) fn write(kind: u8, header: &[u8], payload: &[u8], out: &mut BytesMut) {
    let begun = Header::begin(out);
    begun.out.extend_from_slice(header);
    begun.finish(kind, payload);
}

/// A header that is being written where it is to stand.
struct Header<'a> {
    out: &'a mut BytesMut,
    start: usize,
}

/// The kind of a frame, and the length of its header if that is short.
const HEAD: usize = 2;

impl<'a> Header<'a> {
    /// Leaves room for what stands before a header, which is known at its end.
    fn begin(out: &'a mut BytesMut) -> Self {
        out.reserve(256);
        out.extend_from_slice(&[0; HEAD]);
        let start = out.len();
        Self { out, start }
    }

    /// Makes the header that of a frame.
    fn finish(self, kind: u8, payload: &[u8]) {
        let Self { out, start } = self;
        let end = out.len();
        let length = (end - start) as u64;
        // One byte of it has its place; for more the header moves on.
        let more = varint_length(length) - 1;
        if more > 0 {
            out.resize(end + more, 0);
            out.copy_within(start..end, start + more);
        }
        out[start - HEAD] = kind;
        fill_varint(length, &mut out[start - 1..=start - 1 + more]);
        out.reserve(MAX_VARINT + payload.len());
        put_varints([payload.len() as u64], out);
        out.extend_from_slice(payload);
    }

    fn number(&mut self, number: u64, value: u64) {
        put_varints([number << 3, value], self.out);
    }

    fn flag(&mut self, number: u64, value: bool) {
        self.count(number, value.into());
    }

    /// A number that is 0 where it is absent.
    fn count(&mut self, number: u64, value: u64) {
        if value != 0 {
            self.number(number, value);
        }
    }

    fn credit(&mut self, credit: Credit) {
        self.count(field::WINDOW_MESSAGES, credit.messages);
        self.count(field::WINDOW_BYTES, credit.bytes);
    }

    fn text(&mut self, number: u64, value: &str) {
        put_varints([number << 3 | 2, value.len() as u64], self.out);
        self.out.extend_from_slice(value.as_bytes());
    }

    fn optional(&mut self, number: u64, value: Option<&str>) {
        if let Some(value) = value {
            self.text(number, value);
        }
    }

    fn topic(&mut self, topic: &TopicId) {
        self.text(field::TOPIC_TYPE, topic.topic_type.as_str());
        self.text(field::SOURCE, topic.source.as_str());
    }

    fn recipients(&mut self, agents: &[AgentType], subscriptions: &[u64]) {
        agents.iter().for_each(|agent| self.text(field::AGENT_TYPE, agent.as_str()));
        subscriptions.iter().for_each(|&number| self.number(field::SUBSCRIPTION, number));
    }

    fn common(&mut self, header: Common<'_>) {
        self.optional(field::MESSAGE_ID, header.id.map(MessageId::as_str));
        self.optional(field::CONVERSATION, header.conversation.map(MessageId::as_str));
        self.optional(field::CAUSE, header.cause.map(MessageId::as_str));
        self.optional(field::PRINCIPAL, header.principal.map(Principal::as_str));
        if let Some(sender) = header.sender {
            self.text(field::SENDER_TYPE, sender.agent_type.as_str());
            self.text(field::SENDER_KEY, sender.key.as_str());
        }
        self.optional(field::TRACEPARENT, header.traceparent);
        self.count(field::HOPS, header.hops.into());
        self.optional(field::IDEMPOTENCY_KEY, header.idempotency_key);
    }

    fn attempt(&mut self, attempt: Option<Attempt>) {
        if let Some(Attempt { delivery, number }) = attempt {
            self.text(field::DELIVERY, &delivery.to_string());
            self.number(field::ATTEMPT, number.into());
        }
    }

    /// Makes it the frame that ends a call.
    fn reply(mut self, id: CallId, attempt: Option<Attempt>, reply: &Reply) {
        self.number(field::ID, id.0);
        self.attempt(attempt);
        match reply {
            Ok(payload) => {
                self.payload(payload);
                self.finish(kind::REPLY, &payload.bytes);
            }
            Err(fault) => {
                self.fault(&fault.clone().shortened(MAX_FAULT_TEXT));
                self.finish(kind::FAULT, &[]);
            }
        }
    }

    fn payload(&mut self, payload: &Payload) {
        self.optional(field::CONTENT_TYPE, some(&payload.content_type));
        self.optional(field::DATA_TYPE, some(&payload.data_type));
        for (name, value) in payload.metadata.iter() {
            // Each of the two: a tag of one byte, a length, the text.
            let texts = [name, value].map(|text| text.len());
            let lengths = texts.map(|length| 1 + varint_length(length as u64) + length);
            let length = lengths.iter().sum::<usize>() as u64;
            put_varints([field::METADATA << 3 | 2, length], self.out);
            self.text(field::ENTRY_NAME, name);
            self.text(field::ENTRY_VALUE, value);
        }
    }

    fn fault(&mut self, fault: &Fault) {
        self.text(field::FAULT_KIND, fault.kind().name());
        self.text(field::DETAIL, fault.detail());
        self.optional(field::HINT, fault.hint_text());
        self.number(field::MAY_HAVE_RUN, fault.may_have_run().into());
        if let Some(wait) = fault.retry_after_time() {
            self.number(field::RETRY_AFTER_MS, millis(wait));
        }
        self.optional(field::CONFIG_KEY, fault.config_key());
        if let Some(limit) = fault.limit_value() {
            self.number(field::LIMIT, limit);
        }
    }
}

/// A text that is absent where it is empty.
fn some(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

/// The most bytes that a number takes.
const MAX_VARINT: usize = 10;

pub(super) fn put_varint(value: u64, out: &mut BytesMut) {
    put_varints([value], out);
}

/// Appends up to two numbers.
#[inline]
fn put_varints<const N: usize>(values: [u64; N], out: &mut BytesMut) {
    // Most are small.
    if values.iter().all(|&value| value < 0x80) {
        out.extend_from_slice(&values.map(|value| value as u8));
    } else {
        put_large(values, out);
    }
}

fn put_large<const N: usize>(values: [u64; N], out: &mut BytesMut) {
    let mut bytes = [0; 2 * MAX_VARINT];
    let mut length = 0;
    for mut value in values {
        while value >= 0x80 {
            bytes[length] = value as u8 | 0x80;
            value >>= 7;
            length += 1;
        }
        bytes[length] = value as u8;
        length += 1;
    }
    // A copy of constant size is a few instructions; one of few bytes, but any number, is a call.
    let end = out.len() + length;
    out.extend_from_slice(&bytes);
    out.truncate(end);
}

/// Writes a number to the bytes that it takes.
fn fill_varint(mut value: u64, bytes: &mut [u8]) {
    if let Some((last, others)) = bytes.split_last_mut() {
        for byte in others {
            *byte = value as u8 | 0x80;
            value >>= 7;
        }
        *last = value as u8;
    }
}

fn varint_length(value: u64) -> usize {
    (u64::BITS - (value | 1).leading_zeros()).div_ceil(7) as usize
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
