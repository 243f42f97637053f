//! The state of one partition: what its log says.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use bytestring::ByteString;

use super::delivery::{Change, Delivery, Stale, State};
use super::line::{Gate, Lines};
use super::record::{self, Corrupt, FORMAT, KeyEntry, Message, Reader, Record, Source, Writer};
use super::{DeliveryId, PartitionId, Position, RetryPolicy, Timestamp};
use crate::{AgentId, AgentType, Fault, FaultKind, MessageId, Reply, WorkerId};

/// The deliveries of one partition, folded from its log.
///
/// Methods come in three groups:
///
/// - commands: what somebody wants to happen. They decide, apply and write records in one go;
/// - `poll_*`, for what begins next;
/// - [`take_commit`](Self::take_commit): the records since the last one. Until the commit is on disk
///   nobody may be told what it says. If it cannot be written, the partition is to be thrown away.
#[derive(Debug)]
pub struct Partition {
    id: PartitionId,
    scalars: Scalars,
    /// The last commit that was taken or replayed.
    position: Position,
    deliveries: HashMap<u64, Live, foldhash::fast::RandomState>,
    lines: Lines,
    /// When there is something to do for which delivery.
    timers: BTreeSet<(Timestamp, u64)>,
    keys: HashMap<u128, (KeyEntry, Position), foldhash::fast::RandomState>,
    keys_by_time: BTreeSet<(Timestamp, u128)>,
    sources: BTreeMap<PartitionId, (Source, Position)>,
    /// The commits from which the state is made, and how much of it each holds.
    commits: VecDeque<Written>,
    /// Numbers of those that wait, are in flight, and are dead.
    standing: Standing,
    /// Whether a commit is begun: its records so far, and the totals before the first of them.
    is_open: bool,
    records: Vec<u8>,
    before: Totals,
    settled: Vec<Settled>,
    changed: Vec<u64>,
    /// Bytes of those commits, and of what the state needs of them.
    commit_bytes: usize,
    live_bytes: usize,
    /// Bytes of the messages that are in memory, and how many there may be.
    loaded: usize,
    memory: usize,
}

/// What each commit begins with: the state of the log before it that is no delivery's.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Scalars {
    time: Timestamp,
    /// Drawn by the owner that writes.
    epoch: u32,
    /// The log up to here is not needed for the state any more.
    base: Position,
    totals: Totals,
}

/// How many deliveries there ever were, and how those ended that are no more.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "the terms of the law of conservation")]
#[expect(missing_docs, reason = "named after the states")]
pub struct Totals {
    pub accepted: u64,
    pub completed: u64,
    pub cancelled: u64,
    pub expired: u64,
    pub discarded: u64,
}

/// How many deliveries are where.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "the terms of the law of conservation")]
#[expect(missing_docs, reason = "named after the states")]
pub struct Standing {
    pub waiting: u64,
    pub in_flight: u64,
    pub dead: u64,
}

#[derive(Debug)]
struct Live {
    delivery: Delivery,
    agent: Arc<AgentId>,
    message: Option<Arc<Message>>,
    /// Its entry among the timers.
    timer: Option<Timestamp>,
    place: Place,
    /// Bytes of its record.
    weight: usize,
}

/// Where a record is: in which commit, and behind how many bytes of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "an address")]
pub struct Place {
    /// The commit.
    pub position: Position,
    /// From its first record on.
    pub offset: u32,
}

#[derive(Debug)]
struct Written {
    position: Position,
    bytes: usize,
    /// How many deliveries, keys and watermarks it holds the last full record of.
    live: usize,
}

/// Roughly what the record of a key takes.
const KEY_BYTES: usize = 100;

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
    /// How many attempts may fail, at least 1.
    pub max_attempts: u32,
    /// How many attempts may be lost, at least 1.
    pub max_lost: u32,
    /// Whether it waits until those before it, that ask for this too, have ended.
    pub strict: bool,
    /// Digests of its idempotency key and of its body, and for how long they are remembered.
    pub key: Option<(u128, u64, Duration)>,
    /// Where it comes from, if a topic's log owes it.
    pub source: Option<Source>,
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
    pub agent: AgentId,
    /// At which worker.
    pub worker: WorkerId,
    /// What is to be delivered, or where it stands.
    pub message: Result<Arc<Message>, Place>,
}

/// Records that are to be appended to the log, all or none.
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_structs, reason = "carried out by the partition's owner")]
pub struct Commit {
    /// Where it belongs.
    pub position: Position,
    /// What to write there.
    pub bytes: Bytes,
    /// The deliveries that something happened to, some of them more than once.
    pub changed: Vec<u64>,
    /// The deliveries that ended.
    pub settled: Vec<Settled>,
}

/// A delivery that has ended.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "read by whoever waits for it")]
pub struct Settled {
    /// Where the log tells of it.
    pub place: Place,
    /// As it ended.
    pub delivery: Delivery,
    /// The answer, if it was completed.
    pub reply: Option<crate::Payload>,
}

impl Partition {
    /// A partition with an empty log, owned under this epoch.
    pub fn new(id: PartitionId, epoch: u32, memory: usize) -> Self {
        Self {
            id,
            scalars: Scalars { epoch, ..Scalars::default() },
            position: Position::default(),
            deliveries: HashMap::default(),
            lines: Lines::default(),
            timers: BTreeSet::new(),
            keys: HashMap::default(),
            keys_by_time: BTreeSet::new(),
            sources: BTreeMap::new(),
            commits: VecDeque::new(),
            standing: Standing::default(),
            is_open: false,
            records: Vec::new(),
            before: Totals::default(),
            settled: Vec::new(),
            changed: Vec::new(),
            commit_bytes: 0,
            live_bytes: 0,
            loaded: 0,
            memory,
        }
    }

    /// The position behind which a log has to be replayed, as its last commit says.
    pub fn base(commit: &Bytes) -> Result<Position, Corrupt> {
        header(&mut Reader(commit.clone())).map(|scalars| scalars.base)
    }

    /// Takes the next commit of the log.
    pub fn replay(&mut self, position: Position, commit: &Bytes) -> Result<(), Corrupt> {
        let scalars = header(&mut Reader(commit.clone()))?;
        let is_first = self.commits.is_empty();
        if is_first {
            self.scalars.totals = scalars.totals;
        } else if self.scalars.totals != scalars.totals {
            return Err(Corrupt::Contradiction("other deliveries were accepted or have ended"));
        } else if position != self.position.next() {
            return Err(Corrupt::Contradiction("a commit is missing"));
        }
        let Scalars { time, base, .. } = scalars;
        (self.scalars.time, self.scalars.base, self.position) = (time, base, position);
        self.commits.push_back(Written { position, bytes: commit.len(), live: 0 });
        self.commit_bytes += commit.len();
        for found in Records::of(position, commit)? {
            let (place, record, weight) = found?;
            self.apply(record, place, weight, false)?;
        }
        self.settled.clear();
        self.changed.clear();
        Ok(())
    }

    /// Takes the log over with the commit that comes next, once all of it was replayed: attempts that were under way are lost with the
    /// host that made them.
    pub fn recover(&mut self, epoch: u32, policy: &RetryPolicy, now: Timestamp, random: f64) {
        self.scalars.epoch = epoch;
        self.advance(now);
        // Also if there is nothing to tell: whoever owned the partition before cannot write any more.
        self.open();
        let in_flight = |live: &&Live| live.delivery.state.is_in_flight();
        let mut lost: Vec<_> = self.deliveries.values().filter(in_flight).collect();
        lost.sort_unstable_by_key(|live| live.delivery.id.number);
        let lost: Vec<_> = lost.iter().map(|it| (it.delivery.id, it.delivery.token)).collect();
        for (id, token) in lost {
            let fault = Fault::new(FaultKind::WorkerLost, "the host stopped during the attempt");
            // The token is the delivery's own.
            let _ = self.end(id, token, Err(fault), policy, now, random);
        }
        self.handle_timeout(now);
    }

    // Commands.

    /// Takes a message that is to be delivered.
    pub fn accept(&mut self, accept: Accept, now: Timestamp) -> Result<Accepted, Fault> {
        self.advance(now);
        if let Some((key, body, _)) = accept.key
            && let Some((known, _)) = self.keys.get(&key)
        {
            if known.body != body {
                let detail = format!(
                    "the idempotency key was used for something else: {:016x}, now {body:016x}",
                    known.body
                );
                return Err(Fault::new(FaultKind::Conflict, detail)
                    .hint("use a new key for a new message, or send the same content again"));
            }
            let (id, conversation) = (known.id, known.conversation.clone());
            return Ok(Accepted { id, conversation, is_new: false });
        }
        let id = DeliveryId {
            partition: self.id,
            epoch: self.scalars.epoch,
            number: self.scalars.totals.accepted + 1,
        };
        let now = self.scalars.time;
        let Accept { agent, message, strict, .. } = accept;
        let conversation = message.header.conversation.clone();
        let accepted = Accepted { id, conversation: conversation.clone(), is_new: true };
        let delivery = Delivery {
            id,
            agent,
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
            token: 0,
            worker: None,
            steps: Vec::new(),
        };
        let key = accept.key.map(|(key, body, window)| {
            let until = now.after(window);
            KeyEntry { key, body, id, conversation, until }
        });
        let (delivery, message) = (Box::new(delivery), Box::new(message));
        self.write(Record::Accepted { delivery, key, source: accept.source, message });
        Ok(accepted)
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
        while let Some(&(at, number)) = self.timers.first()
            && at <= self.scalars.time
        {
            self.timers.pop_first();
            if let Some(live) = self.deliveries.get_mut(&number) {
                live.timer = None;
            }
            self.expire(number);
            self.queue(number);
        }
        while let Some(&(until, key)) = self.keys_by_time.first()
            && until <= self.scalars.time
        {
            self.keys_by_time.pop_first();
            if let Some((_, position)) = self.keys.remove(&key) {
                self.live_bytes -= KEY_BYTES;
                self.release(position);
            }
        }
    }

    /// Workers of this type may take more than they did.
    pub fn wake(&mut self, agent_type: &AgentType) {
        self.lines.wake(agent_type);
    }

    /// A worker has ended something.
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
        let live = self.deliveries.get(&number)?;
        let Delivery { id, token, attempt, .. } = live.delivery;
        let message = live.message.clone().ok_or(live.place);
        Some(Start { id, token, attempt, agent: live.delivery.agent.clone(), worker, message })
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) at the latest.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        let key = self.keys_by_time.first().map(|(at, _)| *at);
        let timer = self.timers.first().map(|(at, _)| *at);
        [key, timer].into_iter().flatten().min()
    }

    /// The oldest commit that the state is made from, if the log behind it has become much longer than
    /// the state: more than `slack` bytes and twice as long. [`carry`](Self::carry) wants it.
    pub fn poll_carry(&mut self, slack: usize) -> Option<Position> {
        self.let_go();
        let is_long = self.commit_bytes > slack + 2 * self.live_bytes;
        // The newest commit is never let go, as it tells where the others begin.
        self.commits.front().filter(|_| is_long && self.commits.len() > 1).map(|it| it.position)
    }

    /// Writes again what the state needs of an old commit, so that the log up to it can go.
    pub fn carry(&mut self, position: Position, commit: &Bytes) -> Result<(), Corrupt> {
        for found in Records::of(position, commit)? {
            let (place, record, _) = found?;
            match record {
                Record::Accepted { delivery, key, source, message } => {
                    self.carry_delivery(&delivery, &message, place);
                    key.iter().for_each(|key| self.carry_key(key, position));
                    source.iter().for_each(|source| self.carry_source(source, position));
                }
                Record::Carried { delivery, message } => {
                    self.carry_delivery(&delivery, &message, place);
                }
                Record::KeyCarried(key) => self.carry_key(&key, position),
                Record::SourceCarried(source) => self.carry_source(&source, position),
                Record::Changed { .. } | Record::Settled { .. } => {}
            }
        }
        Ok(())
    }

    /// The records since the last commit, if there are any.
    pub fn take_commit(&mut self) -> Option<Commit> {
        if !std::mem::take(&mut self.is_open) {
            return None;
        }
        self.let_go();
        let mut bytes = Vec::with_capacity(64 + self.records.len());
        write_header(&Scalars { totals: self.before, ..self.scalars.clone() }, &mut bytes);
        bytes.append(&mut self.records);
        self.position = self.position.next();
        let length = bytes.len();
        self.commit_bytes += length;
        if let Some(open) = self.commits.back_mut() {
            open.bytes = length;
        }
        let (changed, settled) =
            (std::mem::take(&mut self.changed), std::mem::take(&mut self.settled));
        Some(Commit { position: self.position, bytes: bytes.into(), changed, settled })
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

    /// Whether agents wait for this worker to have room.
    pub fn has_parked(&self, worker: WorkerId) -> bool {
        self.lines.has_parked(worker)
    }

    /// Where the message of such a delivery stands, if it is not in memory.
    pub fn message(&self, id: DeliveryId) -> Option<Result<Arc<Message>, Place>> {
        let live = self.deliveries.get(&id.number).filter(|live| live.delivery.id == id)?;
        Some(live.message.clone().ok_or(live.place))
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Delivery> {
        self.deliveries.values().map(|live| &live.delivery)
    }

    /// How many deliveries there ever were, and how those ended that are no more.
    pub fn totals(&self) -> Totals {
        self.scalars.totals
    }

    /// How many deliveries are where.
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// How many idempotency keys are remembered.
    pub fn keys(&self) -> usize {
        self.keys.len()
    }

    /// Up to where the log is not needed for the state any more.
    pub fn needless(&self) -> Position {
        self.scalars.base
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

    fn known(&self, id: DeliveryId) -> Result<&Delivery, Fault> {
        self.get(id).ok_or_else(|| {
            let detail = format!("there is no delivery {id} that has not ended");
            Fault::new(FaultKind::NotFound, detail)
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
            let position = self.position.next();
            self.commits.push_back(Written { position, bytes: 0, live: 0 });
        }
    }

    /// Where the next record stands.
    fn place(&mut self) -> Place {
        self.open();
        Place { position: self.position.next(), offset: self.records.len() as u32 }
    }

    /// Writes that a delivery was changed, and changes it.
    fn change(&mut self, number: u64, change: Change) {
        let place = self.place();
        let Some(live) = self.deliveries.get(&number) else { return };
        if change.settles() {
            record::encode_settled(&live.delivery, &change, &mut self.records);
        } else {
            record::encode_changed(number, &change, &mut self.records);
        }
        self.apply_change(number, change, place);
    }

    /// Writes a record that is not about what happens to a delivery, and applies it.
    fn write(&mut self, record: Record) {
        let place = self.place();
        record::encode(&record, &mut self.records);
        let weight = self.records.len() - place.offset as usize;
        // What is written here follows from the state.
        let _ = self.apply(record, place, weight, true);
    }

    fn apply(
        &mut self,
        record: Record,
        place: Place,
        weight: usize,
        keep: bool,
    ) -> Result<(), Corrupt> {
        match record {
            Record::Accepted { delivery, key, source, message } => {
                if delivery.id.number != self.scalars.totals.accepted + 1 {
                    return Err(Corrupt::Contradiction("a delivery is missing"));
                }
                self.scalars.totals.accepted += 1;
                if let Some(key) = key {
                    self.set_key(key, place.position);
                }
                if let Some(source) = source {
                    self.set_source(source, place.position);
                }
                self.insert(*delivery, keep.then_some(message), place, weight);
            }
            Record::Changed { number, change } => self.apply_change(number, change, place),
            Record::Settled { delivery, change } => {
                self.apply_change(delivery.id.number, change, place);
            }
            Record::Carried { delivery, .. } => {
                match self.deliveries.get_mut(&delivery.id.number) {
                    Some(live) => {
                        let (old, old_weight) = (live.place.position, live.weight);
                        (live.place, live.weight) = (place, weight);
                        self.live_bytes += weight;
                        self.live_bytes -= old_weight;
                        self.hold(place.position);
                        self.release(old);
                    }
                    None => self.insert(*delivery, None, place, weight),
                }
            }
            Record::KeyCarried(key) => self.set_key(key, place.position),
            Record::SourceCarried(source) => self.set_source(source, place.position),
        }
        Ok(())
    }

    fn insert(
        &mut self,
        delivery: Delivery,
        message: Option<Box<Message>>,
        place: Place,
        weight: usize,
    ) {
        let delivery = delivery.kept();
        let number = delivery.id.number;
        let agent = Arc::new(delivery.agent.clone());
        if delivery.strict && delivery.state != State::Dead {
            self.lines.enter(&agent, number);
        }
        *self.standing.of(delivery.state) += 1;
        let message = message.filter(|message| self.loaded + message.weight() <= self.memory);
        self.loaded += message.as_ref().map_or(0, |message| message.weight());
        let message = message.map(|message| Arc::new(*message));
        self.hold(place.position);
        self.live_bytes += weight;
        self.deliveries
            .insert(number, Live { delivery, agent, message, timer: None, place, weight });
        self.queue(number);
    }

    fn apply_change(&mut self, number: u64, change: Change, place: Place) {
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
        let agent = live.agent.clone();
        let is_strict = live.delivery.strict;
        *self.standing.of(before) -= 1;
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
        }
        if change.settles() {
            // It was there a moment ago.
            if let Some(live) = self.deliveries.remove(&number) {
                self.loaded -= live.message.as_ref().map_or(0, |message| message.weight());
                self.live_bytes -= live.weight;
                self.release(live.place.position);
                self.settled.push(Settled::new(place, live.delivery, change));
            }
        } else {
            *self.standing.of(after) += 1;
            self.queue(number);
        }
        if let Some(next) = next {
            self.queue(next);
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
        if is_due && (!live.delivery.strict || self.lines.is_first(&live.agent, number)) {
            let agent = live.agent.clone();
            self.lines.ready(&agent, number);
        }
    }

    fn expire(&mut self, number: u64) {
        let live = self.deliveries.get(&number);
        if live.is_some_and(|live| live.delivery.is_expired(self.scalars.time)) {
            self.change(number, Change::Expired);
        }
    }

    fn set_key(&mut self, key: KeyEntry, position: Position) {
        let name = key.key;
        self.hold(position);
        self.live_bytes += KEY_BYTES;
        self.keys_by_time.insert((key.until, name));
        let until = key.until;
        if let Some((old, held)) = self.keys.insert(name, (key, position)) {
            if old.until != until {
                self.keys_by_time.remove(&(old.until, name));
            }
            self.live_bytes -= KEY_BYTES;
            self.release(held);
        }
    }

    fn set_source(&mut self, source: Source, position: Position) {
        self.hold(position);
        if let Some((_, old)) = self.sources.insert(source.partition, (source, position)) {
            self.release(old);
        }
    }

    fn carry_delivery(&mut self, delivery: &Delivery, message: &Message, place: Place) {
        let live = self.deliveries.get(&delivery.id.number);
        let Some(live) = live.filter(|live| live.place == place) else { return };
        let delivery = Box::new(live.delivery.clone());
        self.write(Record::Carried { delivery, message: Box::new(message.clone()) });
    }

    fn carry_key(&mut self, key: &KeyEntry, position: Position) {
        if self.keys.get(&key.key).is_some_and(|(_, held)| *held == position) {
            self.write(Record::KeyCarried(key.clone()));
        }
    }

    fn carry_source(&mut self, source: &Source, position: Position) {
        let held = self.sources.get(&source.partition);
        if held.is_some_and(|(known, held)| known == source && *held == position) {
            self.write(Record::SourceCarried(*source));
        }
    }

    fn hold(&mut self, position: Position) {
        if let Some(commit) = self.commit_at(position) {
            commit.live += 1;
        }
    }

    fn release(&mut self, position: Position) {
        if let Some(commit) = self.commit_at(position) {
            commit.live -= 1;
        }
    }

    fn commit_at(&mut self, position: Position) -> Option<&mut Written> {
        let first = self.commits.front()?.position;
        let index = usize::try_from(position.0.checked_sub(first.0)?).ok()?;
        self.commits.get_mut(index)
    }

    /// Lets go of the oldest commits that nothing is made from any more, but never of the newest.
    fn let_go(&mut self) {
        while self.commits.len() > 1
            && let Some(oldest) = self.commits.front()
            && oldest.live == 0
        {
            self.commit_bytes -= oldest.bytes;
            self.scalars.base = oldest.position;
            self.commits.pop_front();
        }
    }
}

impl Totals {
    fn count(&mut self, change: &Change) {
        match change {
            Change::Completed { .. } => self.completed += 1,
            Change::Cancelled { .. } => self.cancelled += 1,
            Change::Expired => self.expired += 1,
            Change::Discarded { .. } => self.discarded += 1,
            _ => {}
        }
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

/// The records of a commit, each with its place.
struct Records {
    position: Position,
    length: usize,
    rest: Bytes,
}

impl Records {
    fn of(position: Position, commit: &Bytes) -> Result<Self, Corrupt> {
        let mut r = Reader(commit.clone());
        header(&mut r)?;
        Ok(Self { position, length: r.0.len(), rest: r.0 })
    }
}

impl Iterator for Records {
    type Item = Result<(Place, Record, usize), Corrupt>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let offset = (self.length - self.rest.len()) as u32;
        let place = Place { position: self.position, offset };
        let before = self.rest.len();
        let record = record::decode(&mut self.rest);
        Some(record.map(|record| (place, record, before - self.rest.len())))
    }
}

/// Which deliveries a commit tells the end of, and where.
pub fn settled_in(position: Position, commit: &Bytes) -> Result<Vec<(u64, Place)>, Corrupt> {
    let mut settled = Vec::new();
    for found in Records::of(position, commit)? {
        if let (place, Record::Settled { delivery, .. }, _) = found? {
            settled.push((delivery.id.number, place));
        }
    }
    Ok(settled)
}

/// When a commit was made.
pub fn time_of(commit: &Bytes) -> Result<Timestamp, Corrupt> {
    header(&mut Reader(commit.clone())).map(|scalars| scalars.time)
}

impl Settled {
    /// Reads the end of a delivery from the commit that tells of it.
    pub fn read(commit: &Bytes, place: Place) -> Result<Self, Corrupt> {
        let Record::Settled { mut delivery, change } = record_at(commit, place.offset)? else {
            return Err(Corrupt::Impossible("place of an end"));
        };
        delivery.apply(&change, time_of(commit)?);
        Ok(Self::new(place, *delivery, change))
    }

    fn new(place: Place, delivery: Delivery, change: Change) -> Self {
        let reply = match change {
            Change::Completed { reply } => Some(reply),
            _ => None,
        };
        Self { place, delivery, reply }
    }
}

/// The record that stands at `offset` in a commit.
pub fn record_at(commit: &Bytes, offset: u32) -> Result<Record, Corrupt> {
    let mut r = Reader(commit.clone());
    header(&mut r)?;
    let mut records = r.0;
    if records.len() < offset as usize {
        return Err(Corrupt::Truncated("a record"));
    }
    records.advance(offset as usize);
    record::decode(&mut records)
}

fn write_header(scalars: &Scalars, out: &mut Vec<u8>) {
    out.push(FORMAT);
    let Scalars { time, epoch, base, totals } = scalars;
    let Totals { accepted, completed, cancelled, expired, discarded } = *totals;
    let mut w = Writer(out);
    for number in [time.0, u64::from(*epoch), base.0] {
        w.number(number);
    }
    [accepted, completed, cancelled, expired, discarded].into_iter().for_each(|n| w.number(n));
}

fn header(r: &mut Reader) -> Result<Scalars, Corrupt> {
    let format = r.byte()?;
    if format > FORMAT {
        return Err(Corrupt::Newer(format));
    } else if format == 0 {
        return Err(Corrupt::Impossible("format"));
    }
    Ok(Scalars {
        time: Timestamp(r.number()?),
        epoch: u32::try_from(r.number()?).map_err(|_| Corrupt::Impossible("epoch"))?,
        base: Position(r.number()?),
        totals: Totals {
            accepted: r.number()?,
            completed: r.number()?,
            cancelled: r.number()?,
            expired: r.number()?,
            discarded: r.number()?,
        },
    })
}

#[cfg(test)]
mod tests;
