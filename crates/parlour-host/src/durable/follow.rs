//! The events of a topic as its log has them, from some place on.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use parlour_core::durable::{
    Corrupt, MessageKind, PartitionId, Position, epoch_of, previous_of, published_in, time_of,
};
use parlour_core::{Event, Fault, FaultKind, TopicType};
use tokio::sync::watch;

use super::{Durable, refusal};
use crate::backbone::commit_at;

/// How much of a log is read at once.
const READ: usize = 256 << 10;

/// Where an event stands. Written `partition-epoch-position-offset`, such as `3-9f3a21c0-1042-57`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct EventPlace {
    pub(crate) partition: PartitionId,
    /// Of the owner that wrote it: another one, on a log that was restored, may have written something
    /// else there.
    pub(crate) epoch: u32,
    pub(crate) position: Position,
    pub(crate) offset: u32,
}

impl EventPlace {
    pub(crate) fn parse(text: &str) -> Result<Self, Fault> {
        let parts = || {
            let mut parts = text.split('-');
            let parsed = Self {
                partition: PartitionId(parts.next()?.parse().ok()?),
                epoch: u32::from_str_radix(parts.next()?, 16).ok()?,
                position: Position(parts.next()?.parse().ok()?),
                offset: parts.next()?.parse().ok()?,
            };
            // One way to write each: no signs, no further zeros.
            (parts.next().is_none() && parsed.to_string() == text).then_some(parsed)
        };
        parts().ok_or_else(|| {
            let detail = format!("`{}` is the id of no durable event", text.escape_debug());
            Fault::new(FaultKind::Invalid, detail)
                .hint("give the `id` of an event that was sent, or begin without one")
        })
    }
}

impl fmt::Display for EventPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { partition, epoch, position, offset } = self;
        write!(f, "{partition}-{epoch:08x}-{}-{offset}", position.0)
    }
}

/// The last commit of a log that publishes something.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tail {
    pub(crate) position: Position,
    /// The one before it that did.
    pub(crate) behind: Position,
    pub(crate) commit: Bytes,
}

/// What somebody follows.
pub(crate) struct Follow {
    durable: Durable,
    partition: PartitionId,
    topic_type: TopicType,
    /// All commits up to here were looked at.
    seen: Position,
    ready: VecDeque<Followed>,
    tail: watch::Receiver<Tail>,
}

/// An event, where it stands and when it was published.
pub(crate) struct Followed {
    pub(crate) place: EventPlace,
    pub(crate) event: Event,
    pub(crate) time: Duration,
}

impl Durable {
    /// Follows the durable events of a topic type, from behind `after` on or else from now on.
    ///
    /// What has gone from the log is not passed over: it is answered with `gone`.
    pub(crate) async fn follow(
        &self,
        topic_type: &TopicType,
        after: Option<EventPlace>,
    ) -> Result<Follow, Fault> {
        self.are_open().await;
        let partition = PartitionId::of_topic(topic_type, self.0.backbone.partitions());
        let tail = self.tail(partition).subscribe();
        let seen = tail.borrow().position;
        let (durable, topic_type) = (self.clone(), topic_type.to_kept());
        let mut follow =
            Follow { durable, partition, topic_type, seen, ready: VecDeque::new(), tail };
        let after = after.filter(|_| !parlour_core::bug!("place_ignored"));
        let Some(after) = after else { return Ok(follow) };
        if after.partition != partition {
            let detail = format!("the event {after} is not of {}", follow.topic_type);
            return Err(Fault::new(FaultKind::Invalid, detail)
                .hint("give the id of an event of the same topic type, or none"));
        }
        let found = commit_at(&*self.0.backbone, partition, after.position).await;
        if matches!(found, Ok(None)) && parlour_core::bug!("gap_passed_over") {
            return Ok(follow);
        }
        let commit = found.map_err(|error| refusal(&error))?.ok_or_else(gone)?;
        if epoch_of(&commit).map_err(|error| refusal(&error.into()))? != after.epoch {
            return Err(gone());
        }
        follow.seen = after.position;
        follow.take(after.position, &commit, Some(after.offset))?;
        Ok(follow)
    }
}

impl Follow {
    /// The next event. Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<Followed, Fault> {
        loop {
            if let Some(next) = self.ready.pop_front() {
                return Ok(next);
            }
            let Tail { position, behind, commit } = self.tail.borrow_and_update().clone();
            if position <= self.seen {
                if self.tail.changed().await.is_err() {
                    return Err(Fault::new(FaultKind::Unavailable, "the host is shutting down"));
                }
            } else if behind <= self.seen && !commit.is_empty() {
                self.take(position, &commit, None)?;
                self.seen = position;
            } else {
                self.read(position).await?;
            }
        }
    }

    /// Reads on, up to `end` at the most.
    async fn read(&mut self, end: Position) -> Result<(), Fault> {
        let backbone = self.durable.0.backbone.clone();
        let commits = backbone.read(self.partition, self.seen.next(), READ).await;
        let commits = commits.map_err(|error| refusal(&error))?;
        if commits.is_empty() {
            self.seen = end;
        }
        for (position, commit) in commits {
            if previous_of(&commit).map_err(|error| refusal(&error.into()))? > self.seen {
                return Err(gone());
            }
            self.take(position, &commit, None)?;
            self.seen = position;
        }
        Ok(())
    }

    /// Takes what a commit publishes behind this offset.
    fn take(
        &mut self,
        position: Position,
        commit: &Bytes,
        after: Option<u32>,
    ) -> Result<(), Fault> {
        let events = published(self.partition, position, commit);
        let events = events.map_err(|error| refusal(&error.into()))?.into_iter();
        self.ready.extend(events.filter(|it| {
            it.event.topic.topic_type == self.topic_type
                && after.is_none_or(|after| it.place.offset > after)
        }));
        Ok(())
    }
}

/// The events that a commit publishes.
pub(super) fn published(
    partition: PartitionId,
    position: Position,
    commit: &Bytes,
) -> Result<Vec<Followed>, Corrupt> {
    let (time, epoch) = (Duration::from_millis(time_of(commit)?.0), epoch_of(commit)?);
    let events = published_in(commit)?.into_iter().filter_map(|(offset, message)| {
        let MessageKind::Event(topic) = message.kind else { return None };
        let place = EventPlace { partition, epoch, position, offset };
        let event = Event { header: message.header, topic, payload: message.payload };
        Some(Followed { place, event, time })
    });
    Ok(events.collect())
}

fn gone() -> Fault {
    Fault::new(FaultKind::Gone, "events behind that one are not kept any more").hint(
        "begin without Last-Event-ID; `durable.retention_age` says for how long they are kept",
    )
}
