use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use bytestring::ByteString;
use thiserror::Error;

use super::frame::{
    CallFrame, Done, EventFrame, Frame, HeaderFields, Hello, PublishFrame, Register, SharedEvent,
    Subscribe, Welcome,
};
use crate::{
    AgentId, AgentType, CallId, Event, Fault, FaultKind, InvalidName, Key, MessageId,
    MetadataError, Payload, Principal, Registration, TopicFilter, TopicId, TopicType,
};

/// The kinds of frames. Numbers are never given to another kind.
mod kind {
    pub(super) const HELLO: u8 = 1;
    pub(super) const WELCOME: u8 = 2;
    pub(super) const REGISTER: u8 = 3;
    pub(super) const UNREGISTER: u8 = 4;
    pub(super) const SUBSCRIBE: u8 = 5;
    pub(super) const UNSUBSCRIBE: u8 = 6;
    pub(super) const DONE: u8 = 7;
    pub(super) const CALL: u8 = 8;
    pub(super) const REPLY: u8 = 9;
    pub(super) const FAULT: u8 = 10;
    pub(super) const PUBLISH: u8 = 11;
    pub(super) const EVENT: u8 = 12;
    pub(super) const CANCEL: u8 = 13;
    pub(super) const PING: u8 = 14;
    pub(super) const PONG: u8 = 15;
    pub(super) const DRAIN: u8 = 16;
}

/// The fields of headers. A number means the same in every frame.
mod field {
    pub(super) const ID: u64 = 1;
    pub(super) const AGENT_TYPE: u64 = 2;
    pub(super) const KEY: u64 = 3;
    pub(super) const TOPIC_TYPE: u64 = 4;
    pub(super) const SOURCE: u64 = 5;
    pub(super) const CONTENT_TYPE: u64 = 6;
    pub(super) const DATA_TYPE: u64 = 7;
    pub(super) const METADATA: u64 = 8;
    pub(super) const TIMEOUT_MS: u64 = 9;
    pub(super) const MESSAGE_ID: u64 = 10;
    pub(super) const CONVERSATION: u64 = 11;
    pub(super) const CAUSE: u64 = 12;
    pub(super) const SENDER_TYPE: u64 = 13;
    pub(super) const SENDER_KEY: u64 = 14;
    pub(super) const PRINCIPAL: u64 = 15;
    pub(super) const TRACEPARENT: u64 = 16;
    pub(super) const HOPS: u64 = 17;
    pub(super) const IDEMPOTENCY_KEY: u64 = 18;
    pub(super) const FAULT_KIND: u64 = 19;
    pub(super) const DETAIL: u64 = 20;
    pub(super) const HINT: u64 = 21;
    pub(super) const MAY_HAVE_RUN: u64 = 22;
    pub(super) const RETRY_AFTER_MS: u64 = 23;
    pub(super) const CONFIG_KEY: u64 = 24;
    pub(super) const LIMIT: u64 = 25;
    pub(super) const EXCLUSIVE: u64 = 26;
    pub(super) const CAPABILITY: u64 = 27;
    pub(super) const TOPIC_PREFIX: u64 = 28;
    pub(super) const SUBSCRIPTION: u64 = 29;
    pub(super) const RECIPIENTS: u64 = 30;
    pub(super) const DROPPED: u64 = 31;
    pub(super) const VERSION: u64 = 32;
    pub(super) const FEATURE: u64 = 33;
    pub(super) const NAME: u64 = 34;
    pub(super) const MAX_PAYLOAD: u64 = 35;
    pub(super) const HEARTBEAT_MS: u64 = 36;
    /// Within a metadata entry.
    pub(super) const ENTRY_NAME: u64 = 1;
    pub(super) const ENTRY_VALUE: u64 = 2;
}

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
    #[error("field {0} has the wrong type")]
    FieldType(u64),
    /// A text is not UTF-8.
    #[error("field {0} is not UTF-8")]
    Utf8(u64),
    /// The frame lacks a field that it needs.
    #[error("a frame of kind {0} needs field {1}")]
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
const MAX_TEXT: usize = 1024;
/// The most bytes of a fault's detail, and of its hint; more is cut when it is written.
const MAX_FAULT_TEXT: usize = 8 * 1024;

/// Takes the bytes of the next frame off `message`.
pub fn split_frame(message: &mut Bytes) -> Result<Bytes, DecodeError> {
    let mut rest = message.clone();
    if rest.is_empty() {
        return Err(DecodeError::Truncated("kind"));
    }
    rest.advance(1);
    take(&mut rest, "header")?;
    take(&mut rest, "payload")?;
    Ok(message.split_to(message.len() - rest.len()))
}

/// Takes the next frame off `message`. Payload and texts are slices of it, not copies.
///
/// Returns `None` for a frame of an unknown kind, which is to be skipped. Call it until `message` is
/// empty.
pub fn decode(message: &mut Bytes) -> Result<Option<Frame>, DecodeError> {
    if message.is_empty() {
        return Err(DecodeError::Truncated("kind"));
    }
    let kind = message.get_u8();
    let header = take(message, "header")?;
    if header.len() > MAX_HEADER {
        return Err(DecodeError::TooLong("the header", MAX_HEADER));
    }
    let payload = take(message, "payload")?;
    let fields = Fields(header);
    let missing = |number| move || DecodeError::Missing(kind, number);
    Ok(Some(match kind {
        kind::HELLO => Frame::Hello(hello(fields)?),
        kind::WELCOME => Frame::Welcome(welcome(fields)?),
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
        kind::CALL | kind::PUBLISH | kind::EVENT => message_frame(kind, fields, payload)?,
        kind::REPLY => {
            let mut id = None;
            let mut payload = Payload { bytes: payload, ..Payload::default() };
            for field in fields {
                let field = field?;
                match field.number {
                    field::ID => id = Some(CallId(field.number()?)),
                    _ => payload_field(&mut payload, field)?,
                }
            }
            Frame::Reply(id.ok_or_else(missing(field::ID))?, Ok(payload))
        }
        kind::FAULT => {
            let (id, fault) = fault(fields)?;
            Frame::Reply(id.ok_or_else(missing(field::ID))?, Err(fault))
        }
        kind::CANCEL | kind::PING | kind::PONG => {
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
                kind::PING => Frame::Ping(id),
                _ => Frame::Pong(id),
            }
        }
        kind::DRAIN => Frame::Drain,
        _ => return Ok(None),
    }))
}

/// Appends `frame` to `out`.
pub fn encode(frame: &Frame, out: &mut BytesMut) {
    let mut header = Header::default();
    let mut payload = &Bytes::new();
    let kind = match frame {
        Frame::Hello(hello) => {
            header.text(field::NAME, &hello.name);
            hello.versions.iter().for_each(|&version| header.number(field::VERSION, version));
            hello.features.iter().for_each(|feature| header.text(field::FEATURE, feature));
            kind::HELLO
        }
        Frame::Welcome(welcome) => {
            header.number(field::VERSION, welcome.version);
            welcome.features.iter().for_each(|feature| header.text(field::FEATURE, feature));
            header.text(field::NAME, &welcome.name);
            header.number(field::MAX_PAYLOAD, welcome.max_payload);
            header.number(field::HEARTBEAT_MS, millis(welcome.heartbeat));
            kind::WELCOME
        }
        Frame::Register(register) => {
            header.number(field::ID, register.request.0);
            header.text(field::AGENT_TYPE, register.agent_type.as_str());
            header.optional(field::KEY, register.key.as_ref().map(Key::as_str));
            header.flag(field::EXCLUSIVE, register.registration.exclusive);
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
            header.common(&call.header);
            header.payload(&call.payload);
            payload = &call.payload.bytes;
            kind::CALL
        }
        Frame::Reply(id, Ok(reply)) => {
            header.number(field::ID, id.0);
            header.payload(reply);
            payload = &reply.bytes;
            kind::REPLY
        }
        Frame::Reply(id, Err(fault)) => {
            header.number(field::ID, id.0);
            header.fault(&fault.clone().shortened(MAX_FAULT_TEXT));
            kind::FAULT
        }
        Frame::Publish(publish) => {
            if let Some(request) = publish.request {
                header.number(field::ID, request.0);
            }
            header.topic(&publish.topic);
            header.common(&publish.header);
            header.payload(&publish.payload);
            payload = &publish.payload.bytes;
            kind::PUBLISH
        }
        Frame::Event(event) => {
            header.topic(&event.topic);
            header.common(&event.header);
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
    };
    write(kind, &[&header.0], payload, out);
}

/// Appends an event frame to `out`: the part that all recipients share, and who receives it here.
pub fn encode_event(
    event: &SharedEvent,
    agents: &[AgentType],
    subscriptions: &[u64],
    out: &mut BytesMut,
) {
    let mut header = Header::default();
    header.recipients(agents, subscriptions);
    write(kind::EVENT, &[&event.header, &header.0], &event.payload, out);
}

impl SharedEvent {
    /// Writes the shared part of `event`.
    pub fn new(event: &Event) -> Self {
        let mut header = Header::default();
        header.topic(&event.topic);
        header.common(&HeaderFields::from(&event.header));
        header.payload(&event.payload);
        Self { header: Bytes::from(header.0), payload: event.payload.bytes.clone() }
    }
}

impl From<&crate::Header> for HeaderFields {
    fn from(header: &crate::Header) -> Self {
        Self {
            id: Some(header.id.clone()),
            conversation: Some(header.conversation.clone()),
            cause: header.cause.clone(),
            principal: Some(header.principal.clone()),
            sender: header.sender.clone(),
            traceparent: header.traceparent.clone(),
            hops: header.hops,
            idempotency_key: header.idempotency_key.clone(),
        }
    }
}

fn write(kind: u8, header: &[&[u8]], payload: &[u8], out: &mut BytesMut) {
    let length: usize = header.iter().map(|part| part.len()).sum();
    out.reserve(length + payload.len() + 16);
    out.put_u8(kind);
    put_varint(length as u64, out);
    header.iter().for_each(|part| out.put_slice(part));
    put_varint(payload.len() as u64, out);
    out.put_slice(payload);
}

fn hello(fields: Fields) -> Result<Hello, DecodeError> {
    let mut hello = Hello::default();
    for field in fields {
        let field = field?;
        match field.number {
            field::NAME => hello.name = field.text()?,
            field::VERSION => hello.versions.push(field.number()?),
            field::FEATURE => hello.features.push(field.text()?),
            _ => {}
        }
    }
    Ok(hello)
}

fn welcome(fields: Fields) -> Result<Welcome, DecodeError> {
    let mut welcome = Welcome::default();
    for field in fields {
        let field = field?;
        match field.number {
            field::VERSION => welcome.version = field.number()?,
            field::FEATURE => welcome.features.push(field.text()?),
            field::NAME => welcome.name = field.text()?,
            field::MAX_PAYLOAD => welcome.max_payload = field.number()?,
            field::HEARTBEAT_MS => welcome.heartbeat = Duration::from_millis(field.number()?),
            _ => {}
        }
    }
    Ok(welcome)
}

/// Call, publish and event share most of their fields.
fn message_frame(kind: u8, fields: Fields, payload: Bytes) -> Result<Frame, DecodeError> {
    let missing = |number| move || DecodeError::Missing(kind, number);
    let (mut id, mut timeout) = (None, None);
    let (mut agent_type, mut key) = (None, None);
    let (mut topic_type, mut source) = (None, None);
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
            field::SUBSCRIPTION => subscriptions.push(field.number()?),
            field::TIMEOUT_MS => timeout = Some(Duration::from_millis(field.number()?)),
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
            _ => payload_field(&mut payload, field)?,
        }
    }
    if let (Some(agent_type), Some(key)) = (sender_type, sender_key) {
        header.sender = Some(AgentId { agent_type, key });
    }
    if kind == kind::CALL {
        let agent_type = agent_type.ok_or_else(missing(field::AGENT_TYPE))?;
        let key = key.ok_or_else(missing(field::KEY))?;
        return Ok(Frame::Call(CallFrame {
            id: id.ok_or_else(missing(field::ID))?,
            target: AgentId { agent_type, key },
            timeout,
            header,
            payload,
        }));
    }
    let topic = TopicId {
        topic_type: topic_type.ok_or_else(missing(field::TOPIC_TYPE))?,
        source: source.ok_or_else(missing(field::SOURCE))?,
    };
    Ok(match kind {
        kind::PUBLISH => Frame::Publish(PublishFrame { request: id, topic, header, payload }),
        _ => Frame::Event(EventFrame { agents, subscriptions, topic, header, payload }),
    })
}

/// Takes `field` if it describes a payload.
fn payload_field(payload: &mut Payload, field: Field) -> Result<(), DecodeError> {
    match field.number {
        field::CONTENT_TYPE => payload.content_type = field.text()?,
        field::DATA_TYPE => payload.data_type = field.text()?,
        field::METADATA => {
            let (mut name, mut value) = (ByteString::new(), ByteString::new());
            for part in Fields(field.bytes()?) {
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

fn fault(fields: Fields) -> Result<(Option<CallId>, Fault), DecodeError> {
    let (mut id, mut kind, mut detail) = (None, FaultKind::Internal, ByteString::new());
    let (mut hint, mut may_have_run, mut retry_after) = (None, true, None);
    let (mut config_key, mut limit) = (None, None);
    for field in fields {
        let field = field?;
        match field.number {
            field::ID => id = Some(CallId(field.number()?)),
            // A kind from a newer peer is at least a failure that may have run.
            field::FAULT_KIND => {
                kind = FaultKind::from_name(&field.text()?).unwrap_or(FaultKind::Internal);
            }
            field::DETAIL => detail = field.text()?,
            field::HINT => hint = Some(field.text()?),
            field::MAY_HAVE_RUN => may_have_run = field.number()? != 0,
            field::RETRY_AFTER_MS => retry_after = Some(Duration::from_millis(field.number()?)),
            field::CONFIG_KEY => config_key = Some(field.text()?),
            field::LIMIT => limit = Some(field.number()?),
            _ => {}
        }
    }
    let mut fault = Fault::new(kind, &*detail).may_have_run_if(may_have_run);
    if let Some(hint) = hint {
        fault = fault.hint(&*hint);
    }
    if let Some(wait) = retry_after {
        fault = fault.retry_after(wait);
    }
    if let Some(key) = config_key {
        fault = fault.limit(&*key, limit);
    }
    Ok((id, fault))
}

/// A header that is being written.
#[derive(Default)]
struct Header(Vec<u8>);

impl Header {
    fn number(&mut self, number: u64, value: u64) {
        put_varint(number << 3, &mut self.0);
        put_varint(value, &mut self.0);
    }

    fn flag(&mut self, number: u64, value: bool) {
        if value {
            self.number(number, 1);
        }
    }

    fn text(&mut self, number: u64, value: &str) {
        put_varint(number << 3 | 2, &mut self.0);
        put_varint(value.len() as u64, &mut self.0);
        self.0.put_slice(value.as_bytes());
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

    fn common(&mut self, header: &HeaderFields) {
        self.optional(field::MESSAGE_ID, header.id.as_ref().map(MessageId::as_str));
        self.optional(field::CONVERSATION, header.conversation.as_ref().map(MessageId::as_str));
        self.optional(field::CAUSE, header.cause.as_ref().map(MessageId::as_str));
        self.optional(field::PRINCIPAL, header.principal.as_ref().map(Principal::as_str));
        if let Some(sender) = &header.sender {
            self.text(field::SENDER_TYPE, sender.agent_type.as_str());
            self.text(field::SENDER_KEY, sender.key.as_str());
        }
        self.optional(field::TRACEPARENT, header.traceparent.as_deref());
        if header.hops != 0 {
            self.number(field::HOPS, header.hops.into());
        }
        self.optional(field::IDEMPOTENCY_KEY, header.idempotency_key.as_deref());
    }

    fn payload(&mut self, payload: &Payload) {
        let content_type = Some(&*payload.content_type).filter(|text| !text.is_empty());
        self.optional(field::CONTENT_TYPE, content_type);
        let data_type = Some(&*payload.data_type).filter(|text| !text.is_empty());
        self.optional(field::DATA_TYPE, data_type);
        for (name, value) in payload.metadata.iter() {
            let mut entry = Self::default();
            entry.text(field::ENTRY_NAME, name);
            entry.text(field::ENTRY_VALUE, value);
            put_varint(field::METADATA << 3 | 2, &mut self.0);
            put_varint(entry.0.len() as u64, &mut self.0);
            self.0.put_slice(&entry.0);
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

/// The fields of a header, one after the other.
struct Fields(Bytes);

struct Field {
    number: u64,
    value: Value,
}

enum Value {
    Number(u64),
    Bytes(Bytes),
    Skipped,
}

impl Iterator for Fields {
    type Item = Result<Field, DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        (!self.0.is_empty()).then(|| self.field())
    }
}

impl Fields {
    fn field(&mut self) -> Result<Field, DecodeError> {
        let tag = varint(&mut self.0, "field")?;
        let number = tag >> 3;
        let value = match tag & 7 {
            0 => Value::Number(varint(&mut self.0, "field")?),
            2 => Value::Bytes(take(&mut self.0, "field")?),
            kind @ (1 | 5) => {
                let length = if kind == 1 { 8 } else { 4 };
                if self.0.len() < length {
                    return Err(DecodeError::Truncated("field"));
                }
                self.0.advance(length);
                Value::Skipped
            }
            _ => return Err(DecodeError::FieldType(number)),
        };
        Ok(Field { number, value })
    }
}

impl Field {
    fn number(&self) -> Result<u64, DecodeError> {
        match self.value {
            Value::Number(value) => Ok(value),
            _ => Err(DecodeError::FieldType(self.number)),
        }
    }

    fn bytes(self) -> Result<Bytes, DecodeError> {
        match self.value {
            Value::Bytes(value) => Ok(value),
            _ => Err(DecodeError::FieldType(self.number)),
        }
    }

    /// The number of a request: any but 0.
    fn request(&self) -> Result<Option<CallId>, DecodeError> {
        Ok(Some(CallId(self.number()?)).filter(|id| id.0 != 0))
    }

    fn short_text(self, what: &'static str) -> Result<ByteString, DecodeError> {
        let text = self.text()?;
        if text.len() <= MAX_TEXT { Ok(text) } else { Err(DecodeError::TooLong(what, MAX_TEXT)) }
    }

    fn text(self) -> Result<ByteString, DecodeError> {
        let number = self.number;
        ByteString::try_from(self.bytes()?).map_err(|_| DecodeError::Utf8(number))
    }
}

/// Takes a length and as many bytes.
fn take(from: &mut Bytes, what: &'static str) -> Result<Bytes, DecodeError> {
    let length = varint(from, what)?;
    match usize::try_from(length) {
        Ok(length) if length <= from.len() => Ok(from.split_to(length)),
        _ => Err(DecodeError::Truncated(what)),
    }
}

fn varint(from: &mut Bytes, what: &'static str) -> Result<u64, DecodeError> {
    let mut value = 0_u64;
    for place in 0..10 {
        let Some(&byte) = from.get(place) else { return Err(DecodeError::Truncated(what)) };
        value |= u64::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            // The tenth byte has room for one bit.
            if place == 9 && byte > 1 {
                break;
            }
            from.advance(place + 1);
            return Ok(value);
        }
    }
    Err(DecodeError::Varint)
}

fn put_varint(mut value: u64, out: &mut impl BufMut) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_kind_of_frame_survives_the_wire() {
        let mut metadata = crate::Metadata::default();
        metadata.insert("request-type", "sum ✓").unwrap();
        let payload = Payload {
            data_type: "Text".into(),
            content_type: "application/json".into(),
            metadata,
            bytes: Bytes::from_static(b"{\"a\":1}"),
        };
        let header = HeaderFields {
            id: Some(MessageId::parse("m1").unwrap()),
            conversation: Some(MessageId::parse("c1").unwrap()),
            cause: Some(MessageId::parse("m0").unwrap()),
            principal: Some(Principal::named("token")),
            sender: Some(AgentId::parse("a/k/2").unwrap()),
            traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
            hops: 3,
            idempotency_key: Some("once".into()),
        };
        let agent_type = AgentType::parse("upper").unwrap();
        let topic = TopicId::new(TopicType::parse("a:b").unwrap(), Key::parse("s").unwrap());
        let fault = Fault::new(FaultKind::Overloaded, "full")
            .hint("wait")
            .retry_after(Duration::from_millis(250))
            .limit("limits.queue_messages", Some(4096));
        let registration = Registration { exclusive: true, capabilities: vec!["sum".into()] };
        let frames = [
            Frame::Hello(Hello {
                name: "me".into(),
                versions: vec![1, 2],
                features: vec!["resume".into()],
            }),
            Frame::Welcome(Welcome {
                version: 1,
                features: vec![],
                name: "room".into(),
                max_payload: 1 << 20,
                heartbeat: Duration::from_secs(15),
            }),
            Frame::Register(Register {
                request: CallId(1),
                agent_type: agent_type.clone(),
                key: Some(Key::parse("k").unwrap()),
                registration,
            }),
            Frame::Unregister { request: CallId(2), agent_type: agent_type.clone(), key: None },
            Frame::Subscribe(Subscribe {
                request: CallId(3),
                subscription: 7,
                filter: TopicFilter::parse("news.*").unwrap(),
                agent_type: Some(agent_type.clone()),
            }),
            Frame::Unsubscribe { request: CallId(4), subscription: 7 },
            Frame::Done(Done { request: CallId(4), recipients: 2, dropped: vec!["a/b".into()] }),
            Frame::Call(CallFrame {
                id: CallId(u64::MAX),
                target: AgentId::parse("upper/1").unwrap(),
                timeout: Some(Duration::from_millis(1500)),
                header: header.clone(),
                payload: payload.clone(),
            }),
            Frame::Reply(CallId(5), Ok(payload.clone())),
            Frame::Reply(CallId(6), Err(fault)),
            Frame::Publish(PublishFrame {
                request: None,
                topic: topic.clone(),
                header: HeaderFields::default(),
                payload: payload.clone(),
            }),
            Frame::Event(EventFrame {
                agents: vec![agent_type],
                subscriptions: vec![7, 300],
                topic,
                header,
                payload,
            }),
            Frame::Cancel(CallId(7)),
            Frame::Ping(8),
            Frame::Pong(9),
            Frame::Drain,
        ];

        let mut message = BytesMut::new();
        frames.iter().for_each(|frame| encode(frame, &mut message));
        let mut message = message.freeze();
        for frame in frames {
            assert_eq!(decode(&mut message).unwrap(), Some(frame));
        }
        assert!(message.is_empty());
    }

    #[test]
    fn what_is_unknown_is_skipped() {
        // Kind 200; then a ping with fields 100 of every type before its number.
        #[rustfmt::skip]
        let bytes: &[u8] = &[
            200, 1, 0xff, 2, 1, 2,
            kind::PING, 25,
            0xa0, 6, 1,
            0xa1, 6, 1, 2, 3, 4, 5, 6, 7, 8,
            0xa2, 6, 1, 9,
            0xa5, 6, 1, 2, 3, 4,
            8, 5,
            0,
        ];
        let mut message = Bytes::from_static(bytes);
        assert_eq!(decode(&mut message), Ok(None));
        assert_eq!(decode(&mut message), Ok(Some(Frame::Ping(5))));
    }

    #[test]
    fn broken_frames_are_named() {
        let error = |bytes: &'static [u8]| decode(&mut Bytes::from_static(bytes)).unwrap_err();
        assert_eq!(error(&[]), DecodeError::Truncated("kind"));
        assert_eq!(error(&[14, 5, 8]), DecodeError::Truncated("header"));
        assert_eq!(error(&[14, 2, 8, 1]), DecodeError::Truncated("payload"));
        assert_eq!(error(&[14, 0, 0]), DecodeError::Missing(14, 1));
        assert_eq!(error(&[14, 2, 10, 0, 0]), DecodeError::FieldType(1));
        assert_eq!(error(&[14, 1, 11, 0]), DecodeError::FieldType(1));
        assert_eq!(error(&[1, 5, 0x92, 2, 2, 0xc3, 0x28, 0]), DecodeError::Utf8(34));
        assert_eq!(
            error(&[14, 12, 8, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2, 0, 0]),
            DecodeError::Varint
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut message = Bytes::from(bytes);
            while !message.is_empty() && decode(&mut message).is_ok() {}
        }
    }
}
