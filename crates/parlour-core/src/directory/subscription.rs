//! Who wants which events, and what of an event goes to whom.

use std::fmt;
use std::sync::Arc;

use bytestring::ByteString;

use super::WorkerId;
use crate::{AgentType, TopicType};

/// Names a subscription within one host.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum SubscriptionId {
    /// By a text that its maker chose for the whole host.
    Named(ByteString),
    /// By a number that its owner chose.
    Numbered(WorkerId, u64),
}

impl fmt::Display for SubscriptionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name) => f.write_str(name),
            Self::Numbered(worker, number) => write!(f, "{}:{number}", worker.0),
        }
    }
}

/// A wish to receive events.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "built by every binding, field by field")]
pub struct Subscription {
    /// Which topics.
    pub filter: TopicFilter,
    /// Who receives them.
    pub target: Target,
}

impl Subscription {
    /// The same in memory of its own, for keeping it longer than the message it came in.
    pub(super) fn to_kept(&self) -> Self {
        let filter = match &self.filter {
            TopicFilter::Exact(topic_type) => TopicFilter::Exact(topic_type.to_kept()),
            TopicFilter::Prefix(prefix) => TopicFilter::Prefix(ByteString::from(&**prefix)),
        };
        let target = match &self.target {
            Target::Agent(agent_type) => Target::Agent(agent_type.to_kept()),
            Target::Listener(number) => Target::Listener(*number),
        };
        Self { filter, target }
    }
}

/// Which topics a subscription matches.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "the two kinds of subscription that AutoGen knows")]
pub enum TopicFilter {
    /// Topics of just this type.
    Exact(TopicType),
    /// Topics whose type begins with this.
    Prefix(ByteString),
}

impl TopicFilter {
    /// Reads `news.tech` as that type and `news.*` as all that begin with `news.`.
    pub fn parse(pattern: &str) -> Result<Self, crate::InvalidName> {
        match pattern.strip_suffix('*') {
            None => TopicType::parse(pattern).map(Self::Exact),
            Some(prefix) => Self::prefix(prefix),
        }
    }

    /// All types that begin with `prefix`; a trailing `*` stands for the rest and is dropped.
    pub fn prefix(prefix: &str) -> Result<Self, crate::InvalidName> {
        let prefix = prefix.strip_suffix('*').unwrap_or(prefix);
        // `.` alone is no type, but is a fine beginning of one.
        if !prefix.is_empty() {
            TopicType::parse(format!("{prefix}_"))?;
        }
        Ok(Self::Prefix(prefix.into()))
    }
}

impl fmt::Display for TopicFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(topic_type) => write!(f, "{topic_type}"),
            Self::Prefix(prefix) => write!(f, "{prefix}*"),
        }
    }
}

/// Who receives the events of a subscription.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "an event goes to an agent or to a connection")]
pub enum Target {
    /// The agent of this type whose key is the topic's source.
    Agent(AgentType),
    /// The connection that subscribed.
    Listener(Listener),
}

/// The number by which a listening connection knows its subscription.
pub type Listener = u64;

/// What of an event goes to one worker or listening connection.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "taken apart by every binding")]
pub struct Recipients {
    /// Agent types that receive it, each with the topic's source as key.
    pub agents: Vec<AgentType>,
    /// Subscriptions of the connection's own.
    pub listeners: Vec<Listener>,
}

/// Where an event goes: each worker once, with all that it gets there.
pub type Destinations<P> = Arc<[(WorkerId, P, Arc<Recipients>)]>;

impl Recipients {
    pub(super) fn add(&mut self, target: &Target) {
        match target {
            Target::Listener(number) => {
                let swapped = 2 * u64::from(crate::bug!("wrong_subscriber"));
                self.listeners.push(*number ^ swapped);
            }
            Target::Agent(agent_type) => self.agents.push(agent_type.clone()),
        }
    }
}
