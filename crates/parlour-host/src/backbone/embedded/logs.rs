//! What is known of the logs without a look at the disk.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parlour_core::durable::{PartitionId, Position};

/// All logs, as the thread that writes has them. Others look at them.
#[derive(Debug)]
pub(super) struct Logs {
    logs: Vec<Log>,
    /// The position that the next transaction has.
    next: AtomicU64,
}

#[derive(Debug, Default)]
struct Log {
    last: AtomicU64,
    /// The commits up to here have been let go.
    trimmed: AtomicU64,
    /// Of the commits that are in the table.
    bytes: AtomicU64,
}

/// The bytes by which positions rise.
const STEP: u64 = 1024;

impl Logs {
    /// Those of so many partitions, and that of the room.
    pub(super) fn new(partitions: u16) -> Self {
        let room = PartitionId::of_room(partitions);
        let logs = (0..=room.0).map(|_| Log::default()).collect();
        Self { logs, next: AtomicU64::new(1) }
    }

    /// None for a partition that there is not: a damaged database may name any.
    fn log(&self, partition: PartitionId) -> Option<&Log> {
        self.logs.get(usize::from(partition.0))
    }

    /// Whose they are.
    pub(super) fn partitions(&self) -> impl Iterator<Item = PartitionId> {
        (0..self.logs.len()).map(|number| PartitionId(number as u16))
    }

    pub(super) fn last(&self, partition: PartitionId) -> Position {
        Position(self.log(partition).map_or(0, |log| log.last.load(Relaxed)))
    }

    pub(super) fn trimmed(&self, partition: PartitionId) -> Position {
        Position(self.log(partition).map_or(0, |log| log.trimmed.load(Relaxed)))
    }

    pub(super) fn bytes(&self, partition: PartitionId) -> u64 {
        self.log(partition).map_or(0, |log| log.bytes.load(Relaxed))
    }

    /// The position of the next transaction.
    pub(super) fn next(&self) -> Position {
        Position(self.next.load(Relaxed))
    }

    /// How many bytes of commits were written from `position` on, roughly.
    pub(super) fn since(&self, position: Position) -> u64 {
        self.next().0.saturating_sub(position.0) * STEP
    }

    /// This log ends at `position`, and has so many bytes of commits.
    pub(super) fn set(&self, partition: PartitionId, position: Position, bytes: u64) {
        if let Some(log) = self.log(partition) {
            log.last.store(position.0, Relaxed);
            log.bytes.store(bytes, Relaxed);
        }
        self.next.fetch_max(position.next().0, Relaxed);
    }

    /// A commit of so many bytes is in the table, behind all that are there.
    pub(super) fn add(&self, partition: PartitionId, position: Position, bytes: u64) {
        if let Some(log) = self.log(partition) {
            log.last.store(position.0, Relaxed);
            log.bytes.fetch_add(bytes, Relaxed);
        }
        // Positions tell how long the logs are, so that nobody needs to look.
        let next = self.next().max(position.next());
        self.next.store(next.0 + bytes / STEP, Relaxed);
    }

    pub(super) fn trim(&self, partition: PartitionId, position: Position) {
        if let Some(log) = self.log(partition) {
            log.trimmed.fetch_max(position.0, Relaxed);
        }
    }

    /// Commits of so many bytes are not in the table any more.
    pub(super) fn remove(&self, partition: PartitionId, bytes: u64) {
        if let Some(log) = self.log(partition) {
            log.bytes.fetch_sub(bytes, Relaxed);
        }
    }
}
