//! The dialect of `autogen-http-runtime` 0.1.0 on a WebSocket: one JSON object in each text message.

use std::borrow::Cow;
use std::collections::HashMap;

use bytes::Bytes;
use bytestring::ByteString;
use parlour_core::wire::{CallFrame, Frame, HeaderFields, PublishFrame};
use parlour_core::{
    AgentId, AgentType, CallId, Event, Fault, FaultKind, InvalidName, Key, MessageId, Payload,
    Reply, TopicId, TopicType,
};
use serde::{Deserialize, Serialize};

use crate::io::kept;
use crate::json;
use crate::link::{Outbox, Protocol, Sendable};
use crate::peer::Close;

/// The name under which the protocol is listed.
pub(crate) const NAME: &str = "autogen-0.1.0";

/// Its clients refuse larger frames, and then stay up deaf.
const MAX_FRAME: usize = 1024 * 1024;

/// What a client may call a request of its own.
const MAX_REQUEST_ID: usize = 256;
/// The most bytes of an error's text: escaped, they still fit into a frame.
const MAX_ERROR: usize = 64 * 1024;

/// The translation, with what a client calls its own requests.
#[derive(Debug)]
pub(crate) struct Dialect {
    max_depth: usize,
    next_id: u64,
    requests: HashMap<CallId, Box<str>>,
}

impl Dialect {
    pub(crate) fn new(max_depth: usize) -> Self {
        Self { max_depth, next_id: 1, requests: HashMap::new() }
    }
}

impl Protocol for Dialect {
    const GREETS: bool = false;

    const IS_TEXT: (bool, &'static str) =
        (true, "this dialect is JSON text; ask for subprotocol parlour.v1 to send frames");

    fn decode(&mut self, message: &mut Bytes) -> Result<Option<Frame>, Close> {
        let bytes = std::mem::take(message);
        let broken = |error: &dyn std::fmt::Display| {
            Close::new(Close::PROTOCOL, format!("not a frame of this dialect: {error}"))
        };
        let frame = json::parse::<Incoming<'_>>(&bytes, self.max_depth).map_err(|e| broken(&e))?;
        let name = frame.request_id.as_deref().unwrap_or_default();
        Ok(match frame.kind.as_ref() {
            "request" if name.len() > MAX_REQUEST_ID => {
                return Err(broken(&"its request_id is longer than 256 bytes"));
            }
            "request" => {
                let id = CallId(self.next_id);
                self.next_id += 1;
                let call = frame.call(id, &bytes).map_err(|error| broken(&error))?;
                self.requests.insert(id, name.into());
                Some(Frame::Call(call))
            }
            // A name the host never gave cannot be in flight: the session drops and counts it.
            "response" => {
                let id = CallId(name.parse().unwrap_or(u64::MAX));
                Some(Frame::Reply(id, frame.reply(&bytes)))
            }
            "cloud_event" => {
                Some(Frame::Publish(frame.publish(&bytes).map_err(|error| broken(&error))?))
            }
            other => {
                tracing::debug!(kind = other, "skipped a frame of an unknown type");
                None
            }
        })
    }

    fn encode(&mut self, item: Sendable<'_>, out: &mut Outbox) -> Result<(), Fault> {
        match item {
            Sendable::Call(id, call, _) => {
                let text = text_of(&call.payload)?;
                let name = id.0.to_string();
                let frame = RequestOut {
                    r#type: "request",
                    request_id: &name,
                    target: (&call.target).into(),
                    source: call.header.sender.as_ref().map(Into::into),
                    data_type: &call.payload.data_type,
                    data_content_type: content_type(&call.payload),
                    data: text,
                    original_sender: "",
                };
                out.texts.push(write(&frame)?.into());
            }
            Sendable::Reply(id, reply) => {
                let Some(name) = self.requests.remove(&id) else { return Ok(()) };
                let text = match reply {
                    Ok(payload) => text_of(payload)
                        .and_then(|text| write(&ResponseOut::new(&name, "", payload, text))),
                    Err(fault) => Err(fault.clone()),
                };
                let text = text.or_else(|fault| {
                    let (empty, fault) = (Payload::default(), fault.shortened(MAX_ERROR));
                    write(&ResponseOut::new(&name, fault.detail(), &empty, ""))
                })?;
                out.texts.push(text.into());
            }
            Sendable::Event(event, _) => match event.dialect() {
                Some(text) => out.texts.push(text.clone()),
                None => return Err(unfit()),
            },
            Sendable::Ping => out.ping = true,
            // It has no words for these.
            Sendable::Withdraw(_) | Sendable::Frame(_) | Sendable::Drain => {}
        }
        Ok(())
    }
}

/// The frame of an event, if it fits into one.
pub(crate) fn event(event: &Event) -> Option<ByteString> {
    let text = text_of(&event.payload).ok()?;
    let frame = EventOut {
        r#type: "cloud_event",
        topic: TopicOut {
            r#type: event.topic.topic_type.as_str(),
            source: event.topic.source.as_str(),
        },
        sender: event.header.sender.as_ref().map(Into::into),
        data_type: &event.payload.data_type,
        data_content_type: content_type(&event.payload),
        id: event.header.id.as_str(),
        data: text,
        payload: text,
    };
    write(&frame).ok().map(ByteString::from)
}

/// The result of `agent.call` over JSON-RPC: the response frame that the caller's client expects.
pub(crate) fn response(request_id: &str, payload: &Payload) -> Result<String, Fault> {
    write(&ResponseOut::new(request_id, "", payload, text_of(payload)?))
}

/// A client's frame of any type, or the parameters of a JSON-RPC method that says the same.
#[derive(Deserialize)]
pub(crate) struct Incoming<'a> {
    #[serde(rename = "type", borrow, default)]
    kind: Cow<'a, str>,
    #[serde(borrow, default)]
    request_id: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    error: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    id: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    target: Option<AgentIn<'a>>,
    #[serde(borrow, default)]
    source: Option<AgentIn<'a>>,
    #[serde(borrow, default)]
    sender: Option<AgentIn<'a>>,
    #[serde(borrow, default)]
    topic: Option<TopicIn<'a>>,
    #[serde(borrow, default)]
    data_type: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    data_content_type: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    data: Option<Cow<'a, str>>,
    /// Where receivers of 0.1.0 look for an event's body, and so where some senders put it.
    #[serde(borrow, default)]
    payload: Option<Cow<'a, str>>,
}

/// An agent as JSON has it.
#[derive(Deserialize)]
pub(crate) struct AgentIn<'a> {
    #[serde(rename = "type", borrow)]
    agent_type: Cow<'a, str>,
    #[serde(borrow)]
    key: Cow<'a, str>,
}

/// A topic as JSON has it.
#[derive(Deserialize)]
pub(crate) struct TopicIn<'a> {
    #[serde(rename = "type", borrow)]
    topic_type: Cow<'a, str>,
    #[serde(borrow)]
    source: Cow<'a, str>,
}

impl AgentIn<'_> {
    pub(crate) fn parse(&self) -> Result<AgentId, InvalidName> {
        Ok(AgentId::new(
            AgentType::parse(self.agent_type.as_ref())?,
            Key::parse(self.key.as_ref())?,
        ))
    }
}

impl TopicIn<'_> {
    pub(crate) fn parse(&self) -> Result<TopicId, InvalidName> {
        Ok(TopicId::new(
            TopicType::parse(self.topic_type.as_ref())?,
            Key::parse(self.source.as_ref())?,
        ))
    }
}

/// Why a frame is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    #[error(transparent)]
    Name(#[from] InvalidName),
    #[error("`{0}` is missing")]
    Missing(&'static str),
}

impl Incoming<'_> {
    /// The call that it asks for. Texts are slices of `message` where nothing in them is escaped.
    pub(crate) fn call(&self, id: CallId, message: &Bytes) -> Result<CallFrame, FrameError> {
        let target = self.target.as_ref().ok_or(FrameError::Missing("target"))?.parse()?;
        let sender = self.source.as_ref().map(AgentIn::parse).transpose()?;
        let header = HeaderFields { sender, ..HeaderFields::default() };
        Ok(CallFrame { id, target, timeout: None, header, payload: self.payload(message) })
    }

    /// The event that it publishes.
    pub(crate) fn publish(&self, message: &Bytes) -> Result<PublishFrame, FrameError> {
        let topic = self.topic.as_ref().ok_or(FrameError::Missing("topic"))?.parse()?;
        let sender = self.sender.as_ref().map(AgentIn::parse).transpose()?;
        let id = self.id.as_deref().filter(|id| !id.is_empty());
        let id = id.map(MessageId::parse).transpose()?;
        let header = HeaderFields { id, sender, ..HeaderFields::default() };
        Ok(PublishFrame { request: None, topic, header, payload: self.payload(message) })
    }

    fn reply(&self, message: &Bytes) -> Reply {
        match self.error.as_deref() {
            None | Some("") => Ok(self.payload(message)),
            Some(error) => Err(Fault::new(FaultKind::AgentFailed, error)),
        }
    }

    fn payload(&self, message: &Bytes) -> Payload {
        let text = |text: &Option<Cow<'_, str>>| text.as_deref().unwrap_or_default().into();
        let bytes = match self.data.as_ref().or(self.payload.as_ref()) {
            None => Bytes::new(),
            Some(Cow::Borrowed(data)) => kept(message.slice_ref(data.as_bytes())),
            Some(Cow::Owned(data)) => Bytes::copy_from_slice(data.as_bytes()),
        };
        Payload {
            data_type: text(&self.data_type),
            content_type: text(&self.data_content_type),
            metadata: Default::default(),
            bytes,
        }
    }
}

#[derive(Serialize)]
struct AgentOut<'a> {
    r#type: &'a str,
    key: &'a str,
}

impl<'a> From<&'a AgentId> for AgentOut<'a> {
    fn from(id: &'a AgentId) -> Self {
        Self { r#type: id.agent_type.as_str(), key: id.key.as_str() }
    }
}

#[derive(Serialize)]
struct TopicOut<'a> {
    r#type: &'a str,
    source: &'a str,
}

#[derive(Serialize)]
struct RequestOut<'a> {
    r#type: &'a str,
    request_id: &'a str,
    target: AgentOut<'a>,
    source: Option<AgentOut<'a>>,
    data_type: &'a str,
    data_content_type: &'a str,
    data: &'a str,
    /// Old workers hand it back; nobody believes it.
    original_sender: &'a str,
}

#[derive(Serialize)]
struct ResponseOut<'a> {
    r#type: &'a str,
    request_id: &'a str,
    error: &'a str,
    data_type: &'a str,
    data_content_type: &'a str,
    data: &'a str,
}

impl<'a> ResponseOut<'a> {
    fn new(request_id: &'a str, error: &'a str, payload: &'a Payload, data: &'a str) -> Self {
        let (data_type, data_content_type) = (&*payload.data_type, content_type(payload));
        Self { r#type: "response", request_id, error, data_type, data_content_type, data }
    }
}

#[derive(Serialize)]
struct EventOut<'a> {
    r#type: &'a str,
    topic: TopicOut<'a>,
    sender: Option<AgentOut<'a>>,
    data_type: &'a str,
    data_content_type: &'a str,
    id: &'a str,
    data: &'a str,
    payload: &'a str,
}

/// Its clients take JSON for granted.
fn content_type(payload: &Payload) -> &str {
    match &*payload.content_type {
        "" => "application/json",
        content_type => content_type,
    }
}

fn text_of(payload: &Payload) -> Result<&str, Fault> {
    std::str::from_utf8(&payload.bytes).map_err(|_| {
        let detail = "the payload is not text, and autogen-http-runtime 0.1.0 takes nothing else";
        Fault::new(FaultKind::Invalid, detail).hint("send UTF-8 text, or connect with parlour.v1")
    })
}

fn write(frame: &impl Serialize) -> Result<String, Fault> {
    let text = serde_json::to_string(frame)
        .map_err(|error| Fault::new(FaultKind::Internal, error.to_string()))?;
    if text.len() > MAX_FRAME { Err(unfit()) } else { Ok(text) }
}

fn unfit() -> Fault {
    let detail = "as a frame of autogen-http-runtime 0.1.0 the message would exceed 1 MiB";
    Fault::new(FaultKind::TooLarge, detail)
        .hint("send less, or connect with parlour.v1")
        .may_have_run_if(false)
}
