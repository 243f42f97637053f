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

    fn begin(&mut self, is_text: bool) -> Result<(), &'static str> {
        let reason = "this dialect is JSON text; ask for subprotocol parlour.v1 to send frames";
        if is_text { Ok(()) } else { Err(reason) }
    }

    fn decode(&mut self, message: &mut Bytes) -> Result<Option<Frame>, Close> {
        // What is read from it are slices of it, and live as long as the call.
        let bytes = kept(std::mem::take(message));
        let broken = |error: &dyn std::fmt::Display| {
            Close::new(Close::PROTOCOL, format!("not a frame of this dialect: {error}"))
        };
        let frame = json::parse::<Message<'_>>(&bytes, self.max_depth).map_err(|e| broken(&e))?;
        let name = frame.request_id.as_deref().unwrap_or_default();
        Ok(match frame.kind.as_ref() {
            "request" if name.len() > MAX_REQUEST_ID => {
                return Err(broken(&"its request_id is longer than 256 bytes"));
            }
            "request" => {
                let (id, name) = (CallId(self.next_id), Box::from(name));
                self.next_id += 1;
                let call = frame.into_call(id, &bytes).map_err(|error| broken(&error))?;
                self.requests.insert(id, name);
                Some(Frame::Call(call))
            }
            // A name the host never gave cannot be in flight: the session drops and counts it.
            "response" => {
                let id = CallId(name.parse().unwrap_or(u64::MAX));
                Some(Frame::Reply(id, frame.into_reply(&bytes)))
            }
            "cloud_event" => {
                Some(Frame::Publish(frame.into_publish(&bytes).map_err(|error| broken(&error))?))
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
                out.texts.push(write(&frame, text)?.into());
            }
            Sendable::Reply(id, reply) => {
                let Some(name) = self.requests.remove(&id) else { return Ok(()) };
                let text = match reply {
                    Ok(payload) => text_of(payload)
                        .and_then(|text| write(&ResponseOut::new(&name, "", payload, text), text)),
                    Err(fault) => Err(fault.clone()),
                };
                let text = text.or_else(|fault| {
                    // An agent's text was cut when it came, so that this fits.
                    let empty = Payload::default();
                    write(&ResponseOut::new(&name, fault.detail(), &empty, ""), fault.detail())
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
    write(&frame, text).ok().map(ByteString::from)
}

/// The result of `agent.call` over JSON-RPC: the response frame that the caller's client expects.
pub(crate) fn response(request_id: &str, payload: &Payload) -> Result<String, Fault> {
    let text = text_of(payload)?;
    write(&ResponseOut::new(request_id, "", payload, text), text)
}

/// A client's frame of any type, or the parameters of a JSON-RPC method that says the same.
#[derive(Deserialize)]
pub(crate) struct Message<'a> {
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
    pub(crate) fn parse(&self, source: &Bytes) -> Result<AgentId, InvalidName> {
        let agent_type = AgentType::parse(text_in(source, &self.agent_type))?;
        Ok(AgentId::new(agent_type, Key::parse(text_in(source, &self.key))?))
    }
}

impl TopicIn<'_> {
    pub(crate) fn parse(&self, source: &Bytes) -> Result<TopicId, InvalidName> {
        let topic_type = TopicType::parse(text_in(source, &self.topic_type))?;
        Ok(TopicId::new(topic_type, Key::parse(text_in(source, &self.source))?))
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

impl Message<'_> {
    /// The call that it asks for. Texts are slices of `source`, out of which the message was read.
    pub(crate) fn into_call(self, id: CallId, source: &Bytes) -> Result<CallFrame, FrameError> {
        let target = self.target.as_ref().ok_or(FrameError::Missing("target"))?.parse(source)?;
        let sender = self.source.as_ref().map(|agent| agent.parse(source)).transpose()?;
        let header = HeaderFields { sender, ..HeaderFields::default() };
        Ok(CallFrame { id, target, timeout: None, header, payload: self.into_payload(source) })
    }

    /// The event that it publishes.
    pub(crate) fn into_publish(self, source: &Bytes) -> Result<PublishFrame, FrameError> {
        let topic = self.topic.as_ref().ok_or(FrameError::Missing("topic"))?.parse(source)?;
        let sender = self.sender.as_ref().map(|agent| agent.parse(source)).transpose()?;
        let id = self.id.as_ref().filter(|id| !id.is_empty());
        let id = id.map(|id| MessageId::parse(text_in(source, id))).transpose()?;
        let header = HeaderFields { id, sender, ..HeaderFields::default() };
        Ok(PublishFrame { request: None, topic, header, payload: self.into_payload(source) })
    }

    fn into_reply(self, source: &Bytes) -> Reply {
        match self.error.as_deref() {
            None | Some("") => Ok(self.into_payload(source)),
            Some(error) => Err(Fault::new(FaultKind::AgentFailed, error)),
        }
    }

    fn into_payload(self, source: &Bytes) -> Payload {
        let text = |text: &Option<Cow<'_, str>>| {
            text.as_ref().map_or_else(ByteString::new, |text| text_in(source, text))
        };
        let (data_type, content_type) = (text(&self.data_type), text(&self.data_content_type));
        let bytes = match self.data.or(self.payload) {
            None => Bytes::new(),
            Some(Cow::Borrowed(data)) => slice_in(source, data.as_bytes())
                .unwrap_or_else(|| Bytes::copy_from_slice(data.as_bytes())),
            Some(Cow::Owned(data)) => Bytes::from(data),
        };
        Payload { data_type, content_type, metadata: Default::default(), bytes }
    }
}

/// `text` as a slice of `source`, if it stands there; an escaped text does not.
fn text_in(source: &Bytes, text: &str) -> ByteString {
    let slice = slice_in(source, text.as_bytes());
    slice.and_then(|slice| ByteString::try_from(slice).ok()).unwrap_or_else(|| text.into())
}

fn slice_in(source: &Bytes, part: &[u8]) -> Option<Bytes> {
    let start = part.as_ptr().addr().checked_sub(source.as_ptr().addr())?;
    let end = start.checked_add(part.len()).filter(|&end| end <= source.len())?;
    Some(source.slice(start..end))
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

/// Writes `frame`, which is a little longer than `data`.
fn write(frame: &impl Serialize, data: &str) -> Result<String, Fault> {
    let mut text = Vec::with_capacity(data.len() + data.len() / 4 + 320);
    let written = serde_json::to_writer(&mut text, frame);
    let text = written.ok().and_then(|()| String::from_utf8(text).ok());
    let text =
        text.ok_or_else(|| Fault::new(FaultKind::Internal, "a frame could not be written"))?;
    if text.len() > MAX_FRAME { Err(unfit()) } else { Ok(text) }
}

fn unfit() -> Fault {
    let detail = "as a frame of autogen-http-runtime 0.1.0 the message would exceed 1 MiB";
    Fault::new(FaultKind::TooLarge, detail)
        .hint("send less, or connect with parlour.v1")
        .may_have_run_if(false)
}
