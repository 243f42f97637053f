//! Plain calls beside messages that are accepted for later: what the one costs the other.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use parlour_core::{AgentId, ByteString, Bytes, Key, Payload};
use serde::Serialize;

use super::http;
use super::input::Input;
use super::load::Load;
use super::measure::{Measured, measure};
use super::peer::{Finder, Peer};
use super::setup::Host;
use super::tally::Tally;
use super::{BesideArgs, Door, accept, agent_type, native, process, web};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output};

const CALLER_BUFFER: usize = 16 << 10;
const WORKER_BUFFER: usize = 256 << 10;

#[derive(Debug, Serialize)]
struct Report {
    connections: usize,
    in_flight: usize,
    senders: usize,
    payload: usize,
    p99_alone_us: f64,
    per_second_alone: f64,
    /// Messages accepted a second, with nothing beside, and beside the calls.
    saturated_per_second: f64,
    accepted_per_second: f64,
    /// How many times as long calls took at the 99th percentile.
    times: f64,
    /// The calls beside the messages.
    #[serde(flatten)]
    measured: Measured,
}

pub(super) fn run(args: &BesideArgs, output: &Output) -> Result<Code, Failure> {
    if args.target.door != Door::Rest {
        return Err(Failure::new(Code::Usage, "messages are accepted for later by --door rest"));
    }
    process::allow_files((args.connections + args.senders + 64) as u64);
    let host = Host::parse(&args.target.url)?;
    let alone = measure(calls(args, &host)?, &args.target, &args.time)?;
    let saturated = measure(saturated(args, &host)?, &args.target, &args.time)?;
    for measured in [&alone, &saturated] {
        if measured.code() != Code::Ok {
            return Err(Failure::new(Code::Failed, measured.text("answers")));
        }
    }

    let mut load = calls(args, &host)?;
    let accepted = Rc::new(Cell::new(0));
    let first = load.next_place();
    paced(args, &host, &accepted, &mut load)?;
    load.pace(first..load.next_place(), saturated.per_second / 2.0);
    let measured = measure(load, &args.target, &args.time)?;
    // Those of the warm-up and of the last answers count too: the rate was the same.
    let time = (args.time.warmup + args.time.duration).as_secs_f64();
    let report = Report {
        connections: args.connections,
        in_flight: args.in_flight,
        senders: args.senders,
        payload: args.payload,
        p99_alone_us: alone.p99_us,
        per_second_alone: alone.per_second,
        saturated_per_second: saturated.per_second,
        accepted_per_second: accepted.get() as f64 / time,
        times: measured.p99_us / alone.p99_us,
        measured,
    };
    match output.mode() {
        Mode::Text => {
            output.data(report.measured.text("calls").as_bytes())?;
            output.line(&format!(
                "beside {:.0} messages/s, half of {:.0}: p99 is {:.2} times what it is alone, {:.0} µs",
                report.accepted_per_second,
                report.saturated_per_second,
                report.times,
                report.p99_alone_us
            ))?;
        }
        Mode::Json | Mode::Jsonl => output.json(&report)?,
    }
    Ok(report.measured.code())
}

/// The plain calls.
fn calls(args: &BesideArgs, host: &Host) -> Result<Load, Failure> {
    let mut load = Load::new()?;
    let agent_type = agent_type("bench")?;
    let payload = Payload {
        content_type: ByteString::from_static("text/plain"),
        bytes: Bytes::from("x".repeat(args.payload)),
        ..Payload::default()
    };
    let mut link = host.native(agent_type.as_str(), WORKER_BUFFER)?;
    link.register([&agent_type])?;
    load.add(link, native::Worker::new(&payload, false))?;
    for number in 0..args.connections {
        let keys = number..number + 1;
        let caller = native::Caller::calls(&agent_type, keys, &payload, args.in_flight)?;
        load.add(host.native(agent_type.as_str(), CALLER_BUFFER)?, caller)?;
    }
    Ok(load)
}

/// As many messages as the host takes.
fn saturated(args: &BesideArgs, host: &Host) -> Result<Load, Failure> {
    let mut load = Load::new()?;
    let agent_type = agent_type("kept")?;
    let payload = "x".repeat(args.payload);
    for number in 0..args.senders {
        accept::sender(host, &agent_type, number, &payload, None, &mut load)?;
    }
    Ok(load)
}

/// Messages whenever a sender is woken.
fn paced(
    args: &BesideArgs,
    host: &Host,
    accepted: &Rc<Cell<u64>>,
    load: &mut Load,
) -> Result<(), Failure> {
    let agent_type = agent_type("kept")?;
    let payload = "x".repeat(args.payload);
    for number in 0..args.senders {
        let target = AgentId::new(agent_type.clone(), Key::parse(number.to_string())?);
        let (request, _) = web::delivery(&host.authority, &target, &payload, None);
        let (ack, accepted) = (web::durable(), accepted.clone());
        let sender = Sender { request, ack, accepted, is_waiting: false };
        load.add(host.connect(CALLER_BUFFER)?, sender)?;
    }
    Ok(())
}

/// Sends a message when it is woken, unless the last was not yet accepted.
struct Sender {
    request: Vec<u8>,
    ack: Finder,
    accepted: Rc<Cell<u64>>,
    is_waiting: bool,
}

impl Peer for Sender {
    fn prompt(&mut self, tally: &mut Tally, output: &mut Vec<u8>) {
        if !tally.has_ended() && !std::mem::replace(&mut self.is_waiting, true) {
            output.extend_from_slice(&self.request);
        }
    }

    fn hear(
        &mut self,
        input: &mut Input,
        tally: &mut Tally,
        _output: &mut Vec<u8>,
    ) -> io::Result<()> {
        while let Some(response) = http::response(input.waiting())? {
            if response.status == 202 && self.ack.after(&response.body).is_some() {
                self.accepted.set(self.accepted.get() + 1);
            } else {
                tally.stray(&response.body);
            }
            self.is_waiting = false;
            let taken = response.taken;
            input.take(taken);
        }
        Ok(())
    }
}
