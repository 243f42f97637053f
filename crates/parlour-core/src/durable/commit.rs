//! A commit: what it begins with, and its records.

use bytes::{Buf, Bytes};

use super::delivery::{Change, Delivery};
use super::record::{self, Corrupt, FORMAT, Message, Reader, Record, Writer};
use super::{Position, Timestamp};
use crate::Payload;

/// Where a record is: in which commit, and behind how many bytes of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "an address")]
pub struct Place {
    /// The commit.
    pub position: Position,
    /// From its first record on.
    pub offset: u32,
}

/// Records that are to be appended to the log, all or none.
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_structs, reason = "carried out by the partition's owner")]
pub struct Commit {
    /// Behind which commit it belongs.
    pub previous: Position,
    /// What to write there.
    pub bytes: Bytes,
    /// The deliveries that something happened to, some of them more than once.
    pub changed: Vec<u64>,
    /// The deliveries that ended.
    pub settled: Vec<Settled>,
}

/// A delivery that has ended.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "read by whoever waits for it")]
pub struct Settled {
    /// Where in its commit the log tells of it.
    pub offset: u32,
    /// As it ended.
    pub delivery: Delivery,
    /// The answer, if it was completed.
    pub reply: Option<Payload>,
}

/// What each commit begins with: the state of the log before it that is no delivery's.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Scalars {
    pub(super) time: Timestamp,
    /// Drawn by the owner that writes.
    pub(super) epoch: u32,
    /// The commit before this one.
    pub(super) previous: Position,
    /// The log up to here is not needed for the state any more.
    pub(super) base: Position,
    pub(super) totals: Totals,
}

/// How many deliveries there ever were, and how those ended that are no more.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "the terms of the law of conservation")]
#[expect(missing_docs, reason = "named after the states")]
pub struct Totals {
    pub accepted: u64,
    pub completed: u64,
    pub cancelled: u64,
    pub expired: u64,
    pub discarded: u64,
    /// And how many events were published.
    pub published: u64,
}

impl Totals {
    pub(super) fn count(&mut self, change: &Change) {
        match change {
            Change::Completed { .. } => self.completed += 1,
            Change::Cancelled { .. } => self.cancelled += 1,
            Change::Expired => self.expired += 1,
            Change::Discarded { .. } => self.discarded += 1,
            _ => {}
        }
    }
}

/// The records of a commit, each with its offset and its length.
pub(super) struct Records {
    length: usize,
    rest: Bytes,
}

impl Records {
    pub(super) fn of(commit: &Bytes) -> Result<Self, Corrupt> {
        let mut r = Reader(commit.clone());
        header(&mut r)?;
        Ok(Self { length: r.0.len(), rest: r.0 })
    }
}

impl Iterator for Records {
    type Item = Result<(u32, Record, u32), Corrupt>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let offset = (self.length - self.rest.len()) as u32;
        let before = self.rest.len();
        let record = record::decode(&mut self.rest);
        Some(record.map(|record| (offset, record, (before - self.rest.len()) as u32)))
    }
}

/// Which deliveries a commit tells the end of, by their numbers, and at which offsets.
pub fn settled_in(commit: &Bytes) -> Result<Vec<(u64, u32)>, Corrupt> {
    let mut settled = Vec::new();
    let Records { length, mut rest } = Records::of(commit)?;
    while !rest.is_empty() {
        let offset = (length - rest.len()) as u32;
        settled.extend(record::settled(&mut rest)?.map(|number| (number, offset)));
    }
    Ok(settled)
}

/// The events that a commit publishes, each with its offset. As [`record_at`], they keep little else in
/// memory.
pub fn published_in(commit: &Bytes) -> Result<Vec<(u32, Message)>, Corrupt> {
    let mut events = Vec::new();
    let Records { length, mut rest } = Records::of(commit)?;
    while !rest.is_empty() {
        let offset = (length - rest.len()) as u32;
        events.extend(record::published(&mut rest)?.map(|message| (offset, message)));
    }
    Ok(events)
}

/// The epoch of the owner that made a commit.
pub fn epoch_of(commit: &Bytes) -> Result<u32, Corrupt> {
    header(&mut Reader(commit.clone())).map(|scalars| scalars.epoch)
}

/// When a commit was made.
pub fn time_of(commit: &Bytes) -> Result<Timestamp, Corrupt> {
    header(&mut Reader(commit.clone())).map(|scalars| scalars.time)
}

/// The commit before this one in its log; 0 if there was none.
pub fn previous_of(commit: &Bytes) -> Result<Position, Corrupt> {
    header(&mut Reader(commit.clone())).map(|scalars| scalars.previous)
}

impl Settled {
    /// Reads the end of a delivery from the commit that tells of it.
    pub fn read(commit: &Bytes, offset: u32) -> Result<Self, Corrupt> {
        let Record::Settled { mut delivery, change } = record_at(commit, offset)? else {
            return Err(Corrupt::Impossible("place of an end"));
        };
        delivery.apply(&change, time_of(commit)?);
        Ok(Self::new(offset, *delivery, change))
    }

    pub(super) fn new(offset: u32, delivery: Delivery, change: Change) -> Self {
        let reply = match change {
            Change::Completed { reply } => Some(reply),
            _ => None,
        };
        Self { offset, delivery, reply }
    }
}

/// The record that stands at `offset` in a commit. It does not keep the commit in memory, unless that is
/// not much more.
pub fn record_at(commit: &Bytes, offset: u32) -> Result<Record, Corrupt> {
    let mut r = Reader(commit.clone());
    header(&mut r)?;
    let mut records = r.0;
    if records.len() < offset as usize {
        return Err(Corrupt::Truncated("a record"));
    }
    records.advance(offset as usize);
    record::decode(&mut record::apart(&mut records)?)
}

pub(super) fn write_header(scalars: &Scalars, out: &mut Vec<u8>) {
    out.push(FORMAT);
    let Scalars { time, epoch, previous, base, totals } = scalars;
    let Totals { accepted, completed, cancelled, expired, discarded, published } = *totals;
    let mut w = Writer(out);
    for number in [time.0, u64::from(*epoch), previous.0, base.0] {
        w.number(number);
    }
    for number in [accepted, completed, cancelled, expired, discarded, published] {
        w.number(number);
    }
}

pub(super) fn header(r: &mut Reader) -> Result<Scalars, Corrupt> {
    let format = r.byte()?;
    if format > FORMAT {
        return Err(Corrupt::Newer(format));
    } else if format == 0 {
        return Err(Corrupt::Impossible("format"));
    }
    Ok(Scalars {
        time: Timestamp(r.number()?),
        epoch: u32::try_from(r.number()?).map_err(|_| Corrupt::Impossible("epoch"))?,
        previous: Position(r.number()?),
        base: Position(r.number()?),
        totals: Totals {
            accepted: r.number()?,
            completed: r.number()?,
            cancelled: r.number()?,
            expired: r.number()?,
            discarded: r.number()?,
            published: r.number()?,
        },
    })
}
