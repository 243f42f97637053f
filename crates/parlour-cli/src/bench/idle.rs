//! Workers that wait for work, to see what each costs the host, and what it is when all come back.

use std::time::Duration;

use serde::Serialize;

use super::join::Joiner;
use super::load::Load;
use super::peer::Peer;
use super::process::{self, Process};
use super::setup::Host;
use super::tally::{Tally, now};
use super::{Door, IdleArgs, agent_type, dialect, native, nats, raw, usage};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output};

const BUFFER: usize = 1 << 10;

/// How long all may take to come back.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Serialize)]
struct Report {
    door: Door,
    workers: usize,
    rss_before_bytes: u64,
    rss_after_bytes: u64,
    bytes_per_worker: u64,
    #[serde(flatten)]
    reconnect: Option<Reconnect>,
}

/// All workers came back at once. Each was back when it had registered; times count from when the
/// first began to connect.
#[derive(Debug, Serialize)]
struct Reconnect {
    back_p50_ms: f64,
    back_p99_ms: f64,
    all_back_ms: f64,
    back_host_cpu_ms: f64,
    back_driver_cpu_ms: f64,
    back_rss_bytes: u64,
}

pub(super) fn run(args: &IdleArgs, output: &Output) -> Result<Code, Failure> {
    let Some(pid) = args.target.host_pid else {
        return usage("--host-pid says whose memory to look at");
    };
    let door = args.target.door;
    if args.reconnect && !matches!(door, Door::V1 | Door::Nats | Door::Raw) {
        return usage("--reconnect is for --door v1, nats and raw");
    }
    if let Some(cpu) = args.target.pin {
        process::pin(cpu)?;
    }
    let host = args.target.host(args.workers)?;
    let host_process = Process::Pid(pid);

    // What the first connection brings into memory is no cost of a worker.
    let mut load = Load::new()?;
    let mut tally = Tally::new();
    open(door, 0, &host, &mut load)?;
    load.begin(&mut tally)?;
    load.run(args.hold, &mut tally, |_| false)?;
    let before = host_process.rss()?;
    for number in 1..=args.workers {
        open(door, number, &host, &mut load)?;
    }
    load.run(args.hold, &mut tally, |_| false)?;
    let after = host_process.rss()?;
    let reconnect =
        args.reconnect.then(|| reconnect(args, &host, host_process, &mut load)).transpose()?;

    let report = Report {
        door,
        workers: args.workers,
        rss_before_bytes: before,
        rss_after_bytes: after,
        bytes_per_worker: after.saturating_sub(before) / args.workers as u64,
        reconnect,
    };
    match output.mode() {
        Mode::Text => {
            output.line(&format!(
                "{} idle workers: {:.1} MiB before, {:.1} MiB after, {} bytes each",
                report.workers,
                mebibytes(before),
                mebibytes(after),
                report.bytes_per_worker
            ))?;
            if let Some(back) = &report.reconnect {
                output.line(&format!(
                    "all reconnect at once: half are back after {:.0} ms, 99 % after {:.0} ms, all after {:.0} ms\n\
                     host {:.0} ms of CPU, {:.1} MiB afterwards; driver {:.0} ms of CPU",
                    back.back_p50_ms,
                    back.back_p99_ms,
                    back.all_back_ms,
                    back.back_host_cpu_ms,
                    mebibytes(back.back_rss_bytes),
                    back.back_driver_cpu_ms,
                ))?;
            }
        }
        Mode::Json | Mode::Jsonl => output.json(&report)?,
    }
    Ok(Code::Ok)
}

/// Drops all workers at once, and has all of them come back at once.
fn reconnect(
    args: &IdleArgs,
    host: &Host,
    host_process: Process,
    load: &mut Load,
) -> Result<Reconnect, Failure> {
    let door = args.target.door;
    let types = (1..=args.workers).map(|number| agent_type(&format!("idle-{number}")));
    let types = types.collect::<Result<Vec<_>, _>>()?;
    let mut tally = Tally::new();
    let (host_cpu, driver_cpu) = (host_process.cpu()?, Process::Driver.cpu()?);
    load.disconnect();
    let began = now();
    for agent_type in &types {
        let joiner = Joiner::new(door, host, agent_type, worker(door), began);
        load.connect(host.address, BUFFER, joiner)?;
    }
    load.begin(&mut tally)?;
    load.run(PATIENCE, &mut tally, |tally| tally.open == 0)?;
    if tally.open > 0 {
        let detail = format!("{} workers are not back after {PATIENCE:?}", tally.open);
        return Err(Failure::new(Code::Timeout, detail));
    }
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    let host_cpu = milliseconds(host_process.cpu()?.saturating_sub(host_cpu));
    let driver_cpu = milliseconds(Process::Driver.cpu()?.saturating_sub(driver_cpu));
    load.run(args.hold, &mut tally, |_| false)?;
    let quantile = |quantile| tally.latency.value_at_quantile(quantile) as f64 / 1e6;
    Ok(Reconnect {
        back_p50_ms: quantile(0.5),
        back_p99_ms: quantile(0.99),
        all_back_ms: tally.latency.max() as f64 / 1e6,
        back_host_cpu_ms: host_cpu,
        back_driver_cpu_ms: driver_cpu,
        back_rss_bytes: host_process.rss()?,
    })
}

fn open(door: Door, number: usize, host: &Host, load: &mut Load) -> Result<(), Failure> {
    let agent_type = agent_type(&format!("idle-{number}"))?;
    let link = match door {
        Door::V1 | Door::Rest => {
            let mut link = host.native(agent_type.as_str(), BUFFER)?;
            link.register([&agent_type])?;
            link
        }
        Door::Dialect | Door::Rpc => {
            let mut control = host.connect(BUFFER)?;
            let client_id = agent_type.as_str();
            host.dialect_worker(&mut control, client_id, &agent_type, BUFFER)?
        }
        Door::Nats => host.nats(&nats::worker_subscription(&agent_type), BUFFER)?,
        Door::Raw => host.raw(BUFFER)?.0,
    };
    load.add(link, worker(door))
}

fn worker(door: Door) -> Box<dyn Peer> {
    match door {
        Door::V1 | Door::Rest => Box::new(native::Worker::new(&Default::default(), false)),
        Door::Dialect | Door::Rpc => Box::new(dialect::Worker::new()),
        Door::Nats => Box::new(nats::Worker),
        Door::Raw => Box::new(raw::Worker),
    }
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
