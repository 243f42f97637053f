//! Calls through the host, as many as it takes.

use std::fmt::Write as _;
use std::time::Duration;

use parlour_core::{AgentId, AgentType, ByteString, Bytes, Key, Payload};
use serde::Serialize;

use super::load::Load;
use super::process::{self, Process};
use super::setup::Host;
use super::tally::Tally;
use super::{CallArgs, Door, agent_type, dialect, native, web};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output};

/// How long calls that are in flight at the end are waited for.
const LAST_ANSWERS: Duration = Duration::from_secs(25);

/// Read buffers: a worker's takes what all callers send at once.
const CALLER_BUFFER: usize = 16 << 10;
const WORKER_BUFFER: usize = 256 << 10;

#[derive(Debug, Serialize)]
struct Report {
    door: Door,
    connections: usize,
    in_flight: usize,
    workers: usize,
    payload: usize,
    seconds: f64,
    calls: u64,
    per_second: f64,
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
    max_us: f64,
    errors: u64,
    unanswered: u64,
    strays: u64,
    first_error: Option<String>,
    driver_cpu: f64,
    host_cpu: Option<f64>,
    host_us_per_call: Option<f64>,
    host_rss_bytes: Option<u64>,
}

pub(super) fn run(args: &CallArgs, output: &Output) -> Result<Code, Failure> {
    check(args)?;
    if let Some(cpu) = args.target.pin {
        process::pin(cpu)?;
    }
    process::allow_files((args.connections + args.workers + 64) as u64);
    let host = Host::parse(&args.target.url)?;
    let host_process = args.target.host_pid.map(Process::Pid);

    let mut load = connect(args, &host)?;
    let mut tally = Tally::new();
    load.begin(&mut tally)?;
    load.run(args.warmup, &mut tally, |_| false)?;

    tally.start();
    let host_before = host_process.map(Process::cpu).transpose()?;
    let driver_before = Process::Driver.cpu()?;
    let time = load.run(args.duration, &mut tally, |_| false)?;
    let driver_cpu = share(driver_before, Process::Driver.cpu()?, time);
    let host_after = host_process.map(Process::cpu).transpose()?;
    let host_cpu = host_before.zip(host_after).map(|(before, after)| share(before, after, time));
    let host_rss_bytes = host_process.map(Process::rss).transpose()?;

    let calls = tally.answered;
    let microseconds = |nanoseconds: u64| nanoseconds as f64 / 1000.0;
    let quantile = |q| microseconds(tally.latency.value_at_quantile(q));
    let (p50_us, p99_us, p999_us) = (quantile(0.5), quantile(0.99), quantile(0.999));
    let max_us = microseconds(tally.latency.max());
    tally.end();
    load.run(LAST_ANSWERS, &mut tally, |tally| tally.open == 0)?;

    let seconds = time.as_secs_f64();
    let report = Report {
        door: args.target.door,
        connections: args.connections,
        in_flight: args.in_flight,
        workers: args.workers,
        payload: args.payload,
        seconds,
        calls,
        per_second: calls as f64 / seconds,
        p50_us,
        p99_us,
        p999_us,
        max_us,
        errors: tally.errors,
        unanswered: tally.open,
        strays: tally.strays,
        first_error: tally.first_error,
        driver_cpu,
        host_cpu,
        host_us_per_call: host_cpu.map(|cpu| cpu * seconds * 1e6 / calls.max(1) as f64),
        host_rss_bytes,
    };
    match output.mode() {
        Mode::Text => output.data(report.text().as_bytes())?,
        Mode::Json | Mode::Jsonl => output.json(&report)?,
    }
    Ok(match report.errors + report.unanswered + report.strays {
        0 if calls > 0 => Code::Ok,
        _ if calls > 0 => Code::PartlyFailed,
        _ => Code::Failed,
    })
}

fn check(args: &CallArgs) -> Result<(), Failure> {
    let wrong = |detail: &str| Err(Failure::new(Code::Usage, detail));
    match args.target.door {
        Door::Rpc | Door::Rest if args.in_flight != 1 => {
            wrong("HTTP/1.1 carries one call at a time on a connection: use --in-flight 1")
        }
        Door::Rpc | Door::Dialect if args.workers != 1 => {
            wrong("in this dialect one worker serves a type: use --workers 1")
        }
        _ => Ok(()),
    }
}

fn connect(args: &CallArgs, host: &Host) -> Result<Load, Failure> {
    let mut load = Load::new()?;
    let agent_type = agent_type("bench")?;
    let text = "x".repeat(args.payload);
    let payload = Payload {
        content_type: ByteString::from_static("text/plain"),
        bytes: Bytes::from(text.clone()),
        ..Payload::default()
    };
    let name = agent_type.as_str();
    match args.target.door {
        Door::V1 | Door::Rest => {
            for _ in 0..args.workers {
                let mut link = host.native(name, WORKER_BUFFER)?;
                link.register(&agent_type)?;
                load.add(link, native::Worker::new(&payload))?;
            }
        }
        Door::Dialect | Door::Rpc => {
            let mut control = host.connect(CALLER_BUFFER)?;
            let client_id = format!("{name}-worker");
            let link = host.dialect_worker(&mut control, &client_id, &agent_type, WORKER_BUFFER)?;
            load.add(link, dialect::Worker::new())?;
        }
    }
    for number in 0..args.connections {
        let target = target(&agent_type, number)?;
        match args.target.door {
            Door::V1 => {
                let caller = native::Caller::new(target, payload.clone(), args.in_flight);
                load.add(host.native(name, CALLER_BUFFER)?, caller)?;
            }
            Door::Dialect => {
                let link = host.dialect(&format!("{name}-caller-{number}"), CALLER_BUFFER)?;
                load.add(link, dialect::Caller::new(&target, &text, args.in_flight))?;
            }
            Door::Rpc => {
                // Like one program with a pool of connections.
                let client_id = format!("{name}-caller");
                let caller = web::Caller::rpc(&host.authority, &client_id, &target, &text);
                load.add(host.connect(CALLER_BUFFER)?, caller)?;
            }
            Door::Rest => {
                let caller = web::Caller::rest(&host.authority, &target, &text);
                load.add(host.connect(CALLER_BUFFER)?, caller)?;
            }
        }
    }
    Ok(load)
}

/// The agent that a connection calls: one each, so that several workers share the load.
fn target(agent_type: &AgentType, number: usize) -> Result<AgentId, Failure> {
    Ok(AgentId::new(agent_type.clone(), Key::parse(number.to_string())?))
}

fn share(before: Duration, after: Duration, time: Duration) -> f64 {
    after.saturating_sub(before).as_secs_f64() / time.as_secs_f64()
}

impl Report {
    fn text(&self) -> String {
        let mut text = format!(
            "{:.0} calls/s   p50 {:.0} µs   p99 {:.0} µs   p99.9 {:.0} µs   max {:.0} µs\n",
            self.per_second, self.p50_us, self.p99_us, self.p999_us, self.max_us,
        );
        let _ = write!(text, "driver {:.0} % of a CPU", self.driver_cpu * 100.0);
        if let (Some(cpu), Some(cost)) = (self.host_cpu, self.host_us_per_call) {
            let _ = write!(text, "   host {:.0} %, {cost:.1} µs a call", cpu * 100.0);
        }
        if let Some(bytes) = self.host_rss_bytes {
            let _ = write!(text, ", {:.1} MiB", bytes as f64 / f64::from(1 << 20));
        }
        let _ = writeln!(
            text,
            "\n{} calls in {:.1} s: {} errors, {} unanswered, {} strays",
            self.calls, self.seconds, self.errors, self.unanswered, self.strays
        );
        if let Some(error) = &self.first_error {
            let _ = writeln!(text, "the first error: {}", crate::output::escape(error));
        }
        text
    }
}
