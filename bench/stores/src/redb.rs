//! redb, every commit with `Durability::Immediate`. `two_phase` adds the second fsync of its careful mode.

use std::path::Path;

use anyhow::Result;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::store::{Batch, Each, Settings, Store};

pub const SETTINGS: &[&str] = &["two_phase", "cache_mib", "order"];

const COMMITS: TableDefinition<'_, (u64, u64), &[u8]> = TableDefinition::new("commits");
const BODIES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("bodies");

pub struct Redb {
    database: Database,
    two_phase: bool,
    by_position: bool,
}

impl Redb {
    pub fn open(dir: &Path, settings: &Settings<'_>) -> Result<Self> {
        let cache: usize = settings.get("cache_mib", "64").parse()?;
        let database =
            Database::builder().set_cache_size(cache << 20).create(dir.join("log.redb"))?;
        let store = Self {
            database,
            two_phase: settings.get("two_phase", "0") == "1",
            by_position: settings.by_position(),
        };
        store.commit(&Batch::default())?;
        Ok(store)
    }

    fn key(&self, partition: u16, position: u64) -> (u64, u64) {
        let partition = u64::from(partition);
        if self.by_position { (position, partition) } else { (partition, position) }
    }

    fn commit(&self, batch: &Batch) -> Result<()> {
        let mut transaction = self.database.begin_write()?;
        transaction.set_two_phase_commit(self.two_phase);
        {
            let mut commits = transaction.open_table(COMMITS)?;
            for row in &batch.rows {
                commits.insert(self.key(row.partition, row.position), row.value.as_slice())?;
            }
            if !self.by_position {
                for &(partition, up_to) in &batch.trims {
                    commits.retain_in(
                        self.key(partition, 0)..=self.key(partition, up_to),
                        |_, _| false,
                    )?;
                }
            } else if let Some((partition, up_to)) = batch.trim_through {
                commits.retain_in(..=self.key(partition, up_to), |_, _| false)?;
            }
            let mut bodies = transaction.open_table(BODIES)?;
            for (id, body) in &batch.bodies {
                bodies.insert(id, body.as_slice())?;
            }
        }
        transaction.commit()?;
        Ok(())
    }
}

impl Store for Redb {
    fn commit(&mut self, batch: &Batch) -> Result<()> {
        Self::commit(self, batch)
    }

    fn get(&mut self, partition: u16, position: u64) -> Result<Option<Vec<u8>>> {
        let table = self.database.begin_read()?.open_table(COMMITS)?;
        Ok(table.get(self.key(partition, position))?.map(|value| value.value().to_vec()))
    }

    fn read_all(&mut self, each: &mut Each<'_>) -> Result<()> {
        let table = self.database.begin_read()?.open_table(COMMITS)?;
        for entry in table.iter()? {
            let (key, value) = entry?;
            let (first, second) = key.value();
            let (partition, position) =
                if self.by_position { (second, first) } else { (first, second) };
            each(partition as u16, position, value.value())?;
        }
        Ok(())
    }
}
