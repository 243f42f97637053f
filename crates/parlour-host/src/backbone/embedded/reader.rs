//! The thread that reads.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use bytes::Bytes;
use parlour_core::durable::{PartitionId, Position};
use rusqlite::{Connection, params};

use super::logs::Logs;
use super::{Done, checksum, failure, id_of, position_of};
use crate::backbone::BackboneError;

type Commits = Vec<(Position, Bytes)>;

pub(super) enum Read {
    Last(PartitionId, Done<Option<(Position, Bytes)>>),
    From(PartitionId, Position, usize, Done<Commits>),
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
            let id: i64 = row.get(0).map_err(failed)?;
            let sum: u32 = row.get(1).map_err(failed)?;
            let commit = row.get_ref(2).map_err(failed)?;
            let commit = commit.as_blob().unwrap_or_default();
            length += commit.len();
            if length > bytes && !commits.is_empty() {
                break;
            }
            let position = position_of(id);
            if checksum(id, commit) != sum && !parlour_core::bug!("damage_unnoticed") {
                let error = format!("commit {} of partition {partition} is damaged", position.0);
                return Err(BackboneError::Damaged(error));
            }
            commits.push((position, Bytes::copy_from_slice(commit)));
            if length >= bytes {
                break;
            }
        }
        Ok(commits)
    }
}
