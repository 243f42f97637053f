//! What outlives the host and belongs to no partition: settings of the room.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{Buf, Bytes};
use bytestring::ByteString;

use super::record::{Corrupt, FORMAT, Reader, framed};
use crate::{AgentType, TopicFilter, TopicType};

/// The settings of a room, as the last commit of its own log has them.
///
/// Each commit of that log is the whole of it, so that the last one is all that has to be read.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "the log has these and no others")]
pub struct RoomSettings {
    /// By the agent type they are for. What asks for nothing is left out.
    pub agents: BTreeMap<AgentType, AgentSettings>,
    /// The durable subscriptions, by their names.
    pub subscriptions: BTreeMap<ByteString, DurableSubscription>,
}

/// A wish to have every durable event of some topics, whether or not a worker is there.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "the log has these and no others")]
pub struct DurableSubscription {
    /// Which topics.
    pub filter: TopicFilter,
    /// Whose agents get them, each those of the source that is its key.
    pub agent_type: AgentType,
    /// Whether each agent gets one at a time, until it is settled.
    pub strict: bool,
}

/// What a room asks for the deliveries to agents of one type. Where it asks for nothing, the settings
/// of the host hold.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "the log has these and no others")]
pub struct AgentSettings {
    /// Whether no attempt begins.
    pub paused: bool,
    /// The most attempts at once, over all partitions.
    pub concurrency: Option<u32>,
    /// How many attempts begin in a time.
    pub rate: Option<Rate>,
    /// Whether those accepted from now on are delivered one at a time for each agent, until settled.
    pub strict: bool,
    /// Attempts that may fail, of deliveries accepted from now on.
    pub max_attempts: Option<u32>,
    /// Attempts that may be lost, of deliveries accepted from now on.
    pub max_lost: Option<u32>,
    /// The longest wait before the second attempt.
    pub backoff_base: Option<Duration>,
    /// The longest wait between two attempts.
    pub backoff_cap: Option<Duration>,
    /// How long one attempt may take.
    pub attempt_timeout: Option<Duration>,
    /// How many dead letters there may be before nothing more is accepted.
    pub max_dead: Option<u32>,
}

/// How fast attempts begin: a bucket that holds `burst` of them and is refilled evenly.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a number with a unit, and another")]
pub struct Rate {
    /// Attempts in a thousand seconds, at least 1.
    pub per_1000_s: u32,
    /// How many may begin at once after a pause, at least 1.
    pub burst: u32,
}

/// The kinds of records of the room's log.
mod kind {
    pub(super) const AGENT: u8 = 1;
    pub(super) const SUBSCRIPTION: u8 = 2;
}

/// The numbers of an agent type's settings.
mod field {
    pub(super) const PAUSED: u64 = 1;
    pub(super) const CONCURRENCY: u64 = 2;
    pub(super) const RATE: u64 = 3;
    pub(super) const BURST: u64 = 4;
    pub(super) const STRICT: u64 = 5;
    pub(super) const MAX_ATTEMPTS: u64 = 6;
    pub(super) const MAX_LOST: u64 = 7;
    pub(super) const BACKOFF_BASE: u64 = 8;
    pub(super) const BACKOFF_CAP: u64 = 9;
    pub(super) const ATTEMPT_TIMEOUT: u64 = 10;
    pub(super) const MAX_DEAD: u64 = 11;
}

impl RoomSettings {
    /// What is asked for agents of this type.
    pub fn of(&self, agent_type: &AgentType) -> AgentSettings {
        self.agents.get(agent_type).cloned().unwrap_or_default()
    }

    /// Changes what is asked for agents of this type, and keeps nothing where that is nothing.
    pub fn change<E>(
        &mut self,
        agent_type: &AgentType,
        change: impl FnOnce(&mut AgentSettings) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut settings = self.of(agent_type);
        change(&mut settings)?;
        if settings == AgentSettings::default() {
            self.agents.remove(agent_type);
        } else {
            self.agents.insert(agent_type.to_kept(), settings);
        }
        Ok(())
    }

    /// The commit that says it.
    pub fn encode(&self) -> Bytes {
        let mut out = vec![FORMAT];
        for (agent_type, settings) in &self.agents {
            framed(kind::AGENT, &mut out, |w| {
                w.bytes(agent_type.as_str().as_bytes());
                for (field, value) in settings.fields() {
                    w.number(field);
                    w.number(value);
                }
            });
        }
        for (name, it) in &self.subscriptions {
            framed(kind::SUBSCRIPTION, &mut out, |w| {
                w.bytes(name.as_bytes());
                let (is_prefix, pattern) = match &it.filter {
                    TopicFilter::Exact(topic_type) => (false, topic_type.as_str()),
                    TopicFilter::Prefix(prefix) => (true, &**prefix),
                };
                w.number(is_prefix.into());
                w.bytes(pattern.as_bytes());
                w.bytes(it.agent_type.as_str().as_bytes());
                w.number(it.strict.into());
            });
        }
        out.into()
    }

    /// The durable subscriptions that an event of this type is owed to.
    pub fn subscribed(
        &self,
        topic_type: &TopicType,
    ) -> impl Iterator<Item = (&ByteString, &DurableSubscription)> {
        self.subscriptions.iter().filter(move |(_, it)| match &it.filter {
            TopicFilter::Exact(exact) => exact == topic_type,
            TopicFilter::Prefix(prefix) => topic_type.as_str().starts_with(&**prefix),
        })
    }

    /// Reads what a commit of the room's log says.
    pub fn decode(commit: &Bytes) -> Result<Self, Corrupt> {
        let mut r = Reader(commit.clone());
        match r.byte()? {
            0 => return Err(Corrupt::Impossible("format")),
            format if format > FORMAT => return Err(Corrupt::Newer(format)),
            _ => {}
        }
        let mut room = Self::default();
        while !r.0.is_empty() {
            if r.0.len() < 5 {
                return Err(Corrupt::Truncated("a record"));
            }
            let (kind, length) = (r.0.get_u8(), r.0.get_u32_le() as usize);
            if r.0.len() < length {
                return Err(Corrupt::Truncated("a record"));
            }
            let mut record = Reader(r.0.split_to(length));
            match kind {
                kind::AGENT => {
                    let name = ByteString::try_from(record.bytes()?);
                    let name = name.ok().and_then(|name| AgentType::parse(name).ok());
                    let name = name.ok_or(Corrupt::Impossible("agent type"))?;
                    let mut settings = AgentSettings::default();
                    while !record.0.is_empty() {
                        settings.set(record.number()?, record.number()?)?;
                    }
                    room.agents.insert(name.to_kept(), settings);
                }
                kind::SUBSCRIPTION => {
                    let (name, subscription) = subscription(&mut record)?;
                    room.subscriptions.insert(name, subscription);
                }
                _ => return Err(Corrupt::Impossible("kind of record")),
            }
        }
        Ok(room)
    }
}

fn subscription(record: &mut Reader) -> Result<(ByteString, DurableSubscription), Corrupt> {
    let text = |record: &mut Reader| {
        let bytes = record.bytes()?;
        // In memory of its own, as the commit is not kept.
        let text = std::str::from_utf8(&bytes).map_err(|_| Corrupt::Impossible("text"))?;
        Ok::<_, Corrupt>(ByteString::from(text))
    };
    let name = text(record)?;
    let is_prefix = record.number()? == 1;
    let pattern = text(record)?;
    let filter = if is_prefix {
        TopicFilter::prefix(&pattern)
    } else {
        TopicType::parse(pattern).map(TopicFilter::Exact)
    };
    let agent_type = AgentType::parse(text(record)?);
    let subscription = DurableSubscription {
        filter: filter.map_err(|_| Corrupt::Impossible("topic type"))?,
        agent_type: agent_type.map_err(|_| Corrupt::Impossible("agent type"))?,
        strict: record.number()? == 1,
    };
    Ok((name, subscription))
}

impl AgentSettings {
    /// What is asked for, by the numbers of the fields.
    fn fields(&self) -> impl Iterator<Item = (u64, u64)> {
        let flag = |is_set: bool| is_set.then_some(1);
        let number = |number: Option<u32>| number.map(u64::from);
        let time = |time: Option<Duration>| time.map(|time| time.as_millis() as u64);
        let fields = [
            (field::PAUSED, flag(self.paused)),
            (field::CONCURRENCY, number(self.concurrency)),
            (field::RATE, number(self.rate.map(|rate| rate.per_1000_s))),
            (field::BURST, number(self.rate.map(|rate| rate.burst))),
            (field::STRICT, flag(self.strict)),
            (field::MAX_ATTEMPTS, number(self.max_attempts)),
            (field::MAX_LOST, number(self.max_lost)),
            (field::BACKOFF_BASE, time(self.backoff_base)),
            (field::BACKOFF_CAP, time(self.backoff_cap)),
            (field::ATTEMPT_TIMEOUT, time(self.attempt_timeout)),
            (field::MAX_DEAD, number(self.max_dead)),
        ];
        fields.into_iter().filter_map(|(field, value)| Some((field, value?)))
    }

    fn set(&mut self, field: u64, value: u64) -> Result<(), Corrupt> {
        let number = u32::try_from(value).map_err(|_| Corrupt::Impossible("setting"));
        let time = Some(Duration::from_millis(value));
        match field {
            field::PAUSED => self.paused = value == 1,
            field::CONCURRENCY => self.concurrency = Some(number?),
            field::RATE => self.rate = Some(Rate { per_1000_s: number?.max(1), burst: 1 }),
            field::BURST => {
                self.rate.as_mut().ok_or(Corrupt::Impossible("burst"))?.burst = number?.max(1);
            }
            field::STRICT => self.strict = value == 1,
            field::MAX_ATTEMPTS => self.max_attempts = Some(number?),
            field::MAX_LOST => self.max_lost = Some(number?),
            field::BACKOFF_BASE => self.backoff_base = time,
            field::BACKOFF_CAP => self.backoff_cap = time,
            field::ATTEMPT_TIMEOUT => self.attempt_timeout = time,
            field::MAX_DEAD => self.max_dead = Some(number?),
            _ => return Err(Corrupt::Impossible("setting")),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn agent_type(name: &str) -> AgentType {
        AgentType::parse(name).unwrap()
    }

    fn settings() -> impl Strategy<Value = AgentSettings> {
        let number = || proptest::option::of(1..u32::MAX);
        let time =
            || proptest::option::of((1..u64::from(u32::MAX)).prop_map(Duration::from_millis));
        let rate = proptest::option::of((1..u32::MAX, 1..u32::MAX))
            .prop_map(|rate| rate.map(|(per_1000_s, burst)| Rate { per_1000_s, burst }));
        let first = (any::<bool>(), number(), rate, any::<bool>());
        let rest = (number(), number(), time(), time(), time(), number());
        (first, rest).prop_map(|(first, rest)| {
            let (paused, concurrency, rate, strict) = first;
            let (max_attempts, max_lost, backoff_base, backoff_cap, attempt_timeout, max_dead) =
                rest;
            AgentSettings {
                paused,
                concurrency,
                rate,
                strict,
                max_attempts,
                max_lost,
                backoff_base,
                backoff_cap,
                attempt_timeout,
                max_dead,
            }
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            agents in proptest::collection::btree_map("[a-z]{1,9}", settings(), 0..9),
        ) {
            let agents = agents.into_iter().map(|(name, it)| (agent_type(&name), it)).collect();
            let filter = [TopicFilter::parse("news.*"), TopicFilter::parse("news")];
            let subscriptions = filter.into_iter().zip(["a", "b"]).map(|(filter, name)| {
                let (filter, strict) = (filter.unwrap(), name == "a");
                let agent_type = agent_type("reader");
                (name.into(), DurableSubscription { filter, agent_type, strict })
            });
            let room = RoomSettings { agents, subscriptions: subscriptions.collect() };
            prop_assert_eq!(RoomSettings::decode(&room.encode()), Ok(room));
        }

        #[test]
        fn bytes_that_are_no_settings_are_refused_and_never_a_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            cut in 0..60_usize,
        ) {
            let _ = RoomSettings::decode(&bytes.clone().into());
            let mut room = RoomSettings::default();
            let paused = |it: &mut AgentSettings| { it.paused = true; Ok::<_, Corrupt>(()) };
            room.change(&agent_type("report"), paused).unwrap();
            let mut commit = room.encode().to_vec();
            commit.truncate(cut);
            commit.extend(bytes);
            let _ = RoomSettings::decode(&commit.into());
        }
    }

    #[test]
    fn a_later_format_is_named_and_what_asks_for_nothing_is_not_kept() {
        let later = Bytes::from(vec![FORMAT + 1, 0]);
        assert_eq!(RoomSettings::decode(&later), Err(Corrupt::Newer(FORMAT + 1)));
        let mut room = RoomSettings::default();
        for paused in [true, false] {
            let set = |it: &mut AgentSettings| {
                it.paused = paused;
                Ok::<_, Corrupt>(())
            };
            room.change(&agent_type("report"), set).unwrap();
            assert_eq!(room.agents.len(), usize::from(paused));
        }
    }
}
