//! Bytes to frames.

use std::time::Duration;

use bytes::{Buf, Bytes};
use bytestring::ByteString;
use thiserror::Error;

use super::frame::{
    AcceptedFrame, CallFrame, DeliveryFrame, Done, EventFrame, Frame, HeaderFields, Hello, Outcome,
    PublishFrame, PublishedFrame, Register, SendFrame, Subscribe, WaitFrame, Welcome,
};
use super::number::{field, field_name, kind, kind_name};
use crate::durable::{DeliveryId, State, Timestamp};
use crate::{
    AgentId, AgentType, Attempt, CallId, Fault, FaultKind, InvalidName, Key, MessageId,
    MetadataError, Payload, Principal, Registration, TopicFilter, TopicId, TopicType,
};

/// Why bytes are not a frame.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[non_exhaustive]
pub enum DecodeError {
    /// A frame or field is longer than what holds it.
    #[error("the frame ends in the middle of its {0}")]
    Truncated(&'static str),
    /// A number takes more than ten bytes.
    #[error("a varint is longer than ten bytes")]
    Varint,
    /// A field has a type that does not exist, or that is not its own.
    #[error("{} has the wrong type", field_name(*.0))]
    FieldType(u64),
    /// A text is not UTF-8.
    #[error("{} is not UTF-8", field_name(*.0))]
    Utf8(u64),
    /// The frame lacks a field that it needs.
    #[error("{} needs {}", kind_name(*.0), field_name(*.1))]
    Missing(u8, u64),
    /// A name breaks its rule.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// A header, or one of its texts, is longer than allowed.
    #[error("{0} is longer than {1} bytes")]
    TooLong(&'static str, usize),
    /// Metadata breaks its rule.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
}

/// The most bytes of a header.
pub const MAX_HEADER: usize = 32 * 1024;
/// The most bytes of a text that has no narrower rule: trace context and idempotency key.
pub const MAX_TEXT: usize = 1024;

/// Whether the frame that `message` begins with carries what may stay in memory for longer than its
/// channel is there.
pub fn is_for_later(message: &[u8]) -> bool {
    match message.first() {
        Some(&kind::SEND) => true,
        Some(&kind::PUBLISH) => {
            let header = measure(message).ok().and_then(|it| message.get(it.header.0..it.header.1));
            let header = header.unwrap_or_default();
            // How the field begins. Most headers are ASCII but for the tags of others.
            const BEGIN: u8 = 0x80 | ((field::ACK << 3 | 2) & 0x7f) as u8;
            let nothing = Bytes::new();
            let mut fields = Fields { header: &nothing, rest: header };
            header.contains(&BEGIN)
                && fields.any(|field| field.is_ok_and(|field| field.number == field::ACK))
        }
        _ => false,
    }
}

/// Takes the bytes of the next frame off `message`.
pub fn split_frame(message: &mut Bytes) -> Result<Bytes, DecodeError> {
    let length = frame_length(message)?;
    Ok(message.split_to(length))
}

/// How long the frame is that `message` begins with.
pub fn frame_length(message: &[u8]) -> Result<usize, DecodeError> {
    measure(message).map(|Measured { length, .. }| length)
}

/// Where the parts of a frame are.
struct Measured {
    /// Of the header: its first byte, and the one behind its last.
    header: (usize, usize),
    payload: usize,
    length: usize,
}

fn measure(message: &[u8]) -> Result<Measured, DecodeError> {
    let part = |rest, what| {
        let (length, rest) = read_varint(rest, what)?;
        let begin = message.len() - rest.len();
        let end = usize::try_from(length).ok().and_then(|length| begin.checked_add(length));
        match end.and_then(|end| Some((end, message.get(end..)?))) {
            Some((end, rest)) => Ok(((begin, end), rest)),
            None => Err(DecodeError::Truncated(what)),
        }
    };
    let rest = message.get(1..).ok_or(DecodeError::Truncated("kind"))?;
    let (header, rest) = part(rest, "header")?;
    let ((payload, length), _) = part(rest, "payload")?;
    Ok(Measured { header, payload, length })
}

/// Takes the next frame off `message`, as what it is made of: kind, header and payload.
pub(super) fn parts(message: &mut Bytes) -> Result<(u8, Bytes, Bytes), DecodeError> {
    let Measured { header: (begin, end), payload, length } = measure(message)?;
    if end - begin > MAX_HEADER {
        return Err(DecodeError::TooLong("the header", MAX_HEADER));
    }
    let mut frame = message.split_to(length);
    let kind = frame[0];
    let payload = frame.split_off(payload);
    frame.truncate(end);
    frame.advance(begin);
    Ok((kind, frame, payload))
}

/// Takes the next frame off `message`. Payload and texts are slices of it, not copies.
///
/// Returns `None` for a frame of an unknown kind, which is to be skipped. Call it until `message` is
/// empty.
pub fn decode(message: &mut Bytes) -> Result<Option<Frame>, DecodeError> {
    let (kind, header, payload) = parts(message)?;
    let fields = Fields::new(&header);
    let missing = |number| move || DecodeError::Missing(kind, number);
    Ok(Some(match kind {
        kind::HELLO => hello(fields)?.into(),
        kind::WELCOME => welcome(fields)?.into(),
        kind::REGISTER | kind::UNREGISTER => {
            let (mut request, mut agent_type, mut key) = (None, None, None);
            let mut registration = Registration::default();
            for field in fields {
                let field = field?;
                match field.number {
                    field::ID => request = field.request()?,
                    field::AGENT_TYPE => agent_type = Some(AgentType::parse(field.text()?)?),
                    field::KEY => key = Some(Key::parse(field.text()?)?),
                    field::EXCLUSIVE => registration.exclusive = field.number()? != 0,
                    field::CAPACITY => {
                        let capacity = field.number()?.clamp(1, u16::MAX.into());
                        registration.capacity = capacity as u16;
                    }
                    field::CAPABILITY => registration.capabilities.push(field.text()?),
                    _ => {}
                }
            }
            let request = request.ok_or_else(missing(field::ID))?;
            let agent_type = agent_type.ok_or_else(missing(field::AGENT_TYPE))?;
            match kind {
                kind::REGISTER => {
                    Frame::Register(Register { request, agent_type, key, registration })
                }
                _ => Frame::Unregister { request, agent_type, key },
            }
        }
        kind::SUBSCRIBE => {
            let (mut request, mut subscription) = (None, None);
            let (mut filter, mut agent_type) = (None, None);
            for field in fields {
                let field = field?;
                match field.number {
                    field::ID => request = field.request()?,
                    field::SUBSCRIPTION => subscription = Some(field.number()?),
                    field::TOPIC_TYPE => {
                        filter = Some(TopicFilter::Exact(TopicType::parse(field.text()?)?));
                    }
                    field::TOPIC_PREFIX => filter = Some(TopicFilter::prefix(&field.text()?)?),
                    field::AGENT_TYPE => agent_type = Some(AgentType::parse(field.text()?)?),
                    _ => {}
                }
            }
            Frame::Subscribe(Subscribe {
                request: request.ok_or_else(missing(field::ID))?,
                subscription: subscription.ok_or_else(missing(field::SUBSCRIPTION))?,
                filter: filter.ok_or_else(missing(field::TOPIC_TYPE))?,
                agent_type,
            })
        }
        kind::UNSUBSCRIBE => {
            let (mut request, mut subscription) = (None, None);
            for field in fields {
                let field = field?;
                match field.number {
                    field::ID => request = field.request()?,
                    field::SUBSCRIPTION => subscription = Some(field.number()?),
                    _ => {}
                }
            }
            Frame::Unsubscribe {
                request: request.ok_or_else(missing(field::ID))?,
                subscription: subscription.ok_or_else(missing(field::SUBSCRIPTION))?,
            }
        }
        kind::DONE => {
            let (mut request, mut recipients, mut dropped) = (None, 0, Vec::new());
            for field in fields {
                let field = field?;
                match field.number {
                    field::ID => request = field.request()?,
                    field::RECIPIENTS => recipients = field.number()?,
                    field::DROPPED => dropped.push(field.text()?),
                    _ => {}
                }
            }
            Frame::Done(Done {
                request: request.ok_or_else(missing(field::ID))?,
                recipients,
                dropped,
            })
        }
        kind::CALL | kind::SEND | kind::PUBLISH | kind::EVENT => {
            message_frame(kind, fields, payload)?
        }
        kind::REPLY | kind::PROGRESS | kind::FAULT => {
            let (mut id, mut attempt) = (None, AttemptFields::default());
            let mut payload = Payload { bytes: payload, ..Payload::default() };
            let mut fault = FaultFields::default();
            for field in fields {
                let field = field?;
                match field.number {
                    field::ID => id = Some(CallId(field.number()?)),
                    field::DELIVERY | field::ATTEMPT => attempt.take(&field)?,
                    _ if kind == kind::FAULT => fault.take(&field)?,
                    _ => payload_field(&mut payload, &field)?,
                }
            }
            let id = id.ok_or_else(missing(field::ID))?;
            let reply = if kind == kind::FAULT { Err(fault.fault()) } else { Ok(payload) };
            match (reply, attempt.attempt()) {
                (Ok(progress), _) if kind == kind::PROGRESS => Frame::Progress(id, progress),
                (reply, Some(attempt)) => Outcome { id, attempt, reply }.into(),
                (reply, None) => Frame::Reply(id, reply),
            }
        }
        kind::STALE => {
            let (mut id, mut attempt) = (None, AttemptFields::default());
            for field in fields {
                let field = field?;
                match field.number {
                    field::ID => id = Some(CallId(field.number()?)),
                    _ => attempt.take(&field)?,
                }
            }
            Frame::Stale(
                id.ok_or_else(missing(field::ID))?,
                attempt.attempt().ok_or_else(missing(field::DELIVERY))?,
            )
        }
        kind::ACCEPTED => accepted(fields)?,
        kind::WAIT | kind::CANCEL_DELIVERY => {
            let (mut request, mut delivery) = (None, None);
            let (mut generation, mut level, mut timeout) = (0, None, None);
            let mut reason = ByteString::new();
            for field in fields {
                let field = field?;
                match field.number {
                    field::ID => request = field.request()?,
                    field::DELIVERY => delivery = Some(DeliveryId::parse(&field.text()?)?),
                    field::GENERATION => generation = field.number()?,
                    field::LEVEL => level = Some(field.short_text("level")?),
                    field::TIMEOUT_MS => timeout = Some(Duration::from_millis(field.number()?)),
                    field::DETAILS => reason = field.short_text("details")?,
                    _ => {}
                }
            }
            let request = request.ok_or_else(missing(field::ID))?;
            let delivery = delivery.ok_or_else(missing(field::DELIVERY))?;
            match kind {
                kind::WAIT => WaitFrame { request, delivery, generation, level, timeout }.into(),
                _ => Frame::CancelDelivery { request, delivery, reason },
            }
        }
        kind::DELIVERY => delivery(fields, payload)?.into(),
        kind::CANCEL | kind::RECEIVED | kind::PING | kind::PONG => {
            let mut id = None;
            for field in fields {
                let field = field?;
                if field.number == field::ID {
                    id = Some(field.number()?);
                }
            }
            let id = id.ok_or_else(missing(field::ID))?;
            match kind {
                kind::CANCEL => Frame::Cancel(CallId(id)),
                kind::RECEIVED => Frame::Received(CallId(id)),
                kind::PING => Frame::Ping(id),
                _ => Frame::Pong(id),
            }
        }
        kind::ACK => {
            let mut received = None;
            for field in fields {
                let field = field?;
                if field.number == field::RECEIVED {
                    received = Some(field.number()?);
                }
            }
            Frame::Ack(received.ok_or_else(missing(field::RECEIVED))?)
        }
        kind::DRAIN => Frame::Drain,
        kind::LEAVE => Frame::Leave,
        _ => return Ok(None),
    }))
}

fn hello(fields: Fields<'_>) -> Result<Hello, DecodeError> {
    let mut hello = Hello::default();
    for field in fields {
        let field = field?;
        match field.number {
            field::NAME => hello.name = field.text()?,
            field::VERSION => hello.versions.push(field.number()?),
            field::FEATURE => hello.features.push(field.text()?),
            field::SESSION => hello.session = Some(field.text()?),
            field::RECEIVED => hello.received = field.number()?,
            field::WINDOW_MESSAGES => hello.credit.messages = field.number()?,
            field::WINDOW_BYTES => hello.credit.bytes = field.number()?,
            _ => {}
        }
    }
    Ok(hello)
}

fn welcome(fields: Fields<'_>) -> Result<Welcome, DecodeError> {
    let mut welcome = Welcome::default();
    for field in fields {
        let field = field?;
        match field.number {
            field::VERSION => welcome.version = field.number()?,
            field::FEATURE => welcome.features.push(field.text()?),
            field::NAME => welcome.name = field.text()?,
            field::MAX_PAYLOAD => welcome.max_payload = field.number()?,
            field::HEARTBEAT_MS => welcome.heartbeat = Duration::from_millis(field.number()?),
            field::SESSION => welcome.session = Some(field.text()?),
            field::RESUMED => welcome.resumed = field.number()? != 0,
            field::RECEIVED => welcome.received = field.number()?,
            field::WINDOW_MESSAGES => welcome.credit.messages = field.number()?,
            field::WINDOW_BYTES => welcome.credit.bytes = field.number()?,
            field::GRACE_MS => welcome.grace = Duration::from_millis(field.number()?),
            _ => {}
        }
    }
    Ok(welcome)
}

/// What names a delivery answers a send, and what names an event a publish.
fn accepted(fields: Fields<'_>) -> Result<Frame, DecodeError> {
    let missing = |number| move || DecodeError::Missing(kind::ACCEPTED, number);
    let (mut request, mut delivery, mut id, mut conversation) = (None, None, None, None);
    let (mut ack, mut generation, mut recipients, mut known) = (None, 0, 0, false);
    for field in fields {
        let field = field?;
        match field.number {
            field::ID => request = field.request()?,
            field::DELIVERY => delivery = Some(DeliveryId::parse(&field.text()?)?),
            field::MESSAGE_ID => id = Some(MessageId::parse(field.text()?)?),
            field::CONVERSATION => conversation = Some(MessageId::parse(field.text()?)?),
            field::ACK => ack = Some(field.text()?),
            field::GENERATION => generation = field.number()?,
            field::RECIPIENTS => recipients = field.number()?,
            field::KNOWN => known = field.number()? != 0,
            _ => {}
        }
    }
    let request = request.ok_or_else(missing(field::ID))?;
    let conversation = conversation.ok_or_else(missing(field::CONVERSATION))?;
    let ack = ack.ok_or_else(missing(field::ACK))?;
    Ok(match (delivery, id) {
        (Some(delivery), _) => {
            AcceptedFrame { request, delivery, conversation, ack, generation, known }.into()
        }
        (None, Some(id)) => {
            PublishedFrame { request, id, conversation, ack, recipients, known }.into()
        }
        (None, None) => return Err(DecodeError::Missing(kind::ACCEPTED, field::DELIVERY)),
    })
}

fn delivery(fields: Fields<'_>, payload: Bytes) -> Result<DeliveryFrame, DecodeError> {
    let missing = |number| move || DecodeError::Missing(kind::DELIVERY, number);
    let (mut request, mut state) = (None, None);
    let mut attempt = AttemptFields::default();
    let (mut generation, mut levels, mut details) = (0, Vec::new(), ByteString::new());
    let (mut fault, mut has_fault) = (FaultFields::default(), false);
    let mut reply = Payload { bytes: payload, ..Payload::default() };
    for field in fields {
        let field = field?;
        match field.number {
            field::ID => request = field.request()?,
            field::DELIVERY | field::ATTEMPT => attempt.take(&field)?,
            field::STATE => state = Some(field.text()?),
            field::GENERATION => generation = field.number()?,
            field::LEVEL => levels.push(field.text()?),
            field::DETAILS => details = field.text()?,
            _ => {
                has_fault |= field.number == field::FAULT_KIND;
                fault.take(&field)?;
                payload_field(&mut reply, &field)?;
            }
        }
    }
    let state = state.ok_or_else(missing(field::STATE))?;
    let is_answered = state == State::Completed.name();
    Ok(DeliveryFrame {
        request: request.ok_or_else(missing(field::ID))?,
        delivery: attempt.delivery.ok_or_else(missing(field::DELIVERY))?,
        state,
        generation,
        attempt: attempt.number.unwrap_or_default(),
        levels,
        details,
        fault: has_fault.then(|| fault.fault()),
        reply: is_answered.then_some(reply),
    })
}

/// The fields that name an attempt of a durable call.
#[derive(Default)]
struct AttemptFields {
    delivery: Option<DeliveryId>,
    number: Option<u32>,
}

impl AttemptFields {
    fn take(&mut self, field: &Field<'_>) -> Result<(), DecodeError> {
        match field.number {
            field::DELIVERY => self.delivery = Some(DeliveryId::parse(&field.text()?)?),
            field::ATTEMPT => self.number = Some(field.number()?.try_into().unwrap_or(u32::MAX)),
            _ => {}
        }
        Ok(())
    }

    fn attempt(&self) -> Option<Attempt> {
        let (delivery, number) = (self.delivery?, self.number?);
        Some(Attempt { delivery, number })
    }
}

/// Call, send, publish and event share most of their fields.
fn message_frame(kind: u8, fields: Fields<'_>, payload: Bytes) -> Result<Frame, DecodeError> {
    let missing = |number| move || DecodeError::Missing(kind, number);
    let (mut id, mut timeout) = (None, None);
    let (mut progress, mut resent) = (false, false);
    let mut attempt = AttemptFields::default();
    let (mut delay, mut deliver_at, mut ttl, mut max_attempts) = (None, None, None, None);
    let (mut agent_type, mut key) = (None, None);
    let (mut topic_type, mut source, mut ack) = (None, None, None);
    let (mut sender_type, mut sender_key) = (None, None);
    let (mut agents, mut subscriptions) = (Vec::new(), Vec::new());
    let mut header = HeaderFields::default();
    let mut payload = Payload { bytes: payload, ..Payload::default() };
    for field in fields {
        let field = field?;
        match field.number {
            field::ID => id = field.request()?,
            field::AGENT_TYPE if kind == kind::EVENT => {
                agents.push(AgentType::parse(field.text()?)?)
            }
            field::AGENT_TYPE => agent_type = Some(AgentType::parse(field.text()?)?),
            field::KEY => key = Some(Key::parse(field.text()?)?),
            field::TOPIC_TYPE => topic_type = Some(TopicType::parse(field.text()?)?),
            field::SOURCE => source = Some(Key::parse(field.text()?)?),
            field::ACK => ack = Some(field.short_text("ack")?),
            field::SUBSCRIPTION => subscriptions.push(field.number()?),
            field::TIMEOUT_MS => timeout = Some(Duration::from_millis(field.number()?)),
            field::PROGRESS => progress = field.number()? != 0,
            field::RESENT => resent = field.number()? != 0,
            field::DELIVERY | field::ATTEMPT => attempt.take(&field)?,
            field::DELAY_MS => delay = Some(Duration::from_millis(field.number()?)),
            field::DELIVER_AT => deliver_at = Some(Timestamp(field.number()?)),
            field::TTL_MS => ttl = Some(Duration::from_millis(field.number()?)),
            field::MAX_ATTEMPTS => {
                max_attempts = Some(field.number()?.try_into().unwrap_or(u32::MAX));
            }
            field::MESSAGE_ID => header.id = Some(MessageId::parse(field.text()?)?),
            field::CONVERSATION => header.conversation = Some(MessageId::parse(field.text()?)?),
            field::CAUSE => header.cause = Some(MessageId::parse(field.text()?)?),
            field::PRINCIPAL => header.principal = Some(Principal::named(field.text()?)),
            field::SENDER_TYPE => sender_type = Some(AgentType::parse(field.text()?)?),
            field::SENDER_KEY => sender_key = Some(Key::parse(field.text()?)?),
            field::TRACEPARENT => header.traceparent = Some(field.short_text("traceparent")?),
            field::HOPS => header.hops = u8::try_from(field.number()?).unwrap_or(u8::MAX),
            field::IDEMPOTENCY_KEY => {
                header.idempotency_key = Some(field.short_text("idempotency_key")?);
            }
            _ => payload_field(&mut payload, &field)?,
        }
    }
    if let (Some(agent_type), Some(key)) = (sender_type, sender_key) {
        header.sender = Some(AgentId { agent_type, key });
    }
    if matches!(kind, kind::CALL | kind::SEND) {
        let agent_type = agent_type.ok_or_else(missing(field::AGENT_TYPE))?;
        let key = key.ok_or_else(missing(field::KEY))?;
        let target = AgentId { agent_type, key };
        let id = id.ok_or_else(missing(field::ID))?;
        if kind == kind::SEND {
            let request = id;
            return Ok(Frame::from(SendFrame {
                request,
                target,
                delay,
                deliver_at,
                ttl,
                max_attempts,
                header,
                payload,
            }));
        }
        let attempt = attempt.attempt();
        return Ok(Frame::from(CallFrame {
            id,
            target,
            timeout,
            progress,
            resent,
            attempt,
            topic: topic_type.zip(source).map(|(kind, source)| TopicId::new(kind, source)),
            header,
            payload,
        }));
    }
    let topic = TopicId {
        topic_type: topic_type.ok_or_else(missing(field::TOPIC_TYPE))?,
        source: source.ok_or_else(missing(field::SOURCE))?,
    };
    Ok(match kind {
        // Nobody would learn what became of it.
        kind::PUBLISH if ack.is_some() && id.is_none() => return Err(missing(field::ID)()),
        kind::PUBLISH => PublishFrame { request: id, ack, topic, header, payload }.into(),
        _ => EventFrame { agents, subscriptions, topic, header, payload }.into(),
    })
}

/// Takes `field` if it describes a payload.
fn payload_field(payload: &mut Payload, field: &Field<'_>) -> Result<(), DecodeError> {
    match field.number {
        field::CONTENT_TYPE => payload.content_type = field.text()?,
        field::DATA_TYPE => payload.data_type = field.text()?,
        field::METADATA => {
            let (mut name, mut value) = (ByteString::new(), ByteString::new());
            for part in field.parts()? {
                let part = part?;
                match part.number {
                    field::ENTRY_NAME => name = part.text()?,
                    field::ENTRY_VALUE => value = part.text()?,
                    _ => {}
                }
            }
            payload.metadata.insert(name, value)?;
        }
        _ => {}
    }
    Ok(())
}

/// The fields that a fault consists of.
#[derive(Default)]
struct FaultFields {
    kind: Option<FaultKind>,
    detail: ByteString,
    hint: Option<ByteString>,
    did_not_run: bool,
    retry_after: Option<Duration>,
    config_key: Option<ByteString>,
    limit: Option<u64>,
}

impl FaultFields {
    /// Takes `field` if it is one of them.
    fn take(&mut self, field: &Field<'_>) -> Result<(), DecodeError> {
        match field.number {
            field::FAULT_KIND => self.kind = FaultKind::from_name(&field.text()?),
            field::DETAIL => self.detail = field.text()?,
            field::HINT => self.hint = Some(field.text()?),
            field::MAY_HAVE_RUN => self.did_not_run = field.number()? == 0,
            field::RETRY_AFTER_MS => {
                self.retry_after = Some(Duration::from_millis(field.number()?));
            }
            field::CONFIG_KEY => self.config_key = Some(field.text()?),
            field::LIMIT => self.limit = Some(field.number()?),
            _ => {}
        }
        Ok(())
    }

    fn fault(self) -> Fault {
        // A kind from a newer peer is at least a failure that may have run.
        let kind = self.kind.unwrap_or(FaultKind::Internal);
        let mut fault = Fault::new(kind, &*self.detail).may_have_run_if(!self.did_not_run);
        if let Some(hint) = self.hint {
            fault = fault.hint(&*hint);
        }
        if let Some(wait) = self.retry_after {
            fault = fault.retry_after(wait);
        }
        if let Some(key) = self.config_key {
            fault = fault.limit(&*key, self.limit);
        }
        fault
    }
}

/// The fields of a header, one after the other.
pub(super) struct Fields<'a> {
    header: &'a Bytes,
    rest: &'a [u8],
}

pub(super) struct Field<'a> {
    header: &'a Bytes,
    pub(super) number: u64,
    pub(super) value: Value<'a>,
}

#[derive(Clone, Copy)]
pub(super) enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Skipped,
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, DecodeError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        (!self.rest.is_empty()).then(|| self.field())
    }
}

impl<'a> Fields<'a> {
    pub(super) fn new(header: &'a Bytes) -> Self {
        Self { header, rest: header }
    }

    #[inline]
    fn field(&mut self) -> Result<Field<'a>, DecodeError> {
        let tag = self.varint()?;
        let number = tag >> 3;
        let value = match tag & 7 {
            0 => Value::Number(self.varint()?),
            2 => {
                let length = self.varint()?;
                Value::Bytes(self.take(usize::try_from(length).unwrap_or(usize::MAX))?)
            }
            kind @ (1 | 5) => {
                self.take(if kind == 1 { 8 } else { 4 })?;
                Value::Skipped
            }
            _ => return Err(DecodeError::FieldType(number)),
        };
        Ok(Field { header: self.header, number, value })
    }

    #[inline]
    fn varint(&mut self) -> Result<u64, DecodeError> {
        let (value, rest) = read_varint(self.rest, "field")?;
        self.rest = rest;
        Ok(value)
    }

    #[inline]
    fn take(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) =
            self.rest.split_at_checked(length).ok_or(DecodeError::Truncated("field"))?;
        self.rest = rest;
        Ok(taken)
    }
}

impl<'a> Field<'a> {
    fn number(&self) -> Result<u64, DecodeError> {
        match self.value {
            Value::Number(value) => Ok(value),
            _ => Err(DecodeError::FieldType(self.number)),
        }
    }

    fn bytes(&self) -> Result<&'a [u8], DecodeError> {
        match self.value {
            Value::Bytes(value) => Ok(value),
            _ => Err(DecodeError::FieldType(self.number)),
        }
    }

    /// The fields that its value consists of.
    fn parts(&self) -> Result<Fields<'a>, DecodeError> {
        Ok(Fields { header: self.header, rest: self.bytes()? })
    }

    /// The number of a request: any but 0.
    fn request(&self) -> Result<Option<CallId>, DecodeError> {
        Ok(Some(CallId(self.number()?)).filter(|id| id.0 != 0))
    }

    fn short_text(&self, what: &'static str) -> Result<ByteString, DecodeError> {
        if self.bytes()?.len() > MAX_TEXT {
            return Err(DecodeError::TooLong(what, MAX_TEXT));
        }
        self.text()
    }

    /// Its text: a slice of the header.
    fn text(&self) -> Result<ByteString, DecodeError> {
        let text = self.header.slice_ref(self.bytes()?);
        ByteString::try_from(text).map_err(|_| DecodeError::Utf8(self.number))
    }
}

/// The number that `bytes` begin with, and what stands behind it.
#[inline]
fn read_varint<'a>(bytes: &'a [u8], what: &'static str) -> Result<(u64, &'a [u8]), DecodeError> {
    // Most are small.
    if let Some((&byte, rest)) = bytes.split_first()
        && byte < 0x80
    {
        return Ok((byte.into(), rest));
    }
    let mut value = 0_u64;
    for place in 0..10 {
        let Some(&byte) = bytes.get(place) else { return Err(DecodeError::Truncated(what)) };
        value |= u64::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            // The tenth byte has room for one bit.
            if place == 9 && byte > 1 {
                break;
            }
            return Ok((value, &bytes[place + 1..]));
        }
    }
    Err(DecodeError::Varint)
}
