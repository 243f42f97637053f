//! Events from one publisher to many subscribers.

use std::io;
use std::time::Instant;

use parlour_core::{Bytes, Payload, TopicId, TopicType};

use super::input::Input;
use super::load::Load;
use super::measure::measure;
use super::peer::Peer;
use super::setup::Host;
use super::tally::Tally;
use super::{Door, FanoutArgs, native, nats, raw, usage};
use crate::exit::{Code, Failure};
use crate::output::Output;

/// An event's payload begins with its number, in so many bytes.
pub(super) const NUMBER: usize = size_of::<u64>();

const BUFFER: usize = 32 << 10;

/// Publishes that are written at once, and where in them the numbers of the events stand.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) bytes: Vec<u8>,
    pub(super) numbers_at: Vec<usize>,
}

/// Takes what is whole, and gives the payload of each event to the last argument.
type Events = fn(&mut Input, &mut Vec<u8>, Take<'_>) -> io::Result<()>;

/// Takes the payload of an event.
pub(super) type Take<'a> = &'a mut dyn FnMut(&[u8]);

/// Publishes a batch, and the next when all of it has arrived everywhere.
#[derive(Debug)]
struct Publisher {
    events: Events,
    batch: Batch,
    subscribers: usize,
    next: u64,
    began: Option<Instant>,
}

impl Publisher {
    fn publish(&mut self, tally: &mut Tally, output: &mut Vec<u8>) {
        for &at in &self.batch.numbers_at {
            self.batch.bytes[at..at + NUMBER].copy_from_slice(&self.next.to_be_bytes());
            self.next += 1;
        }
        output.extend_from_slice(&self.batch.bytes);
        self.began = Some(tally.now);
        tally.expect(self.batch.numbers_at.len() * self.subscribers);
    }
}

impl Peer for Publisher {
    fn begin(&mut self, tally: &mut Tally, output: &mut Vec<u8>) {
        self.publish(tally, output);
    }

    fn prompt(&mut self, tally: &mut Tally, output: &mut Vec<u8>) {
        if tally.open == 0
            && let Some(began) = self.began.take()
        {
            tally.took(began);
            if !tally.has_ended() {
                self.publish(tally, output);
            }
        }
    }

    fn hear(&mut self, input: &mut Input, tally: &mut Tally, out: &mut Vec<u8>) -> io::Result<()> {
        (self.events)(input, out, &mut |payload| tally.stray(payload))
    }
}

/// Takes events, each of which must be the one after the last.
#[derive(Debug)]
struct Subscriber {
    events: Events,
    payload: usize,
    next: u64,
}

impl Peer for Subscriber {
    fn hear(&mut self, input: &mut Input, tally: &mut Tally, out: &mut Vec<u8>) -> io::Result<()> {
        (self.events)(input, out, &mut |payload| {
            let number = payload.first_chunk::<NUMBER>().map(|bytes| u64::from_be_bytes(*bytes));
            if number == Some(self.next) && payload.len() == self.payload {
                tally.delivered();
            } else {
                tally.stray(format!("{number:?} in place of event {}", self.next).as_bytes());
            }
            self.next += 1;
        })
    }
}

pub(super) fn run(args: &FanoutArgs, output: &Output) -> Result<Code, Failure> {
    let (Door::V1 | Door::Nats | Door::Raw) = args.target.door else {
        return usage("events go to subscribers by v1, nats and raw");
    };
    let host = args.target.host(args.subscribers)?;
    let load = connect(args, &host)?;
    measure(load, &args.target, &args.time)?.report(args, "deliveries", output)
}

fn connect(args: &FanoutArgs, host: &Host) -> Result<Load, Failure> {
    let mut load = Load::new()?;
    let topic = format!("bench-{}", std::process::id());
    let payload = vec![b'x'; args.payload];
    let events: Events = match args.target.door {
        Door::Nats => nats::events,
        Door::Raw => raw::events,
        _ => native::events,
    };
    let topic_type = TopicType::parse(topic.clone())?;
    for _ in 0..args.subscribers {
        let link = match args.target.door {
            Door::Nats => host.nats(&nats::subscription(&topic), BUFFER)?,
            Door::Raw => host.raw(BUFFER)?.0,
            _ => {
                let mut link = host.native("bench", BUFFER)?;
                link.subscribe(&topic_type)?;
                link
            }
        };
        load.add(link, Subscriber { events, payload: args.payload, next: 0 })?;
    }
    let (link, batch) = match args.target.door {
        Door::Nats => (host.nats("", BUFFER)?, nats::publishes(&topic, &payload, args.batch)),
        Door::Raw => (host.raw(BUFFER)?.0, raw::publishes(&payload, args.batch)),
        _ => {
            let topic = TopicId::new(topic_type, parlour_core::Key::parse("bench")?);
            let payload = Payload { bytes: Bytes::from(payload), ..Payload::default() };
            let batch = native::publishes(topic, payload, args.batch, args.target.coalesce);
            (host.native("bench", BUFFER)?, batch)
        }
    };
    let subscribers = args.subscribers;
    load.add_leader(link, Publisher { events, batch, subscribers, next: 0, began: None })?;
    Ok(load)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_batch_waits_until_all_of_the_last_has_arrived() {
        let mut tally = Tally::new();
        let batch = nats::publishes("news", &[0; NUMBER], 2);
        let mut publisher =
            Publisher { events: nats::events, batch, subscribers: 1, next: 0, began: None };
        let mut subscriber = Subscriber { events: nats::events, payload: NUMBER, next: 0 };
        let mut hear = |numbers: &[u64], tally: &mut Tally| {
            let mut input = Input::new(1024);
            for number in numbers {
                let bytes = [b"MSG news 1 8\r\n", &number.to_be_bytes()[..], b"\r\n"].concat();
                input.fill(&bytes[..]).unwrap();
            }
            subscriber.hear(&mut input, tally, &mut Vec::new()).unwrap();
        };

        let mut output = Vec::new();
        publisher.begin(&mut tally, &mut output);
        assert!(output.ends_with(b"\x01\r\n"));
        output.clear();
        hear(&[0], &mut tally);
        publisher.prompt(&mut tally, &mut output);
        assert_eq!(output, b"");
        hear(&[1], &mut tally);
        publisher.prompt(&mut tally, &mut output);
        assert!(output.ends_with(b"\x03\r\n"));
        assert_eq!((tally.answered, tally.open, tally.strays), (2, 2, 0));

        // One that is left out is noticed.
        hear(&[3], &mut tally);
        assert_eq!((tally.open, tally.strays), (2, 1));
    }
}
