//! How long a host takes to be ready again that was killed with much that waits.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde::Serialize;

use super::accept::Senders;
use super::load::Load;
use super::process::{self, Process};
use super::setup::Host;
use super::tally::{Slots, Tally, now};
use super::{Door, ReopenArgs, agent_type};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output};

/// Connections that send what is to wait, and how many messages on each are not yet acknowledged.
const SENDERS: usize = 8;
const IN_FLIGHT: usize = 64;
/// How long accepting all of it may take, and how long the host may take to be ready.
const PATIENCE: Duration = Duration::from_secs(1200);
const PAUSE: Duration = Duration::from_millis(1);

const WAITING: &str = "parlour_deliveries_waiting";

#[derive(Debug, Serialize)]
struct Report {
    /// Messages that wait, before it was killed and after.
    pending: u64,
    payload: usize,
    accepted_per_second: f64,
    data_bytes: u64,
    rss_before_bytes: u64,
    listening_ms: f64,
    /// From the start of its process.
    ready_ms: f64,
    rss_bytes: u64,
    peak_rss_bytes: u64,
    host_cpu_ms: f64,
}

pub(super) fn run(args: &ReopenArgs, output: &Output) -> Result<Code, Failure> {
    let storage = |error: std::io::Error| {
        Failure::new(Code::Storage, format!("cannot use {}: {error}", args.data.display()))
    };
    std::fs::create_dir_all(&args.data).map_err(storage)?;
    if std::fs::read_dir(&args.data).map_err(storage)?.next().is_some() {
        return Err(Failure::new(Code::Usage, format!("{} is not empty", args.data.display()))
            .hint("name a directory that is made for this with --data DIR"));
    }
    process::allow_files((SENDERS + 64) as u64);
    let first = Running::start(args)?;
    let (sent, accepted_per_second) = fill(args, &first.host)?;
    let rss_before_bytes = first.process().rss()?;
    first.kill()?;
    let data_bytes = size(&args.data).map_err(storage)?;

    let began = now();
    let milliseconds = || now().saturating_duration_since(began).as_secs_f64() * 1e3;
    let host = Running::start(args)?;
    let listening_ms = milliseconds();
    while host.host.get("/readyz")?.0 != 200 {
        if milliseconds() > PATIENCE.as_secs_f64() * 1e3 {
            return Err(Failure::new(Code::Timeout, "the host is not ready again"));
        }
        std::thread::sleep(PAUSE);
    }
    let ready_ms = milliseconds();
    let process = host.process();
    let report = Report {
        pending: host.host.metric(WAITING)?,
        payload: args.payload,
        accepted_per_second,
        data_bytes,
        rss_before_bytes,
        listening_ms,
        ready_ms,
        rss_bytes: process.rss()?,
        peak_rss_bytes: process.peak_rss()?,
        host_cpu_ms: process.cpu()?.as_secs_f64() * 1e3,
    };
    host.kill()?;
    if report.pending != sent {
        let detail = format!("{sent} messages were accepted, and {} wait", report.pending);
        return Err(Failure::new(Code::Failed, detail));
    }
    match output.mode() {
        Mode::Text => output.line(&format!(
            "{} waiting messages, {:.0} MiB on the disk: ready after {:.0} ms, {:.0} MiB of memory (at most {:.0})",
            report.pending,
            mebibytes(data_bytes),
            ready_ms,
            mebibytes(report.rss_bytes),
            mebibytes(report.peak_rss_bytes),
        ))?,
        Mode::Json | Mode::Jsonl => output.json(&report)?,
    }
    Ok(Code::Ok)
}

/// Has as many messages accepted as are to wait, or a few more. Returns how many, and how many a second.
fn fill(args: &ReopenArgs, host: &Host) -> Result<(u64, f64), Failure> {
    let mut load = Load::new()?;
    let agent_type = agent_type("bench")?;
    let payload = "x".repeat(args.payload);
    let senders =
        Senders { host, door: Door::V1, coalesce: true, agent_type: &agent_type, payload };
    for number in 0..SENDERS {
        let keys = number * IN_FLIGHT..(number + 1) * IN_FLIGHT;
        senders.add(keys, None, Box::new(Slots::new(IN_FLIGHT)), &mut load)?;
    }
    let mut tally = Tally::new();
    load.begin(&mut tally)?;
    let wanted = args.pending as u64;
    let took = load.run(PATIENCE, &mut tally, |tally| tally.answered >= wanted)?;
    let per_second = tally.answered as f64 / took.as_secs_f64();
    tally.end();
    load.run(PATIENCE, &mut tally, |tally| tally.open == 0)?;
    match tally.first_error {
        Some(error) => Err(Failure::new(Code::Failed, error)),
        None => Ok((tally.answered, per_second)),
    }
}

/// A host in a process of its own. It is killed when this is dropped.
struct Running {
    child: Child,
    host: Host,
}

impl Running {
    fn start(args: &ReopenArgs) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| {
            Failure::new(Code::Failed, format!("cannot start a host: {error}"))
        };
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        command.args(["serve", "--listen", "127.0.0.1:0", "--data"]).arg(&args.data);
        for (key, value) in &args.set {
            command.args(["--set", &format!("{key}={value}")]);
        }
        let mut child = command.stderr(Stdio::piped()).spawn().map_err(failed)?;
        let stderr = child.stderr.take().ok_or_else(|| failed(std::io::ErrorKind::Other.into()))?;
        let mut lines = BufReader::new(stderr).lines();
        let mut said = String::new();
        while let Some(Ok(line)) = lines.next() {
            if let Some((_, url)) = line.split_once("listening on ") {
                let host = Host::parse(url.trim())?;
                // What it says from now on is not wanted, but must not make it wait either.
                std::thread::spawn(move || lines.for_each(drop));
                return Ok(Self { child, host });
            }
            said = line;
        }
        let _ = child.wait();
        Err(Failure::new(Code::Failed, format!("the host ended: {said}")))
    }

    fn process(&self) -> Process {
        Process::Pid(self.child.id())
    }

    fn kill(mut self) -> Result<(), Failure> {
        let killed = self.child.kill().and_then(|()| self.child.wait());
        killed.map(drop).map_err(|error| Failure::new(Code::Failed, error.to_string()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Of one that has ended there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn size(dir: &Path) -> std::io::Result<u64> {
    std::fs::read_dir(dir)?.try_fold(0, |size, file| Ok(size + file?.metadata()?.len()))
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
