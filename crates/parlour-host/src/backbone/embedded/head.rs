//! Up to where the logs were acknowledged, in a file beside the database.
//!
//! SQLite reads its write-ahead log up to where it makes sense, and does not know how long it was.
//! What is written here was on the disk before: whatever a crash leaves of this file, it is never
//! ahead of the logs, unless they have lost something.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use parlour_core::durable::Position;

const FILE: &str = "head";
/// Of what is in it, so that nothing of it is ever moved on the disk.
const LENGTH: u64 = 30;

/// The file, as the thread that writes has it.
///
/// Where it cannot be written, it falls behind, and tells less than it could: the logs are on the disk
/// all the same.
pub(super) struct Head {
    path: PathBuf,
    file: Option<File>,
    /// Whether what it says is behind.
    is_behind: bool,
}

impl Head {
    /// Opens it for logs that end at `last`, all of which is on the disk.
    pub(super) fn open(dir: &Path, last: Position) -> Self {
        let path = dir.join(FILE);
        let open = || {
            let options = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
            let file = options?;
            file.set_len(LENGTH)?;
            file.write_all_at(line(last).as_bytes(), 0)?;
            // From now on it has its place on the disk.
            file.sync_all()?;
            Ok(file)
        };
        let opened = open();
        if let Err(error) = &opened {
            warn(&path, error);
        }
        Self { path, file: opened.ok(), is_behind: false }
    }

    /// All up to `position` is on the disk, and will be acknowledged.
    pub(super) fn note(&mut self, position: Position) {
        let Some(file) = &self.file else { return };
        let written = file.write_all_at(line(position).as_bytes(), 0);
        if let Err(error) = &written
            && !self.is_behind
        {
            warn(&self.path, error);
        }
        self.is_behind = written.is_err();
    }
}

fn warn(path: &Path, error: &io::Error) {
    let path = path.display();
    tracing::warn!(%error, "cannot write {path}: if the end of the logs is lost, that may go unnoticed");
}

/// Up to where the logs in `dir` were acknowledged. 0 if nobody has written it down.
pub(crate) fn acknowledged(dir: &Path) -> io::Result<Position> {
    let mut text = String::new();
    match File::open(dir.join(FILE)) {
        Ok(file) => file.take(LENGTH + 1).read_to_string(&mut text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Position(0)),
        Err(error) => return Err(error),
    };
    // A host that was killed when it made it leaves it empty.
    if text.is_empty() {
        return Ok(Position(0));
    }
    let position = text.split(' ').next().and_then(|number| number.parse().ok()).map(Position);
    let is_whole = |position: &Position| line(*position) == text;
    position.filter(is_whole).ok_or_else(|| io::Error::other("it is damaged"))
}

/// Has nothing be acknowledged in `dir` any more: other logs come there.
pub(crate) fn forget(dir: &Path) -> io::Result<()> {
    match std::fs::remove_file(dir.join(FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The position, and the CRC-32 of its digits.
fn line(position: Position) -> String {
    let digits = format!("{:020}", position.0);
    let checksum = crc32fast::hash(digits.as_bytes());
    format!("{digits} {checksum:08x}\n")
}
