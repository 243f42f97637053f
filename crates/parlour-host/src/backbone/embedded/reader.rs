//! The thread that reads.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use bytes::Bytes;
use parlour_core::durable::{PartitionId, Position};
use rusqlite::{Connection, Row, params};
use tokio::sync::mpsc;

use super::logs::Logs;
use super::{Done, checksum, failure, id_of, place_of};
use crate::backbone::{BackboneError, Commits, PART, Replay};

pub(super) enum Read {
    Last(PartitionId, Done<Option<(Position, Bytes)>>),
    From(PartitionId, Position, usize, Done<Commits>),
    All(Vec<Replay>, Done<()>),
}

pub(super) struct Reader {
    connection: Connection,
    logs: Arc<Logs>,
}

impl Reader {
    pub(super) fn new(connection: Connection, logs: Arc<Logs>) -> Self {
        Self { connection, logs }
    }

    pub(super) fn run(self, queue: &Receiver<Read>) {
        while let Ok(job) = queue.recv() {
            // Whoever asked may not wait any more.
            match job {
                Read::Last(partition, done) => drop(done.send(self.last(partition))),
                Read::From(partition, position, bytes, done) => {
                    drop(done.send(self.read(partition, position, bytes)));
                }
                Read::All(logs, done) => {
                    self.replay(logs);
                    drop(done.send(Ok(())));
                }
            }
        }
    }

    fn last(&self, partition: PartitionId) -> Result<Option<(Position, Bytes)>, BackboneError> {
        let last = self.logs.last(partition);
        if last == Position(0) {
            return Ok(None);
        }
        let commit = self.read(partition, last, 0)?.pop();
        let missing = || {
            let error = format!("commit {} of partition {partition} is missing", last.0);
            BackboneError::Damaged(error)
        };
        commit.ok_or_else(missing).map(Some)
    }

    /// The commits from `position` on, as many as fit into `bytes` but at least one.
    fn read(
        &self,
        partition: PartitionId,
        position: Position,
        bytes: usize,
    ) -> Result<Commits, BackboneError> {
        let failed = |error| failure(&error);
        let from = "SELECT id, checksum, commit_bytes FROM commits
                    WHERE id BETWEEN ? AND ? AND id & 65535 = ? ORDER BY id";
        let mut query = self.connection.prepare_cached(from).map_err(failed)?;
        let first = position.max(self.logs.trimmed(partition).next());
        let ids = [first, self.logs.last(partition)].map(|position| id_of(partition, position));
        let mut rows = query.query(params![ids[0], ids[1], partition.0]).map_err(failed)?;
        let (mut commits, mut length) = (Vec::new(), 0);
        while let Some(row) = rows.next().map_err(failed)? {
            let commit = commit_in(row)?;
            length += commit.1.len();
            if length > bytes && !commits.is_empty() {
                break;
            }
            commits.push(commit);
            if length >= bytes {
                break;
            }
        }
        Ok(commits)
    }

    /// Sends what is in these logs in one pass over the rows of all.
    fn replay(&self, logs: Vec<Replay>) {
        let mut parts: Vec<_> = self.logs.partitions().map(|_| None).collect();
        let mut first = Position(u64::MAX);
        for Replay { partition, from, to } in logs {
            let from = from.max(self.logs.trimmed(partition).next());
            first = first.min(from);
            if let Some(part) = parts.get_mut(usize::from(partition.0)) {
                *part = Some(Part { from, to, commits: Vec::new(), bytes: 0 });
            }
        }
        let passed = self.pass(first, &mut parts);
        for part in parts.into_iter().flatten() {
            let end = passed.clone().map(|()| part.commits);
            if end.as_ref().map_or(true, |commits| !commits.is_empty()) {
                let _ = part.to.blocking_send(end);
            }
        }
    }

    /// Goes over all rows from `first` on. What is sent to one log is not there any more, what is left
    /// is in its last part.
    fn pass(&self, first: Position, parts: &mut [Option<Part>]) -> Result<(), BackboneError> {
        let failed = |error| failure(&error);
        let from = "SELECT id, checksum, commit_bytes FROM commits WHERE id >= ? ORDER BY id";
        let mut query = self.connection.prepare(from).map_err(failed)?;
        let mut rows = query.query([id_of(PartitionId(0), first)]).map_err(failed)?;
        while parts.iter().any(Option::is_some)
            && let Some(row) = rows.next().map_err(failed)?
        {
            let (partition, position) = place_of(row.get(0).map_err(failed)?);
            let Some(wanted) = parts.get_mut(usize::from(partition.0)) else { continue };
            let Some(part) = wanted.as_mut().filter(|part| position >= part.from) else { continue };
            let goes_on = match commit_in(row) {
                Ok(commit) => part.add(commit),
                Err(error) => {
                    let _ = part.to.blocking_send(Err(error));
                    false
                }
            };
            if !goes_on {
                *wanted = None;
            }
        }
        Ok(())
    }
}

/// The commit in a row: its id, checksum and bytes.
fn commit_in(row: &Row<'_>) -> Result<(Position, Bytes), BackboneError> {
    let failed = |error| failure(&error);
    let id: i64 = row.get(0).map_err(failed)?;
    let sum: u32 = row.get(1).map_err(failed)?;
    let commit = row.get_ref(2).map_err(failed)?;
    let commit = commit.as_blob().unwrap_or_default();
    let (partition, position) = place_of(id);
    if checksum(id, commit) != sum && !parlour_core::bug!("damage_unnoticed") {
        let error = format!("commit {} of partition {partition} is damaged", position.0);
        return Err(BackboneError::Damaged(error));
    }
    Ok((position, Bytes::copy_from_slice(commit)))
}

/// What comes next of a log that is replayed.
struct Part {
    from: Position,
    to: mpsc::Sender<Result<Commits, BackboneError>>,
    commits: Commits,
    bytes: usize,
}

impl Part {
    /// Adds a commit, and sends those that are there once they are enough. Returns whether more is
    /// wanted.
    fn add(&mut self, commit: (Position, Bytes)) -> bool {
        self.bytes += commit.1.len();
        self.commits.push(commit);
        if self.bytes < PART {
            return true;
        }
        self.bytes = 0;
        self.to.blocking_send(Ok(std::mem::take(&mut self.commits))).is_ok()
    }
}
