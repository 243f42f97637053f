//! The thread that writes.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use bytes::Bytes;
use parlour_core::durable::{PartitionId, Position};
use rusqlite::{Connection, params};

use super::reserve::Reserve;
use super::{Done, checksum, failure, id_of, ids, position_of, size};
use crate::backbone::BackboneError;

/// How many jobs go into one transaction at the most, and after how many bytes there are enough.
const JOBS: usize = 1024;
const BYTES: usize = 4 << 20;
/// After how many bytes of commits the write-ahead log is moved into the database. Shorter, and it is
/// done too often; longer, and a commit waits for it too long.
const LOG: usize = 8 << 20;
/// How often it is tried to have a reserve again.
const PAUSE: Duration = Duration::from_secs(1);

pub(super) enum Write {
    Append(PartitionId, Position, Bytes, Done<()>),
    Trim(PartitionId, Position, Done<u64>),
}

impl Write {
    fn weight(&self) -> usize {
        match self {
            Self::Append(_, _, commit, _) => commit.len(),
            Self::Trim(..) => 0,
        }
    }

    /// Answers whoever asked and may not wait any more.
    fn done(self, result: Result<u64, BackboneError>) {
        match self {
            Self::Append(.., done) => drop(done.send(result.map(drop))),
            Self::Trim(.., done) => drop(done.send(result)),
        }
    }
}

pub(super) struct Writer {
    connection: Connection,
    /// The last position of each partition.
    last: Vec<Position>,
    reserve: Reserve,
    /// Bytes written since it was last moved.
    unmoved: usize,
    /// Why nothing is written any more.
    failed: Option<BackboneError>,
}

impl Writer {
    pub(super) fn new(
        connection: Connection,
        partitions: u16,
        reserve: Reserve,
    ) -> rusqlite::Result<Self> {
        let last = |partition| {
            let (first, most) = ids(PartitionId(partition));
            let last = "SELECT max(id) FROM commits WHERE id BETWEEN ? AND ?";
            let id: Option<i64> =
                connection.query_row(last, params![first, most], |row| row.get(0))?;
            Ok(id.map_or(Position(0), position_of))
        };
        let last = (0..partitions).map(last).collect::<rusqlite::Result<_>>()?;
        Ok(Self { connection, last, reserve, unmoved: 0, failed: None })
    }

    pub(super) fn run(mut self, queue: &Receiver<Write>) {
        loop {
            let first = match queue.recv_timeout(PAUSE) {
                Ok(first) => first,
                Err(RecvTimeoutError::Timeout) => {
                    if !self.reserve.is_there() {
                        self.reserve.take();
                    }
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let mut bytes = first.weight();
            let mut jobs = vec![first];
            while jobs.len() < JOBS
                && bytes < BYTES
                && let Ok(job) = queue.try_recv()
            {
                bytes += job.weight();
                jobs.push(job);
            }
            self.work(jobs);
        }
    }

    /// Does all of `jobs` in one transaction, and answers them.
    fn work(&mut self, jobs: Vec<Write>) {
        let mut last = self.last.clone();
        let mut admitted = Vec::with_capacity(jobs.len());
        for job in jobs {
            match job {
                Write::Append(partition, position, ..) => {
                    let last = &mut last[usize::from(partition.0)];
                    if position == last.next() {
                        *last = position;
                        admitted.push(job);
                    } else {
                        job.done(Err(BackboneError::Fenced));
                    }
                }
                Write::Trim(partition, position, _) => {
                    if position < last[usize::from(partition.0)] {
                        admitted.push(job);
                    } else {
                        let error = "the last commit is not let go".to_owned();
                        job.done(Err(BackboneError::Failed(error)));
                    }
                }
            }
        }
        let mut written = self.write(&admitted);
        if matches!(written, Err(BackboneError::Full(_))) && self.reserve.give() {
            written = self.write(&admitted);
        }
        match written {
            Ok(freed) => {
                self.last = last;
                admitted.into_iter().zip(freed).for_each(|(job, freed)| job.done(Ok(freed)));
            }
            Err(error) => {
                // What is on the disk is not known any more, and another attempt would not tell: the
                // kernel may have dropped the pages that it could not write.
                if !matches!(error, BackboneError::Full(_)) {
                    self.failed = Some(error.clone());
                }
                admitted.into_iter().for_each(|job| job.done(Err(error.clone())));
            }
        }
    }

    /// Returns for each job how many bytes it let go.
    fn write(&mut self, jobs: &[Write]) -> Result<Vec<u64>, BackboneError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        if jobs.is_empty() {
            return Ok(Vec::new());
        }
        let freed = self.transact(jobs).map_err(|error| failure(&error))?;
        self.unmoved += jobs.iter().map(Write::weight).sum::<usize>();
        if self.unmoved >= LOG {
            self.unmoved = 0;
            let moved = self.connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
            match moved.map_err(|error| failure(&error)) {
                // What is in the log is safe there. It is moved when there is room.
                Ok(()) | Err(BackboneError::Full(_)) => {}
                // These commits are on the disk, but none can follow.
                Err(error) => self.failed = Some(error),
            }
        }
        Ok(freed)
    }

    fn transact(&mut self, jobs: &[Write]) -> rusqlite::Result<Vec<u64>> {
        let mut freed = vec![0; jobs.len()];
        // Dropped before its end, it is rolled back.
        let transaction = self.connection.transaction()?;
        {
            let mut insert = transaction.prepare_cached("INSERT INTO commits VALUES (?, ?, ?)")?;
            let mut delete =
                transaction.prepare_cached("DELETE FROM commits WHERE id BETWEEN ? AND ?")?;
            for (job, freed) in jobs.iter().zip(&mut freed) {
                match job {
                    Write::Append(partition, position, commit, _) => {
                        let id = id_of(*partition, *position);
                        insert.execute(params![id, checksum(id, commit), &**commit])?;
                    }
                    Write::Trim(partition, position, _) => {
                        let (first, _) = ids(*partition);
                        let last = id_of(*partition, *position);
                        *freed = size(&transaction, first, last)?;
                        delete.execute(params![first, last])?;
                    }
                }
            }
        }
        transaction.commit()?;
        Ok(freed)
    }
}
