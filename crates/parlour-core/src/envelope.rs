use std::time::Instant;

use bytes::Bytes;
use bytestring::ByteString;
use thiserror::Error;

use crate::durable::DeliveryId;
use crate::{AgentId, Fault, MessageId, TopicId};

/// How many messages may follow from one another unless a host is configured otherwise: a loop of
/// agents that call each other ends here.
pub const MAX_HOPS: u8 = 16;

/// A message body and how to read it. Nobody between the two ends looks inside `bytes`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "built by every binding, field by field")]
pub struct Payload {
    /// The application's name for the type; may be empty.
    pub data_type: ByteString,
    /// The media type of `bytes`; may be empty.
    pub content_type: ByteString,
    /// Texts beside the body, which the host passes on and never reads.
    pub metadata: Metadata,
    /// The encoded body, shared rather than copied when one event has many recipients.
    pub bytes: Bytes,
}

impl Payload {
    /// A plain text.
    pub fn text(text: impl Into<String>) -> Self {
        Self {
            content_type: ByteString::from_static("text/plain; charset=utf-8"),
            bytes: Bytes::from(text.into()),
            ..Self::default()
        }
    }

    /// Roughly the memory that a queued message with this payload holds.
    pub fn weight(&self) -> usize {
        self.bytes.len() + self.data_type.len() + self.content_type.len() + self.metadata.weight()
    }
}

/// What every call and event carries beside its address and its payload.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "built by every binding, field by field")]
pub struct Header {
    /// Names the message.
    pub id: MessageId,
    /// Names the conversation: the id of the message that began it.
    pub conversation: MessageId,
    /// The message that this one answers or follows from.
    pub cause: Option<MessageId>,
    /// Who connected; stamped by the host.
    pub principal: Principal,
    /// The agent that sends it, if its connection serves that agent's type.
    pub sender: Option<AgentId>,
    /// W3C trace context, passed on as it came.
    pub traceparent: Option<ByteString>,
    /// How many messages of this conversation led to this one, one after the other.
    pub hops: u8,
    /// The sender's name for the work, so that doing it twice can be avoided.
    pub idempotency_key: Option<ByteString>,
}

/// A request to one agent, which ends with exactly one [`Reply`].
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "built by every binding, field by field")]
pub struct Call {
    /// What every message carries.
    pub header: Header,
    /// The agent asked.
    pub target: AgentId,
    /// After this the caller no longer wants an answer.
    pub deadline: Instant,
    /// Whether the caller wants to hear of its progress.
    pub progress: bool,
    /// Of a durable call: which attempt this is.
    pub attempt: Option<Attempt>,
    /// Of an event that its agent is to acknowledge: what it is about. The reply says no more than that.
    pub topic: Option<TopicId>,
    /// What is asked.
    pub payload: Payload,
}

/// One of the times that a durable message is sent to its agent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "all that an agent is told of it")]
pub struct Attempt {
    /// The delivery, which is the same in each.
    pub delivery: DeliveryId,
    /// Which one it is, from 1 on.
    pub number: u32,
}

impl Header {
    /// Roughly the memory that its texts hold.
    pub fn weight(&self) -> usize {
        self.id.as_str().len()
            + self.conversation.as_str().len()
            + self.traceparent.as_ref().map_or(0, |text| text.len())
            + self.idempotency_key.as_ref().map_or(0, |text| text.len())
    }
}

/// What came of a [`Call`].
pub type Reply = Result<Payload, Fault>;

/// A fact published to whoever subscribes. Nobody answers it.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "built by every binding, field by field")]
pub struct Event {
    /// What every message carries.
    pub header: Header,
    /// What it is about.
    pub topic: TopicId,
    /// What happened.
    pub payload: Payload,
}

/// Who connected, as the host established it.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Principal(ByteString);

impl Principal {
    /// Somebody who showed no credential.
    pub const ANONYMOUS: Self = Self(ByteString::from_static("anonymous"));

    /// The principal of that name.
    pub fn named(name: impl Into<ByteString>) -> Self {
        Self(name.into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A bounded map of text to text beside a payload: at most 64 entries and 16 KiB, names of
/// `[A-Za-z0-9_.-]` compared without case.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Metadata(Vec<(ByteString, ByteString)>);

impl Metadata {
    /// The most entries.
    pub const MAX_ENTRIES: usize = 64;
    /// The most bytes of all names and values together.
    pub const MAX_BYTES: usize = 16 * 1024;

    /// Sets `name` to `value`, in place of an earlier value.
    pub fn insert(
        &mut self,
        name: impl Into<ByteString>,
        value: impl Into<ByteString>,
    ) -> Result<(), MetadataError> {
        let (name, value) = (name.into(), value.into());
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
        if name.is_empty() || !name.bytes().all(allowed) {
            return Err(MetadataError::Name(name));
        }
        if value.chars().any(char::is_control) {
            return Err(MetadataError::Value(name));
        }
        self.0.retain(|(known, _)| !known.eq_ignore_ascii_case(&name));
        if self.0.len() >= Self::MAX_ENTRIES
            || self.weight() + name.len() + value.len() > Self::MAX_BYTES
        {
            return Err(MetadataError::TooLarge);
        }
        self.0.push((name, value));
        Ok(())
    }

    /// The value of `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// All entries, in the order in which they were set.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (&**name, &**value))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes of all names and values together.
    pub fn weight(&self) -> usize {
        self.0.iter().map(|(name, value)| name.len() + value.len()).sum()
    }
}

/// Why an entry does not fit into [`Metadata`].
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[non_exhaustive]
pub enum MetadataError {
    /// The name is empty or has characters outside of the alphabet.
    #[error("`{}` is not a metadata name: use A-Z a-z 0-9 _ - .", .0.escape_debug())]
    Name(ByteString),
    /// The value of this name has control characters.
    #[error("the metadata value of `{0}` has control characters")]
    Value(ByteString),
    /// Too many entries, or too many bytes.
    #[error("metadata is limited to 64 entries and 16 KiB in all")]
    TooLarge,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_bounded_and_knows_names_without_case() {
        let mut metadata = Metadata::default();
        metadata.insert("Request-Type", "a").unwrap();
        metadata.insert("request-type", "b").unwrap();
        assert_eq!(metadata.iter().collect::<Vec<_>>(), [("request-type", "b")]);

        assert_eq!(metadata.insert("a b", ""), Err(MetadataError::Name("a b".into())));
        assert_eq!(metadata.insert("a", "x\r\ny"), Err(MetadataError::Value("a".into())));
        let large = "x".repeat(Metadata::MAX_BYTES);
        assert_eq!(metadata.insert("large", large), Err(MetadataError::TooLarge));
        for n in 1..Metadata::MAX_ENTRIES {
            metadata.insert(format!("n{n}"), "").unwrap();
        }
        assert_eq!(metadata.insert("one-more", ""), Err(MetadataError::TooLarge));
    }
}
