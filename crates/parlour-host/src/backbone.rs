//! Where durable messages live: the one seam to what keeps them.
//!
//! A room has a fixed number of partitions. Each is a log: a row of commits at positions that rise. A
//! commit is written as a whole or not at all. Whoever writes the next one owns the partition: two
//! hosts that both believe to own it offer a commit behind the same last one, one of them is
//! [`Fenced`](BackboneError::Fenced), and goes.
//!
//! Beside the partitions there is one more log, [`PartitionId::of_room`]: that of the room itself.

pub(crate) mod embedded;
mod memory;
#[cfg(test)]
pub(crate) mod tests;

use std::fmt;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;

use bytes::Bytes;
use futures_util::future::join_all;
use parlour_core::durable::{Corrupt, PartitionId, Position};
use thiserror::Error;
use tokio::sync::{mpsc, watch};

pub use embedded::{Embedded, OpenError};
pub use memory::Memory;

/// What a backbone does, when it has done it.
pub type Work<'a, T> = Pin<Box<dyn Future<Output = Result<T, BackboneError>> + Send + 'a>>;

/// Commits of one log, each with its position, in order.
pub type Commits = Vec<(Position, Bytes)>;

/// Who wants to [replay](Backbone::replay) a log.
#[derive(Debug)]
#[expect(clippy::exhaustive_structs, reason = "what a backbone is asked for")]
pub struct Replay {
    /// Whose log.
    pub partition: PartitionId,
    /// The first position that is wanted.
    pub from: Position,
    /// Takes the commits part by part, never an empty one.
    pub to: mpsc::Sender<Result<Commits, BackboneError>>,
}

/// How much of a log is read at once, in bytes.
pub(crate) const PART: usize = 64 << 10;

/// Keeps the logs of a room. Methods may be called at once, and from any thread.
///
/// A method whose future is dropped may have done its work, or may do it still: whoever does not wait
/// for an [`append`](Self::append) reads the log before it goes on.
pub trait Backbone: Send + Sync + fmt::Debug + 'static {
    /// What is promised of a commit once it has been appended.
    fn ack(&self) -> Ack;

    /// Whether there is room for more than what must still be written of what was accepted.
    fn has_room(&self) -> bool {
        true
    }

    /// How many partitions the room has, without its own log. It never changes.
    fn partitions(&self) -> u16;

    /// Appends `commit` behind the last one, which must be at `last`: 0 where the log is empty. Returns
    /// its position, a later one.
    ///
    /// When it returns, the commit is as safe as [`ack`](Self::ack) says. When it fails with
    /// [`Full`](BackboneError::Full) nothing was written, and the same can be tried again. After any
    /// other error the log has to be read again, by whoever still owns it.
    fn append(&self, partition: PartitionId, last: Position, commit: Bytes) -> Work<'_, Position>;

    /// Says while something is being written that what is appended would wait for. Whoever waits for
    /// its end has more in one commit, and no later.
    fn busy(&self) -> Option<watch::Receiver<bool>> {
        None
    }

    /// The last commit, if there is any.
    fn last(&self, partition: PartitionId) -> Work<'_, Option<(Position, Bytes)>>;

    /// Commits from `position` on, in order, as many as fit into `bytes` but at least one. None at the
    /// end of the log.
    fn read(&self, partition: PartitionId, position: Position, bytes: usize) -> Work<'_, Commits>;

    /// Sends what is in several logs to those who want it, each log to its end or to an error, and drops
    /// its sender there. Nobody waits for more than a part of another's log to be taken.
    fn replay(&self, logs: Vec<Replay>) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let replay_one = move |Replay { partition, mut from, to }| async move {
            loop {
                let part = self.read(partition, from, PART).await;
                let last = part.as_ref().map(|commits| commits.last().map(|(last, _)| *last));
                let Ok(Some(last)) = last else {
                    // At the end there is no part.
                    if part.is_err() {
                        let _ = to.send(part).await;
                    }
                    return;
                };
                // Whoever wants no more is gone.
                if to.send(part).await.is_err() {
                    return;
                }
                from = last.next();
            }
        };
        Box::pin(async move { drop(join_all(logs.into_iter().map(replay_one)).await) })
    }

    /// Lets the commits up to `position` go, which must not be the last. They are not read any more:
    /// asking for them gives what comes behind. A host that is killed soon after may find them again.
    fn trim(&self, partition: PartitionId, position: Position) -> Work<'_, ()>;

    /// How many bytes of commits there are, with those that are gone but still take space.
    fn size(&self, partition: PartitionId) -> Work<'_, u64>;

    /// About how many bytes are read by whoever reads this log from `position` on, if those are more
    /// than the bytes of its commits.
    fn backlog(&self, _partition: PartitionId, _position: Position) -> u64 {
        0
    }

    /// A directory of this host's own for what it makes of the logs and can make again. Without, that
    /// is kept in memory.
    fn views(&self) -> Option<&Path> {
        None
    }
}

/// The commit at `position`, if it has not been let go.
pub(crate) async fn commit_at(
    backbone: &dyn Backbone,
    partition: PartitionId,
    position: Position,
) -> Result<Option<Bytes>, BackboneError> {
    let commits = backbone.read(partition, position, 1).await?;
    let found = commits.into_iter().next().filter(|(at, _)| *at == position);
    Ok(found.map(|(_, commit)| commit))
}

/// What an acknowledgement says of a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Ack {
    /// It is in the host's memory.
    Memory,
    /// It is on the host's disk: it survives that the host is killed, or its power cut.
    Durable,
}

impl Ack {
    /// The name on every wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Durable => "durable",
        }
    }
}

impl From<Corrupt> for BackboneError {
    fn from(error: Corrupt) -> Self {
        Self::Damaged(error.to_string())
    }
}

/// Why a backbone did not do what it was asked.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[non_exhaustive]
pub enum BackboneError {
    /// Another host owns the partition.
    #[error("another host writes this partition")]
    Fenced,
    /// There is no room. What was asked can be tried again when there is.
    #[error("there is no room on the disk: {0}")]
    Full(String),
    /// It cannot be used any more before the host is started anew.
    #[error("{0}")]
    Failed(String),
    /// What is there is not what was written.
    #[error("{0}")]
    Damaged(String),
}
