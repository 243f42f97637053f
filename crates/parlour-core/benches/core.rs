//! What the codec, the session and the directory cost, in time and in allocations.
//!
//! `cargo bench -p parlour-core` runs all; a pattern behind `--` picks some.

#![expect(clippy::unwrap_used, reason = "what is parsed here is constant")]

use std::time::{Duration, Instant};

use bytes::BytesMut;
use divan::{AllocProfiler, Bencher, black_box};
use parlour_core::wire::{
    self, CallFrame, EventFrame, Frame, HeaderFields, PublishFrame, SharedEvent,
};
use parlour_core::{
    AgentId, AgentType, Bytes, CallId, Directory, Event, Header, Key, MessageId, Payload,
    Principal, Registration, Session, Subscription, SubscriptionId, Target, TopicFilter, TopicId,
    TopicType, WorkerId,
};

#[global_allocator]
static ALLOCATOR: AllocProfiler = AllocProfiler::system();

fn main() {
    divan::main();
}

/// Payloads of these sizes; frames of the smallest are all header.
const SIZES: [usize; 3] = [0, 100, 10 << 10];

mod codec {
    use super::*;

    #[divan::bench(args = SIZES)]
    fn encode_call(bencher: Bencher, payload: usize) {
        encode(bencher, &call(payload));
    }

    #[divan::bench(args = SIZES)]
    fn decode_call(bencher: Bencher, payload: usize) {
        decode(bencher, &call(payload));
    }

    #[divan::bench(args = SIZES)]
    fn encode_reply(bencher: Bencher, payload: usize) {
        encode(bencher, &reply(payload));
    }

    #[divan::bench(args = SIZES)]
    fn decode_reply(bencher: Bencher, payload: usize) {
        decode(bencher, &reply(payload));
    }

    #[divan::bench(args = SIZES)]
    fn decode_publish(bencher: Bencher, payload: usize) {
        let (topic, header) = (topic(), header());
        let payload = bytes(payload);
        let publish = PublishFrame { request: None, ack: None, topic, header, payload };
        decode(bencher, &Frame::from(publish));
    }

    /// The part of an event that all its recipients share.
    #[divan::bench]
    fn share_event(bencher: Bencher) {
        let event = event();
        bencher.bench_local(|| SharedEvent::new(black_box(&event)));
    }

    /// The same event to one recipient more.
    #[divan::bench]
    fn encode_event(bencher: Bencher) {
        let event = SharedEvent::new(&event());
        let mut out = BytesMut::with_capacity(64 << 10);
        bencher.bench_local(|| {
            out.clear();
            wire::encode_event(black_box(&event), &[], &[1], &mut out);
        });
    }

    #[divan::bench]
    fn decode_event(bencher: Bencher) {
        let (topic, header, payload) = (topic(), header(), bytes(100));
        let event =
            EventFrame { agents: Vec::new(), subscriptions: vec![1], topic, header, payload };
        decode(bencher, &Frame::from(event));
    }

    fn encode(bencher: Bencher, frame: &Frame) {
        let mut out = BytesMut::with_capacity(64 << 10);
        bencher.bench_local(|| {
            out.clear();
            wire::encode(black_box(frame), &mut out);
        });
    }

    fn decode(bencher: Bencher, frame: &Frame) {
        let mut out = BytesMut::new();
        wire::encode(frame, &mut out);
        let message = out.freeze();
        bencher
            .with_inputs(|| message.clone())
            .bench_local_values(|mut message| wire::decode(&mut message));
    }

    fn call(payload: usize) -> Frame {
        Frame::from(CallFrame {
            id: CallId(1 << 28),
            target: agent(7),
            timeout: Some(Duration::from_secs(30)),
            progress: false,
            resent: false,
            attempt: None,
            topic: None,
            header: header(),
            payload: bytes(payload),
        })
    }

    fn reply(payload: usize) -> Frame {
        Frame::Reply(CallId(1 << 28), Ok(bytes(payload)))
    }

    fn header() -> HeaderFields {
        HeaderFields {
            id: Some(id()),
            conversation: Some(id()),
            hops: 1,
            ..HeaderFields::default()
        }
    }
}

/// A call's life in a session that has others in flight.
#[divan::bench(args = [0, 64, 1024])]
fn session_call(bencher: Bencher, others: u64) {
    let deadline = now() + Duration::from_secs(30);
    let mut session = Session::new(usize::MAX);
    for id in 0..others {
        session.begin(CallId(id), deadline, ()).unwrap();
    }
    let mut next = others;
    bencher.with_inputs(|| bytes(100)).bench_local_values(|payload| {
        let (id, deadline) = (CallId(next), deadline + Duration::from_micros(next));
        next += 1;
        session.begin(id, deadline, ()).unwrap();
        assert!(session.send(id) && session.handle_reply(id, Ok(payload)));
        session.poll_settled()
    });
}

/// Finding a worker among so many agent types.
#[divan::bench(args = [1, 1_000, 100_000])]
fn route_among_types(bencher: Bencher, types: u64) {
    let mut directory = Directory::default();
    for number in 0..types {
        register(&mut directory, WorkerId(number), &agent_type(number));
    }
    let agent = agent(types / 2);
    bencher.bench_local(|| directory.route(black_box(&agent)));
}

/// Finding the worker of a key in a pool of so many.
#[divan::bench(args = [1, 10, 100, 1_000])]
fn route_in_pool(bencher: Bencher, workers: u64) {
    let mut directory = Directory::default();
    for number in 0..workers {
        register(&mut directory, WorkerId(number), &agent_type(0));
    }
    let agent = agent(0);
    bencher.bench_local(|| directory.route(black_box(&agent)));
}

/// One more registration, as a host makes it: readers keep the directory as it was.
#[divan::bench(args = [1, 1_000, 100_000])]
fn register_among_types(bencher: Bencher, types: u64) {
    let mut directory = Directory::default();
    for number in 0..types {
        register(&mut directory, WorkerId(number), &agent_type(number));
    }
    let another = agent_type(types);
    bencher.bench_local(|| {
        let mut copy = directory.clone();
        register(&mut copy, WorkerId(types), black_box(&another));
        copy
    });
}

/// Finding the recipients of an event that so many subscribe to.
#[divan::bench(args = [1, 10, 100])]
fn recipients(bencher: Bencher, subscribers: u64) {
    let mut directory: Directory<()> = Directory::default();
    for number in 0..subscribers {
        let owner = WorkerId(number);
        let filter = TopicFilter::Exact(topic().topic_type);
        let subscription = Subscription { filter, target: Target::Listener(1) };
        let id = SubscriptionId::Numbered(owner, 1);
        directory.subscribe(owner, &(), id, &subscription, false, 1).unwrap();
    }
    let topic = topic();
    let where_it_is = |_: &AgentId, id: WorkerId, (): &()| Some((id, ()));
    bencher.bench_local(|| directory.recipients(black_box(&topic), where_it_is));
}

fn register(directory: &mut Directory<()>, worker: WorkerId, agent_type: &AgentType) {
    directory.register(worker, &(), agent_type, &Registration::default(), usize::MAX).unwrap();
}

fn agent_type(number: u64) -> AgentType {
    AgentType::parse(format!("agent-{number}")).unwrap()
}

fn agent(number: u64) -> AgentId {
    AgentId::new(agent_type(number), Key::parse("somebody").unwrap())
}

fn topic() -> TopicId {
    TopicId::new(TopicType::parse("news").unwrap(), Key::parse("tech").unwrap())
}

fn event() -> Event {
    let header = Header {
        id: id(),
        conversation: id(),
        cause: None,
        principal: Principal::ANONYMOUS,
        sender: None,
        traceparent: None,
        hops: 1,
        idempotency_key: None,
    };
    Event { header, topic: topic(), payload: bytes(100) }
}

fn bytes(length: usize) -> Payload {
    Payload { bytes: Bytes::from(vec![b'x'; length]), ..Payload::text("") }
}

fn id() -> MessageId {
    MessageId::parse("0197a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b").unwrap()
}

#[expect(clippy::disallowed_methods, reason = "only a starting point")]
fn now() -> Instant {
    Instant::now()
}
