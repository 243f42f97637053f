//! SQLite in WAL mode with `synchronous=FULL`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use anyhow::{Result, ensure};
use rusqlite::{Connection, OptionalExtension, params};

use crate::store::{Batch, Each, Settings, Store};

pub const SETTINGS: &[&str] = &[
    "page_size",
    "autocheckpoint",
    "checkpoint",
    "journal_size_limit",
    "auto_vacuum",
    "exclusive",
    "mmap_mib",
    "cache_mib",
    "schema",
    "order",
    "max_pages",
];

/// How the key (partition, position) is stored.
#[derive(Clone, Copy, PartialEq)]
enum Schema {
    /// One integer, the rowid: partition in the upper 16 bits, position in the lower 48.
    Packed,
    /// One integer, the rowid: position above, partition in the lower 16 bits.
    Position,
    /// Two columns, `WITHOUT ROWID`.
    Pair,
    /// A table for each partition, whose rowid is the position.
    Tables,
}

pub struct Sqlite {
    /// Dropped before the connection, so that the last connection to close is the one that writes.
    checkpointer: Option<Checkpointer>,
    connection: Connection,
    schema: Schema,
}

impl Sqlite {
    pub fn open(dir: &Path, settings: &Settings<'_>) -> Result<Self> {
        let path = dir.join("log.sqlite");
        let connection = Connection::open(&path)?;
        connection.pragma_update(None, "page_size", settings.get("page_size", "4096"))?;
        connection.pragma_update(None, "auto_vacuum", settings.get("auto_vacuum", "none"))?;
        if settings.get("exclusive", "0") == "1" {
            connection.pragma_update(None, "locking_mode", "exclusive")?;
        }
        let mode: String = connection.query_row("PRAGMA journal_mode=wal", [], |row| row.get(0))?;
        ensure!(mode == "wal", "the journal is {mode}, not wal");
        commits_behind_the_end(&connection)?;
        connection.pragma_update(None, "synchronous", "full")?;
        let cache: i64 = settings.get("cache_mib", "8").parse()?;
        connection.pragma_update(None, "cache_size", -(cache << 10))?;
        let mmap: i64 = settings.get("mmap_mib", "0").parse()?;
        connection
            .query_row(&format!("PRAGMA mmap_size={}", mmap << 20), [], |_| Ok(()))
            .optional()?;
        let limit = settings.get("journal_size_limit", "-1");
        connection.query_row(&format!("PRAGMA journal_size_limit={limit}"), [], |_| Ok(()))?;
        let threshold: u32 = settings.get("autocheckpoint", "1000").parse()?;
        let in_thread = settings.get("checkpoint", "writer") == "thread";
        let auto = if in_thread { 0 } else { threshold };
        connection.query_row(&format!("PRAGMA wal_autocheckpoint={auto}"), [], |_| Ok(()))?;
        let max = settings.get("max_pages", "0");
        connection.query_row(&format!("PRAGMA max_page_count={max}"), [], |_| Ok(()))?;
        connection.busy_timeout(std::time::Duration::from_secs(10))?;
        let schema = match settings.get("schema", "packed") {
            "packed" if settings.by_position() => Schema::Position,
            "pair" => Schema::Pair,
            "tables" => Schema::Tables,
            _ => Schema::Packed,
        };
        connection.execute_batch(&match schema {
            Schema::Packed | Schema::Position => {
                "CREATE TABLE IF NOT EXISTS commits (id INTEGER PRIMARY KEY, value BLOB NOT NULL)".to_owned()
            }
            Schema::Pair => "CREATE TABLE IF NOT EXISTS commits (partition INTEGER, position INTEGER, value BLOB NOT NULL,
                PRIMARY KEY (partition, position)) WITHOUT ROWID"
                .to_owned(),
            Schema::Tables => (0..crate::store::PARTITIONS)
                .map(|p| format!("CREATE TABLE IF NOT EXISTS commits{p} (position INTEGER PRIMARY KEY, value BLOB NOT NULL);"))
                .collect(),
        })?;
        connection.execute_batch(
            "CREATE TABLE IF NOT EXISTS bodies (id INTEGER PRIMARY KEY, value BLOB NOT NULL)",
        )?;
        connection.set_prepared_statement_cache_capacity(64);
        let checkpointer = in_thread.then(|| Checkpointer::start(path, threshold)).transpose()?;
        Ok(Self { checkpointer, connection, schema })
    }

    fn write(&mut self, batch: &Batch) -> rusqlite::Result<()> {
        let transaction = self.connection.transaction()?;
        for row in &batch.rows {
            let (p, n) = (row.partition, row.position as i64);
            match self.schema {
                Schema::Packed | Schema::Position => transaction
                    .prepare_cached("INSERT INTO commits VALUES (?, ?)")?
                    .execute(params![self.schema.id(p, n), row.value])?,
                Schema::Pair => transaction
                    .prepare_cached("INSERT INTO commits VALUES (?, ?, ?)")?
                    .execute(params![p, n, row.value])?,
                Schema::Tables => transaction
                    .prepare_cached(&format!("INSERT INTO commits{p} VALUES (?, ?)"))?
                    .execute(params![n, row.value])?,
            };
        }
        if self.schema == Schema::Position
            && let Some((p, n)) = batch.trim_through
        {
            let id = self.schema.id(p, n as i64);
            transaction.prepare_cached("DELETE FROM commits WHERE id <= ?")?.execute([id])?;
        }
        for &(p, up_to) in &batch.trims {
            let n = up_to as i64;
            match self.schema {
                Schema::Packed => transaction
                    .prepare_cached("DELETE FROM commits WHERE id BETWEEN ? AND ?")?
                    .execute(params![self.schema.id(p, 0), self.schema.id(p, n)])?,
                Schema::Position => break,
                Schema::Pair => transaction
                    .prepare_cached("DELETE FROM commits WHERE partition = ? AND position <= ?")?
                    .execute(params![p, n])?,
                Schema::Tables => transaction
                    .prepare_cached(&format!("DELETE FROM commits{p} WHERE position <= ?"))?
                    .execute(params![n])?,
            };
        }
        for (id, body) in &batch.bodies {
            transaction
                .prepare_cached("INSERT INTO bodies VALUES (?, ?)")?
                .execute(params![*id as i64, body])?;
        }
        transaction.commit()
    }
}

/// SQLite reads a WAL up to the first frame that is not right and forgets what is behind, as a power cut in a commit
/// leaves it so. A second commit behind such a frame was not begun before the first was on the disk: that is damage.
fn commits_behind_the_end(connection: &Connection) -> Result<()> {
    // Reading makes the connection look into the WAL.
    connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
    let frames: i64 = connection.query_row("PRAGMA wal_checkpoint(noop)", [], |row| row.get(1))?;
    let page: u32 = connection.query_row("PRAGMA page_size", [], |row| row.get(0))?;
    let wal = File::open(connection.path().unwrap_or_default().to_owned() + "-wal")?;
    let (mut header, mut frame) = ([0; 32], [0; 24]);
    if wal.read_exact_at(&mut header, 0).is_err() {
        return Ok(());
    }
    let mut commits = 0;
    let mut at = 32 + frames.max(0) as u64 * u64::from(24 + page);
    while wal.read_exact_at(&mut frame, at).is_ok() {
        let same_turn = frame[8..16] == header[16..24];
        let ends_a_commit = frame[4..8] != [0; 4];
        commits += u32::from(same_turn && ends_a_commit);
        at += u64::from(24 + page);
    }
    ensure!(commits < 2, "the WAL is damaged: {commits} commits lie behind its end");
    Ok(())
}

impl Schema {
    /// Partitions go to 32,767 this way, positions to 2⁴⁷.
    fn id(self, partition: u16, position: i64) -> i64 {
        let partition = i64::from(partition);
        if self == Self::Position { position << 16 | partition } else { partition << 48 | position }
    }
}

impl Store for Sqlite {
    fn commit(&mut self, batch: &Batch) -> Result<()> {
        self.write(batch)?;
        if let Some(checkpointer) = &self.checkpointer {
            let values = batch
                .rows
                .iter()
                .map(|row| &row.value)
                .chain(batch.bodies.iter().map(|(_, body)| body));
            checkpointer
                .committed
                .send(values.map(|value| value.len() as u64 / checkpointer.page + 1).sum())?;
        }
        Ok(())
    }

    fn get(&mut self, partition: u16, position: u64) -> Result<Option<Vec<u8>>> {
        let n = position as i64;
        let value = |row: &rusqlite::Row<'_>| row.get(0);
        Ok(match self.schema {
            Schema::Packed | Schema::Position => self
                .connection
                .prepare_cached("SELECT value FROM commits WHERE id = ?")?
                .query_row([self.schema.id(partition, n)], value)
                .optional()?,
            Schema::Pair => self
                .connection
                .prepare_cached("SELECT value FROM commits WHERE partition = ? AND position = ?")?
                .query_row(params![partition, n], value)
                .optional()?,
            Schema::Tables => self
                .connection
                .prepare_cached(&format!(
                    "SELECT value FROM commits{partition} WHERE position = ?"
                ))?
                .query_row([n], value)
                .optional()?,
        })
    }

    fn read_all(&mut self, each: &mut Each<'_>) -> Result<()> {
        let queries = match self.schema {
            Schema::Position => {
                vec!["SELECT id & 0xffff, id >> 16, value FROM commits ORDER BY id".to_owned()]
            }
            Schema::Packed => vec![
                "SELECT id >> 48, id & 0xffffffffffff, value FROM commits ORDER BY id".to_owned(),
            ],
            Schema::Pair => vec![
                "SELECT partition, position, value FROM commits ORDER BY partition, position"
                    .to_owned(),
            ],
            Schema::Tables => (0..crate::store::PARTITIONS)
                .map(|p| format!("SELECT {p}, position, value FROM commits{p} ORDER BY position"))
                .collect(),
        };
        for query in queries {
            let mut statement = self.connection.prepare(&query)?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                each(row.get(0)?, row.get::<_, i64>(1)? as u64, row.get_ref(2)?.as_blob()?)?;
            }
        }
        Ok(())
    }
}

/// Checkpoints through a connection of its own. It first copies what it can while commits go on, then, if the WAL has
/// grown to four times the threshold, holds them for the rest, as a WAL is only reused once all of it is copied.
struct Checkpointer {
    /// About how many pages a commit wrote.
    committed: Sender<u64>,
    page: u64,
    thread: Option<JoinHandle<()>>,
}

impl Checkpointer {
    fn start(path: PathBuf, threshold: u32) -> Result<Self> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(std::time::Duration::from_secs(10))?;
        connection.pragma_update(None, "synchronous", "full")?;
        let page: u32 = connection.query_row("PRAGMA page_size", [], |row| row.get(0))?;
        let (committed, commits) = channel();
        let thread = std::thread::spawn(move || {
            if let Err(error) = checkpoint(&connection, &commits, u64::from(threshold)) {
                eprintln!("checkpoint: {error:#}");
            }
        });
        Ok(Self { committed, page: u64::from(page), thread: Some(thread) })
    }
}

impl Drop for Checkpointer {
    fn drop(&mut self) {
        self.committed = channel().0;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn checkpoint(connection: &Connection, commits: &Receiver<u64>, threshold: u64) -> Result<()> {
    let mut pages = 0;
    while let Ok(written) = commits.recv() {
        pages += written;
        pages += commits.try_iter().sum::<u64>();
        if pages < threshold {
            continue;
        }
        pages = 0;
        let log: i64 =
            connection.query_row("PRAGMA wal_checkpoint(passive)", [], |row| row.get(1))?;
        if log as u64 >= 4 * threshold {
            connection.query_row("PRAGMA wal_checkpoint(restart)", [], |_| Ok(()))?;
        }
    }
    Ok(())
}
