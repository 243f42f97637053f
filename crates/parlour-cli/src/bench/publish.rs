//! Events that the host acknowledges, as many as it takes.

use parlour_core::{Key, Payload, TopicId, TopicType};

use super::load::Load;
use super::measure::measure;
use super::setup::Host;
use super::{Door, PublishArgs, native, usage, web};
use crate::exit::{Code, Failure};
use crate::output::Output;

const BUFFER: usize = 16 << 10;
const SUBSCRIBER_BUFFER: usize = 256 << 10;

pub(super) fn run(args: &PublishArgs, output: &Output) -> Result<Code, Failure> {
    if !matches!(args.load.target.door, Door::V1 | Door::Rest) {
        return usage("events are acknowledged by v1 and rest");
    }
    args.load.target.carries(args.load.in_flight)?;
    let host = args.load.target.host(args.load.connections + args.subscribers)?;
    let load = connect(args, &host)?;
    measure(load, &args.load.target, &args.load.time)?.report(args, "events", output)
}

fn connect(args: &PublishArgs, host: &Host) -> Result<Load, Failure> {
    let mut load = Load::new()?;
    let topic_type = TopicType::parse(format!("bench-{}", std::process::id()))?;
    let text = "x".repeat(args.payload);
    let payload = Payload::text(&text);
    for _ in 0..args.subscribers {
        let mut link = host.native("bench-subscriber", SUBSCRIBER_BUFFER)?;
        link.subscribe(&topic_type)?;
        // A worker takes events and does nothing with them.
        load.add(link, native::Worker::new(&payload, false))?;
    }
    for number in 0..args.load.connections {
        let topic = TopicId::new(topic_type.clone(), Key::parse(number.to_string())?);
        let recipients = args.subscribers as u64;
        if args.load.target.door == Door::Rest {
            let publisher = web::Caller::publisher(&host.authority, &topic, &text, recipients);
            load.add(host.connect(BUFFER)?, publisher)?;
        } else {
            let publisher =
                native::Caller::publishes(topic, payload.clone(), args.load.in_flight, recipients);
            load.add(host.native("bench", BUFFER)?, publisher.coalesce(args.load.target.coalesce))?;
        }
    }
    Ok(load)
}
