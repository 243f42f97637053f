//! What became of the calls.

use std::fmt;
use std::ops::Range;
use std::time::Instant;

use hdrhistogram::Histogram;

/// The first number a call gets: from here on a varint takes five bytes, for 34 billion calls.
pub(super) const FIRST_ID: u64 = 1 << 28;

/// What all connections together have seen, and whether they may begin more.
#[derive(Debug)]
pub(super) struct Tally {
    /// When the bytes that are being read came.
    pub(super) now: Instant,
    /// Calls that have no answer yet, or deliveries that are to come.
    pub(super) open: u64,
    pub(super) answered: u64,
    pub(super) errors: u64,
    /// Answers to calls that had one already, or that nobody made.
    pub(super) strays: u64,
    pub(super) first_error: Option<String>,
    /// In nanoseconds.
    pub(super) latency: Histogram<u64>,
    /// Connections, by their places, that may say more although nothing was said to them.
    pub(super) woken: Vec<usize>,
    ended: bool,
}

impl Tally {
    pub(super) fn new() -> Self {
        // Three digits, up to a minute.
        let latency = Histogram::new_with_bounds(1, 60_000_000_000, 3);
        Self {
            now: now(),
            open: 0,
            answered: 0,
            errors: 0,
            strays: 0,
            first_error: None,
            #[expect(clippy::expect_used, reason = "the bounds are constants that are in order")]
            latency: latency.expect("bounds in order"),
            woken: Vec::new(),
            ended: false,
        }
    }

    /// Forgets the answers so far, which were to warm things up; errors stay.
    pub(super) fn start(&mut self) {
        self.answered = 0;
        self.latency.reset();
    }

    /// From here on nobody begins a call.
    pub(super) fn end(&mut self) {
        self.ended = true;
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// So many deliveries are to come.
    pub(super) fn expect(&mut self, deliveries: usize) {
        self.open += deliveries as u64;
    }

    /// One of them came.
    pub(super) fn delivered(&mut self) {
        self.open = self.open.saturating_sub(1);
        self.answered += 1;
    }

    /// Something that began then is over now.
    pub(super) fn took(&mut self, began: Instant) {
        let took = self.now.saturating_duration_since(began);
        self.latency.saturating_record(took.as_nanos() as u64);
    }

    pub(super) fn stray(&mut self, what: &[u8]) {
        self.strays += 1;
        self.note(what);
    }

    /// What was asked for was refused.
    pub(super) fn refused(&mut self, what: &[u8]) {
        self.errors += 1;
        self.note(what);
    }

    fn note(&mut self, what: &[u8]) {
        self.first_error.get_or_insert_with(|| {
            String::from_utf8_lossy(&what[..what.len().min(500)]).into_owned()
        });
    }

    fn answered(&mut self, began: Instant, what: Result<(), &[u8]>) {
        match what {
            Ok(()) => {
                self.answered += 1;
                self.took(began);
            }
            Err(what) => self.refused(what),
        }
    }
}

/// When one connection makes its requests.
pub(super) trait Turns: fmt::Debug {
    /// The numbers of those that it makes at first.
    fn begin(&mut self, tally: &mut Tally) -> Range<u64>;

    /// Takes the answer to one, with the bytes to show if it is a bad one. Returns the number of the
    /// next, if it is to be made now.
    fn answer(&mut self, id: u64, what: Result<(), &[u8]>, tally: &mut Tally) -> Option<u64>;

    /// Has those made that the connection was woken for.
    fn woken(&mut self, _tally: &mut Tally, _make: &mut dyn FnMut(u64)) {}
}

/// The calls that one connection has in flight: as soon as one ends, the next begins in its place.
#[derive(Debug)]
pub(super) struct Slots {
    count: usize,
    /// None before the first calls.
    slots: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    id: u64,
    began: Instant,
    is_open: bool,
}

impl Slots {
    /// Room for `count` calls.
    pub(super) fn new(count: usize) -> Self {
        Self { count, slots: Vec::new() }
    }
}

impl Turns for Slots {
    /// Begins as many calls as there is room for.
    fn begin(&mut self, tally: &mut Tally) -> Range<u64> {
        let ids = FIRST_ID..FIRST_ID + self.count as u64;
        tally.open += self.count as u64;
        let slot = |id| Slot { id, began: tally.now, is_open: true };
        self.slots = ids.clone().map(slot).collect();
        ids
    }

    fn answer(&mut self, id: u64, what: Result<(), &[u8]>, tally: &mut Tally) -> Option<u64> {
        let count = self.count as u64;
        let place = id.wrapping_sub(FIRST_ID) % count;
        let slot = self.slots.get_mut(place as usize);
        let Some(slot) = slot.filter(|slot| slot.id == id && slot.is_open) else {
            tally.stray(b"an answer to a call that nobody waits for");
            return None;
        };
        tally.answered(slot.began, what);
        if tally.ended {
            slot.is_open = false;
            tally.open -= 1;
            return None;
        }
        slot.id += count;
        slot.began = tally.now;
        Some(slot.id)
    }
}

/// The time. A load driver measures the real one.
#[expect(clippy::disallowed_methods, reason = "what is measured here is real time")]
pub(super) fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_answer_is_a_stray() {
        let mut tally = Tally::new();
        let mut slots = Slots::new(2);
        assert_eq!(slots.begin(&mut tally), FIRST_ID..FIRST_ID + 2);
        assert_eq!(slots.answer(FIRST_ID + 1, Ok(()), &mut tally), Some(FIRST_ID + 3));
        assert_eq!(slots.answer(FIRST_ID + 1, Ok(()), &mut tally), None);
        assert_eq!((tally.answered, tally.strays, tally.open), (1, 1, 2));
    }

    #[test]
    fn after_the_end_answers_count_and_no_call_begins() {
        let mut tally = Tally::new();
        let mut slots = Slots::new(1);
        slots.begin(&mut tally);
        tally.end();
        assert_eq!(slots.answer(FIRST_ID, Err(b"no such agent"), &mut tally), None);
        assert_eq!((tally.errors, tally.open), (1, 0));
        assert_eq!(tally.first_error.as_deref(), Some("no such agent"));
    }
}
