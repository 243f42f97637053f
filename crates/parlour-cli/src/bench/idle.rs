//! Workers that wait for work, to see what each costs the host.

use serde::Serialize;

use super::load::Load;
use super::process::{self, Process};
use super::setup::Host;
use super::tally::Tally;
use super::{Door, IdleArgs, agent_type, dialect, native, nats, raw};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output};

const BUFFER: usize = 1 << 10;

#[derive(Debug, Serialize)]
struct Report {
    door: Door,
    workers: usize,
    rss_before_bytes: u64,
    rss_after_bytes: u64,
    bytes_per_worker: u64,
}

pub(super) fn run(args: &IdleArgs, output: &Output) -> Result<Code, Failure> {
    let Some(pid) = args.target.host_pid else {
        return Err(Failure::new(Code::Usage, "--host-pid says whose memory to look at"));
    };
    if let Some(cpu) = args.target.pin {
        process::pin(cpu)?;
    }
    process::allow_files((args.workers + 64) as u64);
    let host = Host::parse(&args.target.url)?;
    let host_process = Process::Pid(pid);

    // What the first connection brings into memory is no cost of a worker.
    let mut load = Load::new()?;
    let mut tally = Tally::new();
    open(args.target.door, 0, &host, &mut load)?;
    load.begin(&mut tally)?;
    load.run(args.hold, &mut tally, |_| false)?;
    let before = host_process.rss()?;
    for number in 1..=args.workers {
        open(args.target.door, number, &host, &mut load)?;
    }
    load.run(args.hold, &mut tally, |_| false)?;
    let after = host_process.rss()?;

    let report = Report {
        door: args.target.door,
        workers: args.workers,
        rss_before_bytes: before,
        rss_after_bytes: after,
        bytes_per_worker: after.saturating_sub(before) / args.workers as u64,
    };
    match output.mode() {
        Mode::Text => output.line(&format!(
            "{} idle workers: {:.1} MiB before, {:.1} MiB after, {} bytes each",
            report.workers,
            before as f64 / f64::from(1 << 20),
            after as f64 / f64::from(1 << 20),
            report.bytes_per_worker
        ))?,
        Mode::Json | Mode::Jsonl => output.json(&report)?,
    }
    Ok(Code::Ok)
}

fn open(door: Door, number: usize, host: &Host, load: &mut Load) -> Result<(), Failure> {
    let agent_type = agent_type(&format!("idle-{number}"))?;
    match door {
        Door::V1 | Door::Rest => {
            let mut link = host.native(agent_type.as_str(), BUFFER)?;
            link.register([&agent_type])?;
            load.add(link, native::Worker::new(&Default::default(), false))
        }
        Door::Dialect | Door::Rpc => {
            let mut control = host.connect(BUFFER)?;
            let client_id = agent_type.as_str();
            let link = host.dialect_worker(&mut control, client_id, &agent_type, BUFFER)?;
            load.add(link, dialect::Worker::new())
        }
        Door::Nats => {
            let subscription = nats::worker_subscription(&agent_type);
            load.add(host.nats(&subscription, BUFFER)?, nats::Worker)
        }
        Door::Raw => load.add(host.raw(BUFFER)?.0, raw::Worker),
    }
}
