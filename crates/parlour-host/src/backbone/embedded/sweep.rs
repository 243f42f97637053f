//! Lets go of commits that were trimmed.
//!
//! The commits of all logs stand in the order in which they were written. What goes, goes from the
//! front in one pass over all logs, a slice at a time, so that each page is written once.

use std::ops::RangeInclusive;
use std::sync::Arc;

use rusqlite::{Connection, Transaction};

use super::logs::Logs;
use super::{id_of, place_of};

/// For how many transactions a pass waits, unless nothing else is to be done, so that the other logs are
/// trimmed too.
const REST: u32 = 1024;
/// How many empty pages a file may have, and how many are given back at once.
const EMPTY_PAGES: i64 = 8192;
const SHRINK: u32 = 512;

pub(super) struct Sweep {
    logs: Arc<Logs>,
    /// After how many transactions the next pass begins, if something was trimmed.
    due: Option<u32>,
    /// What the pass that is under way has to look at.
    pass: Option<RangeInclusive<i64>>,
}

/// What a slice did.
pub(super) struct Swept {
    /// What is left of the pass.
    rest: Option<RangeInclusive<i64>>,
    /// Bytes of the commits that are gone, by partition.
    pub(super) freed: Vec<u64>,
}

impl Sweep {
    pub(super) fn new(logs: Arc<Logs>) -> Self {
        Self { logs, due: None, pass: None }
    }

    /// Something was trimmed.
    pub(super) fn ask(&mut self) {
        self.due.get_or_insert(REST);
    }

    /// Has a pass go on later.
    pub(super) fn put_off(&mut self) {
        self.pass = None;
        self.due = Some(REST);
    }

    /// Nothing else is to be done.
    pub(super) fn hurry(&mut self) {
        self.due = self.due.and(Some(0));
    }

    /// There is another transaction.
    pub(super) fn count(&mut self) {
        self.due = self.due.map(|rest| rest.saturating_sub(1));
    }

    /// Whether there is something to do now.
    pub(super) fn is_due(&mut self) -> bool {
        if self.pass.is_none() && self.due == Some(0) {
            self.due = None;
            let trimmed = self.logs.partitions().map(|it| id_of(it, self.logs.trimmed(it)));
            self.pass = trimmed.max().map(|last| 0..=last);
        }
        self.pass.is_some()
    }

    /// Looks at the next `count` commits, and deletes those that may go.
    pub(super) fn slice(
        &self,
        transaction: &Transaction<'_>,
        count: usize,
    ) -> rusqlite::Result<Swept> {
        let mut freed = vec![0; self.logs.partitions().count()];
        let Some(pass) = &self.pass else { return Ok(Swept { rest: None, freed }) };
        let mut next = transaction.prepare_cached(
            "SELECT id, length(commit_bytes) FROM commits WHERE id BETWEEN ? AND ?
             ORDER BY id LIMIT ?",
        )?;
        let (first, last) = pass.clone().into_inner();
        let rows = next.query_map((first, last, count as i64), |row| {
            Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?))
        })?;
        let commits = rows.collect::<rusqlite::Result<Vec<_>>>()?;
        let goes = |id| {
            let (partition, position) = place_of(id);
            position <= self.logs.trimmed(partition)
        };
        let mut delete =
            transaction.prepare_cached("DELETE FROM commits WHERE id BETWEEN ? AND ?")?;
        for run in commits.chunk_by(|(a, _), (b, _)| goes(*a) == goes(*b)) {
            if let [(first, _), ..] = *run
                && let [.., (last, _)] = *run
                && goes(first)
            {
                delete.execute((first, last))?;
                for (id, bytes) in run {
                    freed[usize::from(place_of(*id).0.0)] += *bytes as u64;
                }
            }
        }
        let rest = match commits.last() {
            Some((seen, _)) if commits.len() == count => Some(seen + 1..=last),
            _ => None,
        };
        Ok(Swept { rest, freed })
    }

    /// What the slice did is on the disk.
    pub(super) fn done(&mut self, swept: Swept) {
        self.pass = swept.rest;
        for (partition, freed) in self.logs.partitions().zip(swept.freed) {
            self.logs.remove(partition, freed);
        }
    }
}

/// Gives some of the empty pages back, where there are many.
pub(super) fn shrink(connection: &Connection) -> rusqlite::Result<()> {
    let empty: i64 = connection.pragma_query_value(None, "freelist_count", |row| row.get(0))?;
    if empty > EMPTY_PAGES {
        connection.execute_batch(&format!("PRAGMA incremental_vacuum({SHRINK})"))?;
    }
    Ok(())
}
