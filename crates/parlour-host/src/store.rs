//! What operators do with what a host keeps: copy it, put a copy back, see whether all of it is there.
//!
//! All of it reads beside a host that runs, which goes on writing meanwhile. It sees the logs as they
//! were at one moment: for as long as it reads, the host's write-ahead log grows by what is written.

mod copy;
mod verify;

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use parlour_core::durable::{Position, Timestamp, time_of};
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension as _, Transaction};
use thiserror::Error;

use crate::backbone::OpenError;
use crate::backbone::embedded::{self, DATABASE, LOCK, head};
use crate::view;

pub use verify::{Damage, Report, ViewReport};

/// The logs of a host or of a backup, opened to be read.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    /// The directory of the view, if this is what a host keeps.
    views: Option<PathBuf>,
    connection: Connection,
    stop: Stop,
}

/// Ends what a [`Store`] does, from another thread.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Has it end soon, with [`StoreError::Stopped`].
    pub fn stop(&self) {
        self.0.store(true, Relaxed);
    }

    fn is_asked(&self) -> bool {
        self.0.load(Relaxed)
    }

    /// Whether to go on.
    pub fn check(&self) -> Result<(), StoreError> {
        if self.is_asked() { Err(StoreError::Stopped) } else { Ok(()) }
    }
}

/// How far it has come.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::exhaustive_structs, reason = "read by whoever shows it")]
pub struct Progress {
    /// What is done.
    pub task: Task,
    /// So many bytes of the database.
    pub done: u64,
    /// Of so many.
    pub total: u64,
}

/// What is done with a database.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "there is nothing else")]
pub enum Task {
    /// It is copied.
    Copy,
    /// It is read and checked.
    Verify,
}

/// Is told how far it has come.
pub type Watch<'a> = &'a mut dyn FnMut(Progress);

/// Why a store was not read or copied.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StoreError {
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is not there.
    #[error("{0} is not there")]
    Missing(PathBuf),
    /// Something is there already, which is left alone.
    #[error("{0} is there already")]
    Exists(PathBuf),
    /// Another process writes the same copy.
    #[error("another process writes {0}")]
    Busy(PathBuf),
    /// Not all of it is as it was written.
    #[error("{path} is damaged")]
    Damaged {
        /// The database.
        path: PathBuf,
        /// What of it.
        report: Box<Report>,
    },
    /// It was [stopped](Stop::stop). Nothing of it is left.
    #[error("it was stopped")]
    Stopped,
}

impl Store {
    /// Opens what the host of `dir` keeps, whether it runs or not.
    pub fn open(dir: &Path, stop: Stop) -> Result<Self, StoreError> {
        let views = Some(dir.to_owned());
        Self::open_database(dir.join(DATABASE), views, stop)
    }

    /// Opens a backup.
    pub fn open_backup(file: &Path, stop: Stop) -> Result<Self, StoreError> {
        Self::open_database(file.to_owned(), None, stop)
    }

    fn open_database(
        path: PathBuf,
        views: Option<PathBuf>,
        stop: Stop,
    ) -> Result<Self, StoreError> {
        match path.metadata() {
            Ok(found) if found.is_file() => {}
            Ok(_) => return Err(OpenError::Foreign(path).into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::Missing(path));
            }
            Err(source) => return Err(OpenError::Io { path, source }.into()),
        }
        let connection = open_to_read(&path, &stop).map_err(|error| failed(&path, error))?;
        // A host that was killed when it began leaves this behind.
        if embedded::is_empty(&connection).map_err(|error| failed(&path, error))? {
            return Err(StoreError::Missing(path));
        }
        embedded::check_format(&path, &connection)?;
        Ok(Self { path, views, connection, stop })
    }

    /// The time of the newest commit, by the clock of whoever wrote it.
    pub fn time(&self) -> Result<Option<Timestamp>, StoreError> {
        let newest = "SELECT commit_bytes FROM commits ORDER BY id DESC";
        let commit = self.connection.query_row(newest, [], |row| row.get::<_, Vec<u8>>(0));
        let commit = commit.optional().map_err(|error| self.failed(error))?;
        Ok(commit.and_then(|commit| time_of(&Bytes::from(commit)).ok()))
    }

    /// Up to where what this host keeps was acknowledged. Of a backup that is not known.
    fn acknowledged(&self) -> io::Result<Position> {
        self.views.as_deref().map_or(Ok(Position(0)), head::acknowledged)
    }

    /// Begins to read the logs as they are now. They are read as they were until this is dropped.
    fn moment(&self) -> Result<Transaction<'_>, StoreError> {
        let begin = || {
            let moment = self.connection.unchecked_transaction()?;
            // It begins when something is read.
            moment.query_row("SELECT count(*) FROM room", [], |_| Ok(()))?;
            Ok(moment)
        };
        begin().map_err(|error| self.failed(error))
    }

    fn failed(&self, error: rusqlite::Error) -> StoreError {
        failed(&self.path, error)
    }

    /// How many bytes of the database are in use.
    fn bytes(&self) -> rusqlite::Result<u64> {
        let number = |pragma: &str| {
            let number = self.connection.pragma_query_value(None, pragma, |row| row.get(0));
            number.map(|number: i64| number as u64)
        };
        let pages = number("page_count")?.saturating_sub(number("freelist_count")?);
        Ok(pages * number("page_size")?)
    }
}

/// Whether a host uses this directory.
pub fn is_in_use(dir: &Path) -> Result<bool, StoreError> {
    let path = dir.join(LOCK);
    let lock = match File::open(&path) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(OpenError::Io { path, source }.into()),
    };
    match lock.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(source)) => Err(OpenError::Io { path, source }.into()),
    }
}

/// Removes the view of what has ended from a directory that no host uses. The next host makes it again.
pub fn forget_view(dir: &Path) -> Result<(), StoreError> {
    let _lock = embedded::lock(dir)?;
    view::forget(dir).map_err(|source| OpenError::Io { path: dir.to_owned(), source }.into())
}

fn open_to_read(path: &Path, stop: &Stop) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(Duration::from_secs(10))?;
    let stop = stop.clone();
    connection.progress_handler(10_000, Some(move || stop.is_asked()))?;
    // What is on a page is looked at before it is relied on.
    connection.pragma_update(None, "cell_size_check", true)?;
    Ok(connection)
}

/// What an error of SQLite means.
fn failed(path: &Path, source: rusqlite::Error) -> StoreError {
    let path = path.to_owned();
    match source.sqlite_error_code() {
        Some(ErrorCode::OperationInterrupted) => StoreError::Stopped,
        Some(ErrorCode::DiskFull) => {
            OpenError::Io { path, source: io::ErrorKind::StorageFull.into() }.into()
        }
        _ => OpenError::Database { path, source }.into(),
    }
}
