//! A backbone that keeps everything in memory, for tests and for hosts that keep nothing.

use std::collections::BTreeMap;

use bytes::Bytes;
use parking_lot::Mutex;
use parlour_core::durable::{PartitionId, Position};

use super::{Ack, Backbone, BackboneError, Commits, Work};

/// Logs in memory. They last as long as this does: a host that is given it after another goes on
/// where that one was.
#[derive(Debug)]
pub struct Memory {
    /// Those of the partitions, and behind them that of the room.
    logs: Vec<Mutex<Log>>,
}

#[derive(Debug, Default)]
struct Log {
    commits: BTreeMap<Position, Bytes>,
    last: Position,
}

impl Memory {
    /// Empty logs.
    pub fn new(partitions: u16) -> Self {
        let last = PartitionId::of_room(partitions).0;
        Self { logs: (0..=last).map(|_| Mutex::default()).collect() }
    }

    fn log(&self, partition: PartitionId) -> parking_lot::MutexGuard<'_, Log> {
        self.logs[usize::from(partition.0)].lock()
    }
}

fn done<T: Send + 'static>(result: Result<T, BackboneError>) -> Work<'static, T> {
    Box::pin(std::future::ready(result))
}

impl Backbone for Memory {
    fn ack(&self) -> Ack {
        Ack::Memory
    }

    fn partitions(&self) -> u16 {
        self.logs.len() as u16 - 1
    }

    fn append(&self, partition: PartitionId, last: Position, commit: Bytes) -> Work<'_, Position> {
        let mut log = self.log(partition);
        if last != log.last {
            return done(Err(BackboneError::Fenced));
        }
        let position = last.next();
        log.last = position;
        log.commits.insert(position, commit);
        done(Ok(position))
    }

    fn last(&self, partition: PartitionId) -> Work<'_, Option<(Position, Bytes)>> {
        let log = self.log(partition);
        done(Ok(log.commits.last_key_value().map(|(position, it)| (*position, it.clone()))))
    }

    fn read(&self, partition: PartitionId, position: Position, bytes: usize) -> Work<'_, Commits> {
        let log = self.log(partition);
        let mut length = 0;
        let fits = |(_, commit): &(&Position, &Bytes)| {
            length += commit.len();
            length == commit.len() || length <= bytes
        };
        let commits = log.commits.range(position..).take_while(fits);
        done(Ok(commits.map(|(position, commit)| (*position, commit.clone())).collect()))
    }

    fn size(&self, partition: PartitionId) -> Work<'_, u64> {
        let log = self.log(partition);
        done(Ok(log.commits.values().map(|commit| commit.len() as u64).sum()))
    }

    fn trim(&self, partition: PartitionId, position: Position) -> Work<'_, ()> {
        let mut log = self.log(partition);
        if position >= log.last {
            return done(Err(BackboneError::Failed("the last commit is not let go".into())));
        }
        log.commits = log.commits.split_off(&position.next());
        done(Ok(()))
    }
}
