//! `parlour.v1+json`: the frames of `parlour.v1` as JSON, one in each text message, for people who
//! look at a channel or type into one.

use std::collections::HashSet;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use parlour_core::Fault;
use parlour_core::wire::{
    self, FIELDS, FieldType, Frame, Hello, KINDS, RawFrame, RawValue, Welcome,
};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value};
use tokio_websockets::Message;

use super::native::Native;
use crate::json;
use crate::link::{Outbox, Protocol, Sendable};
use crate::peer::Close;

/// The name under which the protocol is listed.
pub(crate) const NAME: &str = wire::TEXT_SUBPROTOCOL;

/// The frames are those of `parlour.v1`; only how they are written is another.
#[derive(Debug, Default)]
pub(crate) struct Text {
    native: Native,
    max_depth: usize,
}

impl Text {
    /// Takes no JSON that nests deeper than this.
    pub(crate) fn new(max_depth: usize) -> Self {
        Self { native: Native::default(), max_depth }
    }
}

impl Protocol for Text {
    const GREETS: bool = true;

    fn begin(&mut self, is_text: bool) -> Result<(), &'static str> {
        if is_text { Ok(()) } else { Err("parlour.v1+json is text: send JSON in text messages") }
    }

    fn decode(&mut self, message: &mut Bytes) -> Result<Option<Frame>, Close> {
        let mut frame = read(&std::mem::take(message), self.max_depth)
            .map_err(|reason| Close::new(Close::PROTOCOL, reason))?;
        self.native.decode(&mut frame)
    }

    fn encode(&mut self, item: Sendable<'_>, out: &mut Outbox) -> Result<(), Fault> {
        self.native.encode(item, out)
    }

    fn credit(&self) -> Option<u64> {
        self.native.credit()
    }

    fn seal(&mut self, batch: BytesMut) -> Bytes {
        self.native.seal(batch)
    }

    fn resume(&mut self, hello: &Hello, welcome: Welcome) -> Result<Vec<Bytes>, Close> {
        self.native.resume(hello, welcome)
    }

    fn write(&self, mut batch: Bytes, mut give: impl FnMut(Message)) {
        // These bytes are this side's own.
        while !batch.is_empty()
            && let Ok(frame) = RawFrame::decode(&mut batch)
        {
            give(Message::text(write(&frame).to_string()));
        }
    }
}

/// The members of an object, each name once.
struct Members(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MembersVisitor;

        impl<'de> Visitor<'de> for MembersVisitor {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let (mut members, mut names) = (Vec::new(), HashSet::new());
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if !names.insert(name.clone()) {
                        let name = name.escape_debug();
                        return Err(A::Error::custom(format_args!("`{name}` stands twice")));
                    }
                    members.push((name, value));
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(MembersVisitor)
    }
}

/// The bytes of the frame that `text` describes.
fn read(text: &[u8], max_depth: usize) -> Result<Bytes, String> {
    let Members(members) = json::parse(text, max_depth)
        .map_err(|error| format!("a message is the JSON object of one frame: {error}"))?;
    let mut frame = RawFrame::default();
    let (mut has_kind, mut has_payload) = (false, false);
    for (name, value) in members {
        let is_payload = name.starts_with("payload");
        if is_payload && std::mem::replace(&mut has_payload, true) {
            return Err("a frame has one payload, in `payload` or in `payload_base64`".into());
        }
        match &*name {
            "kind" => {
                let kind = value.as_str().unwrap_or_default();
                let known = KINDS.iter().find(|(_, name)| *name == kind);
                let &(number, _) = known.ok_or_else(|| format!("there is no kind {value}"))?;
                (frame.kind, has_kind) = (number, true);
            }
            "payload" => {
                frame.payload = match value {
                    Value::String(text) => text.into(),
                    value => value.to_string().into(),
                };
            }
            "payload_base64" => {
                let bytes = value.as_str().and_then(|text| STANDARD.decode(text).ok());
                frame.payload = bytes.ok_or("payload_base64 is not base64")?.into();
            }
            _ => {
                let known = FIELDS.iter().find(|(_, known, _)| *known == name);
                let &(number, _, field_type) =
                    known.ok_or_else(|| format!("there is no field `{}`", name.escape_debug()))?;
                let values = match value {
                    Value::Array(values) => values,
                    value => vec![value],
                };
                for value in values {
                    let read = read_value(field_type, &value);
                    let read = read.ok_or_else(|| format!("{name} cannot be {value}"))?;
                    frame.fields.extend(read.into_iter().map(|value| (number, value)));
                }
            }
        }
    }
    if !has_kind {
        return Err("a frame needs a `kind`, such as \"hello\"".into());
    }
    let mut bytes = BytesMut::new();
    frame.encode(&mut bytes);
    Ok(bytes.freeze())
}

fn read_value(field_type: FieldType, value: &Value) -> Option<Vec<RawValue>> {
    let one = match (field_type, value) {
        (FieldType::Entry, Value::Object(entries)) => {
            let entry =
                |(name, value): (&String, &Value)| Some(RawFrame::entry(name, value.as_str()?));
            return entries.iter().map(entry).collect();
        }
        (FieldType::Text, Value::String(text)) => {
            RawValue::Bytes(Bytes::copy_from_slice(text.as_bytes()))
        }
        (FieldType::Flag, Value::Bool(value)) => RawValue::Number((*value).into()),
        (FieldType::Number | FieldType::Flag, Value::Number(number)) => {
            RawValue::Number(number.as_u64()?)
        }
        _ => return None,
    };
    Some(vec![one])
}

/// The JSON of a frame. What occurs more than once is an array.
fn write(frame: &RawFrame) -> Value {
    let mut object = Map::new();
    let kind = KINDS.iter().find(|(number, _)| *number == frame.kind);
    object.insert("kind".into(), kind.map_or("unknown", |(_, name)| name).into());
    for (number, value) in &frame.fields {
        let Some((_, name, field_type)) = FIELDS.iter().find(|(known, ..)| known == number) else {
            continue;
        };
        let value = match value {
            RawValue::Number(value) if *field_type == FieldType::Flag => Value::Bool(*value != 0),
            RawValue::Number(value) => (*value).into(),
            RawValue::Bytes(entry) if *field_type == FieldType::Entry => {
                let entries = object.entry(*name).or_insert_with(|| Map::new().into());
                if let (Some(entries), Some((name, value))) = (entries.as_object_mut(), pair(entry))
                {
                    entries.insert(name, value.into());
                }
                continue;
            }
            RawValue::Bytes(text) => String::from_utf8_lossy(text).into(),
        };
        match object.get_mut(*name) {
            None => drop(object.insert((*name).into(), value)),
            Some(Value::Array(values)) => values.push(value),
            Some(first) => *first = Value::Array(vec![first.take(), value]),
        }
    }
    if !frame.payload.is_empty() {
        match std::str::from_utf8(&frame.payload) {
            Ok(text) => object.insert("payload".into(), text.into()),
            Err(_) => {
                object.insert("payload_base64".into(), STANDARD.encode(&frame.payload).into())
            }
        };
    }
    Value::Object(object)
}

/// Name and value of an entry of metadata.
fn pair(entry: &Bytes) -> Option<(String, String)> {
    let fields = wire::fields(entry).ok()?;
    let text = |wanted| {
        let value = fields.iter().find(|(number, _)| *number == wanted);
        match value {
            Some((_, RawValue::Bytes(text))) => String::from_utf8(text.to_vec()).ok(),
            _ => None,
        }
    };
    Some((text(1)?, text(2).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use parlour_core::wire::{CallFrame, HeaderFields};
    use parlour_core::{AgentId, CallId, Payload};

    use super::*;

    fn frame(json: &str) -> Result<Option<Frame>, String> {
        Ok(wire::decode(&mut read(json.as_bytes(), 8)?).unwrap())
    }

    #[test]
    fn a_frame_can_be_typed_and_is_shown_as_it_was_typed() {
        let json = r#"{"agent_type":"upper","id":7,"key":"k","kind":"call","metadata":{"a":"b","c":""},"payload":"hi","progress":true,"timeout_ms":50}"#;
        let bytes = read(json.as_bytes(), 8).unwrap();
        let Some(Frame::Call(call)) = wire::decode(&mut bytes.clone()).unwrap() else { panic!() };
        let CallFrame { id, target, progress, payload, header, .. } = *call;
        assert_eq!((id, target, progress), (CallId(7), AgentId::parse("upper/k").unwrap(), true));
        assert_eq!((payload.bytes, header), (Payload::text("hi").bytes, HeaderFields::default()));
        assert_eq!(payload.metadata.get("a"), Some("b"));
        let shown = write(&RawFrame::decode(&mut { bytes }).unwrap());
        assert_eq!(shown, serde_json::from_str::<Value>(json).unwrap());
    }

    #[test]
    fn a_payload_is_text_or_json_or_base64() {
        let payload = |json: &str| match frame(json).unwrap() {
            Some(Frame::Reply(_, Ok(payload))) => payload.bytes,
            other => panic!("{other:?}"),
        };
        assert_eq!(payload(r#"{"kind":"reply","id":1,"payload":"{}"}"#), "{}");
        assert_eq!(payload(r#"{"kind":"reply","id":1,"payload":{"a":[1]}}"#), r#"{"a":[1]}"#);
        assert_eq!(payload(r#"{"kind":"reply","id":1,"payload_base64":"/w=="}"#), &b"\xff"[..]);
        let raw = RawFrame { kind: 9, payload: Bytes::from_static(b"\xff"), ..RawFrame::default() };
        assert_eq!(write(&raw)["payload_base64"], "/w==");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (json, reason) in [
            ("{}", "a frame needs a `kind`, such as \"hello\""),
            (
                "hello",
                "a message is the JSON object of one frame: expected value at line 1 column 1",
            ),
            (r#"{"kind":"helo"}"#, "there is no kind \"helo\""),
            (r#"{"kind":"call","agent":"a"}"#, "there is no field `agent`"),
            (r#"{"kind":"ping","id":"one"}"#, "id cannot be \"one\""),
            (r#"{"kind":"reply","payload_base64":"?"}"#, "payload_base64 is not base64"),
            (
                r#"{"kind":"reply","id":1,"payload":"a","payload_base64":"Yg=="}"#,
                "a frame has one payload, in `payload` or in `payload_base64`",
            ),
            (
                r#"{"kind":"ping","id":1,"id":2}"#,
                "a message is the JSON object of one frame: `id` stands twice at line 1 column 29",
            ),
        ] {
            assert_eq!(frame(json).unwrap_err(), reason);
        }
    }

    /// The frames that clients in other languages are held against too.
    #[test]
    fn golden_frames_are_read_and_written_as_they_stand() {
        let golden = include_str!("../../../../conformance/golden_frames.json");
        let golden: Vec<Value> = serde_json::from_str(golden).unwrap();
        assert!(golden.len() > 20);
        for case in golden {
            let (what, json) = (&case["what"], &case["json"]);
            let hex = case["hex"].as_str().unwrap().as_bytes().chunks(2);
            let digits = |pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
            let bytes: Bytes = hex.map(digits).collect();

            let frame = wire::decode(&mut bytes.clone()).unwrap().expect("a known kind");
            let mut written = BytesMut::new();
            wire::encode(&frame, &mut written);
            assert_eq!(written, bytes, "{what}: {frame:?}");
            assert_eq!(write(&RawFrame::decode(&mut bytes.clone()).unwrap()), *json, "{what}");
            let typed = read(json.to_string().as_bytes(), 8).unwrap();
            assert_eq!(wire::decode(&mut { typed }).unwrap(), Some(frame), "{what}");
        }
    }
}
