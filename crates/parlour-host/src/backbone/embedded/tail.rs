//! What lies behind the end of a write-ahead log.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use rusqlite::Connection;

/// The header of the file, and of each frame in it, before its page
/// (<https://www.sqlite.org/fileformat2.html#the_write_ahead_log>).
const FILE_HEADER: usize = 32;
const FRAME_HEADER: usize = 24;

/// How many commits lie behind the end of the write-ahead log.
///
/// SQLite reads it up to the first frame that is not right, and forgets what is behind: a power cut
/// in the middle of a commit leaves it so. But a second commit behind such a frame was begun when the
/// first was on the disk. So one commit there is a torn tail, and two are damage.
pub(crate) fn commits_behind_the_end(connection: &Connection) -> rusqlite::Result<u32> {
    // Reading makes the connection look into the log.
    connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
    let frames: i64 = connection.query_row("PRAGMA wal_checkpoint(NOOP)", [], |row| row.get(1))?;
    let page: u32 = connection.pragma_query_value(None, "page_size", |row| row.get(0))?;
    let frame = FRAME_HEADER as u64 + u64::from(page);
    let end = FILE_HEADER as u64 + frames.max(0) as u64 * frame;
    let path = connection.path().unwrap_or_default().to_owned() + "-wal";
    // Without the file, or with one that ends within its header, nothing is there.
    Ok(count(&path, end, frame).unwrap_or_default())
}

fn count(path: &str, end: u64, frame: u64) -> io::Result<u32> {
    let log = File::open(path)?;
    let mut header = [0; FILE_HEADER];
    log.read_exact_at(&mut header, 0)?;
    let mut commits = 0;
    let mut at = end;
    let mut found = [0; FRAME_HEADER];
    while log.read_exact_at(&mut found, at).is_ok() {
        // Older frames, of what was moved since, have other salts.
        let is_of_this_turn = found[8..16] == header[16..24];
        let ends_a_commit = found[4..8] != [0; 4];
        commits += u32::from(is_of_this_turn && ends_a_commit);
        at += frame;
    }
    Ok(commits)
}
