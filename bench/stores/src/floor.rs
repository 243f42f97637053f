//! The floor: append to a file, `fdatasync`, nothing else. `prealloc=BYTES` writes into a file of that length from its
//! start, again and again, so that no length has to be journalled by the file system; it cannot be read back.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, bail};

use crate::store::{Batch, Each, Settings, Store, key};

pub const SETTINGS: &[&str] = &["prealloc"];

pub struct Floor {
    file: File,
    at: u64,
    wrap: u64,
    buffer: Vec<u8>,
}

impl Floor {
    pub fn open(dir: &Path, settings: &Settings<'_>) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.join("log"))?;
        let wrap: u64 = settings.get("prealloc", "0").parse()?;
        let mut at = file.metadata()?.len();
        if wrap > 0 {
            let zeros = vec![0; 1 << 20];
            for offset in (0..wrap).step_by(zeros.len()) {
                file.write_all_at(&zeros, offset)?;
            }
            file.sync_all()?;
            at = 0;
        }
        Ok(Self { file, at, wrap, buffer: Vec::new() })
    }
}

impl Store for Floor {
    fn commit(&mut self, batch: &Batch) -> Result<()> {
        self.buffer.clear();
        for row in &batch.rows {
            self.buffer.extend_from_slice(&key(row.partition, row.position));
            self.buffer.extend_from_slice(&(row.value.len() as u32).to_be_bytes());
            self.buffer.extend_from_slice(&row.value);
        }
        if self.wrap > 0 && self.at + self.buffer.len() as u64 > self.wrap {
            self.at = 0;
        }
        self.file.write_all_at(&self.buffer, self.at)?;
        self.file.sync_data()?;
        self.at += self.buffer.len() as u64;
        Ok(())
    }

    fn get(&mut self, _: u16, _: u64) -> Result<Option<Vec<u8>>> {
        bail!("a file has no index")
    }

    fn read_all(&mut self, each: &mut Each<'_>) -> Result<()> {
        let mut reader = std::io::BufReader::with_capacity(1 << 20, self.file.try_clone()?);
        let mut head = [0; 14];
        let mut value = Vec::new();
        while reader.read_exact(&mut head).is_ok() {
            let partition = u16::from_be_bytes([head[0], head[1]]);
            let position = u64::from_be_bytes(head[2..10].try_into()?);
            let length = u32::from_be_bytes(head[10..14].try_into()?);
            value.clear();
            (&mut reader).take(u64::from(length)).read_to_end(&mut value)?;
            if value.len() < length as usize {
                break;
            }
            each(partition, position, &value)?;
        }
        Ok(())
    }
}
