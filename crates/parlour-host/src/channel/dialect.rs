//! The dialect of `autogen-http-runtime` 0.1.0 on a WebSocket: one JSON object in each text message.

use std::borrow::Cow;
use std::fmt::Write as _;

use bytes::Bytes;
use bytestring::ByteString;
use parlour_core::wire::{CallFrame, Frame, HeaderFields, PublishFrame};
use parlour_core::{
    AgentId, AgentType, CallId, CallMap, Event, Fault, FaultKind, InvalidName, Key, MessageId,
    Payload, Reply, TopicId, TopicType,
};
use serde::Deserialize;

use crate::io::kept;
use crate::json::{self, Text, Value};
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
    requests: CallMap<Box<str>>,
}

impl Dialect {
    pub(crate) fn new(max_depth: usize) -> Self {
        Self { max_depth, next_id: 1, requests: CallMap::default() }
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
        Ok(match &*frame.kind {
            "request" if name.len() > MAX_REQUEST_ID => {
                return Err(broken(&"its request_id is longer than 256 bytes"));
            }
            "request" => {
                let (id, name) = (CallId(self.next_id), Box::from(name));
                self.next_id += 1;
                let call = frame.into_call(id, &bytes).map_err(|error| broken(&error))?;
                self.requests.insert(id, name);
                Some(call.into())
            }
            // A name the host never gave cannot be in flight: the session drops and counts it.
            "response" => {
                let id = CallId(name.parse().unwrap_or(u64::MAX));
                Some(Frame::Reply(id, frame.into_reply(&bytes)))
            }
            "cloud_event" => {
                Some(frame.into_publish(&bytes).map_err(|error| broken(&error))?.into())
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
                out.texts.push(frame(text, |out| {
                    json::object!(out, {
                        "type": "request",
                        "request_id": &id,
                        "target": &call.target,
                        "source": &call.header.sender,
                        "data_type": &*call.payload.data_type,
                        "data_content_type": content_type(&call.payload),
                        "data": text,
                        // Old workers hand it back; nobody believes it.
                        "original_sender": "",
                    });
                })?);
            }
            Sendable::Reply(id, reply) => {
                let Some(name) = self.requests.remove(&id) else { return Ok(()) };
                let text = match reply {
                    Ok(payload) => text_of(payload).and_then(|text| {
                        frame(text, |out| write_response(&name, "", payload, text, out))
                    }),
                    Err(fault) => Err(fault.clone()),
                };
                let text = text.or_else(|fault| {
                    // An agent's text was cut when it came, so that this fits.
                    let (error, empty) = (fault.detail(), Payload::default());
                    frame(error, |out| write_response(&name, error, &empty, "", out))
                })?;
                out.texts.push(text);
            }
            Sendable::Event(event, _) => match event.dialect() {
                Some(text) => out.texts.push(text.clone()),
                None => return Err(unfit()),
            },
            Sendable::Ping => out.ping = true,
            // It has no words for these.
            Sendable::Withdraw(_)
            | Sendable::Progress(..)
            | Sendable::Frame(_)
            | Sendable::Drain => {}
        }
        Ok(())
    }
}

/// The frame of an event, if it fits into one.
pub(crate) fn event(event: &Event) -> Option<ByteString> {
    let text = text_of(&event.payload).ok()?;
    let write = |out: &mut String| {
        json::object!(out, {
            "type": "cloud_event",
            "topic": &event.topic,
            "sender": &event.header.sender,
            "data_type": &*event.payload.data_type,
            "data_content_type": content_type(&event.payload),
            "id": event.header.id.as_str(),
            "data": text,
            "payload": text,
        });
    };
    frame(text, write).ok()
}

/// Appends the result of `agent.call` over JSON-RPC: the response frame that the caller's client
/// expects.
pub(crate) fn response(name: &str, payload: &Payload, out: &mut String) -> Result<(), Fault> {
    let (text, start) = (text_of(payload)?, out.len());
    out.reserve(text.len() + 320);
    write_response(name, "", payload, text, out);
    if out.len() - start > MAX_FRAME { Err(unfit()) } else { Ok(()) }
}

/// A client's frame of any type, or the parameters of a JSON-RPC method that says the same.
#[derive(Deserialize)]
pub(crate) struct Message<'a> {
    #[serde(rename = "type", borrow, default)]
    kind: Text<'a>,
    #[serde(borrow, default)]
    request_id: Option<Text<'a>>,
    #[serde(borrow, default)]
    error: Option<Text<'a>>,
    #[serde(borrow, default)]
    id: Option<Text<'a>>,
    #[serde(borrow, default)]
    target: Option<AgentIn<'a>>,
    #[serde(borrow, default)]
    source: Option<AgentIn<'a>>,
    #[serde(borrow, default)]
    sender: Option<AgentIn<'a>>,
    #[serde(borrow, default)]
    topic: Option<TopicIn<'a>>,
    #[serde(borrow, default)]
    data_type: Option<Text<'a>>,
    #[serde(borrow, default)]
    data_content_type: Option<Text<'a>>,
    #[serde(borrow, default)]
    data: Option<Text<'a>>,
    /// Where receivers of 0.1.0 look for an event's body, and so where some senders put it.
    #[serde(borrow, default)]
    payload: Option<Text<'a>>,
}

/// An agent as JSON has it.
#[derive(Deserialize)]
pub(crate) struct AgentIn<'a> {
    #[serde(rename = "type", borrow)]
    agent_type: Text<'a>,
    #[serde(borrow)]
    key: Text<'a>,
}

/// A topic as JSON has it.
#[derive(Deserialize)]
pub(crate) struct TopicIn<'a> {
    #[serde(rename = "type", borrow)]
    topic_type: Text<'a>,
    #[serde(borrow)]
    source: Text<'a>,
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
        Ok(CallFrame {
            id,
            target,
            timeout: None,
            progress: false,
            resent: false,
            attempt: None,
            topic: None,
            header,
            payload: self.into_payload(source),
        })
    }

    /// The event that it publishes.
    pub(crate) fn into_publish(self, source: &Bytes) -> Result<PublishFrame, FrameError> {
        let topic = self.topic.as_ref().ok_or(FrameError::Missing("topic"))?.parse(source)?;
        let sender = self.sender.as_ref().map(|agent| agent.parse(source)).transpose()?;
        let id = self.id.as_ref().filter(|id| !id.is_empty());
        let id = id.map(|id| MessageId::parse(text_in(source, id))).transpose()?;
        let header = HeaderFields { id, sender, ..HeaderFields::default() };
        let payload = self.into_payload(source);
        Ok(PublishFrame { request: None, ack: None, topic, header, payload })
    }

    fn into_reply(self, source: &Bytes) -> Reply {
        match self.error.as_deref() {
            None | Some("") => Ok(self.into_payload(source)),
            Some(error) => Err(Fault::new(FaultKind::AgentFailed, error)),
        }
    }

    fn into_payload(self, source: &Bytes) -> Payload {
        let text = |text: &Option<Text<'_>>| {
            text.as_ref().map_or_else(ByteString::new, |text| text_in(source, text))
        };
        let (data_type, content_type) = (text(&self.data_type), text(&self.data_content_type));
        let bytes = match self.data.or(self.payload).map(|data| data.0) {
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

impl Value for CallId {
    fn write(&self, out: &mut String) {
        // Writing into a string cannot fail.
        let _ = write!(out, "\"{}\"", self.0);
    }
}

impl Value for AgentId {
    fn write(&self, out: &mut String) {
        json::object!(out, { "type": self.agent_type.as_str(), "key": self.key.as_str() });
    }
}

impl Value for TopicId {
    fn write(&self, out: &mut String) {
        json::object!(out, { "type": self.topic_type.as_str(), "source": self.source.as_str() });
    }
}

/// Appends a response with `payload`, whose bytes are the text `data`.
fn write_response(name: &str, error: &str, payload: &Payload, data: &str, out: &mut String) {
    json::object!(out, {
        "type": "response",
        "request_id": name,
        "error": error,
        "data_type": &*payload.data_type,
        "data_content_type": content_type(payload),
        "data": data,
    });
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

/// Writes a frame that is a little longer than `data`, unless its receivers would refuse it.
fn frame(data: &str, write: impl FnOnce(&mut String)) -> Result<ByteString, Fault> {
    let mut text = String::with_capacity(data.len() + 320);
    write(&mut text);
    if text.len() > MAX_FRAME { Err(unfit()) } else { Ok(text.into()) }
}

fn unfit() -> Fault {
    let detail = "as a frame of autogen-http-runtime 0.1.0 the message would exceed 1 MiB";
    Fault::new(FaultKind::TooLarge, detail)
        .hint("send less, or connect with parlour.v1")
        .may_have_run_if(false)
}
