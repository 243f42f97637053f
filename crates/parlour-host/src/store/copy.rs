//! Copies a database as it is at one moment, while others write it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use parlour_core::durable::Position;
use rusqlite::Connection;
use rusqlite::backup::{Backup, StepResult};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::{Progress, Report, Store, StoreError, Task, Watch, failed};
use crate::backbone::OpenError;
use crate::backbone::embedded::{self, DATABASE, head, sync};
use crate::view;

/// How many pages are copied at once: 8 MiB. They are then on the disk before the next, as a host on
/// the same disk would otherwise wait for all of them at the end.
const PAGES: i32 = 1024;

impl Store {
    /// Copies all of it into a new file, as it is now, and checks the copy.
    ///
    /// The file is there when all of it is on the disk, and not before.
    pub fn backup(&self, file: &Path, watch: Watch<'_>) -> Result<Report, StoreError> {
        refuse_existing(file)?;
        self.copy(file, watch)
    }

    /// Puts this backup into the directory of a host, which must not have data yet.
    ///
    /// What is damaged is not put there.
    pub fn restore(&self, dir: &Path, watch: Watch<'_>) -> Result<Report, StoreError> {
        let _lock = embedded::lock(dir)?;
        let file = dir.join(DATABASE);
        refuse_existing(&file)?;
        // What another database left would be taken for this one's.
        for suffix in ["-wal", "-journal"] {
            refuse_existing(&with_suffix(&file, suffix))?;
        }
        let forgotten = view::forget(dir).and_then(|()| head::forget(dir));
        forgotten.map_err(|source| OpenError::Io { path: dir.to_owned(), source })?;
        self.copy(&file, watch)
    }

    fn copy(&self, file: &Path, watch: Watch<'_>) -> Result<Report, StoreError> {
        let partial = Partial::begin(file)?;
        // Before the moment, at which all of it must be there. `verify` says so if this is damaged.
        let acknowledged = self.acknowledged().unwrap_or(Position(0));
        self.copy_pages(&partial, watch)?;
        let copy = Self::open_backup(&partial.path, self.stop.clone())?;
        let report = copy.check(acknowledged, watch)?;
        drop(copy);
        if !report.is_sound() {
            let (path, report) = (self.path.clone(), Box::new(report));
            return Err(StoreError::Damaged { path, report });
        }
        partial.keep(file)?;
        Ok(report)
    }

    fn copy_pages(&self, partial: &Partial, watch: Watch<'_>) -> Result<(), StoreError> {
        let path = &partial.path;
        let failed = |error| failed(path, error);
        // SQLite begins anew whenever somebody writes, unless the moment is held.
        let _moment = self.moment()?;
        let mut to = Connection::open(path).map_err(failed)?;
        // Nothing is to be mended here: what is half is removed.
        to.pragma_update(None, "journal_mode", "off").map_err(failed)?;
        to.pragma_update(None, "synchronous", "off").map_err(failed)?;
        let size = self.connection.pragma_query_value(None, "page_size", |row| row.get(0));
        let size: i64 = size.map_err(|error| self.failed(error))?;
        let backup = Backup::new(&self.connection, &mut to).map_err(failed)?;
        loop {
            self.stop.check()?;
            let step = backup.step(PAGES).map_err(failed)?;
            partial.sync()?;
            let progress = backup.progress();
            let pages = |count: i32| count as u64 * size as u64;
            let total = pages(progress.pagecount);
            let done = total.saturating_sub(pages(progress.remaining));
            watch(Progress { task: Task::Copy, done, total });
            match step {
                StepResult::Done => break,
                StepResult::More => {}
                // Somebody holds a lock that is never held for long.
                _ => std::thread::sleep(std::time::Duration::from_millis(10)),
            }
        }
        drop(backup);
        // One file that anything can read, wherever it is put.
        to.pragma_update(None, "journal_mode", "delete").map_err(failed)?;
        to.close().map_err(|(_, error)| failed(error))?;
        partial.sync()
    }
}

/// A file that is being written under another name. Dropped, it is removed.
#[derive(Debug)]
struct Partial {
    path: PathBuf,
    /// Held until it has its name.
    file: File,
    is_kept: bool,
}

impl Partial {
    fn begin(file: &Path) -> Result<Self, StoreError> {
        let path = with_suffix(file, ".partial");
        let open = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = open.map_err(|source| OpenError::Io { path: path.clone(), source })?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::Busy(path)),
            Err(TryLockError::Error(source)) => return Err(OpenError::Io { path, source }.into()),
        }
        let partial = Self { path, file, is_kept: false };
        // One that was killed may have left something.
        partial.remove_companions();
        partial.file.set_len(0).map_err(|source| partial.failed(source))?;
        Ok(partial)
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.file.sync_data().map_err(|source| self.failed(source))
    }

    /// Gives it its name, if nothing else has that.
    fn keep(mut self, file: &Path) -> Result<(), StoreError> {
        self.file.sync_all().map_err(|source| self.failed(source))?;
        match renameat_with(CWD, &self.path, CWD, file, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(StoreError::Exists(file.to_owned())),
            // A file system that cannot tell.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                refuse_existing(file)?;
                std::fs::rename(&self.path, file).map_err(|source| self.failed(source))?;
            }
            Err(error) => return Err(self.failed(error.into())),
        }
        self.is_kept = true;
        let dir = match file.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        sync(dir).map_err(|source| self.failed(source))
    }

    /// Removes what SQLite keeps beside a file. It may not be there.
    fn remove_companions(&self) {
        for suffix in ["-journal", "-wal", "-shm"] {
            let _ = std::fs::remove_file(with_suffix(&self.path, suffix));
        }
    }

    fn failed(&self, source: io::Error) -> StoreError {
        OpenError::Io { path: self.path.clone(), source }.into()
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.is_kept {
            self.remove_companions();
            // What stays says by its name that it is not whole.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn refuse_existing(path: &Path) -> Result<(), StoreError> {
    match path.symlink_metadata() {
        Ok(_) => Err(StoreError::Exists(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(OpenError::Io { path: path.to_owned(), source }.into()),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
