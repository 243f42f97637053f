use parlour_core::{AgentId, AgentType, ByteString, Bytes, Key, Payload, TopicId, TopicType};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, ErrorKind};

const JSON: ByteString = ByteString::from_static("application/json");
const OCTETS: ByteString = ByteString::from_static("application/octet-stream");

/// The key of an agent, or the source of a topic, that is written without one.
pub(crate) const DEFAULT_KEY: &str = "default";

/// A value that travels as JSON.
///
/// ```
/// use parlour::{IntoPayload, Json, PayloadExt};
///
/// let payload = Json([1, 2]).into_payload()?;
/// assert_eq!(payload.json::<Vec<u8>>()?, [1, 2]);
/// # Ok::<(), parlour::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a wrapper that is written and taken apart")]
pub struct Json<T>(pub T);

/// What can be sent as a message: a [`Payload`], text, bytes, [`Json`], or `()` for an empty one.
///
/// ```
/// use parlour::{IntoPayload, Payload};
///
/// assert_eq!("hello".into_payload()?, Payload::text("hello"));
/// assert!(().into_payload()?.bytes.is_empty());
/// # Ok::<(), parlour::Error>(())
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be sent as a message",
    label = "no message can be made of `{Self}`",
    note = "send text, bytes, `Json<T>` where `T: Serialize`, `Payload` or `()`; or implement \
            `IntoPayload` for `{Self}`"
)]
pub trait IntoPayload {
    /// Makes the payload. Fails with [`ErrorKind::Encode`] if the value has no encoding.
    fn into_payload(self) -> Result<Payload, Error>;
}

impl IntoPayload for Payload {
    fn into_payload(self) -> Result<Payload, Error> {
        Ok(self)
    }
}

impl IntoPayload for () {
    fn into_payload(self) -> Result<Payload, Error> {
        Ok(Payload::default())
    }
}

impl IntoPayload for &str {
    fn into_payload(self) -> Result<Payload, Error> {
        Ok(Payload::text(self))
    }
}

impl IntoPayload for String {
    fn into_payload(self) -> Result<Payload, Error> {
        Ok(Payload::text(self))
    }
}

impl IntoPayload for &String {
    fn into_payload(self) -> Result<Payload, Error> {
        self.as_str().into_payload()
    }
}

impl IntoPayload for Bytes {
    fn into_payload(self) -> Result<Payload, Error> {
        Ok(Payload { content_type: OCTETS, bytes: self, ..Payload::default() })
    }
}

impl IntoPayload for Vec<u8> {
    fn into_payload(self) -> Result<Payload, Error> {
        Bytes::from(self).into_payload()
    }
}

impl IntoPayload for &[u8] {
    fn into_payload(self) -> Result<Payload, Error> {
        Bytes::copy_from_slice(self).into_payload()
    }
}

impl<const N: usize> IntoPayload for &[u8; N] {
    fn into_payload(self) -> Result<Payload, Error> {
        self.as_slice().into_payload()
    }
}

impl<T: Serialize> IntoPayload for Json<T> {
    fn into_payload(self) -> Result<Payload, Error> {
        let bytes = serde_json::to_vec(&self.0).map_err(|error| {
            let name = name_of::<T>();
            Error::new(ErrorKind::Encode, format!("{name} does not encode as JSON"))
                .with_source(error)
        })?;
        Ok(Payload { content_type: JSON, bytes: bytes.into(), ..Payload::default() })
    }
}

/// Reads payloads.
///
/// ```
/// use parlour::{ErrorKind, Payload, PayloadExt};
///
/// let payload = Payload::text("[1, 2]");
/// assert_eq!(payload.to_text()?, "[1, 2]");
/// assert_eq!(payload.json::<Vec<u8>>()?, [1, 2]);
/// assert_eq!(payload.json::<bool>().unwrap_err().kind(), ErrorKind::Decode);
/// # Ok::<(), parlour::Error>(())
/// ```
pub trait PayloadExt {
    /// The value that the payload has as JSON, whatever its content type says.
    ///
    /// Fails with [`ErrorKind::Decode`].
    fn json<T: DeserializeOwned>(&self) -> Result<T, Error>;

    /// The payload as text. Fails with [`ErrorKind::Decode`] if it is not UTF-8.
    fn to_text(&self) -> Result<&str, Error>;
}

impl PayloadExt for Payload {
    fn json<T: DeserializeOwned>(&self) -> Result<T, Error> {
        serde_json::from_slice(&self.bytes).map_err(|error| {
            let name = name_of::<T>();
            Error::new(ErrorKind::Decode, format!("the payload does not decode as {name}"))
                .with_source(error)
        })
    }

    fn to_text(&self) -> Result<&str, Error> {
        std::str::from_utf8(&self.bytes).map_err(|error| {
            Error::new(ErrorKind::Decode, "the payload is not UTF-8 text").with_source(error)
        })
    }
}

/// The name of a type without the modules that it is in, which callers elsewhere know nothing of.
fn name_of<T>() -> String {
    let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    let last = |part: &'static str| part.rsplit_once("::").map_or(part, |(_, last)| last);
    std::any::type_name::<T>().split_inclusive(|c| !is_path(c)).map(last).collect()
}

/// What names an agent: an [`AgentId`], or text such as `type/key`; `type` alone is `type/default`.
///
/// ```
/// use parlour::{ErrorKind, IntoAgentId};
///
/// assert_eq!("upper".into_agent_id()?.to_string(), "upper/default");
/// assert_eq!("file/a/b".into_agent_id()?.key.as_str(), "a/b");
/// assert_eq!("no name/k".into_agent_id().unwrap_err().kind(), ErrorKind::InvalidName);
/// # Ok::<(), parlour::Error>(())
/// ```
pub trait IntoAgentId {
    /// Checks the name. Fails with [`ErrorKind::InvalidName`].
    fn into_agent_id(self) -> Result<AgentId, Error>;
}

impl IntoAgentId for AgentId {
    fn into_agent_id(self) -> Result<AgentId, Error> {
        Ok(self)
    }
}

impl IntoAgentId for &AgentId {
    fn into_agent_id(self) -> Result<AgentId, Error> {
        Ok(self.clone())
    }
}

impl IntoAgentId for &str {
    fn into_agent_id(self) -> Result<AgentId, Error> {
        let (agent_type, key) = self.split_once('/').unwrap_or((self, DEFAULT_KEY));
        Ok(AgentId::new(AgentType::parse(agent_type)?, Key::parse(key)?))
    }
}

impl IntoAgentId for &String {
    fn into_agent_id(self) -> Result<AgentId, Error> {
        self.as_str().into_agent_id()
    }
}

impl IntoAgentId for String {
    fn into_agent_id(self) -> Result<AgentId, Error> {
        self.as_str().into_agent_id()
    }
}

/// What names a topic: a [`TopicId`], or text such as `type/source`; `type` alone is `type/default`.
///
/// ```
/// use parlour::IntoTopicId;
///
/// let topic = "news.tech/paper".into_topic_id()?;
/// assert_eq!((topic.topic_type.as_str(), topic.source.as_str()), ("news.tech", "paper"));
/// # Ok::<(), parlour::Error>(())
/// ```
pub trait IntoTopicId {
    /// Checks the name. Fails with [`ErrorKind::InvalidName`].
    fn into_topic_id(self) -> Result<TopicId, Error>;
}

impl IntoTopicId for TopicId {
    fn into_topic_id(self) -> Result<TopicId, Error> {
        Ok(self)
    }
}

impl IntoTopicId for &TopicId {
    fn into_topic_id(self) -> Result<TopicId, Error> {
        Ok(self.clone())
    }
}

impl IntoTopicId for &str {
    fn into_topic_id(self) -> Result<TopicId, Error> {
        let (topic_type, source) = self.split_once('/').unwrap_or((self, DEFAULT_KEY));
        Ok(TopicId::new(TopicType::parse(topic_type)?, Key::parse(source)?))
    }
}

impl IntoTopicId for &String {
    fn into_topic_id(self) -> Result<TopicId, Error> {
        self.as_str().into_topic_id()
    }
}

impl IntoTopicId for String {
    fn into_topic_id(self) -> Result<TopicId, Error> {
        self.as_str().into_topic_id()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_type_means_the_default_key() {
        assert_eq!("upper".into_agent_id().unwrap().to_string(), "upper/default");
        assert_eq!("file/a/b".into_agent_id().unwrap().key.as_str(), "a/b");
        assert_eq!("news".into_topic_id().unwrap().to_string(), "news/default");
        let error = "not a name".into_agent_id().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidName);
        assert_eq!("upper/".into_agent_id().unwrap_err().kind(), ErrorKind::InvalidName);
    }

    #[test]
    fn text_and_bytes_can_be_sent_as_they_are_at_hand() {
        let text = String::from("hello");
        assert_eq!((&text).into_payload().unwrap(), text.into_payload().unwrap());
        let bytes = vec![0, 255];
        assert_eq!(bytes.as_slice().into_payload().unwrap().bytes, bytes);
        assert_eq!(b"\0\xff".into_payload().unwrap(), bytes.into_payload().unwrap());
    }

    #[test]
    fn a_type_is_named_without_its_modules() {
        use std::collections::HashMap;
        assert_eq!(
            name_of::<HashMap<String, Option<(Payload, &[u8])>>>(),
            "HashMap<String, Option<(Payload, &[u8])>>"
        );
        assert_eq!(name_of::<u8>(), "u8");
    }

    #[test]
    fn what_does_not_decode_is_said() {
        let error = Payload::text("seven").json::<u8>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Decode);
        assert_eq!(error.to_string(), "the payload does not decode as u8");
        assert!(std::error::Error::source(&error).is_some());
    }
}
