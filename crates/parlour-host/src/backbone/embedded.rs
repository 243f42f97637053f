//! A backbone on the disk of this host: an SQLite database with one table of commits.
//!
//! `docs/storage.md` describes the files, and decision 12 why they are SQLite's. A thread writes: it
//! takes all that waits, puts it into one transaction, answers when the disk has it, and moves what was
//! written from the write-ahead log into the database. Another reads.

pub(crate) mod head;
mod logs;
mod reader;
mod reserve;
mod sweep;
pub(crate) mod tail;
#[cfg(test)]
mod tests;
mod writer;

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use parlour_core::durable::{PartitionId, Position};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, Transaction, ffi, params};
use thiserror::Error;
use tokio::sync::{oneshot, watch};

use super::{Ack, Backbone, BackboneError, Commits, Replay, Work};
use crate::thread::Thread;
use head::Head;
use logs::Logs;
use reader::{Read, Reader};
use reserve::Reserve;
use writer::{Append, Database, Write, Writer};

/// The version of the files that this version writes.
const FORMAT: i64 = 1;

/// Marks the database as ours for `file` and its like: "parl".
const APPLICATION_ID: i64 = 0x7061_726c;
/// Of a new database, in bytes.
const PAGE: usize = 8192;
pub(crate) const DATABASE: &str = "parlour.db";
pub(crate) const LOCK: &str = "lock";
/// Space that is given back when the disk is full, so that what was accepted can still end.
const RESERVE: &str = "reserve";

/// Logs in a directory of their own, which no other process opens meanwhile.
#[derive(Debug)]
pub struct Embedded {
    dir: PathBuf,
    partitions: u16,
    logs: Arc<Logs>,
    /// Whether the reserve is there.
    has_room: Arc<AtomicBool>,
    /// Whether a transaction is under way.
    busy: watch::Receiver<bool>,
    writer: Thread<Write>,
    reader: Thread<Read>,
    /// Held until the host ends. Last, so that all is closed when another host may open it.
    _lock: File,
}

/// Why a data directory cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process has it.
    #[error("another host uses {0}")]
    InUse(PathBuf),
    /// It cannot be made, read or written.
    #[error("cannot use {path}: {source}")]
    Io {
        /// What was opened.
        path: PathBuf,
        /// Why it could not be.
        source: io::Error,
    },
    /// Its files were written by a later version.
    #[error("{path} has format {found}, and this version knows up to {FORMAT}")]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its format.
        found: i64,
    },
    /// Its files were written by a version that kept them in another way.
    #[error("{path} has format {found}, and this version knows only {FORMAT}")]
    Older {
        /// The database.
        path: PathBuf,
        /// Its format.
        found: i64,
    },
    /// Its files are no database of ours.
    #[error("{0} is no database of Parlour")]
    Foreign(PathBuf),
    /// The room is divided in another way.
    #[error("the room in {path} has {found} partitions, not {asked}")]
    Partitions {
        /// The database.
        path: PathBuf,
        /// How many it has.
        found: u16,
        /// How many were asked for.
        asked: u16,
    },
    /// Commits that were on the disk are not readable any more.
    #[error("{path} is damaged: {commits} commits lie behind the end of its write-ahead log")]
    Damaged {
        /// The database.
        path: PathBuf,
        /// How many are lost.
        commits: u32,
    },
    /// Commits that were acknowledged are not there any more.
    #[error(
        "{path} is damaged: what was acknowledged reaches to position {acknowledged}, and what is \
         there ends at {last}"
    )]
    Behind {
        /// The database.
        path: PathBuf,
        /// The position of the last commit that was acknowledged.
        acknowledged: u64,
        /// That of the last one that is there.
        last: u64,
    },
    /// Its write-ahead log cannot be moved, as somebody reads what was there before.
    #[error("another program reads {0}, so that its write-ahead log cannot be moved")]
    Read(PathBuf),
    /// The database does not open.
    #[error("cannot open {path}: {source}")]
    Database {
        /// The database.
        path: PathBuf,
        /// What SQLite says.
        source: rusqlite::Error,
    },
}

impl Embedded {
    /// Opens the logs in `dir`, which is made if it is not there. A room has `partitions` of them for
    /// good.
    pub fn open(dir: &Path, partitions: u16) -> Result<Self, OpenError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::Io { path, source }
        };
        let lock = lock(dir)?;
        let path = dir.join(DATABASE);
        let acknowledged = head::acknowledged(dir).unwrap_or_else(|error| {
            tracing::warn!(%error, "up to where the logs were acknowledged is not known");
            Position(0)
        });
        let (connection, last) = database(&path, partitions, acknowledged)?;
        let failed = |source| OpenError::Database { path: path.clone(), source };
        let logs = Arc::new(read_ends(&connection, partitions).map_err(failed)?);
        let head = Head::open(dir, last);
        // What a crash of the machine leaves of a new directory is looked for by name.
        sync(dir).map_err(io(dir))?;
        let reader = Connection::open(&path).and_then(settle).map_err(failed)?;
        let reader = Reader::new(reader, logs.clone());
        let has_room = Arc::new(AtomicBool::new(true));
        let reserve = Reserve::new(dir.join(RESERVE), has_room.clone());
        let (writing, busy) = watch::channel(false);
        let database = Database::at(path.clone()).map_err(io(&path))?;
        let writer = Writer::new(connection, logs.clone(), head, reserve, writing, database);
        let reader = Thread::start("parlour-read", move |jobs| reader.run(jobs));
        let writer = Thread::start("parlour-write", move |jobs| writer.run(jobs));
        Ok(Self {
            dir: dir.to_owned(),
            partitions,
            logs,
            has_room,
            busy,
            writer: writer.map_err(io(&path))?,
            reader: reader.map_err(io(&path))?,
            _lock: lock,
        })
    }
}

/// Takes a directory, which is made if it is not there, for this process alone.
pub(crate) fn lock(dir: &Path) -> Result<File, OpenError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::Io { path, source }
    };
    std::fs::create_dir_all(dir).map_err(io(dir))?;
    let path = dir.join(LOCK);
    let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let lock = lock.map_err(io(&path))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse(dir.to_owned())),
        Err(TryLockError::Error(source)) => Err(OpenError::Io { path, source }),
    }
}

/// Opens the database, and makes its tables if it is new. Returns the position of its last commit,
/// which must not be behind what was `acknowledged`.
fn database(
    path: &Path,
    partitions: u16,
    acknowledged: Position,
) -> Result<(Connection, Position), OpenError> {
    let failed = |source| OpenError::Database { path: path.to_owned(), source };
    let not_behind = |last: Position| {
        let path = path.to_owned();
        let behind = OpenError::Behind { path, acknowledged: acknowledged.0, last: last.0 };
        if last < acknowledged { Err(behind) } else { Ok(last) }
    };
    // Beside a database that is made anew, SQLite deletes the write-ahead log of another.
    if path.metadata().map_or(0, |found| found.len()) == 0 {
        not_behind(Position(0))?;
    }
    let connection = Connection::open(path).map_err(failed)?;
    // Where this is refused, the write-ahead log stays as it is: closing would move it and forget
    // what is behind its end.
    let keep = DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE;
    connection.set_db_config(keep, true).map_err(failed)?;
    let is_new = is_empty(&connection).map_err(failed)?;
    if is_new {
        connection.pragma_update(None, "page_size", PAGE as i64).map_err(failed)?;
        connection.pragma_update(None, "auto_vacuum", "incremental").map_err(failed)?;
    } else {
        // Before anything that would change what is another's.
        check_format(path, &connection)?;
    }
    let connection = settle(connection).map_err(failed)?;
    if is_new {
        make_tables(&connection, partitions).map_err(failed)?;
    }
    let commits = tail::commits_behind_the_end(&connection).map_err(failed)?;
    if commits > 1 {
        return Err(OpenError::Damaged { path: path.to_owned(), commits });
    }
    let last = not_behind(last_commit(&connection).map_err(failed)?)?;
    // After a failed fsync the log may be well in the kernel's memory and not on the disk. Nothing is
    // acknowledged that rests on it before it was moved, and that has succeeded.
    let move_all = || {
        let pragma = "PRAGMA wal_checkpoint(TRUNCATE)";
        connection.query_row(pragma, [], |row| {
            let (is_busy, frames, moved): (bool, i64, i64) =
                (row.get(0)?, row.get(1)?, row.get(2)?);
            Ok(!is_busy || frames == moved)
        })
    };
    let mut moved = move_all();
    if let Err(error) = &moved
        && let BackboneError::Full(_) = failure(error)
        && std::fs::remove_file(path.with_file_name(RESERVE)).is_ok()
    {
        moved = move_all();
    }
    if !moved.map_err(failed)? {
        return Err(OpenError::Read(path.to_owned()));
    }
    connection.set_db_config(keep, false).map_err(failed)?;
    let found = connection.query_row("SELECT partitions FROM room", [], |row| row.get(0));
    let found: u16 = found.map_err(failed)?;
    if found != partitions {
        return Err(OpenError::Partitions { path: path.to_owned(), found, asked: partitions });
    }
    Ok((connection, last))
}

/// The position of the last commit of all logs, which is never let go. 0 if there is none.
fn last_commit(connection: &Connection) -> rusqlite::Result<Position> {
    let last = "SELECT coalesce(max(id), 0) FROM commits";
    connection.query_row(last, [], |row| Ok(place_of(row.get(0)?).1))
}

/// Makes the tables of a new room.
pub(crate) fn make_tables(connection: &Connection, partitions: u16) -> rusqlite::Result<()> {
    connection.execute_batch(&format!(
        "BEGIN IMMEDIATE;
         CREATE TABLE room (partitions INTEGER NOT NULL);
         INSERT INTO room VALUES ({partitions});
         CREATE TABLE commits (
           -- The position in the upper 48 bits, the partition in the lower 16.
           id INTEGER PRIMARY KEY,
           -- CRC-32 of the id, big-endian, and of the commit.
           checksum INTEGER NOT NULL,
           commit_bytes BLOB NOT NULL);
         CREATE TABLE ends (
           partition INTEGER PRIMARY KEY,
           -- Of its last commit, but for commits behind the greatest of these positions.
           position INTEGER NOT NULL,
           -- Of all its commits up to there.
           commit_bytes INTEGER NOT NULL,
           -- CRC-32 of these three, big-endian.
           checksum INTEGER NOT NULL);
         PRAGMA application_id = {APPLICATION_ID};
         PRAGMA user_version = {FORMAT};
         COMMIT;"
    ))
}

/// Whether nobody has made tables yet.
pub(crate) fn is_empty(connection: &Connection) -> rusqlite::Result<bool> {
    let tables = "SELECT count(*) FROM sqlite_schema";
    connection.query_row(tables, [], |row| Ok(row.get::<_, i64>(0)? == 0))
}

/// Whether a database is ours, and of the format that this version reads.
pub(crate) fn check_format(path: &Path, connection: &Connection) -> Result<(), OpenError> {
    let number = |pragma: &str| {
        let number = connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
        number.map_err(|source| OpenError::Database { path: path.to_owned(), source })
    };
    if number("application_id")? != APPLICATION_ID {
        return Err(OpenError::Foreign(path.to_owned()));
    }
    match number("user_version")? {
        FORMAT => Ok(()),
        found if found > FORMAT => Err(OpenError::Newer { path: path.to_owned(), found }),
        found => Err(OpenError::Older { path: path.to_owned(), found }),
    }
}

/// A connection as both threads have it.
fn settle(connection: Connection) -> rusqlite::Result<Connection> {
    connection.busy_timeout(Duration::from_secs(10))?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    // Each transaction is on the disk when its commit returns.
    let synchronous = if parlour_core::bug!("no_fsync") { "off" } else { "full" };
    connection.pragma_update(None, "synchronous", synchronous)?;
    // The writer does this itself: SQLite keeps to itself what goes wrong when it does.
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    Ok(connection)
}

pub(crate) fn sync(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Reads where the logs end.
fn read_ends(connection: &Connection, partitions: u16) -> rusqlite::Result<Logs> {
    let logs = Logs::new(partitions);
    let ends = stored_ends(connection, partitions)?.unwrap_or_else(|| {
        tracing::warn!("where the logs end is not known: all of them are read");
        Vec::new()
    });
    let mut seen = Position(0);
    for End { partition, position, bytes } in ends {
        logs.set(partition, position, bytes);
        seen = seen.max(position);
    }
    let behind = "SELECT id, length(commit_bytes) FROM commits WHERE id >= ? ORDER BY id";
    let mut behind = connection.prepare(behind)?;
    let mut rows = behind.query(params![id_of(PartitionId(0), seen.next())])?;
    while let Some(row) = rows.next()? {
        let (partition, position) = place_of(row.get(0)?);
        logs.add(partition, position, row.get::<_, i64>(1)? as u64);
    }
    Ok(logs)
}

/// Where a log ended when it was last written down.
pub(crate) struct End {
    pub(crate) partition: PartitionId,
    /// Of its last commit, but for those behind the greatest of these positions. 0 if it was empty.
    pub(crate) position: Position,
    /// Of all its commits up to there.
    pub(crate) bytes: u64,
}

impl End {
    fn checksum(&self) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        for number in [u64::from(self.partition.0), self.position.0, self.bytes] {
            hasher.update(&number.to_be_bytes());
        }
        hasher.finalize()
    }
}

/// Where each log ended when that was last written down: of all of them or of none, or `None` if what
/// is there is damaged.
pub(crate) fn stored_ends(
    connection: &Connection,
    partitions: u16,
) -> rusqlite::Result<Option<Vec<End>>> {
    let mut ends = Vec::new();
    let query = "SELECT partition, position, commit_bytes, checksum FROM ends ORDER BY partition";
    let mut query = connection.prepare(query)?;
    let mut rows = query.query([])?;
    while let Some(row) = rows.next()? {
        let numbers = [0, 1, 2, 3].map(|column| row.get::<_, i64>(column));
        let [Ok(partition), Ok(position), Ok(bytes), Ok(sum)] = numbers else { return Ok(None) };
        let partition = PartitionId(partition as u16);
        let end = End { partition, position: Position(position as u64), bytes: bytes as u64 };
        // One that is missing would be taken for that of an empty log.
        if usize::from(partition.0) != ends.len() || i64::from(end.checksum()) != sum {
            return Ok(None);
        }
        ends.push(end);
    }
    let last = usize::from(PartitionId::of_room(partitions).0);
    let are_all = ends.len() == last + 1 || ends.is_empty();
    Ok(are_all.then_some(ends))
}

fn write_end(transaction: &Transaction<'_>, end: &End) -> rusqlite::Result<()> {
    let write = "INSERT OR REPLACE INTO ends VALUES (?, ?, ?, ?)";
    let numbers = (end.partition.0, end.position.0 as i64, end.bytes as i64, end.checksum());
    transaction.prepare_cached(write)?.execute(numbers)?;
    Ok(())
}

fn id_of(partition: PartitionId, position: Position) -> i64 {
    // Positions stay below 2^47 for as long as anybody lives.
    ((position.0 as i64) << 16) | i64::from(partition.0)
}

/// Where the commit of this id is.
pub(crate) fn place_of(id: i64) -> (PartitionId, Position) {
    (PartitionId(id as u16), Position((id >> 16) as u64))
}

pub(crate) fn checksum(id: i64, commit: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&id.to_be_bytes());
    hasher.update(commit);
    hasher.finalize()
}

/// What an error of SQLite means.
fn failure(error: &rusqlite::Error) -> BackboneError {
    let text = error.to_string();
    let rusqlite::Error::SqliteFailure(ffi::Error { code, extended_code }, _) = error else {
        return BackboneError::Failed(text);
    };
    match (code, *extended_code) {
        // The transaction was not written. What a quota or a limit on the length of files refuses
        // comes as an error of writing.
        (ErrorCode::DiskFull, _) | (_, ffi::SQLITE_IOERR_WRITE) => BackboneError::Full(text),
        (ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase, _) => BackboneError::Damaged(text),
        _ => BackboneError::Failed(text),
    }
}

/// Who waits for the end of a job.
type Done<T> = oneshot::Sender<Result<T, BackboneError>>;

/// Asks `thread` for something, which comes when it is done.
fn ask<J: Send + 'static, T: Send + 'static>(
    thread: &Thread<J>,
    job: impl FnOnce(Done<T>) -> J,
) -> Work<'static, T> {
    let (done, end) = oneshot::channel();
    // A thread that is gone drops the job, which tells whoever waits.
    thread.send(job(done));
    Box::pin(async {
        end.await.unwrap_or_else(|_| Err(BackboneError::Failed("the store is closed".into())))
    })
}

impl Backbone for Embedded {
    fn ack(&self) -> Ack {
        Ack::Durable
    }

    fn has_room(&self) -> bool {
        self.has_room.load(Relaxed)
    }

    fn partitions(&self) -> u16 {
        self.partitions
    }

    fn busy(&self) -> Option<watch::Receiver<bool>> {
        Some(self.busy.clone())
    }

    fn views(&self) -> Option<&Path> {
        Some(&self.dir)
    }

    fn append(&self, partition: PartitionId, last: Position, commit: Bytes) -> Work<'_, Position> {
        ask(&self.writer, |done| Write::Append(Append { partition, last, commit, done }))
    }

    fn last(&self, partition: PartitionId) -> Work<'_, Option<(Position, Bytes)>> {
        ask(&self.reader, |done| Read::Last(partition, done))
    }

    fn read(&self, partition: PartitionId, position: Position, bytes: usize) -> Work<'_, Commits> {
        ask(&self.reader, |done| Read::From(partition, position, bytes, done))
    }

    fn replay(&self, logs: Vec<Replay>) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let replayed = ask(&self.reader, |done| Read::All(logs, done));
        // A thread that is gone has dropped the senders.
        Box::pin(async { drop(replayed.await) })
    }

    fn size(&self, partition: PartitionId) -> Work<'_, u64> {
        Box::pin(std::future::ready(Ok(self.logs.bytes(partition))))
    }

    fn backlog(&self, _partition: PartitionId, position: Position) -> u64 {
        self.logs.since(position)
    }

    fn trim(&self, partition: PartitionId, position: Position) -> Work<'_, ()> {
        ask(&self.writer, |done| Write::Trim(partition, position, done))
    }
}
