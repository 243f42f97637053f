//! The life of one delivery.

use std::borrow::Cow;
use std::sync::Arc;

use bytestring::ByteString;
use thiserror::Error;

use super::{DeliveryId, RetryPolicy, Timestamp};
use crate::{AgentId, Fault, FaultKind, MessageId, Payload};

/// The most steps that are kept of one life. Beyond it the oldest are let go, those first that tell of
/// progress.
pub const MAX_STEPS: usize = 1000;

/// One durable message on its way to one agent.
///
/// ```text
/// accepted ─→ dispatched ─→ received ─→ processing ─→ completed
///     │          │  ↑          │            │
///     │          ▼  │          ▼            ▼
///     │        waiting ←──── (the attempt failed) ──→ dead ─→ (redriven) ─→ waiting
///     └──→ expired, and from anywhere but the end ──→ cancelled
/// ```
///
/// Each arrow is a [`Change`], adds a [`Step`] and raises the generation by one. What only the worker
/// of an attempt may say is said with the token of that attempt: the generation in which it was
/// dispatched. Another token is [`Stale`], and changes nothing.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Delivery {
    /// Its name.
    pub id: DeliveryId,
    /// Whom it is for.
    pub agent: Arc<AgentId>,
    /// The conversation of its message.
    pub conversation: MessageId,
    /// Where it is in its life.
    pub state: State,
    /// Counts its steps.
    pub generation: u64,
    /// When it was accepted.
    pub accepted_at: Timestamp,
    /// Before this it is not attempted.
    pub next_attempt_at: Option<Timestamp>,
    /// From here on no attempt begins any more.
    pub expires_at: Option<Timestamp>,
    /// Counts the attempts since it was accepted or redriven that may have reached an agent.
    pub attempt: u32,
    /// Of these, how many failed.
    pub failed: u32,
    /// Of these, how many were lost with their worker or host.
    pub lost: u32,
    /// How often in a row it has not reached an agent.
    pub unsent: u32,
    /// How many may fail.
    pub max_attempts: u32,
    /// How many may be lost.
    pub max_lost: u32,
    /// Whether earlier ones of its agent, if they ask for this too, have to end before it begins.
    pub strict: bool,
    /// Of an event, the durable subscription that it is for.
    pub subscription: Option<Arc<str>>,
    /// The generation in which the last attempt was dispatched.
    pub token: u64,
    /// The worker of the last attempt.
    pub worker: Option<ByteString>,
    /// Its steps so far, without the first.
    pub steps: Vec<Step>,
}

/// Where a delivery is in its life.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "the states are part of the API")]
pub enum State {
    /// It waits for its first attempt.
    Accepted,
    /// It is on its way to a worker.
    Dispatched,
    /// The agent has it.
    Received,
    /// The agent has told of its progress.
    Processing,
    /// It waits for its next attempt.
    Waiting,
    /// The agent has answered.
    Completed,
    /// No attempt is left. It is kept until somebody redrives or discards it.
    Dead,
    /// Somebody gave it up.
    Cancelled,
    /// Its time was over before an attempt succeeded.
    Expired,
}

impl State {
    /// Every state, in the order of a life.
    pub const ALL: [Self; 9] = [
        Self::Accepted,
        Self::Dispatched,
        Self::Received,
        Self::Processing,
        Self::Waiting,
        Self::Completed,
        Self::Dead,
        Self::Cancelled,
        Self::Expired,
    ];

    /// The state of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }

    /// The name on every wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Dispatched => "dispatched",
            Self::Received => "received",
            Self::Processing => "processing",
            Self::Waiting => "waiting",
            Self::Completed => "completed",
            Self::Dead => "dead",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
        }
    }

    /// Whether it waits for an attempt.
    pub fn is_waiting(self) -> bool {
        matches!(self, Self::Accepted | Self::Waiting)
    }

    /// Whether an attempt is under way.
    pub fn is_in_flight(self) -> bool {
        matches!(self, Self::Dispatched | Self::Received | Self::Processing)
    }

    /// Whether it has ended. One that is dead can be redriven.
    pub fn is_settled(self) -> bool {
        !self.is_waiting() && !self.is_in_flight()
    }
}

/// An acknowledgement: something that happened to a delivery.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "built when it is read back")]
pub struct Step {
    /// Its number: streams of steps resume behind it.
    pub generation: u64,
    /// When it happened.
    pub at: Timestamp,
    /// In which attempt.
    pub attempt: u32,
    /// What happened.
    pub level: Level,
    /// The worker of the attempt.
    pub worker: Option<ByteString>,
    /// What there is to say of it.
    pub details: ByteString,
    /// Why an attempt has no answer.
    pub fault: Option<Fault>,
}

/// What a [`Step`] acknowledges.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "the levels are part of the API")]
#[expect(missing_docs, reason = "named after the states that they lead to")]
pub enum Level {
    Accepted,
    Dispatched,
    Received,
    Processing,
    Completed,
    /// An attempt failed, and there will be another.
    Failed,
    Dead,
    Cancelled,
    Expired,
    /// A dead one is to be attempted again.
    Redriven,
    Discarded,
}

impl Level {
    /// Every level, in the order of a life.
    pub const ALL: [Self; 11] = [
        Self::Accepted,
        Self::Dispatched,
        Self::Received,
        Self::Processing,
        Self::Completed,
        Self::Failed,
        Self::Dead,
        Self::Cancelled,
        Self::Expired,
        Self::Redriven,
        Self::Discarded,
    ];

    /// The level of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|level| level.name() == name)
    }

    /// The name on every wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Dispatched => "dispatched",
            Self::Received => "received",
            Self::Processing => "processing",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Dead => "dead",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
            Self::Redriven => "redriven",
            Self::Discarded => "discarded",
        }
    }
}

/// What can happen to a delivery after it was accepted.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "the log has these and no others")]
pub enum Change {
    /// An attempt begins.
    Dispatched {
        /// Where.
        worker: ByteString,
    },
    /// The agent has it.
    Received,
    /// The agent tells of its progress.
    Processing {
        /// In its words.
        details: ByteString,
    },
    /// The agent has answered.
    Completed {
        /// The answer.
        reply: Payload,
    },
    /// The attempt has no answer.
    Failed {
        /// Why.
        fault: Fault,
        /// What that counts as.
        counts: Counts,
        /// When the next one may begin. Without, there is none: the delivery is dead.
        next: Option<Timestamp>,
    },
    /// Somebody gave it up.
    Cancelled {
        /// Why.
        reason: ByteString,
    },
    /// Its time was over.
    Expired,
    /// Somebody sent a dead one back: it has all its attempts again.
    Redriven,
    /// Somebody gave a dead one up.
    Discarded {
        /// Why.
        reason: ByteString,
    },
}

/// What an attempt without an answer counts as.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "the log has these and no others")]
pub enum Counts {
    /// The agent failed.
    Failed,
    /// The worker or the host was lost meanwhile.
    Lost,
    /// Nothing: the agent certainly did not run.
    Unsent,
}

/// What was said is of an attempt that is over, or of a delivery that has ended.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[error("the attempt is over: it failed, timed out or was given up, or the delivery has ended")]
#[non_exhaustive]
pub struct Stale;

impl Change {
    /// Whether nothing can happen to the delivery any more after this.
    pub fn settles(&self) -> bool {
        matches!(
            self,
            Self::Completed { .. }
                | Self::Cancelled { .. }
                | Self::Expired
                | Self::Discarded { .. }
        )
    }

    /// As [`Delivery::detach`], as far as a step keeps its texts.
    pub(super) fn detach(&mut self) {
        match self {
            Self::Dispatched { worker } => detach(worker),
            Self::Processing { details } => detach(details),
            _ => {}
        }
    }
}

fn detach(text: &mut ByteString) {
    *text = ByteString::from(&**text);
}

impl Delivery {
    /// What comes of an attempt that ended with `fault`.
    ///
    /// `random` is evenly between 0 and 1.
    pub fn fail(
        &self,
        token: u64,
        fault: Fault,
        policy: &RetryPolicy,
        now: Timestamp,
        random: f64,
    ) -> Result<Change, Stale> {
        self.check(token)?;
        let counts = if !fault.may_have_run() && RetryPolicy::retries(fault.kind()) {
            Counts::Unsent
        } else if fault.kind() == FaultKind::WorkerLost {
            Counts::Lost
        } else {
            Counts::Failed
        };
        let is_over = match counts {
            Counts::Failed => {
                self.failed + 1 >= self.max_attempts || !RetryPolicy::retries(fault.kind())
            }
            Counts::Lost => self.lost + 1 >= self.max_lost && !crate::bug!("losses_unlimited"),
            Counts::Unsent => false,
        };
        let asked = fault.retry_after_time().unwrap_or_default();
        let tries = self.attempt + self.unsent;
        let next = (!is_over).then(|| now.after(policy.wait(tries, random).max(asked)));
        Ok(Change::Failed { fault, counts, next })
    }

    /// Whether `token` is that of the attempt which is under way.
    pub fn check(&self, token: u64) -> Result<(), Stale> {
        let is_current = self.token == token || crate::bug!("late_reply_taken");
        if self.state.is_in_flight() && is_current { Ok(()) } else { Err(Stale) }
    }

    /// Whether it may be attempted now.
    pub fn is_due(&self, now: Timestamp) -> bool {
        self.state.is_waiting() && self.next_attempt_at.is_none_or(|at| at <= now)
    }

    /// Whether it waits, and its time is over.
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.state.is_waiting() && self.expires_at.is_some_and(|at| at <= now)
    }

    /// When, after `now`, there is something to do for it if nothing else happens.
    pub fn next_timeout(&self, now: Timestamp) -> Option<Timestamp> {
        let times = [self.next_attempt_at, self.expires_at].into_iter().flatten();
        times.filter(|at| self.state.is_waiting() && *at > now).min()
    }

    /// The step with which it began.
    pub fn first_step(&self) -> Step {
        Step {
            generation: 1,
            at: self.accepted_at,
            attempt: 0,
            level: Level::Accepted,
            worker: None,
            details: ByteString::new(),
            fault: None,
        }
    }

    /// All its steps that are known, with the first.
    pub fn known_steps(&self) -> impl Iterator<Item = Cow<'_, Step>> {
        let first = Cow::Owned(self.first_step());
        std::iter::once(first).chain(self.steps.iter().map(Cow::Borrowed))
    }

    /// The last fault, if it has not been answered since.
    pub fn fault(&self) -> Option<&Fault> {
        if self.state == State::Completed {
            return None;
        }
        self.steps.iter().rev().find_map(|step| step.fault.as_ref())
    }

    /// The same without its steps, but for the one that says why it has no answer.
    pub fn summary(&self) -> Self {
        let last = self.steps.iter().rev().find(|step| step.fault.is_some());
        Self {
            id: self.id,
            agent: self.agent.clone(),
            conversation: self.conversation.clone(),
            subscription: self.subscription.clone(),
            worker: self.worker.clone(),
            steps: last.cloned().into_iter().collect(),
            ..*self
        }
    }

    /// Gives it texts in memory of their own, so that it can outlive what it was read from.
    pub(super) fn detach(&mut self) {
        self.conversation = self.conversation.to_kept();
        self.worker.as_mut().map(detach);
        for step in &mut self.steps {
            step.worker.as_mut().map(detach);
            detach(&mut step.details);
        }
    }

    /// Lets `change` happen to it.
    pub(super) fn apply(&mut self, change: &Change, at: Timestamp) {
        self.generation += 1;
        let mut details = ByteString::new();
        let mut why = None;
        let mut attempt = self.attempt + u32::from(matches!(change, Change::Dispatched { .. }));
        let level = match change {
            Change::Dispatched { worker } => {
                self.attempt += 1;
                self.token = self.generation;
                self.worker = Some(worker.clone());
                self.next_attempt_at = None;
                self.state = State::Dispatched;
                Level::Dispatched
            }
            Change::Received => {
                self.state = State::Received;
                Level::Received
            }
            Change::Processing { details: text } => {
                details = text.clone();
                self.state = State::Processing;
                Level::Processing
            }
            Change::Completed { .. } => {
                self.state = State::Completed;
                Level::Completed
            }
            Change::Failed { fault, counts, next } => {
                match counts {
                    Counts::Failed => self.failed += 1,
                    Counts::Lost => self.lost += 1,
                    Counts::Unsent => self.attempt -= 1,
                }
                self.unsent = if *counts == Counts::Unsent { self.unsent + 1 } else { 0 };
                why = Some(fault.clone());
                self.next_attempt_at = *next;
                self.state = if next.is_some() { State::Waiting } else { State::Dead };
                if next.is_some() { Level::Failed } else { Level::Dead }
            }
            Change::Cancelled { reason } => {
                details = reason.clone();
                self.state = State::Cancelled;
                Level::Cancelled
            }
            Change::Expired => {
                self.state = State::Expired;
                Level::Expired
            }
            Change::Redriven => {
                attempt = 0;
                (self.attempt, self.failed, self.lost, self.unsent) = (0, 0, 0, 0);
                (self.next_attempt_at, self.expires_at) = (None, None);
                self.state = State::Waiting;
                Level::Redriven
            }
            Change::Discarded { reason } => {
                details = reason.clone();
                Level::Discarded
            }
        };
        if self.steps.len() >= MAX_STEPS {
            let progress = self.steps.iter().position(|it| it.level == Level::Processing);
            self.steps.remove(progress.unwrap_or(0));
        }
        let of_attempt = matches!(
            level,
            Level::Dispatched
                | Level::Received
                | Level::Processing
                | Level::Completed
                | Level::Failed
                | Level::Dead
        );
        let worker = self.worker.clone().filter(|_| of_attempt);
        let generation = self.generation;
        self.steps.push(Step { generation, at, attempt, level, worker, details, fault: why });
    }
}
