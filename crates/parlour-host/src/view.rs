//! Where the logs tell of deliveries that have ended.
//!
//! It is made from the logs and follows them: it may lag behind, and be lost, as each partition's
//! owner reads again what it has not seen.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use parking_lot::Mutex;
use parlour_core::durable::{PartitionId, Place, Position};
use rusqlite::{Connection, OptionalExtension as _, Transaction, params};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::backbone::BackboneError;
use crate::thread::Thread;

/// The version of its tables. Another is made anew.
const FORMAT: i64 = 2;
pub(crate) const FILE: &str = "view.db";
/// How many jobs are done in one transaction, and for how long others are waited for that can be done in
/// it too.
const BATCH: usize = 1024;
const GATHER: Duration = Duration::from_millis(50);
/// How many commits may wait for a file that cannot be written.
const MOST_TOLD: usize = 1_000_000;
/// One more than the greatest number of a delivery that has a place in an id of the view.
const NUMBERS: u64 = 1 << 48;

/// The way to it.
#[derive(Debug)]
pub(crate) enum View {
    /// For logs in memory.
    Memory(Mutex<HashMap<(PartitionId, u64), Place>>),
    /// In a file. A thread writes it, in the order of what it is told and asked.
    File(Thread<Job>),
}

pub(crate) enum Job {
    /// What a commit tells the end of.
    Add(PartitionId, Position, Vec<(u64, u32)>),
    /// The log begins behind this position.
    Forget(PartitionId, Position),
    Find(PartitionId, u64, oneshot::Sender<Option<Place>>),
    Seen(PartitionId, oneshot::Sender<Position>),
}

impl View {
    /// Opens it in `dir`, or in memory. One that cannot be read is made anew, or else kept in memory.
    pub(crate) fn open(dir: Option<&Path>) -> io::Result<Self> {
        let Some(dir) = dir else { return Ok(Self::Memory(Mutex::default())) };
        let path = dir.join(FILE);
        let open = || tables(Connection::open(&path)?);
        let connection = open().or_else(|error| {
            tracing::warn!(%error, "the view of what has ended is made anew");
            forget(dir).map_err(|_| error)?;
            open()
        });
        match connection {
            Ok(connection) => {
                Thread::start("parlour-view", move |jobs| run(connection, jobs)).map(Self::File)
            }
            Err(error) => {
                let path = path.display();
                tracing::warn!(%error, "cannot use {path}: where messages have ended is kept in memory");
                Ok(Self::Memory(Mutex::default()))
            }
        }
    }

    /// Tells which deliveries a commit tells the end of, and at which offsets.
    pub(crate) fn add(&self, partition: PartitionId, position: Position, settled: Vec<(u64, u32)>) {
        match self {
            Self::Memory(places) => {
                let settled = settled.into_iter();
                let place = |offset| Place { position, offset };
                places.lock().extend(settled.map(|(number, at)| ((partition, number), place(at))));
            }
            Self::File(thread) => thread.send(Job::Add(partition, position, settled)),
        }
    }

    /// Tells that the log of this partition begins behind `position`.
    pub(crate) fn forget(&self, partition: PartitionId, position: Position) {
        match self {
            Self::Memory(places) => {
                places.lock().retain(|(of, _), place| *of != partition || place.position > position)
            }
            Self::File(thread) => thread.send(Job::Forget(partition, position)),
        }
    }

    /// Where the log tells of the end of a delivery.
    pub(crate) async fn find(
        &self,
        partition: PartitionId,
        number: u64,
    ) -> Result<Option<Place>, BackboneError> {
        let thread = match self {
            Self::Memory(places) => return Ok(places.lock().get(&(partition, number)).copied()),
            Self::File(thread) => thread,
        };
        if number >= NUMBERS {
            return Ok(None);
        }
        let (found, place) = oneshot::channel();
        thread.send(Job::Find(partition, number, found));
        let broken = "the view of what has ended cannot be read";
        place.await.map_err(|_| BackboneError::Failed(broken.into()))
    }

    /// Up to where it knows the log of this partition.
    pub(crate) async fn seen(&self, partition: PartitionId) -> Position {
        let Self::File(thread) = self else { return Position::default() };
        let (seen, position) = oneshot::channel();
        thread.send(Job::Seen(partition, seen));
        position.await.unwrap_or_default()
    }
}

/// Removes the view in `dir`, if there is one. The next host makes it again.
pub(crate) fn forget(dir: &Path) -> io::Result<()> {
    for suffix in ["", "-wal", "-shm"] {
        match std::fs::remove_file(dir.join(format!("{FILE}{suffix}"))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn tables(connection: Connection) -> rusqlite::Result<Connection> {
    connection.pragma_update(None, "journal_mode", "wal")?;
    // What a power cut takes of the end is read from the logs again. Before that it must be whole, as
    // it says up to where it knows them.
    let synchronous = if parlour_core::bug!("view_not_synced") { "off" } else { "normal" };
    connection.pragma_update(None, "synchronous", synchronous)?;
    let format: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if format != FORMAT {
        connection.execute_batch(&format!(
            "BEGIN;
             DROP TABLE IF EXISTS settled;
             DROP TABLE IF EXISTS seen;
             CREATE TABLE settled (
               -- The partition in the upper 16 bits, the number of the delivery in the lower 48.
               id INTEGER PRIMARY KEY,
               position INTEGER NOT NULL,
               byte_offset INTEGER NOT NULL);
             CREATE TABLE seen (
               partition INTEGER PRIMARY KEY,
               -- Up to here it knows the log.
               position INTEGER NOT NULL,
               -- Up to here the log was let go.
               forgotten INTEGER NOT NULL);
             PRAGMA user_version = {FORMAT};
             COMMIT;"
        ))?;
    }
    Ok(connection)
}

fn run(mut connection: Connection, jobs: &mpsc::Receiver<Job>) {
    // What it was told and has not written. It must not say that it knows what comes later without.
    let mut told = Vec::new();
    while let Ok(first) = jobs.recv() {
        let is_told = |job: &Job| matches!(job, Job::Add(..) | Job::Forget(..));
        let (more, asked): (Vec<_>, Vec<_>) = gather(first, jobs).into_iter().partition(is_told);
        if told.len() > MOST_TOLD {
            // The next host reads it from the logs. Whoever asks this one is told that it cannot.
            continue;
        }
        told.extend(more);
        match work(&mut connection, &told, asked) {
            Ok(()) => told.clear(),
            Err(error) => tracing::error!(%error, "the view of what has ended cannot be used"),
        }
    }
}

/// The jobs of one transaction. Nothing is waited for behind one that somebody may wait for.
fn gather(first: Job, jobs: &mpsc::Receiver<Job>) -> Vec<Job> {
    let until = Instant::now() + GATHER;
    let mut batch = vec![first];
    while batch.len() < BATCH && matches!(batch.last(), Some(Job::Add(..))) {
        let left = until.saturating_duration_since(Instant::now());
        let Ok(job) = jobs.recv_timeout(left) else { break };
        batch.push(job);
    }
    batch
}

/// Writes what it was `told`, all of it or nothing, and answers what it was `asked`.
fn work(connection: &mut Connection, told: &[Job], asked: Vec<Job>) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    for job in told {
        match job {
            Job::Add(partition, position, settled) => {
                add(&transaction, *partition, *position, settled)?;
            }
            Job::Forget(partition, position) => forget_to(&transaction, *partition, *position)?,
            Job::Find(..) | Job::Seen(..) => {}
        }
    }
    for job in asked {
        // Whoever asked may not wait any more.
        match job {
            Job::Find(partition, number, found) => {
                let place = transaction
                    .prepare_cached("SELECT position, byte_offset FROM settled WHERE id = ?")?
                    .query_row([id_of(partition, number)], |row| {
                        let position = Position(row.get::<_, i64>(0)? as u64);
                        Ok(Place { position, offset: row.get(1)? })
                    })
                    .optional()?;
                let _ = found.send(place);
            }
            Job::Seen(partition, seen) => {
                let position: Option<i64> = transaction
                    .prepare_cached("SELECT position FROM seen WHERE partition = ?")?
                    .query_row([partition.0], |row| row.get(0))
                    .optional()?;
                let _ = seen.send(Position(position.unwrap_or_default() as u64));
            }
            Job::Add(..) | Job::Forget(..) => {}
        }
    }
    transaction.commit()
}

fn forget_to(
    transaction: &Transaction<'_>,
    partition: PartitionId,
    position: Position,
) -> rusqlite::Result<()> {
    let (first, last) = (id_of(partition, 0), id_of(partition, NUMBERS - 1));
    transaction
        .prepare_cached("DELETE FROM settled WHERE id BETWEEN ? AND ? AND position <= ?")?
        .execute(params![first, last, position.0 as i64])?;
    transaction
        .prepare_cached("UPDATE seen SET forgotten = ? WHERE partition = ?")?
        .execute(params![position.0 as i64, partition.0])?;
    Ok(())
}

fn add(
    transaction: &Transaction<'_>,
    partition: PartitionId,
    position: Position,
    settled: &[(u64, u32)],
) -> rusqlite::Result<()> {
    let mut insert =
        transaction.prepare_cached("INSERT OR REPLACE INTO settled VALUES (?, ?, ?)")?;
    for (number, offset) in settled {
        insert.execute(params![id_of(partition, *number), position.0 as i64, offset])?;
    }
    transaction
        .prepare_cached(
            "INSERT INTO seen VALUES (?, ?, 0)
             ON CONFLICT (partition) DO UPDATE SET position = excluded.position",
        )?
        .execute(params![partition.0, position.0 as i64])?;
    Ok(())
}

pub(crate) fn id_of(partition: PartitionId, number: u64) -> i64 {
    (i64::from(partition.0) << 48) | number as i64
}

/// Which partition's delivery an id of the view stands for.
pub(crate) fn partition_of(id: i64) -> PartitionId {
    PartitionId((id >> 48) as u16)
}
