//! The seam of the measurement: what the log of a room asks of a store, and the bytes it stores.

use std::path::Path;

use anyhow::{Result, bail, ensure};

use crate::{floor, stores_with_features};

/// Partitions of a room. All of them share the transaction of a group commit.
pub const PARTITIONS: u16 = 16;

/// One commit of one partition. Before its bytes is the position of the commit before it, behind them the checksum of
/// all of it, so that one that is missing is noticed wherever positions are not dense.
pub struct Row {
    pub partition: u16,
    pub position: u64,
    pub value: Vec<u8>,
}

impl Row {
    pub fn new(partition: u16, position: u64, before: u64, bytes: &[u8]) -> Self {
        let mut value = Vec::with_capacity(bytes.len() + 12);
        value.extend_from_slice(&before.to_le_bytes());
        value.extend_from_slice(bytes);
        let sum = checksum(partition, position, &value);
        value.extend_from_slice(&sum.to_le_bytes());
        Self { partition, position, value }
    }
}

/// The position before, if a value is what was stored under this key. A commit in another's place is not.
pub fn verify(partition: u16, position: u64, value: &[u8]) -> Option<u64> {
    let (bytes, sum) = value.split_last_chunk::<4>()?;
    let (before, _) = bytes.split_first_chunk::<8>()?;
    let whole = checksum(partition, position, bytes) == u32::from_le_bytes(*sum);
    whole.then_some(u64::from_le_bytes(*before))
}

fn checksum(partition: u16, position: u64, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&partition.to_be_bytes());
    hasher.update(&position.to_be_bytes());
    hasher.update(bytes);
    hasher.finalize()
}

/// What one transaction does, all of it or nothing.
#[derive(Default)]
pub struct Batch {
    pub rows: Vec<Row>,
    /// Bodies too large for a commit.
    pub bodies: Vec<(u64, Vec<u8>)>,
    /// Up to which position, inclusive, a partition lets its commits go.
    pub trims: Vec<(u16, u64)>,
    /// The same in order of writing: everything up to this commit goes.
    pub trim_through: Option<(u16, u64)>,
}

/// Is given partition, position and value.
pub type Each<'a> = dyn FnMut(u16, u64, &[u8]) -> Result<()> + 'a;

pub trait Store: Send {
    /// Returns once the batch would survive a power cut.
    fn commit(&mut self, batch: &Batch) -> Result<()>;

    fn get(&mut self, partition: u16, position: u64) -> Result<Option<Vec<u8>>>;

    /// Every commit, those of a partition in order.
    fn read_all(&mut self, each: &mut Each<'_>) -> Result<()>;
}

/// The key as bytes that sort as it does.
pub fn key(partition: u16, position: u64) -> [u8; 10] {
    let mut key = [0; 10];
    key[..2].copy_from_slice(&partition.to_be_bytes());
    key[2..].copy_from_slice(&position.to_be_bytes());
    key
}

/// Settings behind the name of a store: `sqlite:page_size=8192,checkpoint=thread`.
pub struct Settings<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Settings<'a> {
    pub fn get(&self, name: &str, default: &'a str) -> &'a str {
        self.0.iter().find(|(n, _)| *n == name).map_or(default, |(_, value)| value)
    }

    /// Whether keys are in order of writing, (position, partition), with the transaction's number as the position of all
    /// that is in it, rather than (partition, position), with positions of each partition's own.
    pub fn by_position(&self) -> bool {
        self.get("order", "partition") == "position"
    }

    fn check(&self, known: &[&str]) -> Result<()> {
        for (name, _) in &self.0 {
            ensure!(known.contains(name), "no setting {name}; there are {known:?}");
        }
        Ok(())
    }
}

pub fn settings(spec: &str) -> (&str, Settings<'_>) {
    let (name, settings) = spec.split_once(':').unwrap_or((spec, ""));
    let settings = Settings(
        settings
            .split(',')
            .filter(|s| !s.is_empty())
            .map(|s| s.split_once('=').unwrap_or((s, "1")))
            .collect(),
    );
    (name, settings)
}

pub fn open(spec: &str, dir: &Path) -> Result<Box<dyn Store>> {
    let (name, settings) = settings(spec);
    std::fs::create_dir_all(dir)?;
    Ok(match name {
        "file" => {
            settings.check(floor::SETTINGS)?;
            Box::new(floor::Floor::open(dir, &settings)?)
        }
        #[cfg(feature = "sqlite")]
        "sqlite" => {
            settings.check(crate::sqlite::SETTINGS)?;
            Box::new(crate::sqlite::Sqlite::open(dir, &settings)?)
        }
        #[cfg(feature = "redb")]
        "redb" => {
            settings.check(crate::redb::SETTINGS)?;
            Box::new(crate::redb::Redb::open(dir, &settings)?)
        }
        #[cfg(feature = "fjall")]
        "fjall" => {
            settings.check(crate::fjall::SETTINGS)?;
            Box::new(crate::fjall::Fjall::open(dir, &settings)?)
        }
        _ => bail!("no store {name}; there are {:?}", stores_with_features()),
    })
}
