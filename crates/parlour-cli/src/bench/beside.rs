//! Plain calls beside messages that are accepted for later: what the one costs the other.

use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;

use parlour_core::Payload;
use serde::Serialize;

use super::accept::Senders;
use super::load::Load;
use super::measure::measure;
use super::setup::Host;
use super::tally::{FIRST_ID, Slots, Tally, Turns};
use super::{BesideArgs, TargetArgs, agent_type, native};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output};

const CALLER_BUFFER: usize = 16 << 10;
const WORKER_BUFFER: usize = 256 << 10;

#[derive(Debug, Serialize)]
struct Beside<'a> {
    #[serde(flatten)]
    args: &'a BesideArgs,
    p99_alone_us: f64,
    per_second_alone: f64,
    /// Messages accepted a second, with nothing beside, and beside the calls.
    saturated_per_second: f64,
    accepted_per_second: f64,
    /// How many times as long calls took at the 99th percentile.
    times: f64,
}

/// Calls alone, messages alone, and then both.
pub(super) fn run(args: &BesideArgs, output: &Output) -> Result<Code, Failure> {
    args.load.target.keeps(args.sending)?;
    let host = args.load.target.host(args.load.connections + args.senders)?;
    let alone = measure(calls(args, &host)?, &args.load.target, &args.load.time)?;
    let mut load = Load::new()?;
    senders(args, &host, &mut load, || Box::new(Slots::new(args.sending)))?;
    let saturated = measure(load, &args.load.target, &args.load.time)?;
    for measured in [&alone, &saturated] {
        if measured.code() != Code::Ok {
            return Err(Failure::new(Code::Failed, measured.text("answers")));
        }
    }

    let mut load = calls(args, &host)?;
    let accepted = Rc::new(Cell::new(0));
    let first = load.next_place();
    senders(args, &host, &mut load, || Box::new(Sender::new(args.sending, accepted.clone())))?;
    load.pace(first..load.next_place(), args.sending, saturated.per_second / 2.0);
    let measured = measure(load, &args.load.target, &args.load.time)?;
    // Those of the warm-up and of the last answers count too: the rate was the same.
    let time = (args.load.time.warmup + args.load.time.duration).as_secs_f64();
    let beside = Beside {
        args,
        p99_alone_us: alone.p99_us,
        per_second_alone: alone.per_second,
        saturated_per_second: saturated.per_second,
        accepted_per_second: accepted.get() as f64 / time,
        times: measured.p99_us / alone.p99_us,
    };
    let code = measured.report(&beside, "calls", output)?;
    if output.mode() == Mode::Text {
        output.line(&format!(
            "beside {:.0} messages/s, half of {:.0}: p99 is {:.2} times what it is alone, {:.0} µs",
            beside.accepted_per_second,
            beside.saturated_per_second,
            beside.times,
            beside.p99_alone_us
        ))?;
    }
    Ok(code)
}

/// The plain calls.
fn calls(args: &BesideArgs, host: &Host) -> Result<Load, Failure> {
    let mut load = Load::new()?;
    let agent_type = agent_type("bench")?;
    let payload = Payload::text("x".repeat(args.payload));
    let mut link = host.native(agent_type.as_str(), WORKER_BUFFER)?;
    link.register([&agent_type])?;
    load.add(link, native::Worker::new(&payload, false))?;
    for number in 0..args.load.connections {
        let keys = number..number + 1;
        let caller = native::Caller::calls(&agent_type, keys, &payload, args.load.in_flight)?;
        load.add(host.native(agent_type.as_str(), CALLER_BUFFER)?, caller)?;
    }
    Ok(load)
}

/// Connections that send messages when they are to.
fn senders(
    args: &BesideArgs,
    host: &Host,
    load: &mut Load,
    turns: impl Fn() -> Box<dyn Turns>,
) -> Result<(), Failure> {
    let agent_type = agent_type("kept")?;
    let payload = "x".repeat(args.payload);
    let TargetArgs { door, coalesce, .. } = args.load.target;
    let senders = Senders { host, door, coalesce, agent_type: &agent_type, payload };
    for number in 0..args.senders {
        senders.add(number..number + 1, None, turns(), load)?;
    }
    Ok(())
}

/// Sends a message when it is woken, unless too many were not yet accepted.
#[derive(Debug)]
struct Sender {
    /// The numbers that no message has.
    free: Vec<u64>,
    accepted: Rc<Cell<u64>>,
}

impl Sender {
    fn new(in_flight: usize, accepted: Rc<Cell<u64>>) -> Self {
        Self { free: (FIRST_ID..FIRST_ID + in_flight as u64).collect(), accepted }
    }
}

impl Turns for Sender {
    fn begin(&mut self, _tally: &mut Tally) -> Range<u64> {
        FIRST_ID..FIRST_ID
    }

    fn answer(&mut self, id: u64, what: Result<(), &[u8]>, tally: &mut Tally) -> Option<u64> {
        match what {
            Ok(()) if !self.free.contains(&id) => self.accepted.set(self.accepted.get() + 1),
            Ok(()) => tally.stray(b"an answer to a message that was not sent"),
            Err(what) => tally.stray(what),
        }
        self.free.push(id);
        None
    }

    fn woken(&mut self, tally: &mut Tally, make: &mut dyn FnMut(u64)) {
        if !tally.has_ended()
            && let Some(id) = self.free.pop()
        {
            make(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sender_sends_one_message_each_time_it_is_woken_while_it_may() {
        let (mut tally, accepted) = (Tally::new(), Rc::new(Cell::new(0)));
        let mut sender = Sender::new(2, accepted.clone());
        assert!(sender.begin(&mut tally).is_empty());
        let mut made = Vec::new();
        for _ in 0..3 {
            sender.woken(&mut tally, &mut |id| made.push(id));
        }
        assert_eq!(made.len(), 2);
        assert_eq!(sender.answer(made[0], Ok(()), &mut tally), None);
        sender.woken(&mut tally, &mut |id| made.push(id));
        assert_eq!((made.len(), made[2]), (3, made[0]));
        sender.answer(made[1], Err(b"full"), &mut tally);
        assert_eq!((accepted.get(), tally.strays), (1, 1));
    }
}
