//! The thread that reads.

use std::sync::mpsc::Receiver;

use bytes::Bytes;
use parlour_core::durable::{PartitionId, Position};
use rusqlite::{Connection, params};

use super::{Done, checksum, failure, id_of, ids, position_of, size};
use crate::backbone::BackboneError;

type Commits = Vec<(Position, Bytes)>;

pub(super) enum Read {
    Last(PartitionId, Done<Option<(Position, Bytes)>>),
    From(PartitionId, Position, usize, Done<Commits>),
    Size(PartitionId, Done<u64>),
}

pub(super) struct Reader {
    connection: Connection,
}

impl Reader {
    pub(super) fn new(connection: Connection) -> Self {
        Self { connection }
    }

    pub(super) fn run(self, queue: &Receiver<Read>) {
        while let Ok(job) = queue.recv() {
            // Whoever asked may not wait any more.
            match job {
                Read::Last(partition, done) => drop(done.send(self.last(partition))),
                Read::From(partition, position, bytes, done) => {
                    drop(done.send(self.read(partition, position, bytes)));
                }
                Read::Size(partition, done) => drop(done.send(self.size(partition))),
            }
        }
    }

    fn last(&self, partition: PartitionId) -> Result<Option<(Position, Bytes)>, BackboneError> {
        let last = "SELECT id, checksum, commit_bytes FROM commits
                    WHERE id BETWEEN ? AND ? ORDER BY id DESC";
        Ok(self.commits(last, partition, Position(0), 0)?.pop())
    }

    fn read(
        &self,
        partition: PartitionId,
        position: Position,
        bytes: usize,
    ) -> Result<Commits, BackboneError> {
        let from = "SELECT id, checksum, commit_bytes FROM commits
                    WHERE id BETWEEN ? AND ? ORDER BY id";
        self.commits(from, partition, position, bytes)
    }

    fn size(&self, partition: PartitionId) -> Result<u64, BackboneError> {
        let (first, last) = ids(partition);
        size(&self.connection, first, last).map_err(|error| failure(&error))
    }

    /// What `query` finds of a partition from `position` on, as much as fits into `bytes` but at least
    /// one.
    fn commits(
        &self,
        query: &str,
        partition: PartitionId,
        position: Position,
        bytes: usize,
    ) -> Result<Commits, BackboneError> {
        let failed = |error| failure(&error);
        let mut query = self.connection.prepare_cached(query).map_err(failed)?;
        let (_, last) = ids(partition);
        let mut rows = query.query(params![id_of(partition, position), last]).map_err(failed)?;
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
            if checksum(id, commit) != sum {
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
