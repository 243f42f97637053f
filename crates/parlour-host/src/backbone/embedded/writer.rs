//! The thread that writes.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Duration;

use bytes::Bytes;
use parlour_core::durable::{PartitionId, Position};
use rusqlite::{Connection, Transaction, params};
use tokio::sync::watch;
use tokio::time::Instant;

use super::head::Head;
use super::logs::Logs;
use super::reserve::Reserve;
use super::sweep::Sweep;
use super::{Done, End, PAGE, checksum, failure, id_of, write_end};
use crate::backbone::BackboneError;

/// How many jobs go into one transaction at the most, and after how many bytes there are enough.
const JOBS: usize = 1024;
const BYTES: usize = 4 << 20;
/// After how many bytes, roughly, the write-ahead log is moved into the database. Shorter, and it is
/// done too often; longer, and a commit waits for it too long, and it grows, which takes longer than
/// to write over what it had.
const LOG: usize = 2 << 20;
/// How long to look for another job, where nobody else wants the processor, before to sleep. One who
/// sends a message behind the answer to the one before is there by then, and to wake takes long.
const AWAKE: Duration = Duration::from_micros(100);
/// How often it is tried to have a reserve again, and looked whether the database is still there.
const PAUSE: Duration = Duration::from_secs(1);
/// How many commits are looked at, of those that may go, in a transaction that others wait for, and in
/// one that nobody waits for.
const SLICE: usize = 64;
const IDLE_SLICE: usize = 1024;

pub(super) enum Write {
    Append(Append),
    Trim(PartitionId, Position, Done<()>),
}

pub(super) struct Append {
    pub(super) partition: PartitionId,
    /// Where the last commit has to be.
    pub(super) last: Position,
    pub(super) commit: Bytes,
    pub(super) done: Done<Position>,
}

pub(super) struct Writer {
    connection: Connection,
    logs: Arc<Logs>,
    head: Head,
    reserve: Reserve,
    sweep: Sweep,
    /// Whether commits are being written.
    writing: watch::Sender<bool>,
    database: Database,
    /// When it is next looked at what changes without a word.
    looks: Instant,
    /// Bytes written since the write-ahead log was last moved, roughly.
    unmoved: usize,
    /// Why nothing is written any more.
    failed: Option<BackboneError>,
}

/// The file of the database, as it was opened.
pub(super) struct Database {
    path: PathBuf,
    /// Its device and inode.
    file: (u64, u64),
}

impl Database {
    pub(super) fn at(path: PathBuf) -> io::Result<Self> {
        let file = file_at(&path)?;
        Ok(Self { path, file })
    }

    /// Whether it is still under its name. What is written to it otherwise nobody finds again.
    fn is_there(&self) -> bool {
        match file_at(&self.path) {
            Ok(file) => file == self.file,
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        }
    }
}

fn file_at(path: &Path) -> io::Result<(u64, u64)> {
    path.metadata().map(|found| (found.dev(), found.ino()))
}

/// Waits for a job, but not for ever.
fn await_job(queue: &Receiver<Write>) -> Result<Write, RecvTimeoutError> {
    let asleep = Instant::now() + AWAKE;
    while Instant::now() < asleep {
        match queue.try_recv() {
            Ok(job) => return Ok(job),
            Err(TryRecvError::Empty) => std::thread::yield_now(),
            Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
        }
    }
    queue.recv_timeout(PAUSE)
}

impl Writer {
    pub(super) fn new(
        connection: Connection,
        logs: Arc<Logs>,
        head: Head,
        reserve: Reserve,
        writing: watch::Sender<bool>,
        database: Database,
    ) -> Self {
        let sweep = Sweep::new(logs.clone());
        let looks = Instant::now() + PAUSE;
        let (unmoved, failed) = (0, None);
        Self { connection, logs, head, reserve, sweep, writing, database, looks, unmoved, failed }
    }

    pub(super) fn run(mut self, queue: &Receiver<Write>) {
        loop {
            let first = if self.sweep.is_due() && self.failed.is_none() {
                match queue.try_recv() {
                    Ok(first) => first,
                    Err(TryRecvError::Empty) => {
                        self.sweep_alone();
                        continue;
                    }
                    Err(TryRecvError::Disconnected) => return self.close(),
                }
            } else {
                match await_job(queue) {
                    Ok(first) => first,
                    Err(RecvTimeoutError::Timeout) => {
                        self.idle();
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => return self.close(),
                }
            };
            let (mut bytes, mut jobs) = (0, 0);
            let mut appends = Vec::new();
            let mut next = Some(first);
            while let Some(job) = next {
                match job {
                    Write::Append(append) => {
                        bytes += append.commit.len();
                        appends.push(append);
                    }
                    Write::Trim(partition, position, done) => {
                        // Whoever asked may not wait any more.
                        let _ = done.send(self.trim(partition, position));
                    }
                }
                jobs += 1;
                let has_room = jobs < JOBS && bytes < BYTES;
                next = if has_room { queue.try_recv().ok() } else { None };
                if has_room && next.is_none() {
                    // On the same processor another partition may be about to append.
                    std::thread::yield_now();
                    next = queue.try_recv().ok();
                }
            }
            self.writing.send_replace(true);
            self.append(appends);
            self.writing.send_replace(false);
            self.look_around();
        }
    }

    /// Writes down where the logs end, so that a host that starts misses what is gone by then.
    fn close(&mut self) {
        if self.failed.is_some() {
            return;
        }
        let mut close = || {
            let transaction = self.connection.transaction()?;
            write_ends(&transaction, &self.logs, &[])?;
            transaction.commit()
        };
        if let Err(error) = close() {
            tracing::warn!(%error, "where the logs end is not written down");
        }
    }

    fn trim(&mut self, partition: PartitionId, position: Position) -> Result<(), BackboneError> {
        if position >= self.logs.last(partition) {
            return Err(BackboneError::Failed("the last commit is not let go".into()));
        }
        self.logs.trim(partition, position);
        self.sweep.ask();
        Ok(())
    }

    /// Does all of them in one transaction, and answers them.
    fn append(&mut self, appends: Vec<Append>) {
        let mut admitted: Vec<Append> = Vec::with_capacity(appends.len());
        for append in appends {
            let is_first = admitted.iter().all(|it| it.partition != append.partition);
            let is_next = append.last == self.logs.last(append.partition)
                || parlour_core::bug!("position_ignored");
            if is_first && is_next {
                admitted.push(append);
            } else {
                let _ = append.done.send(Err(BackboneError::Fenced));
            }
        }
        if admitted.is_empty() {
            return;
        }
        let mut written = self.write(&admitted, SLICE);
        if matches!(written, Err(BackboneError::Full(_)))
            && !parlour_core::bug!("reserve_kept")
            && self.reserve.give()
        {
            written = self.write(&admitted, SLICE);
        }
        written = match written {
            Err(BackboneError::Failed(_)) if parlour_core::bug!("fsync_tried_again") => {
                self.failed = None;
                self.write(&admitted, SLICE)
            }
            Err(BackboneError::Full(_)) if parlour_core::bug!("full_disk_unnoticed") => {
                Ok(self.logs.next())
            }
            written => written,
        };
        for append in admitted {
            let _ = append.done.send(written.clone());
        }
    }

    /// Lets go of what may go, while nobody waits.
    fn sweep_alone(&mut self) {
        match self.write(&[], IDLE_SLICE) {
            Ok(_) => {}
            Err(BackboneError::Full(_)) => {
                // Without, it has to wait for room.
                if !self.reserve.give() {
                    self.sweep.put_off();
                }
            }
            Err(error) => tracing::error!(%error, "what is too old cannot be let go"),
        }
    }

    /// Sees once in a while to what changes without a word.
    fn look_around(&mut self) {
        let now = Instant::now();
        if now < self.looks {
            return;
        }
        self.looks = now + PAUSE;
        if !self.reserve.is_there() {
            self.reserve.take();
        }
        if self.failed.is_none() && !self.database.is_there() {
            let path = self.database.path.display();
            self.fail(&BackboneError::Failed(format!("{path} was removed or replaced")));
        }
    }

    fn idle(&mut self) {
        self.look_around();
        self.sweep.hurry();
        if self.failed.is_none()
            && let Err(error) = super::sweep::shrink(&self.connection)
        {
            self.fail(&failure(&error));
        }
    }

    /// Returns the position of the commits.
    fn write(&mut self, appends: &[Append], slice: usize) -> Result<Position, BackboneError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        let position = self.logs.next();
        // The page that they begin in is written once more.
        let bytes = PAGE + appends.iter().map(|it| it.commit.len()).sum::<usize>();
        let is_long = self.unmoved + bytes >= LOG;
        self.sweep.count();
        let slice = if self.sweep.is_due() { slice } else { 0 };
        if parlour_core::bug!("acknowledged_ahead") {
            self.head.note(position);
        }
        if let Err(error) = self.transact(appends, position, slice, is_long) {
            let error = failure(&error);
            self.fail(&error);
            return Err(error);
        }
        self.unmoved += bytes;
        // What only deletes leaves nothing at its position.
        if !appends.is_empty() && !parlour_core::bug!("acknowledged_unnoted") {
            self.head.note(position);
        }
        for Append { partition, commit, .. } in appends {
            self.logs.add(*partition, position, commit.len() as u64);
        }
        if is_long {
            self.unmoved = 0;
            let moved = self.connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
            // These commits are on the disk, but none can follow where this failed. Where there is
            // no room, it is done later: what is in the write-ahead log is safe there.
            if let Err(error) = moved {
                self.fail(&failure(&error));
            }
        }
        Ok(position)
    }

    /// What is on the disk is not known any more, and another attempt would not tell: the kernel may
    /// have dropped the pages that it could not write.
    fn fail(&mut self, error: &BackboneError) {
        if !matches!(error, BackboneError::Full(_)) {
            self.failed = Some(error.clone());
        }
    }

    fn transact(
        &mut self,
        appends: &[Append],
        position: Position,
        slice: usize,
        is_long: bool,
    ) -> rusqlite::Result<()> {
        // One alone is a transaction of its own.
        if let ([append], false, 0) = (appends, is_long, slice) {
            return insert(&self.connection, append, position);
        }
        // Dropped before its end, it is rolled back.
        let transaction = self.connection.transaction()?;
        let swept = if slice > 0 { Some(self.sweep.slice(&transaction, slice)?) } else { None };
        if is_long || swept.is_some() {
            let freed = swept.as_ref().map(|swept| &swept.freed[..]);
            write_ends(&transaction, &self.logs, freed.unwrap_or_default())?;
        }
        for append in appends {
            insert(&transaction, append, position)?;
        }
        transaction.commit()?;
        if let Some(swept) = swept {
            self.sweep.done(swept);
        }
        Ok(())
    }
}

fn insert(connection: &Connection, append: &Append, position: Position) -> rusqlite::Result<()> {
    let Append { partition, commit, .. } = append;
    let id = id_of(*partition, position);
    let mut insert = connection.prepare_cached("INSERT INTO commits VALUES (?, ?, ?)")?;
    insert.execute(params![id, checksum(id, commit), &**commit]).map(drop)
}

/// Writes where the logs end, so that a host that starts need not look for it further back.
fn write_ends(transaction: &Transaction<'_>, logs: &Logs, freed: &[u64]) -> rusqlite::Result<()> {
    for partition in logs.partitions() {
        let freed = freed.get(usize::from(partition.0)).copied().unwrap_or_default();
        let (position, bytes) = (logs.last(partition), logs.bytes(partition) - freed);
        write_end(transaction, &End { partition, position, bytes })?;
    }
    Ok(())
}
