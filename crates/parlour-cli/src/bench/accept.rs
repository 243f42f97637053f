//! Messages that are accepted for later, each acknowledged when it is on the disk.

use std::time::{SystemTime, UNIX_EPOCH};

use parlour_core::{AgentId, AgentType, ByteString, Bytes, Key, Payload};
use serde::Serialize;

use super::load::Load;
use super::measure::{Measured, measure};
use super::setup::Host;
use super::{AcceptArgs, Door, agent_type, native, nats, process, raw, web};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output};

const BUFFER: usize = 16 << 10;

#[derive(Debug, Serialize)]
struct Report {
    door: Door,
    connections: usize,
    in_flight: usize,
    payload: usize,
    idempotency_key: bool,
    coalesce: bool,
    /// Messages that were accepted.
    #[serde(flatten)]
    measured: Measured,
}

pub(super) fn run(args: &AcceptArgs, output: &Output) -> Result<Code, Failure> {
    let wrong = |detail: &str| Err(Failure::new(Code::Usage, detail));
    match args.target.door {
        Door::Rest if args.in_flight != 1 => {
            return wrong(
                "HTTP/1.1 carries one message at a time on a connection: use --in-flight 1",
            );
        }
        Door::Raw if args.idempotency_key => {
            return wrong("the writer in bench/peers knows no keys: leave out --idempotency-key");
        }
        Door::Rest | Door::Nats | Door::Raw if args.coalesce => {
            return wrong("only parlour.v1 has several frames in a message: leave out --coalesce");
        }
        Door::V1 | Door::Rest | Door::Nats | Door::Raw => {}
        _ => return wrong("messages are accepted for later by v1, rest, nats and raw"),
    }
    process::allow_files((args.connections + 64) as u64);
    let host = Host::parse(&args.target.url)?;
    let load = connect(args, &host)?;
    let report = Report {
        door: args.target.door,
        connections: args.connections,
        in_flight: args.in_flight,
        payload: args.payload,
        idempotency_key: args.idempotency_key,
        coalesce: args.coalesce,
        measured: measure(load, &args.target, &args.time)?,
    };
    match output.mode() {
        Mode::Text => output.data(report.measured.text("messages").as_bytes())?,
        Mode::Json | Mode::Jsonl => output.json(&report)?,
    }
    Ok(report.measured.code())
}

fn connect(args: &AcceptArgs, host: &Host) -> Result<Load, Failure> {
    let mut load = Load::new()?;
    let agent_type = agent_type("bench")?;
    let name = agent_type.as_str();
    let payload = "x".repeat(args.payload);
    if args.target.door == Door::Nats {
        host.nats_stream(name, &format!("{name}.*"))?;
    }
    for number in 0..args.connections {
        let keys = args.idempotency_key.then(|| keys(number));
        let keys = keys.as_deref();
        match args.target.door {
            Door::Nats => {
                let link = host.nats(&nats::caller_subscription(number), BUFFER)?;
                let subject = format!("{name}.{number}");
                let caller =
                    nats::Caller::stores(name, &subject, number, &payload, keys, args.in_flight);
                load.add(link, caller)?;
            }
            Door::V1 => {
                let target = AgentId::new(agent_type.clone(), Key::parse(number.to_string())?);
                let payload = Payload {
                    content_type: ByteString::from_static("text/plain"),
                    bytes: Bytes::from(payload.clone()),
                    ..Payload::default()
                };
                let caller = native::Caller::sends(target, payload, keys, args.in_flight);
                load.add(host.native(name, BUFFER)?, caller.coalesce(args.coalesce))?;
            }
            Door::Raw => {
                load.add(host.raw(BUFFER)?.0, raw::Caller::writer(&payload, args.in_flight))?;
            }
            _ => {
                sender(host, &agent_type, number, &payload, keys, &mut load)?;
            }
        }
    }
    Ok(load)
}

/// A connection that sends messages to an agent of its own.
pub(super) fn sender(
    host: &Host,
    agent_type: &AgentType,
    number: usize,
    payload: &str,
    keys: Option<&str>,
    load: &mut Load,
) -> Result<(), Failure> {
    let target = AgentId::new(agent_type.clone(), Key::parse(number.to_string())?);
    load.add(host.connect(BUFFER)?, web::Caller::sender(&host.authority, &target, payload, keys))
}

/// What the idempotency keys of a connection begin with: no other connection or run has the same.
fn keys(number: usize) -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}-{number}-", since.as_micros())
}
