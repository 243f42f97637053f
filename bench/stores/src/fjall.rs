//! fjall, every batch with `PersistMode::SyncData`. `blobs` keeps values apart from keys (its key-value separation).

use std::path::Path;

use anyhow::{Result, ensure};
use fjall::{Database, Keyspace, KeyspaceCreateOptions, KvSeparationOptions, PersistMode};

use crate::store::{Batch, Each, PARTITIONS, Settings, Store, key};

pub const SETTINGS: &[&str] = &["blobs"];

pub struct Fjall {
    database: Database,
    commits: Keyspace,
    bodies: Keyspace,
    /// The oldest position that is still there, as there is no deletion of a range: every key gets its own tombstone.
    first: Vec<u64>,
}

impl Fjall {
    pub fn open(dir: &Path, settings: &Settings<'_>) -> Result<Self> {
        let database = Database::builder(dir.join("log.fjall")).open()?;
        let blobs = settings.get("blobs", "0") == "1";
        let options = || {
            KeyspaceCreateOptions::default()
                .with_kv_separation(blobs.then(KvSeparationOptions::default))
        };
        let commits = database.keyspace("commits", options)?;
        let bodies = database.keyspace("bodies", options)?;
        let mut first = Vec::new();
        for partition in 0..PARTITIONS {
            let oldest = commits.prefix(partition.to_be_bytes()).next();
            first.push(oldest.map_or(Ok(1), |guard| guard.key().map(|k| position(&k)))?);
        }
        Ok(Self { database, commits, bodies, first })
    }
}

fn position(key: &[u8]) -> u64 {
    key[2..].iter().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

impl Store for Fjall {
    fn commit(&mut self, batch: &Batch) -> Result<()> {
        let mut write = self.database.batch().durability(Some(PersistMode::SyncData));
        for row in &batch.rows {
            write.insert(&self.commits, key(row.partition, row.position), row.value.as_slice());
        }
        for &(partition, up_to) in &batch.trims {
            let first = &mut self.first[usize::from(partition)];
            for position in *first..=up_to {
                write.remove(&self.commits, key(partition, position));
            }
            *first = up_to + 1;
        }
        for (id, body) in &batch.bodies {
            write.insert(&self.bodies, id.to_be_bytes(), body.as_slice());
        }
        write.commit()?;
        Ok(())
    }

    fn get(&mut self, partition: u16, position: u64) -> Result<Option<Vec<u8>>> {
        Ok(self.commits.get(key(partition, position))?.map(|value| value.to_vec()))
    }

    fn read_all(&mut self, each: &mut Each<'_>) -> Result<()> {
        for guard in self.commits.iter() {
            let (key, value) = guard.into_inner()?;
            ensure!(key.len() == 10, "a key of {} bytes", key.len());
            each(u16::from_be_bytes([key[0], key[1]]), position(&key), &value)?;
        }
        Ok(())
    }
}
