//! Calls through a client library, as many at once as asked for, with an agent that echoes behind the
//! same library in the same thread. Prints one line of JSON like `parlour bench call`.

use std::error::Error;
use std::io::Write as _;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::{Parser, ValueEnum};
use futures_util::StreamExt as _;
use hdrhistogram::Histogram;
use parlour::{Client, Payload, Worker};
use serde_json::json;
use tokio::sync::mpsc;

type Failure = Box<dyn Error + Send + Sync>;

/// Calls through a client library.
#[derive(Debug, Parser)]
struct Args {
    /// The library, with its host
    #[arg(long)]
    library: Library,
    /// Where the host is
    #[arg(long)]
    url: String,
    /// Calls in flight
    #[arg(long, default_value_t = 64)]
    in_flight: usize,
    /// Size of each payload in bytes
    #[arg(long, default_value_t = 100)]
    payload: usize,
    /// How long to measure, in seconds
    #[arg(long, default_value_t = 5.0)]
    duration: f64,
    /// How long to load it before that, in seconds
    #[arg(long, default_value_t = 1.0)]
    warmup: f64,
    /// Process of the host
    #[arg(long)]
    host_pid: u32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Library {
    Parlour,
    AsyncNats,
}

/// A caller of the echoing agent.
#[derive(Clone)]
enum Caller {
    Parlour(Client),
    AsyncNats(async_nats::Client),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    let args = Args::parse();
    let caller = match args.library {
        Library::Parlour => parlour(&args.url).await?,
        Library::AsyncNats => nats(&args.url).await?,
    };
    let payload = Bytes::from("x".repeat(args.payload));
    let begin = now();
    let from = begin + Duration::from_secs_f64(args.warmup);
    let until = from + Duration::from_secs_f64(args.duration);

    let (report, mut reports) = mpsc::channel(args.in_flight);
    for _ in 0..args.in_flight {
        let (caller, payload, report) = (caller.clone(), payload.clone(), report.clone());
        tokio::spawn(async move {
            let outcome = call_until(&caller, &payload, from, until).await;
            // Its receiver outlives every sender.
            let _ = report.send(outcome).await;
        });
    }
    drop(report);

    tokio::time::sleep_until(from.into()).await;
    let (driver_before, host_before) = (cpu("self")?, cpu(args.host_pid)?);
    tokio::time::sleep_until(until.into()).await;
    let (driver, host) = (cpu("self")? - driver_before, cpu(args.host_pid)? - host_before);

    let mut latency = Histogram::<u64>::new(3)?;
    while let Some(outcome) = reports.recv().await {
        latency.add(outcome?)?;
    }
    let microseconds = |quantile| latency.value_at_quantile(quantile) as f64 / 1000.0;
    let line = json!({
        "calls": latency.len(),
        "per_second": latency.len() as f64 / args.duration,
        "p50_us": microseconds(0.5),
        "p99_us": microseconds(0.99),
        "p999_us": microseconds(0.999),
        "errors": 0,
        "unanswered": 0,
        "strays": 0,
        "driver_cpu": driver / args.duration,
        "host_cpu": host / args.duration,
        "host_us_per_call": host * 1e6 / latency.len().max(1) as f64,
        "host_rss_bytes": rss(args.host_pid)?,
    });
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}

/// Calls one after the other, and keeps how long each that ended between the two times took.
async fn call_until(
    caller: &Caller,
    payload: &Bytes,
    from: Instant,
    until: Instant,
) -> Result<Histogram<u64>, Failure> {
    let mut latency = Histogram::new(3)?;
    loop {
        let began = now();
        let answer = match caller {
            Caller::Parlour(client) => {
                let message = Payload { bytes: payload.clone(), ..Payload::default() };
                client.call("echo", message).await?.bytes
            }
            Caller::AsyncNats(client) => client.request("echo", payload.clone()).await?.payload,
        };
        if answer.len() != payload.len() {
            return Err("an answer of another length".into());
        }
        let end = now();
        if end >= until {
            return Ok(latency);
        }
        if end >= from {
            latency.record((end - began).as_nanos() as u64)?;
        }
    }
}

async fn parlour(url: &str) -> Result<Caller, Failure> {
    let (connected, mut is_connected) = mpsc::channel(1);
    let worker = Worker::builder(url)
        .agent("echo", async |message: Payload| message)
        .on_connected(move || {
            // Once is enough.
            let _ = connected.try_send(());
        })
        .build()?;
    tokio::spawn(worker.run());
    is_connected.recv().await.ok_or("the worker did not connect")?;
    Ok(Caller::Parlour(Client::connect(url).await?))
}

async fn nats(url: &str) -> Result<Caller, Failure> {
    let worker = async_nats::connect(url).await?;
    let mut asked = worker.subscribe("echo").await?;
    worker.flush().await?;
    tokio::spawn(async move {
        while let Some(message) = asked.next().await {
            if let Some(reply) = message.reply
                && worker.publish(reply, message.payload).await.is_err()
            {
                break;
            }
        }
    });
    Ok(Caller::AsyncNats(async_nats::connect(url).await?))
}

/// The processor time that a process has used, in seconds.
fn cpu(process: impl std::fmt::Display) -> Result<f64, Failure> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let times = fields.split_whitespace().skip(11).take(2);
    let ticks: u64 = times.map(str::parse::<u64>).sum::<Result<_, _>>()?;
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// The memory that a process holds, in bytes.
fn rss(process: u32) -> Result<u64, Failure> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()).ok_or("no VmRSS")?;
    Ok(kilobytes.parse::<u64>()? * 1024)
}

#[expect(clippy::disallowed_methods, reason = "what is measured here is real time")]
fn now() -> Instant {
    Instant::now()
}
