//! Messages that are accepted for later, each acknowledged when it is on the disk.

use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

use parlour_core::{AgentId, AgentType, Key, Payload};

use super::load::Load;
use super::measure::measure;
use super::setup::Host;
use super::tally::{Slots, Turns};
use super::{AcceptArgs, Door, TargetArgs, agent_type, native, nats, raw, usage, web};
use crate::exit::{Code, Failure};
use crate::output::Output;

const BUFFER: usize = 16 << 10;

pub(super) fn run(args: &AcceptArgs, output: &Output) -> Result<Code, Failure> {
    match args.load.target.door {
        Door::Raw if args.idempotency_key => {
            return usage("the writer in bench/peers knows no keys: leave out --idempotency-key");
        }
        Door::Nats | Door::Raw => {}
        _ => args.load.target.keeps(args.load.in_flight)?,
    }
    let host = args.load.target.host(args.load.connections)?;
    let load = connect(args, &host)?;
    measure(load, &args.load.target, &args.load.time)?.report(args, "messages", output)
}

fn connect(args: &AcceptArgs, host: &Host) -> Result<Load, Failure> {
    let mut load = Load::new()?;
    let agent_type = agent_type("bench")?;
    let name = agent_type.as_str();
    let payload = "x".repeat(args.payload);
    if args.load.target.door == Door::Nats {
        host.nats_stream(name, &format!("{name}.*"))?;
    }
    let TargetArgs { door, coalesce, .. } = args.load.target;
    let senders =
        Senders { host, door, coalesce, agent_type: &agent_type, payload: payload.clone() };
    for number in 0..args.load.connections {
        let keys = args.idempotency_key.then(|| keys(number));
        let keys = keys.as_deref();
        match args.load.target.door {
            Door::Nats => {
                let link = host.nats(&nats::caller_subscription(number), BUFFER)?;
                let subject = format!("{name}.{number}");
                let caller = nats::Caller::stores(
                    name,
                    &subject,
                    number,
                    &payload,
                    keys,
                    args.load.in_flight,
                );
                load.add(link, caller)?;
            }
            Door::Raw => {
                load.add(host.raw(BUFFER)?.0, raw::Caller::writer(&payload, args.load.in_flight))?;
            }
            _ => {
                let turns = Box::new(Slots::new(args.load.in_flight));
                senders.add(number..number + 1, keys, turns, &mut load)?;
            }
        }
    }
    Ok(load)
}

/// Connections that send messages to agents of one type.
pub(super) struct Senders<'a> {
    pub(super) host: &'a Host,
    pub(super) door: Door,
    pub(super) coalesce: bool,
    pub(super) agent_type: &'a AgentType,
    /// The number of each message stands where the mark is in it, if that is there.
    pub(super) payload: String,
}

impl Senders<'_> {
    /// Adds one that sends to the agents of these keys, in turns; over REST it is the first of them.
    pub(super) fn add(
        &self,
        keys: Range<usize>,
        idempotency_keys: Option<&str>,
        turns: Box<dyn Turns>,
        load: &mut Load,
    ) -> Result<(), Failure> {
        let Self { host, agent_type, payload, .. } = self;
        if self.door == Door::Rest {
            let agent = AgentId::new((*agent_type).clone(), Key::parse(keys.start.to_string())?);
            let sender =
                web::Caller::sender(&host.authority, &agent, payload, idempotency_keys, turns);
            load.add(host.connect(BUFFER)?, sender)
        } else {
            let payload = Payload::text(payload);
            let sender = native::Caller::sends(agent_type, keys, payload, idempotency_keys, turns)?;
            load.add(host.native("bench", BUFFER)?, sender.coalesce(self.coalesce))
        }
    }
}

/// What the idempotency keys of a connection begin with: no other connection or run has the same.
fn keys(number: usize) -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}-{number}-", since.as_micros())
}
