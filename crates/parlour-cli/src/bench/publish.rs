//! Events that the host acknowledges, as many as it takes.

use parlour_core::{ByteString, Bytes, Key, Payload, TopicId, TopicType};
use serde::Serialize;

use super::load::Load;
use super::measure::{Measured, measure};
use super::setup::Host;
use super::{Door, PublishArgs, native, process, web};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output};

const BUFFER: usize = 16 << 10;
const SUBSCRIBER_BUFFER: usize = 256 << 10;

#[derive(Debug, Serialize)]
struct Report {
    door: Door,
    connections: usize,
    in_flight: usize,
    subscribers: usize,
    payload: usize,
    coalesce: bool,
    /// Events that were acknowledged.
    #[serde(flatten)]
    measured: Measured,
}

pub(super) fn run(args: &PublishArgs, output: &Output) -> Result<Code, Failure> {
    let wrong = |detail: &str| Err(Failure::new(Code::Usage, detail));
    match args.target.door {
        Door::V1 => {}
        Door::Rest if args.in_flight != 1 => {
            return wrong(
                "HTTP/1.1 carries one event at a time on a connection: use --in-flight 1",
            );
        }
        Door::Rest if args.coalesce => {
            return wrong("only parlour.v1 has several frames in a message: leave out --coalesce");
        }
        Door::Rest => {}
        _ => return wrong("events are acknowledged by v1 and rest"),
    }
    process::allow_files((args.connections + args.subscribers + 64) as u64);
    let host = Host::parse(&args.target.url)?;
    let load = connect(args, &host)?;
    let report = Report {
        door: args.target.door,
        connections: args.connections,
        in_flight: args.in_flight,
        subscribers: args.subscribers,
        payload: args.payload,
        coalesce: args.coalesce,
        measured: measure(load, &args.target, &args.time)?,
    };
    match output.mode() {
        Mode::Text => output.data(report.measured.text("events").as_bytes())?,
        Mode::Json | Mode::Jsonl => output.json(&report)?,
    }
    Ok(report.measured.code())
}

fn connect(args: &PublishArgs, host: &Host) -> Result<Load, Failure> {
    let mut load = Load::new()?;
    let topic_type = TopicType::parse(format!("bench-{}", std::process::id()))?;
    let text = "x".repeat(args.payload);
    let payload = Payload {
        content_type: ByteString::from_static("text/plain"),
        bytes: Bytes::from(text.clone()),
        ..Payload::default()
    };
    for _ in 0..args.subscribers {
        let mut link = host.native("bench-subscriber", SUBSCRIBER_BUFFER)?;
        link.subscribe(&topic_type)?;
        // A worker takes events and does nothing with them.
        load.add(link, native::Worker::new(&payload, false))?;
    }
    for number in 0..args.connections {
        let topic = TopicId::new(topic_type.clone(), Key::parse(number.to_string())?);
        let recipients = args.subscribers as u64;
        if args.target.door == Door::Rest {
            let publisher = web::Caller::publisher(&host.authority, &topic, &text, recipients);
            load.add(host.connect(BUFFER)?, publisher)?;
        } else {
            let publisher =
                native::Caller::publishes(topic, payload.clone(), args.in_flight, recipients);
            load.add(host.native("bench", BUFFER)?, publisher.coalesce(args.coalesce))?;
        }
    }
    Ok(load)
}
