//! The state of one partition: what its log says.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;

use super::commit::{Commit, Place, Records, Scalars, Settled, Totals, header, write_header};
use super::delivery::{Change, Delivery, Stale, State};
use super::line::{Gate, Lines};
use super::log::{Log, Number, Spot};
use super::outbox::{Outbox, Owing};
use super::record::{self, Corrupt, KeyEntry, Message, Owed, Reader, Record, Source};
use super::{DeliveryId, PartitionId, Position, RetryPolicy, Timestamp};
use crate::{AgentId, AgentType, Fault, FaultKind, MessageId, Reply, WorkerId};

/// The deliveries of one partition, folded from its log.
///
/// Methods come in three groups:
///
/// - commands: what somebody wants to happen. They decide, apply and write records in one go;
/// - `poll_*`, for what begins next;
/// - [`take_commit`](Self::take_commit): the records since the last one. Until the commit is on disk,
///   and [`appended`](Self::appended) has said where, nobody may be told what it says, and nothing else
///   may be asked for. If it cannot be written, the partition is to be thrown away.
#[derive(Debug)]
pub struct Partition {
    id: PartitionId,
    scalars: Scalars,
    /// Boxed: a table is as large as it would be with twice as many, and moves when it grows.
    deliveries: HashMap<u64, Box<Live>, foldhash::fast::RandomState>,
    lines: Lines,
    /// When there is something to do for which delivery.
    timers: BTreeSet<(Timestamp, u64)>,
    keys: HashMap<u128, (KeyEntry, Number), foldhash::fast::RandomState>,
    keys_by_time: BTreeSet<(Timestamp, u128)>,
    sources: BTreeMap<PartitionId, (Source, Number)>,
    /// What is owed of the events that were published here.
    outbox: Outbox,
    /// The deliveries of each durable subscription that have not ended, the earliest first.
    subscriptions: BTreeMap<Arc<str>, BTreeSet<u64>>,
    /// The commits from which the state is made.
    log: Log,
    /// Numbers of those that wait, are in flight, and are dead: of all, and by agent type.
    standing: Standing,
    tallies: HashMap<AgentType, Tally, foldhash::fast::RandomState>,
    /// The types whose numbers have changed since they were taken.
    counted: HashSet<AgentType, foldhash::fast::RandomState>,
    /// Whether a commit is begun: its records so far, and the totals before the first of them.
    is_open: bool,
    records: Vec<u8>,
    before: Totals,
    settled: Vec<Settled>,
    changed: Vec<u64>,
    /// Bytes of what the state needs of the log.
    live_bytes: usize,
    /// Bytes of the messages that are in memory, and how many there may be.
    loaded: usize,
    memory: usize,
}

/// How many deliveries are where.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "the terms of the law of conservation")]
#[expect(missing_docs, reason = "named after the states")]
pub struct Standing {
    pub waiting: u64,
    pub in_flight: u64,
    pub dead: u64,
    /// Not accepted yet, but owed by the log of a topic.
    pub owed: u64,
}

/// How many deliveries to agents of one type are where.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "what the limits of a type are about")]
pub struct Tally {
    /// How many wait, are in flight, and are dead.
    pub standing: Standing,
    /// Bytes of the log that the dead ones take.
    pub dead_bytes: u64,
}

#[derive(Debug)]
struct Live {
    delivery: Delivery,
    message: Option<Arc<Message>>,
    /// Its entry among the timers.
    timer: Option<Timestamp>,
    spot: Spot,
}

/// As long as a commit may become before another is to be begun.
const LONG: usize = 4 << 20;
/// Roughly what the record of a key takes.
const KEY_BYTES: usize = 100;
/// How long the log may wait to be told that an event is owed to nobody any more, if nothing else is to
/// be written. Whoever has it knows that, and is not given it again.
const PASS: Duration = Duration::from_secs(1);

/// A message that is to be delivered.
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_structs, reason = "built by the partition's owner")]
pub struct Accept {
    /// Whom it is for.
    pub agent: AgentId,
    /// What is said.
    pub message: Message,
    /// Before this it is not attempted.
    pub not_before: Option<Timestamp>,
    /// From here on no attempt begins any more.
    pub expires_at: Option<Timestamp>,
    /// How many attempts may fail, at least 1. 0 is for the owner to fill in.
    pub max_attempts: u32,
    /// How many attempts may be lost, at least 1. 0 is for the owner to fill in.
    pub max_lost: u32,
    /// Whether it waits until those before it, that ask for this too, have ended.
    pub strict: bool,
    /// Digests of its idempotency key and of its body, and for how long they are remembered.
    pub key: Option<(u128, u64, Duration)>,
    /// Where it comes from, if a topic's log owes it, and for which durable subscription.
    pub source: Option<Source>,
    /// That subscription's name.
    pub subscription: Option<Arc<str>>,
}

impl Accept {
    /// A message for an agent, with nothing asked for beyond.
    pub fn new(agent: AgentId, message: Message) -> Self {
        Self {
            agent,
            message,
            not_before: None,
            expires_at: None,
            max_attempts: 0,
            max_lost: 0,
            strict: false,
            key: None,
            source: None,
            subscription: None,
        }
    }
}

/// An event that is owed to those who have subscribed.
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_structs, reason = "built by the partition's owner")]
pub struct Publish {
    /// The event.
    pub message: Message,
    /// Whom it is owed to.
    pub owed: Vec<Owed>,
    /// As in [`Accept`].
    pub key: Option<(u128, u64, Duration)>,
}

/// What a publish is answered with.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "read by every door")]
pub struct Published {
    /// The event.
    pub id: MessageId,
    /// Its conversation.
    pub conversation: MessageId,
    /// To how many it is owed.
    pub recipients: u32,
    /// Whether it is a new one. Otherwise it was published before, under the same key.
    pub is_new: bool,
}

/// An event that is to be accepted by the partitions of those whom it is owed to.
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_structs, reason = "carried out by the partition's owner")]
pub struct Handover {
    /// Which event of this log.
    pub number: u64,
    /// The event, or where it stands.
    pub message: Result<Arc<Message>, Place>,
    /// Whom it is owed to.
    pub owed: Vec<(u32, Owed)>,
}

/// What an acceptance is answered with.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "read by every door")]
pub struct Accepted {
    /// The delivery.
    pub id: DeliveryId,
    /// Its conversation.
    pub conversation: MessageId,
    /// Whether it is a new one. Otherwise it was accepted before, under the same key.
    pub is_new: bool,
}

/// An attempt that begins.
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_structs, reason = "carried out by the partition's owner")]
pub struct Start {
    /// The delivery.
    pub id: DeliveryId,
    /// What those must say who speak for this attempt.
    pub token: u64,
    /// Which attempt it is.
    pub attempt: u32,
    /// Whom it is for.
    pub agent: Arc<AgentId>,
    /// At which worker.
    pub worker: WorkerId,
}

impl Partition {
    /// A partition with an empty log, owned under this epoch.
    pub fn new(id: PartitionId, epoch: u32, memory: usize) -> Self {
        Self {
            id,
            scalars: Scalars { epoch, ..Scalars::default() },
            deliveries: HashMap::default(),
            lines: Lines::default(),
            timers: BTreeSet::new(),
            keys: HashMap::default(),
            keys_by_time: BTreeSet::new(),
            sources: BTreeMap::new(),
            outbox: Outbox::default(),
            subscriptions: BTreeMap::new(),
            log: Log::default(),
            standing: Standing::default(),
            tallies: HashMap::default(),
            counted: HashSet::default(),
            is_open: false,
            records: Vec::new(),
            before: Totals::default(),
            settled: Vec::new(),
            changed: Vec::new(),
            live_bytes: 0,
            loaded: 0,
            memory,
        }
    }

    /// The position behind which a log has to be replayed, as its last commit says.
    pub fn base(commit: &Bytes) -> Result<Position, Corrupt> {
        header(&mut Reader(commit.clone())).map(|scalars| scalars.base)
    }

    /// Has the log begin behind `base`.
    pub fn begin(&mut self, base: Position) {
        self.scalars.previous = base;
    }

    /// Takes the next commit of the log.
    pub fn replay(&mut self, position: Position, commit: &Bytes) -> Result<(), Corrupt> {
        let Scalars { time, previous, base, totals, .. } = header(&mut Reader(commit.clone()))?;
        if previous != self.scalars.previous {
            return Err(Corrupt::Contradiction("a commit is missing"));
        } else if self.log.is_empty() {
            self.scalars.totals = totals;
        } else if self.scalars.totals != totals {
            return Err(Corrupt::Contradiction("other deliveries were accepted or have ended"));
        }
        self.scalars = Scalars { time, previous: position, base, ..self.scalars };
        let number = self.log.begin();
        self.log.place(position);
        self.log.end(commit.len());
        for found in Records::of(commit)? {
            let (offset, mut record, weight) = found?;
            record.detach();
            self.apply(record, Spot { commit: number, offset, weight }, false)?;
        }
        // A long log has many more than are remembered at any one time.
        self.forget_keys();
        self.settled.clear();
        self.changed.clear();
        Ok(())
    }

    /// Takes the log over with the commit that comes next, once all of it was replayed: attempts that
    /// were under way are lost with the host that made them.
    pub fn recover(
        &mut self,
        epoch: u32,
        policy: impl Fn(&AgentType) -> RetryPolicy,
        now: Timestamp,
        random: f64,
    ) {
        self.scalars.epoch = epoch;
        self.advance(now);
        // Also if there is nothing to tell: whoever owned the partition before cannot write any more.
        self.open();
        let live = self.deliveries.values();
        let mut lost: Vec<_> = live.filter(|it| it.delivery.state.is_in_flight()).collect();
        lost.sort_unstable_by_key(|live| live.delivery.id.number);
        let lost: Vec<_> = lost
            .iter()
            .map(|it| (it.delivery.id, it.delivery.token, policy(&it.delivery.agent.agent_type)))
            .collect();
        if crate::bug!("attempts_in_memory") {
            for live in self.deliveries.values_mut() {
                let Live { delivery, .. } = &mut **live;
                (delivery.attempt, delivery.failed, delivery.lost) = (1, 0, 0);
            }
        }
        for (id, token, policy) in lost {
            let fault = Fault::new(FaultKind::WorkerLost, "the host stopped during the attempt");
            // The token is the delivery's own.
            let _ = self.end(id, token, Err(fault), &policy, now, random);
        }
        self.handle_timeout(now);
    }

    // Commands.

    /// Takes a message that is to be delivered.
    pub fn accept(&mut self, accept: Accept, now: Timestamp) -> Result<Accepted, Fault> {
        self.advance(now);
        if let Some(known) = self.remembered(accept.key)? {
            let (id, conversation) = (known.id, known.conversation.clone());
            return Ok(Accepted { id, conversation, is_new: false });
        }
        let id = DeliveryId {
            partition: self.id,
            epoch: self.scalars.epoch,
            number: self.scalars.totals.accepted + 1,
        };
        let now = self.scalars.time;
        let Accept { agent, message, strict, subscription, .. } = accept;
        // The message goes with what it came in; its conversation is kept.
        let conversation = message.header.conversation.to_kept();
        let accepted = Accepted { id, conversation: conversation.clone(), is_new: true };
        let delivery = Delivery {
            id,
            agent: Arc::new(agent),
            conversation: conversation.clone(),
            state: State::Accepted,
            generation: 1,
            accepted_at: now,
            next_attempt_at: accept.not_before.filter(|at| *at > now),
            expires_at: accept.expires_at,
            attempt: 0,
            failed: 0,
            lost: 0,
            unsent: 0,
            max_attempts: accept.max_attempts.max(1),
            max_lost: accept.max_lost.max(1),
            strict,
            subscription,
            token: 0,
            worker: None,
            steps: Vec::new(),
        };
        let key = accept.key.map(|(key, body, window)| {
            let until = now.after(window);
            KeyEntry { key, body, id, event: None, conversation, until }
        });
        let (delivery, message) = (Box::new(delivery), Box::new(message));
        self.write(Record::Accepted { delivery, key, source: accept.source, message });
        // It may have waited longer to be accepted than it may wait for an attempt.
        self.expire(id.number);
        Ok(accepted)
    }

    /// Takes an event that is owed to those who have subscribed.
    pub fn publish(&mut self, publish: Publish, now: Timestamp) -> Result<Published, Fault> {
        self.advance(now);
        if let Some(known) = self.remembered(publish.key)?
            && let Some((id, recipients)) = known.event.clone()
        {
            let conversation = known.conversation.clone();
            return Ok(Published { id, conversation, recipients, is_new: false });
        }
        let Publish { message, owed, key } = publish;
        let number = self.scalars.totals.published + 1;
        let header = &message.header;
        let (id, conversation) = (header.id.to_kept(), header.conversation.to_kept());
        let recipients = owed.len() as u32;
        let key = key.map(|(key, body, window)| KeyEntry {
            key,
            body,
            id: DeliveryId { partition: self.id, epoch: self.scalars.epoch, number },
            event: Some((id.clone(), recipients)),
            conversation: conversation.clone(),
            until: self.scalars.time.after(window),
        });
        let owed = (0..).zip(owed).collect();
        self.write(Record::Published { number, owed, key, message: Box::new(message) });
        Ok(Published { id, conversation, recipients, is_new: true })
    }

    /// The partition of one whom an event is owed to has it.
    pub fn taken(&mut self, number: u64, index: u32, now: Timestamp) {
        self.advance(now);
        if self.outbox.taken(number, index) {
            let due = self.scalars.time.after(PASS);
            self.outbox.due.get_or_insert(due);
        }
    }

    /// Whether what `source` names, or something behind it, has been accepted from that log.
    pub fn has_taken(&self, source: Source) -> bool {
        self.sources.get(&source.partition).is_some_and(|(taken, _)| *taken >= source)
    }

    /// The agent of this attempt has it.
    pub fn received(&mut self, id: DeliveryId, token: u64, now: Timestamp) -> Result<(), Stale> {
        self.attempt(id, token, now)?;
        // Said once; later it says no more than what is known.
        if self.deliveries.get(&id.number).is_some_and(|it| it.delivery.state == State::Dispatched)
        {
            self.change(id.number, Change::Received);
        }
        Ok(())
    }

    /// The agent of this attempt tells of its progress.
    pub fn processing(
        &mut self,
        id: DeliveryId,
        token: u64,
        details: ByteString,
        now: Timestamp,
    ) -> Result<(), Stale> {
        self.attempt(id, token, now)?;
        self.change(id.number, Change::Processing { details });
        Ok(())
    }

    /// This attempt has ended. `random` is evenly between 0 and 1.
    pub fn end(
        &mut self,
        id: DeliveryId,
        token: u64,
        reply: Reply,
        policy: &RetryPolicy,
        now: Timestamp,
        random: f64,
    ) -> Result<(), Stale> {
        let delivery = self.attempt(id, token, now)?;
        let change = match reply {
            Ok(reply) => Change::Completed { reply },
            Err(fault) => delivery.fail(token, fault, policy, now, random)?,
        };
        self.change(id.number, change);
        if crate::bug!("dead_letters_dropped") {
            let _ = self.discard(id, "no attempt is left".into(), now);
        }
        self.expire(id.number);
        Ok(())
    }

    /// Gives a delivery up. Returns the token of the attempt that is under way, whose worker is to be
    /// told.
    pub fn cancel(
        &mut self,
        id: DeliveryId,
        reason: ByteString,
        now: Timestamp,
    ) -> Result<Option<u64>, Fault> {
        self.advance(now);
        let delivery = self.known(id)?;
        if delivery.state == State::Dead {
            return Err(conflict(delivery, "discard it instead"));
        }
        let token = delivery.state.is_in_flight().then_some(delivery.token);
        self.change(id.number, Change::Cancelled { reason });
        Ok(token)
    }

    /// Has a dead delivery attempted again, as often as at first.
    pub fn redrive(&mut self, id: DeliveryId, now: Timestamp) -> Result<(), Fault> {
        self.advance(now);
        let delivery = self.known(id)?;
        if delivery.state != State::Dead {
            return Err(conflict(delivery, "only what is dead can be sent back"));
        }
        self.change(id.number, Change::Redriven);
        Ok(())
    }

    /// Gives a dead delivery up.
    pub fn discard(
        &mut self,
        id: DeliveryId,
        reason: ByteString,
        now: Timestamp,
    ) -> Result<(), Fault> {
        self.advance(now);
        let delivery = self.known(id)?;
        if delivery.state != State::Dead {
            return Err(conflict(delivery, "cancel it instead"));
        }
        self.change(id.number, Change::Discarded { reason });
        Ok(())
    }

    /// Ends what has expired, and has what is due begin when its turn comes.
    pub fn handle_timeout(&mut self, now: Timestamp) {
        self.advance(now);
        if self.outbox.due.is_some_and(|due| due <= self.scalars.time) {
            self.pass();
        }
        while let Some(&(at, number)) = self.timers.first()
            && at <= self.scalars.time
            && !self.is_full()
        {
            self.timers.pop_first();
            if let Some(live) = self.deliveries.get_mut(&number) {
                live.timer = None;
            }
            self.expire(number);
            self.queue(number);
        }
        self.forget_keys();
    }

    /// Workers of this type may take more than they did.
    pub fn wake(&mut self, agent_type: &AgentType) {
        self.lines.wake(agent_type);
    }

    /// A worker has room for one more, of those that wait for it.
    pub fn wake_worker(&mut self, worker: WorkerId) {
        self.lines.wake_worker(worker);
    }

    /// Workers have come or gone.
    pub fn wake_all(&mut self) {
        self.lines.wake_all();
    }

    // What comes next.

    /// The next attempt that begins. Ask until there is none.
    pub fn poll_start(
        &mut self,
        now: Timestamp,
        gate: &mut impl FnMut(&AgentId) -> Gate,
    ) -> Option<Start> {
        self.advance(now);
        let (number, worker, name) = self.lines.next(gate)?;
        self.change(number, Change::Dispatched { worker: name });
        let delivery = &self.deliveries.get(&number)?.delivery;
        let Delivery { id, token, attempt, .. } = *delivery;
        Some(Start { id, token, attempt, agent: delivery.agent.clone(), worker })
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) at the latest.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        let key = self.keys_by_time.first().map(|(at, _)| *at);
        let timer = self.timers.first().map(|(at, _)| *at);
        [key, timer, self.outbox.due].into_iter().flatten().min()
    }

    /// The next event that is to be handed to those whom it is owed to: the earliest first, each once
    /// since the partition was opened. Ask until there is none, and only for what is on disk.
    pub fn poll_owed(&mut self) -> Option<Handover> {
        let (number, owing) = self.outbox.poll()?;
        let owed = owing.left.iter().map(|(index, owed)| (*index, owed.clone())).collect();
        let message = owing.message.clone().ok_or_else(|| Place {
            position: self.log.position(owing.spot.commit),
            offset: owing.spot.offset,
        });
        Some(Handover { number, message, owed })
    }

    /// The oldest commit that the state is made from, if the log behind it has become much longer than
    /// the state: more than `slack` bytes and twice as long. [`carry`](Self::carry) wants it.
    ///
    /// `backlog` says how many bytes a host reads that reads the log from a position on: it may have to
    /// read more than the log.
    pub fn poll_carry(
        &mut self,
        slack: usize,
        backlog: impl FnOnce(Position) -> usize,
    ) -> Option<Position> {
        self.let_go();
        let (_, oldest) = self.log.oldest()?;
        let length = self.log.bytes().max(backlog(oldest));
        (length > slack + 2 * self.live_bytes).then_some(oldest)
    }

    /// Writes again what the state needs of the oldest commit, so that the log up to it can go.
    pub fn carry(&mut self, position: Position, commit: &Bytes) -> Result<(), Corrupt> {
        let oldest = self.log.oldest().filter(|(_, oldest)| *oldest == position);
        let Some((number, _)) = oldest else { return Ok(()) };
        for found in Records::of(commit)? {
            let (offset, record, weight) = found?;
            let spot = Spot { commit: number, offset, weight };
            match record {
                Record::Accepted { delivery, key, source, message } => {
                    self.carry_delivery(&delivery, &message, spot);
                    key.iter().for_each(|key| self.carry_key(key, number));
                    source.iter().for_each(|source| self.carry_source(source, number));
                }
                Record::Carried { delivery, message } => {
                    self.carry_delivery(&delivery, &message, spot);
                }
                Record::KeyCarried(key) => self.carry_key(&key, number),
                Record::SourceCarried(source) => self.carry_source(&source, number),
                Record::Published { number: event, key, message, .. } => {
                    self.carry_owed(event, &message, spot);
                    key.iter().for_each(|key| self.carry_key(key, number));
                }
                Record::OwedCarried { number: event, message, .. } => {
                    self.carry_owed(event, &message, spot);
                }
                Record::Changed { .. } | Record::Settled { .. } | Record::Passed { .. } => {}
            }
        }
        Ok(())
    }

    /// Whether the next commit is so long that the rest belongs into another.
    pub fn is_full(&self) -> bool {
        self.records.len() >= LONG
    }

    /// The records since the last commit, if there are any.
    pub fn take_commit(&mut self) -> Option<Commit> {
        if !self.is_open {
            return None;
        }
        self.pass();
        self.is_open = false;
        self.let_go();
        let mut bytes = Vec::with_capacity(64 + self.records.len());
        write_header(&Scalars { totals: self.before, ..self.scalars }, &mut bytes);
        bytes.append(&mut self.records);
        self.log.end(bytes.len());
        let (changed, settled) =
            (std::mem::take(&mut self.changed), std::mem::take(&mut self.settled));
        Some(Commit { previous: self.scalars.previous, bytes: bytes.into(), changed, settled })
    }

    /// The commit that was taken is on the disk, at this position.
    pub fn appended(&mut self, position: Position) {
        self.log.place(position);
        self.scalars.previous = position;
    }

    // Looking at it.

    /// A delivery that has not ended, or is dead.
    pub fn get(&self, id: DeliveryId) -> Option<&Delivery> {
        let live = self.deliveries.get(&id.number)?;
        (live.delivery.id == id).then_some(&live.delivery)
    }

    /// The same by its number alone.
    pub fn get_by_number(&self, number: u64) -> Option<&Delivery> {
        self.deliveries.get(&number).map(|live| &live.delivery)
    }

    /// How many agents wait for this worker to have room.
    pub fn parked(&self, worker: WorkerId) -> usize {
        self.lines.parked(worker)
    }

    /// Where the message of such a delivery stands, if it is not in memory.
    pub fn message(&self, id: DeliveryId) -> Option<Result<Arc<Message>, Place>> {
        let live = self.deliveries.get(&id.number).filter(|live| live.delivery.id == id)?;
        Some(live.message.clone().ok_or_else(|| Place {
            position: self.log.position(live.spot.commit),
            offset: live.spot.offset,
        }))
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Delivery> {
        self.deliveries.values().map(|live| &live.delivery)
    }

    /// Bytes of the commits from the oldest on that the state is made from.
    pub fn log_bytes(&self) -> usize {
        self.log.bytes()
    }

    /// How many deliveries there ever were, and how those ended that are no more.
    pub fn totals(&self) -> Totals {
        self.scalars.totals
    }

    /// How many deliveries are where.
    pub fn standing(&self) -> Standing {
        Standing { owed: self.outbox.owed, ..self.standing }
    }

    /// How many deliveries of each durable subscription have not ended, and since when the oldest is
    /// accepted.
    pub fn subscriptions(&self) -> impl Iterator<Item = (&Arc<str>, usize, Timestamp)> {
        self.subscriptions.iter().filter_map(|(name, numbers)| {
            let oldest = self.get_by_number(*numbers.first()?)?;
            Some((name, numbers.len(), oldest.accepted_at))
        })
    }

    /// How many deliveries to agents of this type are where.
    pub fn tally(&self, agent_type: &AgentType) -> Tally {
        self.tallies.get(agent_type).copied().unwrap_or_default()
    }

    /// The same for all types for which it has changed since this was asked last.
    pub fn take_tallies(&mut self) -> Vec<(AgentType, Tally)> {
        let counted = std::mem::take(&mut self.counted);
        let tallies = counted.into_iter().map(|agent_type| {
            let tally = self.tally(&agent_type);
            if tally == Tally::default() {
                self.tallies.remove(&agent_type);
            }
            (agent_type, tally)
        });
        tallies.collect()
    }

    /// Whether something was accepted under this idempotency key.
    pub fn has_key(&self, key: u128) -> bool {
        self.keys.contains_key(&key)
    }

    /// When the first of the idempotency keys is free again.
    pub fn key_is_free_at(&self) -> Option<Timestamp> {
        self.keys_by_time.first().map(|(until, _)| *until)
    }

    /// How many idempotency keys are remembered.
    pub fn keys(&self) -> usize {
        self.keys.len()
    }

    /// Up to where the log is not needed for the state any more.
    pub fn needless(&self) -> Position {
        self.scalars.base
    }

    /// The last commit.
    pub fn last(&self) -> Position {
        self.scalars.previous
    }

    /// The time of its last record.
    pub fn time(&self) -> Timestamp {
        self.scalars.time
    }

    // How it is done.

    /// A commit has one time, which is that of its first record.
    fn advance(&mut self, now: Timestamp) {
        if !self.is_open {
            self.scalars.time = self.scalars.time.max(now);
        }
    }

    /// What is remembered under a key.
    fn remembered(&self, key: Option<(u128, u64, Duration)>) -> Result<Option<&KeyEntry>, Fault> {
        let Some((key, body, _)) = key else { return Ok(None) };
        let Some((known, _)) = self.keys.get(&key) else { return Ok(None) };
        if known.body == body || crate::bug!("body_not_compared") {
            return Ok(Some(known));
        }
        let known = known.body;
        let detail = format!(
            "the idempotency key was used for something else: {known:016x}, now {body:016x}"
        );
        Err(Fault::new(FaultKind::Conflict, detail)
            .hint("use a new key for a new message, or send the same content again"))
    }

    /// Writes up to which event nobody is owed any more.
    fn pass(&mut self) {
        if let Some(number) = self.outbox.passed() {
            self.write(Record::Passed { number });
        }
    }

    fn known(&self, id: DeliveryId) -> Result<&Delivery, Fault> {
        self.get(id).ok_or_else(|| {
            let detail = format!("there is no delivery {id} that has not ended");
            Fault::new(FaultKind::NotFound, detail)
                .hint("it may have ended: look at it, and it says how")
        })
    }

    fn attempt(&mut self, id: DeliveryId, token: u64, now: Timestamp) -> Result<&Delivery, Stale> {
        self.advance(now);
        let delivery = self.get(id).ok_or(Stale)?;
        delivery.check(token)?;
        Ok(delivery)
    }

    /// Begins a commit, if none is begun.
    fn open(&mut self) {
        if !std::mem::replace(&mut self.is_open, true) {
            self.before = self.scalars.totals;
            self.log.begin();
        }
    }

    /// Where the next record stands.
    fn spot(&mut self) -> Spot {
        self.open();
        Spot { commit: self.log.newest(), offset: self.records.len() as u32, weight: 0 }
    }

    /// Writes that a delivery was changed, and changes it.
    fn change(&mut self, number: u64, change: Change) {
        let spot = self.spot();
        let Some(live) = self.deliveries.get(&number) else { return };
        if change.settles() {
            record::encode_settled(&live.delivery, &change, &mut self.records);
        } else if !(crate::bug!("redrive_in_memory") && change == Change::Redriven) {
            record::encode_changed(number, &change, &mut self.records);
        }
        self.apply_change(number, change, spot);
    }

    /// Writes a record that is not about what happens to a delivery, and applies it.
    fn write(&mut self, record: Record) {
        let mut spot = self.spot();
        record::encode(&record, &mut self.records);
        spot.weight = self.records.len() as u32 - spot.offset;
        // What is written here follows from the state.
        let _ = self.apply(record, spot, true);
    }

    /// `keep` says whether messages may stay in memory.
    fn apply(&mut self, record: Record, spot: Spot, keep: bool) -> Result<(), Corrupt> {
        match record {
            Record::Accepted { delivery, key, source, message } => {
                if delivery.id.number != self.scalars.totals.accepted + 1 {
                    return Err(Corrupt::Contradiction("a delivery is missing"));
                }
                self.scalars.totals.accepted += 1;
                if let Some(key) = key.filter(|_| keep || !crate::bug!("keys_in_memory")) {
                    self.set_key(key, spot.commit);
                }
                if let Some(source) = source.filter(|_| keep || !crate::bug!("taken_in_memory")) {
                    self.set_source(source, spot.commit);
                }
                self.insert(*delivery, keep.then_some(message), spot);
            }
            Record::Changed { number, change } => self.apply_change(number, change, spot),
            Record::Settled { delivery, change } => {
                self.apply_change(delivery.id.number, change, spot);
            }
            Record::Carried { delivery, .. } => {
                match self.deliveries.get_mut(&delivery.id.number) {
                    Some(live) => {
                        let old = std::mem::replace(&mut live.spot, spot);
                        let (agent, state) = (live.delivery.agent.clone(), live.delivery.state);
                        self.count(&agent.agent_type, state, old, false);
                        self.count(&agent.agent_type, state, spot, true);
                        self.hold(spot);
                        self.release(old);
                    }
                    None => self.insert(*delivery, None, spot),
                }
            }
            Record::KeyCarried(key) => self.set_key(key, spot.commit),
            Record::SourceCarried(source) => self.set_source(source, spot.commit),
            Record::Published { number, owed, key, message } => {
                if number != self.scalars.totals.published + 1 {
                    return Err(Corrupt::Contradiction("an event is missing"));
                }
                self.scalars.totals.published = number;
                if let Some(key) = key {
                    self.set_key(key, spot.commit);
                }
                if !owed.is_empty() && (keep || !crate::bug!("outbox_in_memory")) {
                    self.owe(number, owed, keep.then_some(message), spot);
                }
            }
            Record::OwedCarried { number, owed, message } => {
                self.owe(number, owed, keep.then_some(message), spot);
            }
            Record::Passed { number } => {
                for owing in self.outbox.pass(number) {
                    self.forget(&owing);
                }
            }
        }
        Ok(())
    }

    fn owe(
        &mut self,
        number: u64,
        owed: Vec<(u32, Owed)>,
        message: Option<Box<Message>>,
        spot: Spot,
    ) {
        let message = self.keep(message);
        let left = owed.into_iter().collect();
        self.hold(spot);
        let owing = Owing { spot, message, left, out: 0 };
        if let Some(old) = self.outbox.insert(number, owing) {
            self.forget(&old);
        }
    }

    fn forget(&mut self, owing: &Owing) {
        self.loaded -= owing.message.as_ref().map_or(0, |message| message.weight());
        self.release(owing.spot);
    }

    /// The state needs this record.
    fn hold(&mut self, spot: Spot) {
        self.live_bytes += spot.weight as usize;
        self.log.hold(spot.commit);
    }

    /// It does so no more.
    fn release(&mut self, spot: Spot) {
        self.live_bytes -= spot.weight as usize;
        self.log.release(spot.commit);
    }

    /// Holds a message in memory, if there is room.
    fn keep(&mut self, message: Option<Box<Message>>) -> Option<Arc<Message>> {
        let message = message.filter(|message| self.loaded + message.weight() <= self.memory);
        self.loaded += message.as_ref().map_or(0, |message| message.weight());
        message.map(|message| Arc::new(*message))
    }

    fn insert(&mut self, mut delivery: Delivery, message: Option<Box<Message>>, spot: Spot) {
        let agent = self.lines.agent(&delivery.agent);
        delivery.agent = agent.clone();
        if message.is_none() && crate::bug!("schedules_in_memory") {
            delivery.next_attempt_at = None;
        }
        let number = delivery.id.number;
        if delivery.strict && delivery.state != State::Dead {
            self.lines.enter(&agent, number);
        }
        if delivery.strict && delivery.state.is_in_flight() {
            self.lines.begin(&agent, number);
        }
        self.count(&agent.agent_type, delivery.state, spot, true);
        if let Some(name) = &delivery.subscription {
            self.subscriptions.entry(name.clone()).or_default().insert(number);
        }
        let message = self.keep(message);
        self.hold(spot);
        let live = Live { delivery, message, timer: None, spot };
        self.deliveries.insert(number, Box::new(live));
        self.queue(number);
    }

    fn apply_change(&mut self, number: u64, change: Change, spot: Spot) {
        let time = self.scalars.time;
        self.scalars.totals.count(&change);
        // The log that is replayed can begin in the middle of a life which ends in it.
        let Some(live) = self.deliveries.get_mut(&number) else { return };
        let before = live.delivery.state;
        if let Some(at) = live.timer.take() {
            self.timers.remove(&(at, number));
        }
        live.delivery.apply(&change, time);
        let after = live.delivery.state;
        let agent = live.delivery.agent.clone();
        let is_strict = live.delivery.strict;
        let record = live.spot;
        self.count(&agent.agent_type, before, record, false);
        self.changed.push(number);
        if before.is_waiting() {
            self.lines.unready(&agent, number);
        }
        // One that is dead lets others go first, and comes back as the first of all.
        let mut next = None;
        if is_strict && after.is_settled() && before != State::Dead {
            next = self.lines.leave(&agent, number);
        } else if is_strict && before == State::Dead && !after.is_settled() {
            self.lines.enter(&agent, number);
        } else if is_strict && after.is_in_flight() {
            self.lines.begin(&agent, number);
        } else if is_strict && before.is_in_flight() {
            next = self.lines.rest(&agent, number);
        }
        if change.settles() {
            // It was there a moment ago.
            if let Some(live) = self.deliveries.remove(&number) {
                self.loaded -= live.message.as_ref().map_or(0, |message| message.weight());
                self.release(record);
                if let Some(name) = &live.delivery.subscription
                    && let Some(numbers) = self.subscriptions.get_mut(name)
                {
                    numbers.remove(&number);
                    if numbers.is_empty() {
                        self.subscriptions.remove(name);
                    }
                }
                self.settled.push(Settled::new(spot.offset, live.delivery, change));
            }
        } else {
            self.count(&agent.agent_type, after, record, true);
            self.queue(number);
        }
        if let Some(next) = next {
            self.queue(next);
        }
    }

    /// Counts a delivery of this type and record, which is in a state or is not any more.
    fn count(&mut self, agent_type: &AgentType, state: State, record: Spot, is_in: bool) {
        if !self.tallies.contains_key(agent_type) {
            self.tallies.insert(agent_type.clone(), Tally::default());
        }
        if !self.counted.contains(agent_type) {
            self.counted.insert(agent_type.clone());
        }
        let Some(tally) = self.tallies.get_mut(agent_type) else { return };
        for number in [self.standing.of(state), tally.standing.of(state)] {
            if is_in {
                *number += 1;
            } else {
                *number -= 1;
            }
        }
        if state == State::Dead {
            let weight = u64::from(record.weight);
            tally.dead_bytes =
                if is_in { tally.dead_bytes + weight } else { tally.dead_bytes - weight };
        }
    }

    /// Has a waiting delivery begin when it is due and its turn comes.
    fn queue(&mut self, number: u64) {
        let Some(live) = self.deliveries.get_mut(&number) else { return };
        let now = self.scalars.time;
        if live.timer.is_none() {
            live.timer = live.delivery.next_timeout(now);
            self.timers.extend(live.timer.map(|at| (at, number)));
        }
        let is_due = live.delivery.is_due(now);
        if is_due && (!live.delivery.strict || self.lines.is_first(&live.delivery.agent, number)) {
            let agent = live.delivery.agent.clone();
            self.lines.ready(&agent, number);
        }
    }

    fn expire(&mut self, number: u64) {
        let live = self.deliveries.get(&number);
        if live.is_some_and(|live| live.delivery.is_expired(self.scalars.time))
            && !crate::bug!("expiry_unnoticed")
        {
            self.change(number, Change::Expired);
        }
    }

    /// Forgets the keys whose time is over.
    fn forget_keys(&mut self) {
        while let Some(&(until, key)) = self.keys_by_time.first()
            && until <= self.scalars.time
        {
            self.keys_by_time.pop_first();
            if let Some((_, commit)) = self.keys.remove(&key) {
                self.live_bytes -= KEY_BYTES;
                self.log.release(commit);
            }
        }
    }

    fn set_key(&mut self, key: KeyEntry, commit: Number) {
        let name = key.key;
        self.log.hold(commit);
        self.live_bytes += KEY_BYTES;
        self.keys_by_time.insert((key.until, name));
        let until = key.until;
        if let Some((old, held)) = self.keys.insert(name, (key, commit)) {
            if old.until != until {
                self.keys_by_time.remove(&(old.until, name));
            }
            self.live_bytes -= KEY_BYTES;
            self.log.release(held);
        }
    }

    fn set_source(&mut self, source: Source, commit: Number) {
        self.log.hold(commit);
        if let Some((_, old)) = self.sources.insert(source.partition, (source, commit)) {
            self.log.release(old);
        }
    }

    fn carry_delivery(&mut self, delivery: &Delivery, message: &Message, spot: Spot) {
        let live = self.deliveries.get(&delivery.id.number);
        let Some(live) = live.filter(|live| live.spot == spot) else { return };
        let delivery = Box::new(live.delivery.clone());
        self.write(Record::Carried { delivery, message: Box::new(message.clone()) });
    }

    fn carry_owed(&mut self, number: u64, message: &Message, spot: Spot) {
        let owing = self.outbox.get(number);
        let Some(owing) = owing.filter(|it| it.spot == spot) else { return };
        let owed = owing.left.iter().map(|(index, owed)| (*index, owed.clone())).collect();
        self.write(Record::OwedCarried { number, owed, message: Box::new(message.clone()) });
    }

    fn carry_key(&mut self, key: &KeyEntry, commit: Number) {
        if self.keys.get(&key.key).is_some_and(|(_, held)| *held == commit) {
            self.write(Record::KeyCarried(key.clone()));
        }
    }

    fn carry_source(&mut self, source: &Source, commit: Number) {
        let held = self.sources.get(&source.partition);
        if held.is_some_and(|(known, held)| known == source && *held == commit) {
            self.write(Record::SourceCarried(*source));
        }
    }

    /// Lets go of the oldest commits that nothing is made from any more.
    fn let_go(&mut self) {
        self.scalars.base = self.log.let_go().unwrap_or(self.scalars.base);
    }
}

impl Standing {
    /// The number of those in this state. None is kept in a state that has ended for good.
    fn of(&mut self, state: State) -> &mut u64 {
        if state.is_in_flight() {
            &mut self.in_flight
        } else if state == State::Dead {
            &mut self.dead
        } else {
            &mut self.waiting
        }
    }
}

fn conflict(delivery: &Delivery, hint: &'static str) -> Fault {
    let detail = format!("the delivery {} is {}", delivery.id, delivery.state.name());
    Fault::new(FaultKind::Conflict, detail).hint(hint)
}

#[cfg(test)]
mod tests;
