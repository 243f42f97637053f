//! Calls through the host, as many as it takes.

use std::ops::Range;

use parlour_core::{AgentId, AgentType, Key, Payload};

use super::load::Load;
use super::measure::measure;
use super::setup::Host;
use super::{CallArgs, Door, agent_type, dialect, native, nats, raw, usage, web};
use crate::exit::{Code, Failure};
use crate::output::Output;

/// Read buffers: a worker's takes what all callers send at once.
const CALLER_BUFFER: usize = 16 << 10;
const WORKER_BUFFER: usize = 256 << 10;

/// One connection may register so many types, unless its host is told otherwise.
const TYPES_PER_CONNECTION: usize = 1000;

pub(super) fn run(args: &CallArgs, output: &Output) -> Result<Code, Failure> {
    check(args)?;
    let types = args.types.div_ceil(TYPES_PER_CONNECTION);
    let host = args.load.target.host(args.load.connections + args.workers + types)?;
    let load = connect(args, &host)?;
    measure(load, &args.load.target, &args.load.time)?.report(args, "calls", output)
}

fn check(args: &CallArgs) -> Result<(), Failure> {
    let door = args.load.target.door;
    args.load.target.carries(args.load.in_flight)?;
    match door {
        Door::Rpc | Door::Dialect | Door::Nats if args.workers != 1 => {
            usage("through this door one worker serves a type: use --workers 1")
        }
        _ if args.keys.is_some() && door != Door::V1 => usage("--keys is for --door v1"),
        _ if args.types > 0 && !matches!(door, Door::V1 | Door::Rest) => {
            usage("--types is for --door v1 and rest")
        }
        _ => Ok(()),
    }
}

fn connect(args: &CallArgs, host: &Host) -> Result<Load, Failure> {
    let mut load = Load::new()?;
    let agent_type = agent_type("bench")?;
    let text = "x".repeat(args.payload);
    let payload = Payload::text(&text);
    let name = agent_type.as_str();
    others(args, host, &mut load)?;
    let mut worker_slots = Vec::new();
    match args.load.target.door {
        Door::V1 | Door::Rest => {
            for _ in 0..args.workers {
                let mut link = host.native(name, WORKER_BUFFER)?;
                link.register([&agent_type])?;
                load.add(link, native::Worker::new(&payload, args.load.target.coalesce))?;
            }
        }
        Door::Dialect | Door::Rpc => {
            let mut control = host.connect(CALLER_BUFFER)?;
            let client_id = format!("{name}-worker");
            let link = host.dialect_worker(&mut control, &client_id, &agent_type, WORKER_BUFFER)?;
            load.add(link, dialect::Worker::new())?;
        }
        Door::Nats => {
            let link = host.nats(&nats::worker_subscription(&agent_type), WORKER_BUFFER)?;
            load.add(link, nats::Worker)?;
        }
        Door::Raw => {
            for _ in 0..args.workers {
                let (link, slot) = host.raw(WORKER_BUFFER)?;
                worker_slots.push(slot);
                load.add(link, raw::Worker)?;
            }
        }
    }
    for number in 0..args.load.connections {
        let target = AgentId::new(agent_type.clone(), Key::parse(number.to_string())?);
        match args.load.target.door {
            Door::V1 => {
                let keys = keys(args, number);
                let caller =
                    native::Caller::calls(&agent_type, keys, &payload, args.load.in_flight)?;
                let caller = caller.coalesce(args.load.target.coalesce);
                load.add(host.native(name, CALLER_BUFFER)?, caller)?;
            }
            Door::Dialect => {
                let link = host.dialect(&format!("{name}-caller-{number}"), CALLER_BUFFER)?;
                load.add(link, dialect::Caller::new(&target, &text, args.load.in_flight))?;
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
            Door::Nats => {
                let link = host.nats(&nats::caller_subscription(number), CALLER_BUFFER)?;
                let subject = format!("{name}.{number}");
                load.add(link, nats::Caller::new(&subject, number, &text, args.load.in_flight))?;
            }
            Door::Raw => {
                let (link, _) = host.raw(CALLER_BUFFER)?;
                load.add(link, raw::Caller::new(worker_slots.clone(), &text, args.load.in_flight))?;
            }
        }
    }
    Ok(load)
}

/// Registers the types that nobody calls.
fn others(args: &CallArgs, host: &Host, load: &mut Load) -> Result<(), Failure> {
    let types = (0..args.types).map(|number| agent_type(&format!("other-{number}")));
    let types = types.collect::<Result<Vec<AgentType>, _>>()?;
    for types in types.chunks(TYPES_PER_CONNECTION) {
        let mut link = host.native("bench-others", CALLER_BUFFER)?;
        link.register(types)?;
        load.add(link, native::Worker::new(&Payload::default(), false))?;
    }
    Ok(())
}

/// The keys that a connection calls: one each, or its share of all.
fn keys(args: &CallArgs, number: usize) -> Range<usize> {
    let keys = args.keys.unwrap_or(args.load.connections);
    let from = number * keys / args.load.connections;
    from..((number + 1) * keys / args.load.connections).max(from + 1)
}
