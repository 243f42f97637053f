//! `parlour bench`: loads a host, and says what that took.
//!
//! One thread holds callers and workers. It writes bytes that were prepared before, and reads no more
//! of an answer than it needs to know that it is a good one, so that the host is what is measured.
//! The same driver loads what Parlour is compared with: hosts of `autogen-http-runtime` 0.1.0, NATS
//! servers, and the blind forwarder of `bench/peers`.

mod accept;
mod beside;
mod call;
mod dialect;
mod digits;
mod fanout;
mod http;
mod idle;
mod input;
mod join;
mod life;
mod load;
mod measure;
mod native;
mod nats;
mod peer;
mod process;
mod publish;
mod raw;
mod reopen;
mod setup;
mod tally;
mod web;
mod websocket;

use std::path::PathBuf;
use std::time::Duration;

use parlour_core::AgentType;
use serde::Serialize;

use self::setup::Host;
use crate::args::{duration, setting};
use crate::exit::{Code, Failure};
use crate::output::Output;

/// What to load the host with.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Calls an agent again and again, each connection with as many calls in flight as it may
    Call(CallArgs),
    /// Publishes events that the host acknowledges, each connection with as many in flight as it may
    Publish(PublishArgs),
    /// Has messages accepted for later, each acknowledged once it is on the disk
    Accept(AcceptArgs),
    /// Has messages accepted, delivered and answered, the next to an agent when the last is over
    Life(LifeArgs),
    /// Makes calls, alone and beside messages that are accepted at half the rate the host is capable of
    Beside(BesideArgs),
    /// Kills a host with many waiting messages, and says how long it takes to be ready again
    Reopen(ReopenArgs),
    /// Publishes events to many subscribers, the next when all have it
    Fanout(FanoutArgs),
    /// Connects workers that wait, and says what memory each costs the host
    Idle(IdleArgs),
}

/// The door to load.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Door {
    /// Callers and workers speak parlour.v1
    V1,
    /// Callers and workers speak the dialect of autogen-http-runtime 0.1.0
    Dialect,
    /// Callers use JSON-RPC over HTTP, the worker that dialect
    Rpc,
    /// Callers post to the agent, workers speak parlour.v1
    Rest,
    /// Callers and workers speak NATS, to a NATS server
    Nats,
    /// Callers and workers of the blind forwarder in bench/peers, which can also write into a file
    Raw,
}

#[derive(Debug, Serialize, clap::Args)]
struct TargetArgs {
    /// Where the host is
    #[arg(long, env = "PARLOUR_URL", default_value = "http://127.0.0.1:9000")]
    #[serde(skip)]
    url: String,
    /// How the host is spoken to
    #[arg(long, value_name = "DOOR", default_value = "v1")]
    door: Door,
    /// Put what is written at once into one WebSocket message (v1)
    #[arg(long)]
    coalesce: bool,
    /// Process of the host, to say what it uses
    #[arg(long, value_name = "PID")]
    #[serde(skip)]
    host_pid: Option<u32>,
    /// Processor to keep the driver on
    #[arg(long, value_name = "CPU")]
    #[serde(skip)]
    pin: Option<usize>,
}

/// What connections that ask, again and again, have in common.
#[derive(Debug, Serialize, clap::Args)]
struct LoadArgs {
    #[command(flatten)]
    #[serde(flatten)]
    target: TargetArgs,
    /// Connections that call, publish or send
    #[arg(long, value_name = "C", default_value_t = 8, value_parser = count(4096))]
    connections: usize,
    /// Calls, events or messages on each that are not over yet
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = count(10_000))]
    in_flight: usize,
    #[command(flatten)]
    #[serde(skip)]
    time: TimeArgs,
}

#[derive(Debug, Serialize, clap::Args)]
struct CallArgs {
    #[command(flatten)]
    #[serde(flatten)]
    load: LoadArgs,
    /// Connections that answer them
    #[arg(long, value_name = "W", default_value_t = 1, value_parser = count(1100))]
    workers: usize,
    /// Size of each payload in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 100, value_parser = count(1 << 20))]
    payload: usize,
    /// Agents that are called, by key, shared out among the connections (v1) [default: C]
    #[arg(long, value_name = "N", value_parser = count(99_999))]
    keys: Option<usize>,
    /// Agent types that are registered beside the one that is called (v1, rest)
    #[arg(long, value_name = "N", default_value_t = 0)]
    types: usize,
}

#[derive(Debug, Serialize, clap::Args)]
struct PublishArgs {
    #[command(flatten)]
    #[serde(flatten)]
    load: LoadArgs,
    /// Connections that take every event
    #[arg(long, value_name = "S", default_value_t = 1, value_parser = count(10_000))]
    subscribers: usize,
    /// Size of each payload in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 100, value_parser = count(1 << 20))]
    payload: usize,
}

#[derive(Debug, Serialize, clap::Args)]
struct AcceptArgs {
    #[command(flatten)]
    #[serde(flatten)]
    load: LoadArgs,
    /// Size of each payload in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 256, value_parser = count(1 << 20))]
    payload: usize,
    /// Give each message an idempotency key (v1, rest), or a message id (nats)
    #[arg(long)]
    idempotency_key: bool,
}

#[derive(Debug, Serialize, clap::Args)]
struct LifeArgs {
    #[command(flatten)]
    #[serde(flatten)]
    load: LoadArgs,
    /// Connections that take and answer them
    #[arg(long, value_name = "W", default_value_t = 1, value_parser = count(1100))]
    workers: usize,
    /// Size of each payload in bytes, of which a message's number takes twelve
    #[arg(long, value_name = "BYTES", default_value_t = 256, value_parser = count(1 << 20))]
    payload: usize,
    /// How many lives are to be over before it is measured
    #[arg(long, value_name = "N", default_value_t = 0)]
    kept: u64,
}

#[derive(Debug, Serialize, clap::Args)]
struct BesideArgs {
    #[command(flatten)]
    #[serde(flatten)]
    load: LoadArgs,
    /// Connections that send messages
    #[arg(long, value_name = "S", default_value_t = 8, value_parser = count(4096))]
    senders: usize,
    /// Messages on each that are not yet acknowledged
    #[arg(long, value_name = "M", default_value_t = 1, value_parser = count(10_000))]
    sending: usize,
    /// Size of each payload in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 256, value_parser = count(1 << 20))]
    payload: usize,
}

#[derive(Debug, clap::Args)]
struct ReopenArgs {
    /// Directory for what waits: a new one, or an empty one
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// How many messages are to wait
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = count(100_000_000))]
    pending: usize,
    /// Size of each payload in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 256, value_parser = count(1 << 20))]
    payload: usize,
    /// One setting of the host, such as durable.memory_bytes=1GiB
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting)]
    set: Vec<(String, String)>,
}

#[derive(Debug, Serialize, clap::Args)]
struct FanoutArgs {
    #[command(flatten)]
    #[serde(flatten)]
    target: TargetArgs,
    /// Connections that take every event
    #[arg(long, value_name = "S", default_value_t = 100, value_parser = count(10_000))]
    subscribers: usize,
    /// Events that are published at once; the next follow when all subscribers have these
    #[arg(long, value_name = "K", default_value_t = 64, value_parser = count(4096))]
    batch: usize,
    /// Size of each payload in bytes, of which an event's number takes eight
    #[arg(long, value_name = "BYTES", default_value_t = 100, value_parser = payload)]
    payload: usize,
    #[command(flatten)]
    #[serde(skip)]
    time: TimeArgs,
}

#[derive(Debug, clap::Args)]
struct TimeArgs {
    /// How long to measure
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
    duration: Duration,
    /// How long to load it before that
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    warmup: Duration,
}

#[derive(Debug, clap::Args)]
struct IdleArgs {
    #[command(flatten)]
    target: TargetArgs,
    /// How many workers to connect
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = count(50_000))]
    workers: usize,
    /// Then drop all connections at once and open them again at once: how long until all are back?
    /// (v1, nats, raw)
    #[arg(long)]
    reconnect: bool,
    /// How long to let the host settle before each look at its memory
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = duration)]
    hold: Duration,
}

/// Runs it, prints a report on stdout, and ends.
///
/// The code is [`Code::PartlyFailed`] if any call failed, stayed without an answer, or got two. A
/// connection that is lost ends the run with a failure.
pub(crate) fn run(args: &Args, output: &Output) -> Result<Code, Failure> {
    match &args.action {
        Action::Call(args) => call::run(args, output),
        Action::Publish(args) => publish::run(args, output),
        Action::Life(args) => life::run(args, output),
        Action::Beside(args) => beside::run(args, output),
        Action::Reopen(args) => reopen::run(args, output),
        Action::Accept(args) => accept::run(args, output),
        Action::Fanout(args) => fanout::run(args, output),
        Action::Idle(args) => idle::run(args, output),
    }
}

impl TargetArgs {
    /// The host, for so many connections to it.
    fn host(&self, connections: usize) -> Result<Host, Failure> {
        if self.coalesce && self.door != Door::V1 {
            return usage("only parlour.v1 has several frames in a message: leave out --coalesce");
        }
        process::allow_files((connections + 64) as u64);
        Host::parse(&self.url)
    }

    /// Whether a connection carries so many requests at a time.
    fn carries(&self, in_flight: usize) -> Result<(), Failure> {
        if matches!(self.door, Door::Rpc | Door::Rest) && in_flight != 1 {
            return usage(
                "HTTP/1.1 carries one request at a time on a connection: have one in flight",
            );
        }
        Ok(())
    }

    /// Whether what is behind this door has messages accepted for later, so many at a time.
    fn keeps(&self, in_flight: usize) -> Result<(), Failure> {
        if !matches!(self.door, Door::V1 | Door::Rest) {
            return usage("messages are accepted for later by --door v1 and rest");
        }
        self.carries(in_flight)
    }
}

/// The failure of a command that asks for what there is not.
fn usage<T>(detail: &str) -> Result<T, Failure> {
    Err(Failure::new(Code::Usage, detail))
}

/// An agent type that no other run uses.
fn agent_type(name: &str) -> Result<AgentType, Failure> {
    Ok(AgentType::parse(format!("{name}-{}", std::process::id()))?)
}

/// Reads the size of a payload that has room for a number.
fn payload(text: &str) -> Result<usize, String> {
    let size = count(1 << 20)(text)?;
    if size < fanout::NUMBER {
        return Err(format!("expected at least {}", fanout::NUMBER));
    }
    Ok(size)
}

/// Reads a number from one up to `most`.
fn count(most: usize) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        _ => Err(format!("expected a number from 1 to {most}")),
    }
}
