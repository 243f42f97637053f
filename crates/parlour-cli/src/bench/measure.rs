//! From a load that is ready to what there is to say about it.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use super::load::Load;
use super::process::{self, Process};
use super::tally::Tally;
use super::{TargetArgs, TimeArgs};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output};

/// How long calls that are in flight at the end are waited for.
const LAST_ANSWERS: Duration = Duration::from_secs(25);

/// How long what is to be done before may take.
const BEFORE: Duration = Duration::from_secs(600);

/// What came of a load.
#[derive(Debug, Serialize)]
pub(super) struct Measured {
    seconds: f64,
    pub(super) calls: u64,
    pub(super) per_second: f64,
    p50_us: f64,
    pub(super) p99_us: f64,
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

/// Loads the host for as long as asked, and waits for the last answers.
pub(super) fn measure(
    load: Load,
    target: &TargetArgs,
    time: &TimeArgs,
) -> Result<Measured, Failure> {
    measure_after(load, target, time, 0)
}

/// The same, once so much has been done before.
pub(super) fn measure_after(
    mut load: Load,
    target: &TargetArgs,
    time: &TimeArgs,
    count: u64,
) -> Result<Measured, Failure> {
    if let Some(cpu) = target.pin {
        process::pin(cpu)?;
    }
    let host_process = target.host_pid.map(Process::Pid);
    let mut tally = Tally::new();
    load.begin(&mut tally)?;
    load.run(BEFORE, &mut tally, |tally| tally.answered >= count)?;
    load.run(time.warmup, &mut tally, |_| false)?;

    tally.start();
    let host_before = host_process.map(Process::cpu).transpose()?;
    let driver_before = Process::Driver.cpu()?;
    let time = load.run(time.duration, &mut tally, |_| false)?;
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
    Ok(Measured {
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
    })
}

fn share(before: Duration, after: Duration, time: Duration) -> f64 {
    after.saturating_sub(before).as_secs_f64() / time.as_secs_f64()
}

/// What a load was, and what came of it.
#[derive(Serialize)]
struct Report<'a, S> {
    #[serde(flatten)]
    shape: &'a S,
    #[serde(flatten)]
    measured: &'a Measured,
}

impl Measured {
    /// Says what came of a load of this shape, and how the process is to end; `what` is what was
    /// counted, in the plural.
    pub(super) fn report(
        &self,
        shape: &impl Serialize,
        what: &str,
        output: &Output,
    ) -> Result<Code, Failure> {
        match output.mode() {
            Mode::Text => output.data(self.text(what).as_bytes())?,
            Mode::Json | Mode::Jsonl => output.json(&Report { shape, measured: self })?,
        }
        Ok(self.code())
    }

    /// How it went, as the process is to say it.
    pub(super) fn code(&self) -> Code {
        match self.errors + self.unanswered + self.strays {
            0 if self.calls > 0 => Code::Ok,
            _ if self.calls > 0 => Code::PartlyFailed,
            _ => Code::Failed,
        }
    }

    /// The same for people; `what` is what was counted, in the plural.
    pub(super) fn text(&self, what: &str) -> String {
        let mut text = format!(
            "{:.0} {what}/s   p50 {:.0} µs   p99 {:.0} µs   p99.9 {:.0} µs   max {:.0} µs\n",
            self.per_second, self.p50_us, self.p99_us, self.p999_us, self.max_us,
        );
        let _ = write!(text, "driver {:.0} % of a CPU", self.driver_cpu * 100.0);
        if let (Some(cpu), Some(cost)) = (self.host_cpu, self.host_us_per_call) {
            let _ = write!(text, "   host {:.0} %, {cost:.2} µs each", cpu * 100.0);
        }
        if let Some(bytes) = self.host_rss_bytes {
            let _ = write!(text, ", {:.1} MiB", bytes as f64 / f64::from(1 << 20));
        }
        let _ = writeln!(
            text,
            "\n{} {what} in {:.1} s: {} errors, {} unanswered, {} strays",
            self.calls, self.seconds, self.errors, self.unanswered, self.strays
        );
        if let Some(error) = &self.first_error {
            let _ = writeln!(text, "the first error: {}", crate::output::escape(error));
        }
        text
    }
}
