//! The task that owns a partition: takes inputs, has the partition decide, writes the log, and then
//! does what was decided.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use parlour_core::durable::{
    Accept, Accepted, Commit, Delivery, DeliveryId, Handover, Message, MessageKind, Owed,
    Partition, PartitionId, Place, Position, Publish, Published, Record, Settled, Source, Standing,
    Start, State, Timestamp, Totals, published_in, record_at, settled_in, time_of,
};
use parlour_core::{
    AgentId, AgentType, Attempt, Call, Event, Fault, FaultKind, Payload, Reply, WorkerId,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use super::attempt::{AttemptTo, Taken};
use super::follow::{EventPlace, Tail};
use super::gate::{Gate, Slot};
use super::{Durable, Found, Query, tally};
use crate::backbone::{self, BackboneError};
use crate::config;
use crate::exchange::Ticket;
use crate::peer::RETRY_AFTER;
use crate::view::View;

/// What the owner of a partition is asked, or told.
pub(crate) enum Input {
    Accept(Box<Accept>, Answer<Result<Accepted, Fault>>),
    Publish(Box<Publish>, Answer<Result<Published, Fault>>),
    /// A delivery that the log of a topic owes.
    Owed(Box<Accept>, Source),
    /// Such a delivery, of this log's, is accepted.
    Taken(Source),
    /// How far behind the durable subscriptions are.
    Lags(Answer<Vec<Lag>>),
    /// Of a delivery that has not ended, once it is newer than that generation.
    Get(DeliveryId, Option<u64>, Answer<Option<Found>>),
    Cancel(DeliveryId, ByteString, Answer<Result<(), Fault>>),
    Redrive(DeliveryId, Answer<Result<(), Fault>>),
    Discard(DeliveryId, ByteString, Answer<Result<(), Fault>>),
    List(Arc<Query>, Answer<Vec<Delivery>>),
    /// The same to all for agents of a type that are there now, the oldest first, to so many at most.
    All(AgentType, Action, usize, Answer<Worked>),
    /// What a delivery that has not ended, or is dead, carries.
    Message(DeliveryId, Answer<Option<Arc<Message>>>),
    /// Of an attempt, by its token.
    Received(DeliveryId, u64),
    Processing(DeliveryId, u64, Payload, Taken),
    Ended(DeliveryId, u64, Box<Reply>),
    /// A worker has room.
    WakeWorker(WorkerId),
    /// A type has room.
    Wake(AgentType),
}

/// How far behind a durable subscription is.
#[derive(Clone, Debug)]
pub(crate) struct Lag {
    pub(crate) name: ByteString,
    /// How many of its deliveries have not ended.
    pub(crate) unsettled: usize,
    /// When the oldest was accepted.
    pub(crate) oldest: Timestamp,
}

/// What is done to many deliveries at once.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    /// Gives up what waits, for this reason.
    Cancel(ByteString),
    /// Has what is dead attempted again.
    Redrive,
    /// Gives up what is dead, for this reason.
    Discard(ByteString),
}

impl Action {
    /// Whether it can be done to a delivery.
    fn wants(&self, it: &Delivery) -> bool {
        match self {
            Self::Cancel(_) => it.state.is_waiting(),
            Self::Redrive | Self::Discard(_) => it.state == State::Dead,
        }
    }

    fn carry_out(
        &self,
        partition: &mut Partition,
        id: DeliveryId,
        now: Timestamp,
    ) -> Result<(), Fault> {
        match self {
            Self::Cancel(reason) => partition.cancel(id, reason.clone(), now).map(drop),
            Self::Redrive => partition.redrive(id, now),
            Self::Discard(reason) => partition.discard(id, reason.clone(), now),
        }
    }
}

/// What came of an [`Action`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Worked {
    /// How many it was done to.
    pub(crate) done: usize,
    /// How many of the type were in flight, and were let be.
    pub(crate) in_flight: usize,
}

/// An action under way. It is done to a part of them at a time, so that no commit is too long.
struct Work {
    /// The last one is the next.
    left: Vec<DeliveryId>,
    action: Action,
    worked: Worked,
    answer: Answer<Worked>,
}

type Answer<T> = oneshot::Sender<T>;

/// Somebody who wants to know when a delivery is newer than this generation.
type Watcher = (u64, Answer<Option<Found>>);

/// An answer that waits until the log says so.
enum Answered {
    Accepted(Answer<Result<Accepted, Fault>>, Result<Accepted, Fault>),
    Published(Answer<Result<Published, Fault>>, Result<Published, Fault>),
    /// The log that owed it is told.
    Taken(mpsc::UnboundedSender<Input>, Source),
    Found(Answer<Option<Found>>, Option<Found>),
    Done(Answer<Result<(), Fault>>, Result<(), Fault>),
    List(Answer<Vec<Delivery>>, Vec<Delivery>),
    Worked(Answer<Worked>, Worked),
}

impl Answered {
    /// Answers whoever asked and may not wait any more.
    fn send(self) {
        match self {
            Self::Accepted(answer, accepted) => drop(answer.send(accepted)),
            Self::Published(answer, published) => drop(answer.send(published)),
            Self::Taken(owner, source) => drop(owner.send(Input::Taken(source))),
            Self::Found(answer, found) => drop(answer.send(found)),
            Self::Done(answer, done) => drop(answer.send(done)),
            Self::List(answer, list) => drop(answer.send(list)),
            Self::Worked(answer, worked) => drop(answer.send(worked)),
        }
    }
}

/// Inputs taken before a commit is written.
const BATCH: usize = 1024;
/// How much of a log is read at once.
const READ: usize = 1 << 20;
/// By how much a log may be longer than what the state needs of it.
const SLACK: usize = 16 << 20;
/// How long to wait for room on the disk.
const FULL_REST: Duration = Duration::from_secs(1);
/// The most of an agent's words that a step keeps.
const MAX_DETAILS: usize = 4096;
/// How often it is looked at what has become too old.
const RETIRE: Duration = Duration::from_secs(60);

pub(super) struct Owner {
    durable: Durable,
    view: Arc<View>,
    id: PartitionId,
    gate: Gate,
    inbox: mpsc::UnboundedReceiver<Input>,
    changes: watch::Receiver<()>,
    partition: Partition,
    /// By how much the time of the log is ahead of the clock, which was set back since.
    ahead: Duration,
    answers: Vec<Answered>,
    /// What came while a commit waited for room.
    late: Vec<Input>,
    /// Attempts that are under way, by which they can be given up.
    under_way: HashMap<u64, (u64, Option<Ticket>)>,
    works: VecDeque<Work>,
    /// Those who want to see what a delivery carries.
    asked: Vec<(DeliveryId, Answer<Option<Arc<Message>>>)>,
    /// Those who wait for something to happen to a delivery.
    watchers: HashMap<u64, Vec<Watcher>>,
    /// Bytes of the log.
    size: u64,
    /// What the metrics were told.
    counted: (Totals, Standing, usize),
    /// When it is next looked at what has become too old.
    retires: Instant,
    /// The commit that was read last.
    read: Option<(Position, Bytes)>,
}

impl Owner {
    pub(super) fn new(
        durable: Durable,
        view: Arc<View>,
        id: PartitionId,
        gate: Gate,
        inbox: mpsc::UnboundedReceiver<Input>,
    ) -> Self {
        let settings = &durable.0.exchange.config().durable;
        let memory = settings.memory_bytes.0 / durable.0.inboxes.len();
        Self {
            changes: durable.0.exchange.changes(),
            partition: Partition::new(id, fastrand::u32(..), memory),
            durable,
            view,
            id,
            gate,
            inbox,
            ahead: Duration::ZERO,
            answers: Vec::new(),
            late: Vec::new(),
            under_way: HashMap::new(),
            works: VecDeque::new(),
            asked: Vec::new(),
            watchers: HashMap::new(),
            size: 0,
            counted: Default::default(),
            retires: Instant::now(),
            read: None,
        }
    }

    /// Owns the partition until the host ends or the log cannot be written.
    pub(super) async fn run(mut self, closing: CancellationToken) {
        // What the room asks for holds from the first attempt on.
        let room = tokio::select! {
            is_read = self.durable.0.room.is_read() => is_read,
            () = closing.cancelled() => false,
        };
        if !room {
            let _ = self.durable.0.opened.set(());
            return;
        }
        let result = match self.open().await {
            Ok(()) => {
                self.durable.0.open_one();
                // What is bounded over all partitions is not known before.
                tokio::select! {
                    () = self.durable.0.are_open() => {}
                    () = closing.cancelled() => return,
                }
                self.serve(&closing).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            tracing::error!(partition = self.id.0, %error, "the log of a partition failed");
            self.durable.0.fail(error);
        }
    }

    /// Reads the log, and takes it over.
    async fn open(&mut self) -> Result<(), BackboneError> {
        let shared = self.durable.0.clone();
        let backbone = &shared.backbone;
        let seen = self.view.seen(self.id).await;
        let last = backbone.last(self.id).await?;
        let end = last.as_ref().map_or(Position(0), |(position, _)| *position);
        if end < seen {
            let error = format!(
                "partition {} had commits up to {}, and ends at {}",
                self.id, seen.0, end.0
            );
            return Err(BackboneError::Damaged(error));
        }
        if let Some((_, last)) = last {
            let base = Partition::base(&last)?;
            self.partition.begin(base);
            // What only the view lacks is not needed for the state.
            let mut next = base.min(seen).next();
            loop {
                let commits = backbone.read(self.id, next, READ).await?;
                let Some((position, _)) = commits.last() else { break };
                next = position.next();
                for (position, commit) in commits {
                    if position > seen && !parlour_core::bug!("view_not_made_again") {
                        let settled = settled_in(&commit)?;
                        self.view.add(self.id, position, settled);
                    }
                    if position > base {
                        self.partition.replay(position, &commit)?;
                    }
                }
            }
            self.size = backbone.size(self.id).await?;
        }
        self.ahead = self.partition.time().since(self.now());
        let now = self.now();
        let durable = self.durable.clone();
        let policy = |agent_type: &AgentType| durable.terms(agent_type).retry;
        self.partition.recover(fastrand::u32(..), policy, now, fastrand::f64());
        // What was published before is no news.
        self.counted.0.published = self.partition.totals().published;
        self.commit().await?;
        let end = Tail {
            position: self.partition.last(),
            behind: self.partition.last(),
            ..Tail::default()
        };
        shared.tails[usize::from(self.id.0)].send_replace(end);
        self.hand_over().await
    }

    async fn serve(&mut self, closing: &CancellationToken) -> Result<(), BackboneError> {
        let mut inputs = Vec::with_capacity(BATCH);
        let mut starts = Vec::new();
        let mut more = false;
        loop {
            let due = self.partition.poll_timeout().map(|at| self.instant(at));
            let due = due.unwrap_or(self.retires).min(self.retires);
            let due = if more || !self.late.is_empty() { Instant::now() } else { due };
            tokio::select! {
                biased;
                taken = self.inbox.recv_many(&mut inputs, BATCH) => {
                    if taken == 0 {
                        return Ok(());
                    }
                }
                () = closing.cancelled() => return Ok(()),
                changed = self.changes.changed() => match changed {
                    Ok(()) => self.partition.wake_all(),
                    Err(_) => return Ok(()),
                },
                () = sleep_until(due) => {}
            }
            let now = self.now();
            self.partition.handle_timeout(now);
            let (mut woken, mut woken_types) = (Vec::new(), Vec::new());
            for input in self.late.split_off(0).into_iter().chain(inputs.drain(..)) {
                match &input {
                    Input::WakeWorker(worker) => woken.push(*worker),
                    Input::Wake(agent_type) => woken_types.push(agent_type.clone()),
                    _ => {}
                }
                self.handle(input, now);
            }
            self.work(now);
            self.start(&mut starts, now);
            more = starts.len() >= BATCH || !self.works.is_empty();
            for worker in woken {
                if self.partition.has_parked(worker) {
                    self.gate.wait(self.id, worker);
                }
                self.gate.pass_on_at(worker);
            }
            woken_types.iter().for_each(|agent_type| self.gate.pass_on(agent_type));
            self.commit().await?;
            self.hand_over().await?;
            for (start, slot) in starts.drain(..) {
                self.send(start, slot).await?;
            }
            for (id, answer) in std::mem::take(&mut self.asked) {
                let message = match self.partition.message(id) {
                    Some(message) => Some(self.load(message).await?),
                    None => None,
                };
                let _ = answer.send(message);
            }
            more |= self.tidy().await?;
            if Instant::now() >= self.retires {
                self.retires = Instant::now() + RETIRE;
                self.retire(now).await?;
            }
        }
    }

    fn handle(&mut self, input: Input, now: Timestamp) {
        match input {
            Input::Accept(mut accept, answer) => {
                self.durable.inbox(self.id).accepts.fetch_sub(1, Relaxed);
                // Nobody waits any more, so nobody would learn that it was accepted.
                if answer.is_closed() {
                    return;
                }
                // What was asked for by the clock, in the time of the log.
                for at in [&mut accept.not_before, &mut accept.expires_at].into_iter().flatten() {
                    *at = at.after(self.ahead);
                }
                self.fill_in(&mut accept);
                let accepted =
                    self.admit(&accept).and_then(|()| self.partition.accept(*accept, now));
                self.answers.push(Answered::Accepted(answer, accepted));
            }
            Input::Publish(publish, answer) => {
                self.durable.inbox(self.id).accepts.fetch_sub(1, Relaxed);
                if answer.is_closed() {
                    return;
                }
                let published =
                    self.admit_event(&publish).and_then(|()| self.partition.publish(*publish, now));
                self.answers.push(Answered::Published(answer, published));
            }
            Input::Owed(mut accept, source) => {
                // It is given again by a host that was not told that it was taken.
                if !self.partition.has_taken(source) {
                    self.fill_in(&mut accept);
                    // Without a key nothing is refused.
                    let _ = self.partition.accept(*accept, now);
                }
                let owner = self.durable.inbox(source.partition).queue.clone();
                self.answers.push(Answered::Taken(owner, source));
            }
            Input::Taken(Source { number, index, .. }) => {
                self.partition.taken(number, index, now);
            }
            Input::Lags(answer) => {
                let lags = self.partition.subscriptions();
                let lags = lags.map(|(name, unsettled, oldest)| Lag {
                    name: name.clone(),
                    unsettled,
                    oldest,
                });
                let _ = answer.send(lags.collect());
            }
            Input::Get(id, after, answer) => {
                let delivery = self.partition.get(id);
                let is_old = |it: &&Delivery| {
                    !it.state.is_settled() && after.is_some_and(|after| it.generation <= after)
                };
                if delivery.as_ref().is_some_and(is_old) {
                    let watchers = self.watchers.entry(id.number).or_default();
                    watchers.retain(|(_, answer)| !answer.is_closed());
                    watchers.push((after.unwrap_or_default(), answer));
                } else {
                    let found = delivery.map(|it| Found::Live(Box::new(it.clone())));
                    self.answers.push(Answered::Found(answer, found));
                }
            }
            Input::Cancel(id, reason, answer) => {
                let cancelled = self.partition.cancel(id, reason, now);
                if let Ok(Some(_)) = cancelled
                    && let Some((_, Some(ticket))) = self.under_way.remove(&id.number)
                {
                    ticket.cancel();
                }
                self.answers.push(Answered::Done(answer, cancelled.map(drop)));
            }
            Input::Redrive(id, answer) => {
                let redriven = self.partition.redrive(id, now);
                self.answers.push(Answered::Done(answer, redriven));
            }
            Input::Discard(id, reason, answer) => {
                let discarded = self.partition.discard(id, reason, now);
                self.answers.push(Answered::Done(answer, discarded));
            }
            Input::List(query, answer) => {
                let mut list: Vec<_> = self.partition.iter().filter(|it| query.wants(it)).collect();
                list.sort_unstable_by_key(|it| Query::key(it));
                let list = list.into_iter().take(query.limit).cloned().collect();
                self.answers.push(Answered::List(answer, list));
            }
            Input::All(agent_type, action, limit, answer) => {
                let of_type = |it: &&Delivery| it.agent.agent_type == agent_type;
                let all = || self.partition.iter().filter(of_type);
                let in_flight = all().filter(|it| it.state.is_in_flight()).count();
                let mut left: Vec<_> =
                    all().filter(|it| action.wants(it)).map(|it| it.id).collect();
                left.sort_unstable_by_key(|id| id.number);
                left.truncate(limit);
                left.reverse();
                let worked = Worked { done: 0, in_flight };
                self.works.push_back(Work { left, action, worked, answer });
            }
            Input::Message(id, answer) => self.asked.push((id, answer)),
            Input::Received(id, token) => {
                // What is said of an attempt that is over is of no interest.
                let _ = self.partition.received(id, token, now);
            }
            Input::Processing(id, token, payload, _taken) => {
                let details = shorten(&payload);
                let _ = self.partition.processing(id, token, details, now);
            }
            Input::Ended(id, token, mut reply) => {
                // A host that shuts down loses the attempt; the agent has not failed.
                if let Err(fault) = &mut *reply
                    && fault.kind() == FaultKind::Unavailable
                    && self.durable.0.exchange.is_draining()
                {
                    *fault = Fault::new(FaultKind::WorkerLost, fault.detail())
                        .may_have_run_if(fault.may_have_run());
                }
                if self.under_way.get(&id.number).is_some_and(|(of, _)| *of == token) {
                    self.under_way.remove(&id.number);
                }
                let random = fastrand::f64();
                let delivery = self.partition.get(id);
                let policy = delivery.map(|it| self.durable.terms(&it.agent.agent_type).retry);
                let policy = policy.unwrap_or_default();
                let ended = self.partition.end(id, token, *reply, &policy, now, random);
                if ended.is_err() {
                    self.durable.0.exchange.metrics().replies_unasked.inc();
                }
            }
            Input::WakeWorker(worker) => self.partition.wake_worker(worker),
            Input::Wake(agent_type) => self.partition.wake(&agent_type),
        }
    }

    /// Has what the door leaves open be as the room asks for.
    fn fill_in(&self, accept: &mut Accept) {
        let terms = self.durable.terms(&accept.agent.agent_type);
        for (open, asked) in [
            (&mut accept.max_attempts, terms.retry.max_attempts),
            (&mut accept.max_lost, terms.retry.max_lost),
        ] {
            if *open == 0 {
                *open = asked;
            }
        }
        accept.strict |= terms.strict;
    }

    /// Whether there is room for one more message.
    fn admit(&self, accept: &Accept) -> Result<(), Fault> {
        // What is owed was acknowledged before, and what was accepted under its key is there already.
        let is_known = |(key, ..): (u128, u64, Duration)| self.partition.has_key(key);
        if accept.source.is_some() || accept.key.is_some_and(is_known) {
            return Ok(());
        }
        let shared = &self.durable.0;
        let limit = shared.exchange.config().durable.idempotency_keys;
        let keys = shared.tallies.keys() + self.partition.keys() - self.counted.2;
        if accept.key.is_some() && keys >= limit {
            let wait = self.partition.key_is_free_at().map(|at| at.since(self.now()));
            let fault = Fault::new(FaultKind::Overloaded, format!("{keys} keys are remembered"))
                .hint("send without a key, or have keys remembered for less long")
                .retry_after(wait.unwrap_or(RETRY_AFTER));
            let key = config::durable::idempotency_keys;
            return Err(shared.exchange.metrics().limit_met(key, Some(limit), fault));
        }
        let agent_type = &accept.agent.agent_type;
        let others = shared.tallies.beside(Some(self.id), agent_type);
        self.durable.admit(agent_type, tally::add(others, self.partition.tally(agent_type)))
    }

    /// Whether there is room for one more event.
    fn admit_event(&self, publish: &Publish) -> Result<(), Fault> {
        if publish.key.is_some_and(|(key, ..)| self.partition.has_key(key)) {
            return Ok(());
        }
        let exchange = &self.durable.0.exchange;
        let limit = exchange.config().durable.owed;
        let owed = self.partition.standing().owed;
        if owed + publish.owed.len() as u64 > limit as u64 {
            let detail = format!("{owed} deliveries of events like this one are not accepted yet");
            let fault = Fault::new(FaultKind::Overloaded, detail)
                .hint("try again later")
                .retry_after(RETRY_AFTER);
            return Err(exchange.metrics().limit_met(config::durable::owed, Some(limit), fault));
        }
        Ok(())
    }

    /// Hands what is owed, and on the disk, to the partitions of those whom it is owed to.
    async fn hand_over(&mut self) -> Result<(), BackboneError> {
        while let Some(Handover { number, message, owed }) = self.partition.poll_owed() {
            let message = self.load(message).await?;
            let room = self.durable.room_so_far();
            for (index, Owed { agent, subscription }) in owed {
                let named = subscription.as_ref().and_then(|name| room.subscriptions.get(name));
                let source = Source { partition: self.id, number, index };
                let inbox = self.durable.inbox(self.durable.partition_of(&agent));
                let accept = Accept {
                    agent,
                    message: (*message).clone(),
                    not_before: None,
                    expires_at: None,
                    max_attempts: 0,
                    max_lost: 0,
                    strict: named.is_some_and(|it| it.strict),
                    key: None,
                    source: Some(source),
                    subscription,
                };
                // An owner that is gone takes it when the host is started anew.
                let _ = inbox.queue.send(Input::Owed(Box::new(accept), source));
            }
        }
        Ok(())
    }

    /// Tells those who listen of the events in a commit that is on the disk.
    fn announce(&mut self, position: Position, commit: &Bytes) -> Result<(), BackboneError> {
        let time = Duration::from_millis(time_of(commit)?.0);
        for (offset, message) in published_in(commit)? {
            let MessageKind::Event(topic) = message.kind else { continue };
            let event = Event { header: message.header, topic, payload: message.payload };
            let place = EventPlace { partition: self.id, position, offset };
            self.durable.0.exchange.announce(event, place.to_string().into(), time);
        }
        let behind = self.durable.0.tails[usize::from(self.id.0)].borrow().position;
        let tail = Tail { position, behind, commit: commit.clone() };
        self.durable.0.tails[usize::from(self.id.0)].send_replace(tail);
        Ok(())
    }

    /// Goes on with what is done to many, as far as one commit takes.
    fn work(&mut self, now: Timestamp) {
        let Some(Work { left, action, worked, .. }) = self.works.front_mut() else { return };
        for id in left.split_off(left.len().saturating_sub(BATCH)).into_iter().rev() {
            let is_wanted = self.partition.get(id).is_some_and(|it| action.wants(it));
            if is_wanted && action.carry_out(&mut self.partition, id, now).is_ok() {
                worked.done += 1;
            }
        }
        if left.is_empty()
            && let Some(Work { worked, answer, .. }) = self.works.pop_front()
        {
            self.answers.push(Answered::Worked(answer, worked));
        }
    }

    /// Begins the attempts that workers have room for, up to as many as inputs are taken at once.
    fn start(&mut self, starts: &mut Vec<(Start, Slot)>, now: Timestamp) {
        let mut slots = Vec::new();
        let (gate, id) = (&self.gate, self.id);
        let mut ask = |agent: &AgentId| {
            let (answer, slot) = gate.ask(id, agent);
            slots.extend(slot);
            answer
        };
        let mut begun = Vec::new();
        while begun.len() < BATCH
            && let Some(start) = self.partition.poll_start(now, &mut ask)
        {
            begun.push(start);
        }
        // Each that began was let in by the gate just before.
        starts.extend(begun.into_iter().zip(slots));
    }

    /// Writes what was decided, and then tells it.
    async fn commit(&mut self) -> Result<(), BackboneError> {
        if parlour_core::bug!("acknowledged_before_written") {
            self.answers.drain(..).for_each(Answered::send);
        }
        if let Some(Commit { previous, bytes, changed, settled }) = self.partition.take_commit() {
            self.size += bytes.len() as u64;
            let position = self.append(previous, bytes.clone(), &changed).await?;
            self.partition.appended(position);
            if self.partition.totals().published != self.counted.0.published {
                self.announce(position, &bytes)?;
            }
            // A commit that ends nothing is none of the view's business: where it reads again, it
            // passes over those.
            if !settled.is_empty() {
                let places = settled.iter().map(|it| (it.delivery.id.number, it.offset));
                self.view.add(self.id, position, places.collect());
            }
            for settled in settled {
                self.tell_end(settled);
            }
            changed.into_iter().for_each(|number| self.notify(number));
            self.count();
        } else if self.partition.keys() != self.counted.2 {
            self.count();
        }
        self.answers.drain(..).for_each(Answered::send);
        Ok(())
    }

    /// Has the metrics tell what the partition's commits tell.
    fn count(&mut self) {
        let (totals, standing) = (self.partition.totals(), self.partition.standing());
        let keys = self.partition.keys();
        let (old, stood, had) = std::mem::replace(&mut self.counted, (totals, standing, keys));
        let tallies = &self.durable.0.tallies;
        tallies.set(self.id, self.partition.take_tallies());
        tallies.set_keys(had, keys);
        let it = &self.durable.0.exchange.metrics().deliveries;
        it.accepted.inc_by(totals.accepted - old.accepted);
        it.completed.inc_by(totals.completed - old.completed);
        it.cancelled.inc_by(totals.cancelled - old.cancelled);
        it.expired.inc_by(totals.expired - old.expired);
        it.discarded.inc_by(totals.discarded - old.discarded);
        it.events.inc_by(totals.published - old.published);
        it.owed.inc_by(standing.owed as i64 - stood.owed as i64);
        it.waiting.inc_by(standing.waiting as i64 - stood.waiting as i64);
        it.in_flight.inc_by(standing.in_flight as i64 - stood.in_flight as i64);
        it.dead.inc_by(standing.dead as i64 - stood.dead as i64);
        it.keys.inc_by(keys as i64 - had as i64);
    }

    /// Writes a commit, and waits for room on the disk where there is none. `changed` are the
    /// deliveries that it says something of.
    async fn append(
        &mut self,
        previous: Position,
        bytes: Bytes,
        changed: &[u64],
    ) -> Result<Position, BackboneError> {
        let shared = self.durable.0.clone();
        loop {
            match shared.backbone.append(self.id, previous, bytes.clone()).await {
                Err(error @ BackboneError::Full(_)) => {
                    self.refuse_accepts(&error);
                    shared.failure.lock().get_or_insert(error);
                    let until = Instant::now() + FULL_REST;
                    while let Ok(Some(input)) = timeout_at(until, self.inbox.recv()).await {
                        self.handle_while_full(input, changed);
                    }
                }
                appended => {
                    let mut failure = shared.failure.lock();
                    if appended.is_ok() && matches!(&*failure, Some(BackboneError::Full(_))) {
                        *failure = None;
                    }
                    return appended;
                }
            }
        }
    }

    /// Tells those whose messages are in a commit that cannot be written yet.
    fn refuse_accepts(&mut self, error: &BackboneError) {
        let fault = || {
            Fault::new(FaultKind::StorageFull, error.to_string()).may_have_run_if(true).hint(
                "free some space; sent again under the same idempotency key it is accepted once",
            )
        };
        for answered in std::mem::take(&mut self.answers) {
            match answered {
                Answered::Accepted(answer, Ok(_)) => drop(answer.send(Err(fault()))),
                Answered::Published(answer, Ok(_)) => drop(answer.send(Err(fault()))),
                Answered::Accepted(..) | Answered::Published(..) => answered.send(),
                other => self.answers.push(other),
            }
        }
    }

    /// Reading goes on while a commit waits for room, but not of what that commit says.
    fn handle_while_full(&mut self, input: Input, changed: &[u64]) {
        match input {
            // Whoever asked is told why there is no answer.
            Input::Get(id, ..) if changed.contains(&id.number) => {}
            Input::Get(id, _, answer) => {
                let found = self.partition.get(id).cloned();
                let _ = answer.send(found.map(|it| Found::Live(Box::new(it))));
            }
            input => self.late.push(input),
        }
    }

    /// Answers those who waited for something to happen to a delivery that goes on.
    fn notify(&mut self, number: u64) {
        let Some(delivery) = self.partition.get_by_number(number) else { return };
        let Some(watchers) = self.watchers.remove(&number) else { return };
        let mut waiting = Vec::new();
        for (after, answer) in watchers {
            if delivery.generation > after || delivery.state.is_settled() {
                let _ = answer.send(Some(Found::Live(Box::new(delivery.clone()))));
            } else {
                waiting.push((after, answer));
            }
        }
        if !waiting.is_empty() {
            self.watchers.insert(number, waiting);
        }
    }

    /// Answers those who waited for something to happen to a delivery that has ended.
    fn tell_end(&mut self, settled: Settled) {
        let Some(watchers) = self.watchers.remove(&settled.delivery.id.number) else { return };
        let settled = Arc::new(settled);
        for (_, answer) in watchers {
            let _ = answer.send(Some(Found::Settled(settled.clone())));
        }
    }

    /// Sends an attempt on its way, now that the log tells of it.
    async fn send(&mut self, start: Start, slot: Slot) -> Result<(), BackboneError> {
        let Start { id, token, attempt, agent, .. } = start;
        // It may have ended in the same commit.
        let is_current = |it: &Delivery| it.check(token).is_ok();
        let current = self.partition.get(id).filter(|it| is_current(it));
        let Some(message) = current.and_then(|_| self.partition.message(id)) else {
            return Ok(());
        };
        let message = self.load(message).await?;
        let exchange = self.durable.0.exchange.clone();
        let owner = self.durable.inbox(self.id).queue.clone();
        let timeout = self.durable.terms(&agent.agent_type).attempt_timeout;
        let now = Instant::now();
        let call = Call {
            header: message.header.clone(),
            target: agent,
            deadline: (now + timeout).into_std(),
            progress: true,
            attempt: Some(Attempt { delivery: id, number: attempt }),
            topic: match &message.kind {
                MessageKind::Call => None,
                MessageKind::Event(topic) => Some(topic.clone()),
            },
            payload: message.payload.clone(),
        };
        let ticket = exchange.attempt(
            call,
            AttemptTo {
                id,
                number: attempt,
                token,
                owner,
                slot,
                is_received: AtomicBool::new(false),
                untaken: Arc::default(),
            },
        );
        self.under_way.insert(id.number, (token, ticket));
        Ok(())
    }

    /// The message, read from the log if it is not in memory.
    async fn load(
        &mut self,
        message: Result<Arc<Message>, Place>,
    ) -> Result<Arc<Message>, BackboneError> {
        let place = match message {
            Ok(message) => return Ok(message),
            Err(place) => place,
        };
        let commit = self.commit_at(place.position).await?;
        match record_at(&commit, place.offset)? {
            Record::Accepted { message, .. }
            | Record::Carried { message, .. }
            | Record::Published { message, .. }
            | Record::OwedCarried { message, .. } => Ok(Arc::new(*message)),
            _ => Err(BackboneError::Damaged("a message is not where it was written".into())),
        }
    }

    async fn commit_at(&mut self, position: Position) -> Result<Bytes, BackboneError> {
        if let Some((at, commit)) = &self.read
            && *at == position
        {
            return Ok(commit.clone());
        }
        let found = backbone::commit_at(&*self.durable.0.backbone, self.id, position).await?;
        let commit = found.ok_or_else(|| {
            BackboneError::Damaged(format!("the commit {} is missing", position.0))
        })?;
        self.read = Some((position, commit.clone()));
        Ok(commit)
    }

    /// Lets the first commit go that the state is made of, when little of the log is needed. Returns
    /// whether there may be another: those who wait for something have their turn in between.
    async fn tidy(&mut self) -> Result<bool, BackboneError> {
        let shared = &self.durable.0;
        // What each partition has to read of what all have, if all are as long.
        let backlog =
            |position| shared.backbone.backlog(self.id, position) as usize / shared.inboxes.len();
        let Some(position) = self.partition.poll_carry(SLACK, backlog) else { return Ok(false) };
        let commit = self.commit_at(position).await?;
        self.partition.carry(position, &commit)?;
        self.commit().await?;
        Ok(true)
    }

    /// Lets the oldest commits go that nothing is made from, and that are too old or too many.
    async fn retire(&mut self, now: Timestamp) -> Result<(), BackboneError> {
        let shared = self.durable.0.clone();
        let settings = &shared.exchange.config().durable;
        let most = settings.retention_bytes.0 as u64 / shared.inboxes.len() as u64;
        let oldest = Timestamp(now.0.saturating_sub(settings.retention_age.as_millis() as u64));
        loop {
            let mut until = None;
            let commits = shared.backbone.read(self.id, Position(1), READ).await?;
            let count = commits.len();
            let mut gone = 0;
            for (position, commit) in commits {
                let is_needed = position > self.partition.needless()
                    && !parlour_core::bug!("retention_takes_all");
                let is_old = time_of(&commit)? < oldest;
                if is_needed || !(is_old || self.size > most) {
                    break;
                }
                self.size -= commit.len() as u64;
                until = Some(position);
                gone += 1;
            }
            let Some(until) = until else { return Ok(()) };
            shared.backbone.trim(self.id, until).await?;
            self.view.forget(self.id, until);
            if gone < count {
                return Ok(());
            }
        }
    }

    fn now(&self) -> Timestamp {
        let now = self.durable.0.exchange.unix_time(Instant::now());
        Timestamp(now.as_millis() as u64).after(self.ahead)
    }

    fn instant(&self, at: Timestamp) -> Instant {
        Instant::now() + at.since(self.now())
    }
}

/// What an agent says of its progress, as a step keeps it.
fn shorten(payload: &Payload) -> ByteString {
    let text = String::from_utf8_lossy(&payload.bytes);
    text[..text.floor_char_boundary(MAX_DETAILS)].into()
}
