//! Space that is kept for what must still be written when the disk is full.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

/// How much.
const BYTES: u64 = 8 << 20;

fn fill(mut file: &File) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, BYTES) {
        // Not every file system can.
        Err(Errno::OPNOTSUPP) => file.write_all(&vec![0; BYTES as usize]),
        filled => Ok(filled?),
    }
}

/// A file that takes space, for as long as there is some.
pub(super) struct Reserve {
    path: PathBuf,
    /// Whether it is there, for others to see.
    is_there: Arc<AtomicBool>,
}

impl Reserve {
    pub(super) fn new(path: PathBuf, is_there: Arc<AtomicBool>) -> Self {
        let mut reserve = Self { path, is_there };
        reserve.take();
        reserve
    }

    pub(super) fn is_there(&self) -> bool {
        self.is_there.load(Relaxed)
    }

    /// Takes the space, if there is so much.
    pub(super) fn take(&mut self) {
        let mut options = OpenOptions::new();
        let file = options.create(true).truncate(false).write(true).open(&self.path);
        let taken = file.and_then(|file| fill(&file));
        self.is_there.store(taken.is_ok(), Relaxed);
    }

    /// Gives the space back. Returns whether there was any.
    pub(super) fn give(&mut self) -> bool {
        self.is_there.swap(false, Relaxed) && std::fs::remove_file(&self.path).is_ok()
    }
}
