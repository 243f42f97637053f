//! What the owner of a partition is asked, and what it decides.

use std::sync::Arc;
use std::time::Duration;

use bytestring::ByteString;
use parlour_core::durable::{
    Accept, Accepted, Delivery, DeliveryId, Message, Partition, Publish, Published, Settled,
    Source, State, Timestamp,
};
use parlour_core::{AgentType, Fault, FaultKind, Payload, Reply, WorkerId};
use tokio::sync::{mpsc, oneshot};

use super::super::attempt::Taken;
use super::super::sending::Receipt;
use super::super::{Found, Query, tally};
use super::{BATCH, Owner};
use crate::config;

/// The most of an agent's words that a step keeps.
const MAX_DETAILS: usize = 4096;

/// What the owner of a partition is asked, or told.
pub(crate) enum Input {
    Accept(Box<Accept>, Receipt<Accepted>),
    Publish(Box<Publish>, Receipt<Published>),
    /// A delivery that the log of a topic owes there.
    Owed(Source, Box<Accept>),
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
    /// A worker has room, which is kept.
    WakeWorker(WorkerId),
    /// A type has room.
    Wake(AgentType),
}

/// How far behind a durable subscription is.
#[derive(Clone, Debug)]
pub(crate) struct Lag {
    pub(crate) name: Arc<str>,
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
pub(super) struct Work {
    /// The last one is the next.
    pub(super) left: Vec<DeliveryId>,
    action: Action,
    worked: Worked,
    answer: Answer<Worked>,
}

pub(super) type Answer<T> = oneshot::Sender<T>;

/// Somebody who wants to know when a delivery is newer than this generation.
pub(super) type Watcher = (u64, Answer<Option<Found>>);

/// An answer that waits until the log says so.
pub(super) enum Answered {
    Accepted(Receipt<Accepted>, Result<Accepted, Fault>),
    Published(Receipt<Published>, Result<Published, Fault>),
    /// The log that owed it is told.
    Taken(mpsc::UnboundedSender<Input>, Source),
    Found(Answer<Option<Found>>, Option<Found>),
    Done(Answer<Result<(), Fault>>, Result<(), Fault>),
    List(Answer<Vec<Delivery>>, Vec<Delivery>),
    Worked(Answer<Worked>, Worked),
}

impl Answered {
    /// Answers whoever asked and may not wait any more.
    pub(super) fn send(self) {
        match self {
            Self::Accepted(receipt, accepted) => receipt.send(accepted),
            Self::Published(receipt, published) => receipt.send(published),
            Self::Taken(owner, source) => drop(owner.send(Input::Taken(source))),
            Self::Found(answer, found) => drop(answer.send(found)),
            Self::Done(answer, done) => drop(answer.send(done)),
            Self::List(answer, list) => drop(answer.send(list)),
            Self::Worked(answer, worked) => drop(answer.send(worked)),
        }
    }
}

impl Owner {
    /// Decides what is asked. The answer waits until the log says so.
    pub(super) fn handle(&mut self, input: Input, now: Timestamp) {
        match input {
            Input::Accept(mut accept, receipt) => {
                self.durable.inbox(self.id).leave(&accept.message);
                if receipt.is_unwanted() {
                    return;
                }
                // What was asked for by the clock, in the time of the log.
                for at in [&mut accept.not_before, &mut accept.expires_at].into_iter().flatten() {
                    *at = at.after(self.ahead);
                }
                self.fill_in(&mut accept);
                let accepted =
                    self.admit(&accept).and_then(|()| self.partition.accept(*accept, now));
                self.answers.push(Answered::Accepted(receipt, accepted));
            }
            Input::Publish(publish, receipt) => {
                self.durable.inbox(self.id).leave(&publish.message);
                if receipt.is_unwanted() {
                    return;
                }
                let published =
                    self.admit_event(&publish).and_then(|()| self.partition.publish(*publish, now));
                self.answers.push(Answered::Published(receipt, published));
            }
            Input::Owed(source, mut accept) => {
                // It is given again by a host that was not told that it was taken.
                if !self.partition.has_taken(source) {
                    accept.source = Some(source);
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
            Input::Lags(answer) => drop(answer.send(self.lags())),
            Input::Get(id, after, answer) => {
                if let Some((found, answer)) = self.find(id, after, answer) {
                    self.answers.push(Answered::Found(answer, found));
                }
            }
            Input::Cancel(id, reason, answer) => {
                let cancelled = self.partition.cancel(id, reason, now);
                if let Ok(Some(_)) = cancelled
                    && let Some((_, Some(ticket))) = self.under_way.remove(&id.number)
                {
                    self.given_up.push(ticket);
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
                if list.len() > query.limit {
                    list.select_nth_unstable_by_key(query.limit, |it| Query::key(it));
                    list.truncate(query.limit);
                }
                let list = list.into_iter().map(Delivery::summary).collect();
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
            Input::WakeWorker(worker) => {
                let wanted = self.partition.parked(worker);
                for _ in 0..self.gate.claim(self.id, worker, wanted) {
                    self.partition.wake_worker(worker);
                }
            }
            Input::Wake(agent_type) => self.partition.wake(&agent_type),
        }
    }

    /// What is known of a delivery, and for whom; nothing if that waits until it is newer than `after`.
    fn find(
        &mut self,
        id: DeliveryId,
        after: Option<u64>,
        answer: Answer<Option<Found>>,
    ) -> Option<(Option<Found>, Answer<Option<Found>>)> {
        let delivery = self.partition.get(id);
        if let (Some(it), Some(after)) = (delivery, after)
            && !it.state.is_settled()
            && it.generation <= after
        {
            let watchers = self.watchers.entry(id.number).or_default();
            // Now and then, as there may be many.
            if watchers.len().is_power_of_two() {
                watchers.retain(|(_, answer)| !answer.is_closed());
            }
            watchers.push((after, answer));
            return None;
        }
        Some((delivery.map(|it| Found::Live(Box::new(it.clone()))), answer))
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
        if self.admit_key(accept.key)? {
            return Ok(());
        }
        let agent_type = &accept.agent.agent_type;
        let others = self.durable.0.tallies.beside(Some(self.id), agent_type);
        self.durable.admit(agent_type, tally::add(others, self.partition.tally(agent_type)))
    }

    /// Whether what was sent under this key is there already. If it is not, there must be room for one
    /// more key.
    pub(super) fn admit_key(&self, key: Option<(u128, u64, Duration)>) -> Result<bool, Fault> {
        let Some((key, ..)) = key else { return Ok(false) };
        if self.partition.has_key(key) {
            return Ok(true);
        }
        let shared = &self.durable.0;
        let limit = shared.exchange.config().durable.idempotency_keys;
        let keys = shared.tallies.keys() + self.partition.keys() - self.counted.2;
        if keys < limit {
            return Ok(false);
        }
        let detail = format!("{keys} keys are remembered");
        let hint = "send without a key, or have keys remembered for less long";
        let fault = self.durable.overloaded(config::durable::idempotency_keys, limit, detail, hint);
        let wait = self.partition.key_is_free_at().map(|at| at.since(self.now()));
        Err(match wait {
            Some(wait) => fault.retry_after(wait),
            None => fault,
        })
    }

    /// Goes on with what is done to many, as far as one commit takes.
    pub(super) fn work(&mut self, now: Timestamp) {
        let Some(Work { left, action, worked, .. }) = self.works.front_mut() else { return };
        for _ in 0..BATCH {
            let Some(id) = left.pop_if(|_| !self.partition.is_full()) else { break };
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

    /// Reading goes on while a commit waits for room, but not of what that commit says.
    pub(super) fn handle_while_full(&mut self, input: Input, changed: &[u64]) {
        match input {
            // Whoever asked is told why there is no answer.
            Input::Get(id, ..) if changed.contains(&id.number) => {}
            Input::Get(id, after, answer) => {
                if let Some((found, answer)) = self.find(id, after, answer) {
                    let _ = answer.send(found);
                }
            }
            input => self.late.push(input),
        }
    }

    /// Answers those who waited for something to happen to a delivery that goes on.
    pub(super) fn notify(&mut self, number: u64) {
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
    pub(super) fn tell_end(&mut self, settled: Settled) {
        let Some(watchers) = self.watchers.remove(&settled.delivery.id.number) else { return };
        let settled = Arc::new(settled);
        for (_, answer) in watchers {
            let _ = answer.send(Some(Found::Settled(settled.clone())));
        }
    }
}

/// What an agent says of its progress, as a step keeps it.
fn shorten(payload: &Payload) -> ByteString {
    let text = String::from_utf8_lossy(&payload.bytes);
    text[..text.floor_char_boundary(MAX_DETAILS)].into()
}
