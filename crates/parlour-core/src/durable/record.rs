//! What a log says, and its bytes. `docs/storage.md` describes them.

use std::sync::Arc;

use bytes::{Buf, Bytes};
use bytestring::ByteString;
use thiserror::Error;

use super::delivery::{Change, Counts, Delivery, Level, State, Step};
use super::{DeliveryId, PartitionId, Timestamp};
use crate::{
    AgentId, AgentType, Fault, FaultKind, Header, Key, MessageId, Metadata, Payload, Principal,
    TopicId, TopicType,
};

/// The version of the format that is written.
pub const FORMAT: u8 = 1;

/// A durable message: what an agent is to get.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "the log has these and no others")]
pub struct Message {
    /// Whether it is a call, or an event of which topic.
    pub kind: MessageKind,
    /// What every message carries.
    pub header: Header,
    /// What is said.
    pub payload: Payload,
}

impl Message {
    /// Roughly the memory that it holds.
    pub fn weight(&self) -> usize {
        self.payload.weight() + self.header.weight()
    }
}

/// What kind of message is delivered.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "there are no others")]
pub enum MessageKind {
    /// A call: its reply is kept.
    Call,
    /// An event about this topic.
    Event(TopicId),
}

/// One entry of a commit.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "the log has these and no others")]
pub enum Record {
    /// A delivery was accepted.
    Accepted {
        /// As it was then.
        delivery: Box<Delivery>,
        /// The key under which accepting it again changes nothing.
        key: Option<KeyEntry>,
        /// Where it comes from, if a topic's log owed it.
        source: Option<Source>,
        /// What is to be delivered.
        message: Box<Message>,
    },
    /// Something happened to a delivery that goes on.
    Changed {
        /// Which, by its number.
        number: u64,
        /// What.
        change: Change,
    },
    /// A delivery ended: all that is to be known of it.
    Settled {
        /// As it was before.
        delivery: Box<Delivery>,
        /// How it ended.
        change: Change,
    },
    /// A delivery that has not ended, written again so that the log before it can go.
    Carried {
        /// As it is.
        delivery: Box<Delivery>,
        /// What is to be delivered.
        message: Box<Message>,
    },
    /// A key, written again for the same reason.
    KeyCarried(KeyEntry),
    /// A watermark, written again for the same reason.
    SourceCarried(Source),
    /// An event was published.
    Published {
        /// Which one of this log.
        number: u64,
        /// Whom it is owed to, each by its place among all.
        owed: Vec<(u32, Owed)>,
        /// The key under which publishing it again changes nothing.
        key: Option<KeyEntry>,
        /// The event.
        message: Box<Message>,
    },
    /// What is still owed of an event, written again so that the log before it can go.
    OwedCarried {
        /// Which one.
        number: u64,
        /// Whom it is owed to.
        owed: Vec<(u32, Owed)>,
        /// The event.
        message: Box<Message>,
    },
    /// Nobody is owed any more what was published up to this one.
    Passed {
        /// Which one.
        number: u64,
    },
}

impl Record {
    /// Gives what is kept of it texts in memory of their own, so that the commit that it was read from
    /// can go. Its message is not kept.
    pub(super) fn detach(&mut self) {
        match self {
            Self::Accepted { delivery, key, .. } => {
                delivery.detach();
                key.iter_mut().for_each(KeyEntry::detach);
            }
            Self::Changed { change, .. } => change.detach(),
            Self::Carried { delivery, .. } => delivery.detach(),
            Self::KeyCarried(key) => key.detach(),
            Self::Published { owed, key, .. } => {
                owed.iter_mut().for_each(|(_, owed)| owed.detach());
                key.iter_mut().for_each(KeyEntry::detach);
            }
            Self::OwedCarried { owed, .. } => owed.iter_mut().for_each(|(_, owed)| owed.detach()),
            Self::Settled { .. } | Self::SourceCarried(_) | Self::Passed { .. } => {}
        }
    }
}

impl Owed {
    fn detach(&mut self) {
        let AgentId { agent_type, key } = &self.agent;
        self.agent = AgentId::new(agent_type.to_kept(), key.to_kept());
    }
}

impl KeyEntry {
    fn detach(&mut self) {
        self.conversation = self.conversation.to_kept();
        if let Some((id, _)) = &mut self.event {
            *id = id.to_kept();
        }
    }
}

/// Whom an event is owed to.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "the log has these and no others")]
pub struct Owed {
    /// The agent.
    pub agent: AgentId,
    /// The durable subscription that it is owed for, by its name; none for that of a worker.
    pub subscription: Option<Arc<str>>,
}

/// What is remembered of a message that was accepted under an idempotency key.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "the log has these and no others")]
pub struct KeyEntry {
    /// A digest of principal, door, target and key.
    pub key: u128,
    /// A digest of what was sent under it.
    pub body: u64,
    /// The delivery that came of it. Of an event, its number.
    pub id: DeliveryId,
    /// Of an event, its name, and to how many it was owed.
    pub event: Option<(MessageId, u32)>,
    /// Its conversation.
    pub conversation: MessageId,
    /// From here on the key is free.
    pub until: Timestamp,
}

/// A place in another log: all that it owed up to there has been accepted.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[expect(clippy::exhaustive_structs, reason = "the log has these and no others")]
pub struct Source {
    /// Whose log.
    pub partition: PartitionId,
    /// The event.
    pub number: u64,
    /// Which of those whom it is owed to.
    pub index: u32,
}

/// Why bytes are no commit.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[non_exhaustive]
pub enum Corrupt {
    /// They end too early.
    #[error("the commit ends in the middle of {0}")]
    Truncated(&'static str),
    /// They say what no commit says.
    #[error("the commit has an impossible {0}")]
    Impossible(&'static str),
    /// They were written by a later version.
    #[error("the commit has format {0}, and this version reads up to {FORMAT}")]
    Newer(u8),
    /// They contradict what the log said before.
    #[error("the commit contradicts the log before it: {0}")]
    Contradiction(&'static str),
}

/// The numbers of records.
mod kind {
    pub(super) const ACCEPTED: u8 = 1;
    pub(super) const CHANGED: u8 = 2;
    pub(super) const SETTLED: u8 = 3;
    pub(super) const CARRIED: u8 = 4;
    pub(super) const KEY_CARRIED: u8 = 5;
    pub(super) const SOURCE_CARRIED: u8 = 6;
    pub(super) const PUBLISHED: u8 = 7;
    pub(super) const OWED_CARRIED: u8 = 8;
    pub(super) const PASSED: u8 = 9;
}

/// The numbers of changes.
mod change {
    pub(super) const DISPATCHED: u8 = 1;
    pub(super) const RECEIVED: u8 = 2;
    pub(super) const PROCESSING: u8 = 3;
    pub(super) const COMPLETED: u8 = 4;
    pub(super) const FAILED: u8 = 5;
    pub(super) const CANCELLED: u8 = 6;
    pub(super) const EXPIRED: u8 = 7;
    pub(super) const REDRIVEN: u8 = 8;
    pub(super) const DISCARDED: u8 = 9;
}

/// Appends `record` to `out`. What it is about stands before its message, which can be skipped.
pub(super) fn encode(record: &Record, out: &mut Vec<u8>) {
    match record {
        Record::Accepted { delivery, key, source, message } => framed(kind::ACCEPTED, out, |w| {
            w.new_delivery(delivery);
            w.option(key.as_ref(), Writer::key);
            w.option(source.as_ref(), Writer::source);
            w.message(message);
        }),
        Record::Changed { number, change } => encode_changed(*number, change, out),
        Record::Settled { delivery, change } => encode_settled(delivery, change, out),
        Record::Carried { delivery, message } => framed(kind::CARRIED, out, |w| {
            w.delivery(delivery);
            w.message(message);
        }),
        Record::KeyCarried(entry) => framed(kind::KEY_CARRIED, out, |w| w.key(entry)),
        Record::SourceCarried(source) => framed(kind::SOURCE_CARRIED, out, |w| w.source(source)),
        Record::Published { number, owed, key, message } => framed(kind::PUBLISHED, out, |w| {
            w.number(*number);
            w.owed(owed);
            w.option(key.as_ref(), Writer::key);
            w.message(message);
        }),
        Record::OwedCarried { number, owed, message } => framed(kind::OWED_CARRIED, out, |w| {
            w.number(*number);
            w.owed(owed);
            w.message(message);
        }),
        Record::Passed { number } => framed(kind::PASSED, out, |w| w.number(*number)),
    }
}

/// Appends a record of this kind, behind its length.
pub(super) fn framed(kind: u8, out: &mut Vec<u8>, write: impl FnOnce(&mut Writer<'_>)) {
    out.push(kind);
    let begin = out.len();
    out.extend_from_slice(&[0; 4]);
    write(&mut Writer(out));
    let length = (out.len() - begin - 4) as u32;
    out[begin..begin + 4].copy_from_slice(&length.to_le_bytes());
}

/// Appends the record of a delivery that goes on after `change`.
pub(super) fn encode_changed(number: u64, change: &Change, out: &mut Vec<u8>) {
    framed(kind::CHANGED, out, |w| {
        w.number(number);
        w.change(change);
    });
}

/// Appends the record of a delivery that ends with `change`.
pub(super) fn encode_settled(delivery: &Delivery, change: &Change, out: &mut Vec<u8>) {
    framed(kind::SETTLED, out, |w| {
        w.delivery(delivery);
        w.change(change);
    });
}

/// Takes the next record off `bytes`: its kind, and what is behind that.
fn next(bytes: &mut Bytes) -> Result<(u8, Reader), Corrupt> {
    if bytes.len() < 5 {
        return Err(Corrupt::Truncated("a record"));
    }
    let kind = bytes.get_u8();
    let length = bytes.get_u32_le() as usize;
    if bytes.len() < length {
        return Err(Corrupt::Truncated("a record"));
    }
    Ok((kind, Reader(bytes.split_to(length))))
}

/// Takes the next record off `bytes`. If it tells of an end, returns of which delivery.
pub(super) fn settled(bytes: &mut Bytes) -> Result<Option<u64>, Corrupt> {
    let (kind, mut r) = next(bytes)?;
    if kind == kind::SETTLED { Ok(Some(r.id()?.number)) } else { Ok(None) }
}

/// Takes the next record off `bytes`, in memory of its own if it is a small part of what is there.
pub(super) fn apart(bytes: &mut Bytes) -> Result<Bytes, Corrupt> {
    let all = bytes.clone();
    next(bytes)?;
    let record = all.slice(..all.len() - bytes.len());
    let is_most = record.len() * 2 > all.len();
    Ok(if is_most { record } else { Bytes::copy_from_slice(&record) })
}

/// Takes the next record off `bytes`. If it tells of an event, returns that.
pub(super) fn published(bytes: &mut Bytes) -> Result<Option<Message>, Corrupt> {
    if bytes.first() != Some(&kind::PUBLISHED) {
        next(bytes)?;
        return Ok(None);
    }
    match decode(&mut apart(bytes)?)? {
        Record::Published { message, .. } => Ok(Some(*message)),
        _ => Ok(None),
    }
}

/// Takes the next record off `bytes`, and what it stands at is up to the caller. Texts and payloads
/// are slices of it.
pub(super) fn decode(bytes: &mut Bytes) -> Result<Record, Corrupt> {
    let (kind, mut r) = next(bytes)?;
    let record = match kind {
        kind::ACCEPTED => Record::Accepted {
            delivery: Box::new(r.new_delivery()?),
            key: r.option(Reader::key)?,
            source: r.option(Reader::source)?,
            message: Box::new(r.message()?),
        },
        kind::CHANGED => Record::Changed { number: r.number()?, change: r.change()? },
        kind::SETTLED => Record::Settled { delivery: Box::new(r.delivery()?), change: r.change()? },
        kind::CARRIED => {
            Record::Carried { delivery: Box::new(r.delivery()?), message: Box::new(r.message()?) }
        }
        kind::KEY_CARRIED => Record::KeyCarried(r.key()?),
        kind::SOURCE_CARRIED => Record::SourceCarried(r.source()?),
        kind::PUBLISHED => Record::Published {
            number: r.number()?,
            owed: r.owed()?,
            key: r.option(Reader::key)?,
            message: Box::new(r.message()?),
        },
        kind::OWED_CARRIED => Record::OwedCarried {
            number: r.number()?,
            owed: r.owed()?,
            message: Box::new(r.message()?),
        },
        kind::PASSED => Record::Passed { number: r.number()? },
        _ => return Err(Corrupt::Impossible("kind of record")),
    };
    if r.0.is_empty() { Ok(record) } else { Err(Corrupt::Impossible("length of a record")) }
}

/// Writes numbers as varints (LEB128, as in Protocol Buffers) and texts behind their length.
pub(super) struct Writer<'a>(pub(super) &'a mut Vec<u8>);

impl Writer<'_> {
    pub(super) fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    fn option<T: ?Sized>(&mut self, value: Option<&T>, write: impl FnOnce(&mut Self, &T)) {
        self.0.push(value.is_some().into());
        if let Some(value) = value {
            write(self, value);
        }
    }

    fn time(&mut self, time: Option<Timestamp>) {
        // The Epoch itself is no time that a log was written at.
        self.number(time.map_or(0, |time| time.0));
    }

    fn agent(&mut self, agent: &AgentId) {
        self.text(agent.agent_type.as_str());
        self.text(agent.key.as_str());
    }

    fn id(&mut self, id: DeliveryId) {
        self.number(id.partition.0.into());
        self.number(id.epoch.into());
        self.number(id.number);
    }

    fn key(&mut self, entry: &KeyEntry) {
        self.0.extend_from_slice(&entry.key.to_le_bytes());
        self.0.extend_from_slice(&entry.body.to_le_bytes());
        self.id(entry.id);
        self.option(entry.event.as_ref(), |w, (id, owed)| {
            w.text(id.as_str());
            w.number((*owed).into());
        });
        self.text(entry.conversation.as_str());
        self.number(entry.until.0);
    }

    fn owed(&mut self, owed: &[(u32, Owed)]) {
        self.number(owed.len() as u64);
        for (index, it) in owed {
            self.number((*index).into());
            self.agent(&it.agent);
            self.option(it.subscription.as_deref(), Self::text);
        }
    }

    fn source(&mut self, source: &Source) {
        self.number(source.partition.0.into());
        self.number(source.number);
        self.number(source.index.into());
    }

    /// A delivery that nothing has happened to.
    fn new_delivery(&mut self, it: &Delivery) {
        self.id(it.id);
        self.agent(&it.agent);
        self.text(it.conversation.as_str());
        self.number(it.accepted_at.0);
        self.time(it.next_attempt_at);
        self.time(it.expires_at);
        self.number(it.max_attempts.into());
        self.number(it.max_lost.into());
        self.0.push(it.strict.into());
        self.option(it.subscription.as_deref(), Self::text);
    }

    fn delivery(&mut self, it: &Delivery) {
        self.new_delivery(it);
        let state = State::ALL.iter().position(|state| *state == it.state).unwrap_or_default();
        self.0.push(state as u8);
        self.number(it.generation);
        for count in [it.attempt, it.failed, it.lost, it.unsent] {
            self.number(count.into());
        }
        self.number(it.token);
        self.option(it.worker.as_deref(), Self::text);
        self.number(it.steps.len() as u64);
        it.steps.iter().for_each(|step| self.step(step));
    }

    fn step(&mut self, step: &Step) {
        self.number(step.generation);
        self.number(step.at.0);
        self.number(step.attempt.into());
        let level = Level::ALL.iter().position(|level| *level == step.level);
        self.0.push(level.unwrap_or_default() as u8);
        self.option(step.worker.as_deref(), Self::text);
        self.text(&step.details);
        self.option(step.fault.as_ref(), Self::fault);
    }

    fn change(&mut self, it: &Change) {
        match it {
            Change::Dispatched { worker } => {
                self.0.push(change::DISPATCHED);
                self.text(worker);
            }
            Change::Received => self.0.push(change::RECEIVED),
            Change::Processing { details } => {
                self.0.push(change::PROCESSING);
                self.text(details);
            }
            Change::Completed { reply } => {
                self.0.push(change::COMPLETED);
                self.payload(reply);
            }
            Change::Failed { fault, counts, next } => {
                self.0.push(change::FAILED);
                self.fault(fault);
                self.0.push(*counts as u8);
                self.time(*next);
            }
            Change::Cancelled { reason } => {
                self.0.push(change::CANCELLED);
                self.text(reason);
            }
            Change::Expired => self.0.push(change::EXPIRED),
            Change::Redriven => self.0.push(change::REDRIVEN),
            Change::Discarded { reason } => {
                self.0.push(change::DISCARDED);
                self.text(reason);
            }
        }
    }

    fn message(&mut self, message: &Message) {
        match &message.kind {
            MessageKind::Call => self.0.push(0),
            MessageKind::Event(topic) => {
                self.0.push(1);
                self.text(topic.topic_type.as_str());
                self.text(topic.source.as_str());
            }
        }
        let header = &message.header;
        self.text(header.id.as_str());
        self.text(header.conversation.as_str());
        self.option(header.cause.as_ref().map(MessageId::as_str), Self::text);
        self.text(header.principal.as_str());
        self.option(header.sender.as_ref(), Self::agent);
        self.option(header.traceparent.as_deref(), Self::text);
        self.0.push(header.hops);
        self.option(header.idempotency_key.as_deref(), Self::text);
        self.payload(&message.payload);
    }

    fn payload(&mut self, payload: &Payload) {
        self.text(&payload.data_type);
        self.text(&payload.content_type);
        self.number(payload.metadata.iter().count() as u64);
        for (name, value) in payload.metadata.iter() {
            self.text(name);
            self.text(value);
        }
        self.bytes(&payload.bytes);
    }

    fn fault(&mut self, fault: &Fault) {
        self.text(fault.kind().name());
        self.text(fault.detail());
        self.option(fault.hint_text(), Self::text);
        self.0.push(fault.may_have_run().into());
        let wait = fault.retry_after_time().map(|wait| wait.as_millis() as u64);
        self.option(wait.as_ref(), |w, &wait| w.number(wait));
        self.option(fault.config_key(), Self::text);
        self.option(fault.limit_value().as_ref(), |w, &limit| w.number(limit));
    }
}

/// Reads what [`Writer`] wrote.
pub(super) struct Reader(pub(super) Bytes);

impl Reader {
    pub(super) fn byte(&mut self) -> Result<u8, Corrupt> {
        if self.0.is_empty() { Err(Corrupt::Truncated("a byte")) } else { Ok(self.0.get_u8()) }
    }

    pub(super) fn number(&mut self) -> Result<u64, Corrupt> {
        let mut value = 0_u64;
        for place in 0..10 {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << (7 * place);
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Corrupt::Impossible("number"))
    }

    fn small<T: TryFrom<u64>>(&mut self) -> Result<T, Corrupt> {
        T::try_from(self.number()?).map_err(|_| Corrupt::Impossible("number"))
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N], Corrupt> {
        let bytes = self.0.get(..N).and_then(|bytes| bytes.try_into().ok());
        let bytes = bytes.ok_or(Corrupt::Truncated("a number"))?;
        self.0.advance(N);
        Ok(bytes)
    }

    pub(super) fn bytes(&mut self) -> Result<Bytes, Corrupt> {
        let length = usize::try_from(self.number()?).unwrap_or(usize::MAX);
        if self.0.len() < length {
            return Err(Corrupt::Truncated("a text"));
        }
        Ok(self.0.split_to(length))
    }

    fn text(&mut self) -> Result<ByteString, Corrupt> {
        self.bytes()?.try_into().map_err(|_| Corrupt::Impossible("text"))
    }

    fn flag(&mut self) -> Result<bool, Corrupt> {
        match self.byte()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Corrupt::Impossible("flag")),
        }
    }

    fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, Corrupt>,
    ) -> Result<Option<T>, Corrupt> {
        if self.flag()? { read(self).map(Some) } else { Ok(None) }
    }

    fn time(&mut self) -> Result<Option<Timestamp>, Corrupt> {
        let time = self.number()?;
        Ok((time > 0).then_some(Timestamp(time)))
    }

    fn message_id(&mut self) -> Result<MessageId, Corrupt> {
        MessageId::parse(self.text()?).map_err(|_| Corrupt::Impossible("message id"))
    }

    fn agent_key(&mut self) -> Result<Key, Corrupt> {
        Key::parse(self.text()?).map_err(|_| Corrupt::Impossible("key"))
    }

    fn agent(&mut self) -> Result<AgentId, Corrupt> {
        let agent_type = AgentType::parse(self.text()?);
        let agent_type = agent_type.map_err(|_| Corrupt::Impossible("agent type"))?;
        Ok(AgentId::new(agent_type, self.agent_key()?))
    }

    fn id(&mut self) -> Result<DeliveryId, Corrupt> {
        Ok(DeliveryId {
            partition: PartitionId(self.small()?),
            epoch: self.small()?,
            number: self.number()?,
        })
    }

    fn key(&mut self) -> Result<KeyEntry, Corrupt> {
        Ok(KeyEntry {
            key: u128::from_le_bytes(self.fixed()?),
            body: u64::from_le_bytes(self.fixed()?),
            id: self.id()?,
            event: self.option(|r| Ok((r.message_id()?, r.small()?)))?,
            conversation: self.message_id()?,
            until: Timestamp(self.number()?),
        })
    }

    fn owed(&mut self) -> Result<Vec<(u32, Owed)>, Corrupt> {
        // Whatever the bytes say, no more is read than there is.
        (0..self.number()?)
            .map(|_| {
                let index = self.small()?;
                let agent = self.agent()?;
                let subscription = self.option(Self::text)?.map(|name| Arc::from(&*name));
                Ok((index, Owed { agent, subscription }))
            })
            .collect()
    }

    fn source(&mut self) -> Result<Source, Corrupt> {
        Ok(Source {
            partition: PartitionId(self.small()?),
            number: self.number()?,
            index: self.small()?,
        })
    }

    fn new_delivery(&mut self) -> Result<Delivery, Corrupt> {
        Ok(Delivery {
            id: self.id()?,
            agent: Arc::new(self.agent()?),
            conversation: self.message_id()?,
            accepted_at: Timestamp(self.number()?),
            next_attempt_at: self.time()?,
            expires_at: self.time()?,
            max_attempts: self.small()?,
            max_lost: self.small()?,
            strict: self.flag()?,
            subscription: self.option(Self::text)?.map(|name| Arc::from(&*name)),
            state: State::Accepted,
            generation: 1,
            attempt: 0,
            failed: 0,
            lost: 0,
            unsent: 0,
            token: 0,
            worker: None,
            steps: Vec::new(),
        })
    }

    fn delivery(&mut self) -> Result<Delivery, Corrupt> {
        let mut it = self.new_delivery()?;
        let state = State::ALL.get(usize::from(self.byte()?));
        it.state = *state.ok_or(Corrupt::Impossible("state"))?;
        it.generation = self.number()?;
        it.attempt = self.small()?;
        it.failed = self.small()?;
        it.lost = self.small()?;
        it.unsent = self.small()?;
        it.token = self.number()?;
        it.worker = self.option(Self::text)?;
        for _ in 0..self.number()? {
            it.steps.push(self.step()?);
        }
        Ok(it)
    }

    fn step(&mut self) -> Result<Step, Corrupt> {
        Ok(Step {
            generation: self.number()?,
            at: Timestamp(self.number()?),
            attempt: self.small()?,
            level: {
                let level = Level::ALL.get(usize::from(self.byte()?));
                *level.ok_or(Corrupt::Impossible("level"))?
            },
            worker: self.option(Self::text)?,
            details: self.text()?,
            fault: self.option(Self::fault)?,
        })
    }

    fn change(&mut self) -> Result<Change, Corrupt> {
        Ok(match self.byte()? {
            change::DISPATCHED => Change::Dispatched { worker: self.text()? },
            change::RECEIVED => Change::Received,
            change::PROCESSING => Change::Processing { details: self.text()? },
            change::COMPLETED => Change::Completed { reply: self.payload()? },
            change::FAILED => Change::Failed {
                fault: self.fault()?,
                counts: match self.byte()? {
                    0 => Counts::Failed,
                    1 => Counts::Lost,
                    2 => Counts::Unsent,
                    _ => return Err(Corrupt::Impossible("kind of failure")),
                },
                next: self.time()?,
            },
            change::CANCELLED => Change::Cancelled { reason: self.text()? },
            change::EXPIRED => Change::Expired,
            change::REDRIVEN => Change::Redriven,
            change::DISCARDED => Change::Discarded { reason: self.text()? },
            _ => return Err(Corrupt::Impossible("kind of change")),
        })
    }

    fn message(&mut self) -> Result<Message, Corrupt> {
        let kind = match self.byte()? {
            0 => MessageKind::Call,
            1 => {
                let topic_type = TopicType::parse(self.text()?);
                let topic_type = topic_type.map_err(|_| Corrupt::Impossible("topic type"))?;
                MessageKind::Event(TopicId::new(topic_type, self.agent_key()?))
            }
            _ => return Err(Corrupt::Impossible("kind of message")),
        };
        let header = Header {
            id: self.message_id()?,
            conversation: self.message_id()?,
            cause: self.option(Self::message_id)?,
            principal: Principal::named(self.text()?),
            sender: self.option(Self::agent)?,
            traceparent: self.option(Self::text)?,
            hops: self.byte()?,
            idempotency_key: self.option(Self::text)?,
        };
        Ok(Message { kind, header, payload: self.payload()? })
    }

    fn payload(&mut self) -> Result<Payload, Corrupt> {
        let (data_type, content_type) = (self.text()?, self.text()?);
        let mut metadata = Metadata::default();
        for _ in 0..self.number()? {
            let (name, value) = (self.text()?, self.text()?);
            metadata.insert(name, value).map_err(|_| Corrupt::Impossible("metadata"))?;
        }
        Ok(Payload { data_type, content_type, metadata, bytes: self.bytes()? })
    }

    fn fault(&mut self) -> Result<Fault, Corrupt> {
        let kind = FaultKind::from_name(&self.text()?).ok_or(Corrupt::Impossible("fault"))?;
        let mut fault = Fault::new(kind, self.text()?.to_string());
        if let Some(hint) = self.option(Self::text)? {
            fault = fault.hint(hint.to_string());
        }
        fault = fault.may_have_run_if(self.flag()?);
        if let Some(wait) = self.option(Self::number)? {
            fault = fault.retry_after(std::time::Duration::from_millis(wait));
        }
        let (config_key, limit) = (self.option(Self::text)?, self.option(Self::number)?);
        Ok(match config_key {
            Some(key) => fault.limit(key.to_string(), limit),
            None => fault,
        })
    }
}
