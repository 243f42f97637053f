//! The log that the owner of a partition reads and writes.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use parlour_core::durable::{
    Commit, Message, Partition, Place, Position, Record, Timestamp, record_at, settled_in, time_of,
};
use parlour_core::{AgentType, Fault, FaultKind};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::super::follow::Tail;
use super::super::missing;
use super::{Answered, Owner};
use crate::backbone::{self, BackboneError, Replay};

/// How many parts of a log wait to be replayed.
const PARTS: usize = 4;
/// How much of a log is read at once.
const READ: usize = 1 << 20;
/// By how much a log may be longer than what the state needs of it.
const SLACK: usize = 16 << 20;
/// How long to wait for room on the disk.
const FULL_REST: Duration = Duration::from_secs(1);

impl Owner {
    /// Reads the log, and takes it over.
    pub(super) async fn open(
        &mut self,
        opening: mpsc::UnboundedSender<Replay>,
    ) -> Result<(), BackboneError> {
        let shared = self.durable.0.clone();
        let seen = self.view.seen(self.id).await;
        let last = shared.backbone.last(self.id).await?;
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
            self.replay(base.min(seen).next(), seen, base, opening).await?;
            if self.partition.last() < end {
                let read = self.partition.last().0;
                let error = format!("partition {} was read up to {read} of {}", self.id, end.0);
                return Err(BackboneError::Failed(error));
            }
            self.size = shared.backbone.size(self.id).await?;
        }
        self.ahead = self.partition.time().since(self.now());
        let now = self.now();
        let durable = self.durable.clone();
        let policy = |agent_type: &AgentType| durable.terms(agent_type).retry;
        self.partition.recover(fastrand::u32(..), policy, now, fastrand::f64());
        // What was published before is no news.
        self.counted.0.published = self.partition.totals().published;
        self.commit().await?;
        let end = self.partition.last();
        let tail = Tail { position: end, behind: end, ..Tail::default() };
        durable.tail(self.id).send_replace(tail);
        self.hand_over().await
    }

    /// Has the view know of what is behind `seen`, and makes the state of what is behind `base`.
    async fn replay(
        &mut self,
        from: Position,
        seen: Position,
        base: Position,
        opening: mpsc::UnboundedSender<Replay>,
    ) -> Result<(), BackboneError> {
        let (to, mut parts) = mpsc::channel(PARTS);
        let _ = opening.send(Replay { partition: self.id, from, to });
        // All logs are read at once, when each owner has asked or has let go.
        drop(opening);
        while let Some(part) = parts.recv().await {
            for (position, commit) in part? {
                if position > seen && !parlour_core::bug!("view_not_made_again") {
                    self.view.add(self.id, position, settled_in(&commit)?);
                }
                if position > base {
                    self.partition.replay(position, &commit)?;
                }
            }
            // Others have their turn.
            tokio::task::consume_budget().await;
        }
        Ok(())
    }

    /// Writes what was decided, and then tells it.
    pub(super) async fn commit(&mut self) -> Result<(), BackboneError> {
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
        self.given_up.drain(..).for_each(|ticket| ticket.cancel());
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
                Answered::Accepted(receipt, Ok(_)) => receipt.send(Err(fault())),
                Answered::Published(receipt, Ok(_)) => receipt.send(Err(fault())),
                Answered::Accepted(..) | Answered::Published(..) => answered.send(),
                other => self.answers.push(other),
            }
        }
    }

    /// The message, read from the log if it is not in memory.
    pub(super) async fn load(
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
        let commit = found.ok_or_else(|| missing(position))?;
        self.read = Some((position, commit.clone()));
        Ok(commit)
    }

    /// Lets the first commit go that the state is made of, when little of the log is needed. Returns
    /// whether there may be another: those who wait for something have their turn in between.
    pub(super) async fn tidy(&mut self) -> Result<bool, BackboneError> {
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
    pub(super) async fn retire(&mut self, now: Timestamp) -> Result<(), BackboneError> {
        let shared = self.durable.0.clone();
        let settings = &shared.exchange.config().durable;
        let (most, count) = (settings.retention_bytes.0 as u64, shared.inboxes.len() as u64);
        let oldest = Timestamp(now.0.saturating_sub(settings.retention_age.as_millis() as u64));
        let takes_all = parlour_core::bug!("retention_takes_all");
        loop {
            // What is not needed any more, here and in all logs.
            let needed = if takes_all { 0 } else { self.partition.log_bytes() as u64 };
            let past = self.size.saturating_sub(needed);
            let all = shared.past.fetch_add(past.wrapping_sub(self.past), Relaxed);
            let mut all = all.wrapping_add(past.wrapping_sub(self.past));
            self.past = past;
            let is_long = all > most && past > most / count;
            let is_old = self.oldest.is_none_or(|time| time < oldest);
            if past == 0 || !(is_long || is_old) {
                return Ok(());
            }
            let mut until = None;
            for (position, commit) in shared.backbone.read(self.id, Position(1), READ).await? {
                let time = time_of(&commit)?;
                self.oldest = Some(time);
                let is_needed = position > self.partition.needless() && !takes_all;
                if is_needed || !(time < oldest || all > most) {
                    break;
                }
                let bytes = commit.len() as u64;
                self.size = self.size.saturating_sub(bytes);
                all = all.saturating_sub(bytes);
                until = Some(position);
            }
            let Some(until) = until else { return Ok(()) };
            shared.backbone.trim(self.id, until).await?;
            self.view.forget(self.id, until);
        }
    }
}
