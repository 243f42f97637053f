//! Whole lives of messages: accepted, delivered to an agent, acknowledged, settled.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::accept::Senders;
use super::digits::{self, DIGITS};
use super::load::Load;
use super::measure::measure_after;
use super::setup::Host;
use super::tally::{FIRST_ID, Tally, Turns, now};
use super::web::MARK;
use super::{LifeArgs, TargetArgs, agent_type, native};
use crate::exit::{Code, Failure};
use crate::output::Output;

const WORKER_BUFFER: usize = 256 << 10;

const COMPLETED: &str = "parlour_deliveries_completed_total";
/// How long the host may take to settle what was answered last.
const SETTLING: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);

#[derive(Debug, Serialize)]
struct Settled<'a> {
    #[serde(flatten)]
    args: &'a LifeArgs,
    /// All lives that the host says are over: as many as were sent.
    settled: u64,
}

pub(super) fn run(args: &LifeArgs, output: &Output) -> Result<Code, Failure> {
    args.load.target.keeps(args.load.in_flight)?;
    let host = args.load.target.host(args.load.connections + args.workers)?;
    let before = host.metric(COMPLETED)?;
    let (load, lives) = connect(args, &host)?;
    let measured = measure_after(load, &args.load.target, &args.load.time, args.kept)?;
    let begun = lives.begun();
    let started = now();
    let settled = loop {
        let settled = host.metric(COMPLETED)? - before;
        if settled >= begun || now().saturating_duration_since(started) > SETTLING {
            break settled;
        }
        std::thread::sleep(PAUSE);
    };
    if settled != begun && measured.code() == Code::Ok {
        let detail = format!("{begun} messages were sent, and {settled} are settled");
        return Err(Failure::new(Code::Failed, detail));
    }
    measured.report(&Settled { args, settled }, "lives", output)
}

fn connect(args: &LifeArgs, host: &Host) -> Result<(Load, Lives), Failure> {
    let mut load = Load::new()?;
    let agent_type = agent_type("bench")?;
    let lives = Lives::new(args.load.connections, args.load.in_flight, args.workers);
    for _ in 0..args.workers {
        let mut link = host.native(agent_type.as_str(), WORKER_BUFFER)?;
        link.register([&agent_type])?;
        load.add(link, native::Worker::of(lives.clone()))?;
    }
    let payload = MARK.to_owned() + &"x".repeat(args.payload.saturating_sub(MARK.len()));
    let TargetArgs { door, coalesce, .. } = args.load.target;
    let senders = Senders { host, door, coalesce, agent_type: &agent_type, payload };
    for number in 0..args.load.connections {
        let keys = number * args.load.in_flight..(number + 1) * args.load.in_flight;
        let turns = Sender { number, lives: lives.clone() };
        senders.add(keys, None, Box::new(turns), &mut load)?;
    }
    Ok((load, lives))
}

/// What the senders and the workers know of all messages.
#[derive(Clone, Debug)]
pub(super) struct Lives(Rc<RefCell<Inner>>);

#[derive(Debug)]
struct Inner {
    /// Those that are under way. A sender has as many as another, in places that follow each other;
    /// when one is over, the next takes its place.
    lives: Vec<Life>,
    in_flight: usize,
    /// For each sender, the places of those that are over.
    over: Vec<Vec<usize>>,
    /// The place of the first sender among the connections.
    first: usize,
    begun: u64,
}

#[derive(Clone, Copy, Debug)]
struct Life {
    id: u64,
    began: Instant,
    is_accepted: bool,
    is_delivered: bool,
}

impl Lives {
    /// For so many senders, whose connections come behind `first` others.
    fn new(senders: usize, in_flight: usize, first: usize) -> Self {
        let ids = FIRST_ID..FIRST_ID + (senders * in_flight) as u64;
        let life = |id| Life { id, began: now(), is_accepted: false, is_delivered: false };
        let (lives, over) = (ids.map(life).collect(), vec![Vec::new(); senders]);
        Self(Rc::new(RefCell::new(Inner { lives, in_flight, over, first, begun: 0 })))
    }

    fn begun(&self) -> u64 {
        self.0.borrow().begun
    }

    /// A worker was given this message.
    pub(super) fn delivered(&self, payload: &[u8], tally: &mut Tally) {
        let inner = &mut *self.0.borrow_mut();
        let id = payload.first_chunk::<DIGITS>().and_then(|digits| digits::read(digits));
        let place = id.and_then(|id| inner.place(id));
        let Some(place) = place.filter(|&place| !inner.lives[place].is_delivered) else {
            tally.stray(b"a message that was delivered before, or was never sent");
            return;
        };
        inner.lives[place].is_delivered = true;
        if inner.lives[place].is_accepted {
            let sender = place / inner.in_flight;
            if inner.end(place, tally) {
                tally.woken.push(inner.first + sender);
            }
        }
    }
}

impl Inner {
    /// Where the life of this number is, if it is under way.
    fn place(&self, id: u64) -> Option<usize> {
        let place = (id.checked_sub(FIRST_ID)? % self.lives.len() as u64) as usize;
        (self.lives[place].id == id).then_some(place)
    }

    /// Ends a life. Returns whether it is the only one of its sender after which none has begun.
    fn end(&mut self, place: usize, tally: &mut Tally) -> bool {
        tally.delivered();
        tally.took(self.lives[place].began);
        self.vacate(place)
    }

    fn vacate(&mut self, place: usize) -> bool {
        let over = &mut self.over[place / self.in_flight];
        over.push(place);
        over.len() == 1
    }

    /// Begins the next life of a sender if one is over, and returns its number.
    fn next(&mut self, sender: usize, tally: &mut Tally) -> Option<u64> {
        if tally.has_ended() {
            return None;
        }
        let place = self.over[sender].pop()?;
        let id = self.lives[place].id + self.lives.len() as u64;
        Some(self.begin(place, id, tally))
    }

    fn begin(&mut self, place: usize, id: u64, tally: &mut Tally) -> u64 {
        self.begun += 1;
        tally.expect(1);
        self.lives[place] = Life { id, began: tally.now, is_accepted: false, is_delivered: false };
        id
    }
}

/// Sends the next message when one was accepted, delivered and answered.
#[derive(Debug)]
struct Sender {
    number: usize,
    lives: Lives,
}

impl Turns for Sender {
    fn begin(&mut self, tally: &mut Tally) -> Range<u64> {
        let inner = &mut *self.lives.0.borrow_mut();
        let first = self.number * inner.in_flight;
        let ids = FIRST_ID + first as u64..FIRST_ID + (first + inner.in_flight) as u64;
        for (place, id) in (first..).zip(ids.clone()) {
            inner.begin(place, id, tally);
        }
        ids
    }

    fn answer(&mut self, id: u64, what: Result<(), &[u8]>, tally: &mut Tally) -> Option<u64> {
        let inner = &mut *self.lives.0.borrow_mut();
        let place = inner.place(id).filter(|&place| !inner.lives[place].is_accepted);
        let Some(place) = place else {
            tally.stray(b"an answer to a message that was answered before, or was never sent");
            return None;
        };
        inner.lives[place].is_accepted = true;
        if let Err(what) = what {
            tally.refused(what);
            tally.open -= 1;
            inner.vacate(place);
        } else if inner.lives[place].is_delivered {
            inner.end(place, tally);
        }
        inner.next(self.number, tally)
    }

    fn woken(&mut self, tally: &mut Tally, make: &mut dyn FnMut(u64)) {
        while let Some(id) = self.lives.0.borrow_mut().next(self.number, tally) {
            make(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_message_follows_when_the_last_was_accepted_and_delivered_in_any_order() {
        let (lives, mut tally) = (Lives::new(2, 1, 3), Tally::new());
        let mut sender = Sender { number: 1, lives: lives.clone() };
        let text = |number: u64| format!("{:012}xxxxxxxx", FIRST_ID + number).into_bytes();
        assert_eq!(sender.begin(&mut tally), FIRST_ID + 1..FIRST_ID + 2);

        assert_eq!(sender.answer(FIRST_ID + 1, Ok(()), &mut tally), None);
        lives.delivered(&text(1), &mut tally);
        assert_eq!((&*tally.woken, tally.answered), (&[4][..], 1));
        let mut made = Vec::new();
        sender.woken(&mut tally, &mut |id| made.push(id));
        assert_eq!(made, [FIRST_ID + 3]);

        lives.delivered(&text(3), &mut tally);
        assert_eq!(tally.answered, 1);
        assert_eq!(sender.answer(FIRST_ID + 3, Ok(()), &mut tally), Some(FIRST_ID + 5));
        assert_eq!((tally.answered, tally.open, tally.strays, lives.begun()), (2, 1, 0, 3));
        for old in [&*text(3), &text(7), b"short", b"000000000000"] {
            lives.delivered(old, &mut tally);
        }
        assert_eq!(sender.answer(FIRST_ID + 3, Ok(()), &mut tally), None);
        assert_eq!(tally.strays, 5);
    }

    #[test]
    fn a_sender_is_woken_once_for_all_that_are_over_and_what_is_refused_makes_room() {
        let (lives, mut tally) = (Lives::new(1, 3, 1), Tally::new());
        let mut sender = Sender { number: 0, lives: lives.clone() };
        let ids = sender.begin(&mut tally).take(2);
        for id in ids.clone() {
            assert_eq!(sender.answer(id, Ok(()), &mut tally), None);
        }
        for id in ids {
            lives.delivered(format!("{id:012}").as_bytes(), &mut tally);
        }
        assert_eq!(tally.woken, [1]);
        let mut made = Vec::new();
        sender.woken(&mut tally, &mut |id| made.push(id));
        assert_eq!(made, [FIRST_ID + 4, FIRST_ID + 3]);

        assert_eq!(sender.answer(FIRST_ID + 2, Err(b"full"), &mut tally), Some(FIRST_ID + 5));
        assert_eq!((tally.answered, tally.errors, tally.open), (2, 1, 3));

        tally.end();
        assert_eq!(sender.answer(FIRST_ID + 5, Err(b"full"), &mut tally), None);
        assert_eq!(tally.open, 2);
    }
}
