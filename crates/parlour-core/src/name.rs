//! Names, parsed once into types that cannot be wrong.

use std::fmt;

use bytestring::ByteString;
use thiserror::Error;

/// Defines a name: a text that was checked when it was made. Cloning one copies no text.
macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $max:literal bytes, $rule:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub struct $name(ByteString);

        impl $name {
            /// The longest such name, in bytes.
            pub const MAX_BYTES: usize = $max;

            /// Checks `name` and takes it without copying its text.
            pub fn parse(name: impl Into<ByteString>) -> Result<Self, InvalidName> {
                let name = name.into();
                let check: fn(&str) -> bool = $check;
                if name.len() <= $max && check(&name) {
                    Ok(Self(name))
                } else {
                    Err(InvalidName { what: $what, name: shorten(&name), rule: $rule })
                }
            }

            /// The name as it is written.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The name in memory of its own, for keeping it longer than the message it came in.
            pub fn to_kept(&self) -> Self {
                Self(ByteString::from(self.as_str()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl From<$name> for ByteString {
            fn from(name: $name) -> Self {
                name.0
            }
        }
    };
}

name! {
    /// The kind of agent a worker serves, such as `summarizer`.
    ///
    /// ```
    /// # use parlour_core::AgentType;
    /// assert_eq!(AgentType::parse("upper")?.as_str(), "upper");
    /// assert!(AgentType::parse("not a name").is_err());
    /// # Ok::<(), parlour_core::InvalidName>(())
    /// ```
    AgentType, "agent type", 128 bytes, "1 to 128 of A-Z a-z 0-9 _ - ., and not `.` or `..`",
    |name| is_word(name, &AGENT_TYPE)
}

name! {
    /// The kind of a topic, such as `order.paid`.
    TopicType, "topic type", 128 bytes, "1 to 128 of A-Z a-z 0-9 _ - . : =, and not `.` or `..`",
    |name| is_word(name, &TOPIC_TYPE)
}

name! {
    /// Which instance of an agent type, or which source of a topic type: a text that is free but
    /// for its length and control characters.
    Key, "key", 256 bytes, "1 to 256 bytes without control characters",
    is_free
}

name! {
    /// Names a message, or the conversation that a first message began.
    ///
    /// A host makes one (a UUID of version 7) for each message that comes without.
    MessageId, "message id", 128 bytes, "1 to 128 bytes without control characters",
    is_free
}

/// One agent: its type, and the key that tells it from others of that type. Written `type/key`.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[expect(clippy::exhaustive_structs, reason = "an agent is named by these two for good")]
pub struct AgentId {
    /// Which workers can run it.
    pub agent_type: AgentType,
    /// Which instance, within that type.
    pub key: Key,
}

impl AgentId {
    /// An agent of this type and key.
    pub fn new(agent_type: AgentType, key: Key) -> Self {
        Self { agent_type, key }
    }

    /// Parses `type/key`, split at the first slash.
    ///
    /// ```
    /// # use parlour_core::AgentId;
    /// let id = AgentId::parse("file/a/b.txt")?;
    /// assert_eq!((id.agent_type.as_str(), id.key.as_str()), ("file", "a/b.txt"));
    /// # Ok::<(), parlour_core::InvalidName>(())
    /// ```
    pub fn parse(id: &str) -> Result<Self, InvalidName> {
        let Some((agent_type, key)) = id.split_once('/') else {
            return Err(InvalidName { what: "agent", name: shorten(id), rule: "`type/key`" });
        };
        Ok(Self { agent_type: AgentType::parse(agent_type)?, key: Key::parse(key)? })
    }
}

impl fmt::Display for AgentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.agent_type, self.key)
    }
}

/// What an event is about: a topic type, and the source it concerns. Written `type/source`.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a topic is named by these two for good")]
pub struct TopicId {
    /// The kind of topic, which subscriptions match on.
    pub topic_type: TopicType,
    /// The instance of it; an agent that receives the event has this as its key.
    pub source: Key,
}

impl TopicId {
    /// A topic of this type and source.
    pub fn new(topic_type: TopicType, source: Key) -> Self {
        Self { topic_type, source }
    }
}

impl fmt::Display for TopicId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic_type, self.source)
    }
}

/// A name that breaks the rule for its kind.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("`{}` is not a valid {what}: it must be {rule}", name.escape_debug())]
pub struct InvalidName {
    what: &'static str,
    name: Box<str>,
    rule: &'static str,
}

impl InvalidName {
    pub(crate) fn new(what: &'static str, name: &str, rule: &'static str) -> Self {
        Self { what, name: shorten(name), rule }
    }

    /// What such a name must be.
    pub fn rule(&self) -> &'static str {
        self.rule
    }
}

static AGENT_TYPE: [bool; 256] = alphabet(b"_-.");
static TOPIC_TYPE: [bool; 256] = alphabet(b"_-.:=");

/// ASCII letters and digits, and `more`.
const fn alphabet(more: &[u8]) -> [bool; 256] {
    let mut all = [false; 256];
    let mut byte = 0;
    while byte < all.len() {
        all[byte] = (byte as u8).is_ascii_alphanumeric();
        byte += 1;
    }
    let mut i = 0;
    while i < more.len() {
        all[more[i] as usize] = true;
        i += 1;
    }
    all
}

fn is_word(name: &str, alphabet: &[bool; 256]) -> bool {
    let is_word = name.bytes().all(|byte| alphabet[usize::from(byte)]);
    is_word && !matches!(name, "" | "." | "..")
}

fn is_free(name: &str) -> bool {
    // Without a branch for each byte, which the compiler turns into vector instructions.
    let (controls, any) = name.bytes().fold((false, 0), |(controls, any), byte| {
        (controls | (byte < 0x20) | (byte == 0x7f), any | byte)
    });
    // Beyond ASCII there are more of them.
    !name.is_empty() && !controls && (any < 0x80 || !name.chars().any(char::is_control))
}

/// An error repeats no more of a bad name than a reader needs to recognise it.
fn shorten(name: &str) -> Box<str> {
    match name.char_indices().nth(64) {
        Some((end, _)) => format!("{}…", &name[..end]).into(),
        None => name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_of_a_closed_alphabet() {
        for good in ["a", "a.b-c_9", "...", "é".repeat(0).as_str(), "A"] {
            assert_eq!(AgentType::parse(good).is_ok(), !good.is_empty(), "{good:?}");
        }
        for bad in [".", "..", "a b", "a/b", "a*", "é", "a\0", "a:b", &"a".repeat(129)] {
            assert!(AgentType::parse(bad).is_err(), "{bad:?}");
        }
        assert!(TopicType::parse("a:b=c").is_ok());
    }

    #[test]
    fn keys_are_free_but_for_length_and_control_characters() {
        for good in ["a/b", "..", "ü ✓", &"k".repeat(256)] {
            assert!(Key::parse(good).is_ok(), "{good:?}");
        }
        for bad in ["", "a\nb", "\u{1b}[2J", "\u{85}", &"k".repeat(257)] {
            assert!(Key::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_error_names_the_rule_and_hides_control_characters() {
        let text = AgentType::parse("a\u{1b}b").unwrap_err().to_string();
        assert_eq!(
            text,
            "`a\\u{1b}b` is not a valid agent type: it must be 1 to 128 of A-Z a-z 0-9 _ - ., \
             and not `.` or `..`"
        );
    }
}
