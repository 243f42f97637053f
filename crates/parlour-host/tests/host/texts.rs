//! What the host passes on, its receivers can read: the longest texts of a message too.

use bytes::Bytes;
use parlour_core::wire::{
    CallFrame, EventFrame, Frame, HeaderFields, MAX_TEXT, PublishFrame, Register, Subscribe,
};
use parlour_core::{
    AgentId, AgentType, CallId, Fault, FaultKind, Key, MessageId, Metadata, Payload, Registration,
    TopicFilter, TopicId, TopicType,
};

use crate::room::{Channel, Room};

/// As many agent types and subscriptions as one event frame names.
const RECIPIENTS: u64 = 64;

fn agent_type(number: u64) -> AgentType {
    AgentType::parse(format!("{number:0>128}")).unwrap()
}

fn key() -> Key {
    Key::parse("k".repeat(Key::MAX_BYTES)).unwrap()
}

fn message_id() -> Option<MessageId> {
    Some(MessageId::parse("m".repeat(MessageId::MAX_BYTES)).unwrap())
}

fn longest_header(sender: AgentId) -> HeaderFields {
    HeaderFields {
        id: message_id(),
        conversation: message_id(),
        cause: message_id(),
        principal: None,
        sender: Some(sender),
        traceparent: Some("t".repeat(MAX_TEXT).into()),
        hops: 16,
        idempotency_key: Some("i".repeat(MAX_TEXT).into()),
    }
}

fn longest_payload() -> Payload {
    let mut metadata = Metadata::default();
    for number in 0..Metadata::MAX_ENTRIES {
        let each = Metadata::MAX_BYTES / Metadata::MAX_ENTRIES;
        metadata.insert(format!("{number:0>128}"), "v".repeat(each - 128)).unwrap();
    }
    assert_eq!(metadata.weight(), Metadata::MAX_BYTES);
    Payload {
        data_type: "d".repeat(1024).into(),
        content_type: "c".repeat(1024).into(),
        metadata,
        bytes: Bytes::from_static(b"small"),
    }
}

/// Does what `frame` asks for.
async fn ask(channel: &mut Channel, frame: Frame) {
    channel.send(frame).await;
    let answer = channel.next().await;
    assert!(matches!(answer, Some(Frame::Done(_))), "{answer:?}");
}

async fn register(channel: &mut Channel, agent_type: AgentType) {
    let (request, registration) = (CallId(1), Registration::default());
    ask(channel, Frame::Register(Register { request, agent_type, key: None, registration })).await;
}

#[tokio::test(start_paused = true)]
async fn a_call_with_the_longest_texts_there_can_be_arrives_and_so_does_its_reply() {
    let room = Room::open(&[]);
    let (mut worker, mut caller) = (room.channel().await, room.channel().await);
    register(&mut worker, agent_type(0)).await;
    register(&mut caller, agent_type(1)).await;
    let header = longest_header(AgentId::new(agent_type(1), key()));
    let call = CallFrame {
        id: CallId(u64::MAX),
        target: AgentId::new(agent_type(0), key()),
        timeout: None,
        progress: true,
        resent: false,
        attempt: None,
        topic: None,
        header: header.clone(),
        payload: longest_payload(),
    };
    caller.send(Frame::from(call)).await;
    let call = worker.next_call().await;
    assert_eq!(HeaderFields { principal: None, ..call.header }, header);
    assert_eq!(call.payload, longest_payload());

    worker.send(Frame::Progress(call.id, longest_payload())).await;
    worker.send(Frame::Reply(call.id, Ok(longest_payload()))).await;
    assert_eq!(caller.next().await, Some(Frame::Progress(CallId(u64::MAX), longest_payload())));
    assert_eq!(caller.next_reply().await, (u64::MAX, Ok(longest_payload())));
}

#[tokio::test(start_paused = true)]
async fn an_event_with_the_longest_texts_and_the_most_recipients_arrives() {
    let room = Room::open(&[]);
    let mut worker = room.channel().await;
    let topic = TopicType::parse("t".repeat(TopicType::MAX_BYTES)).unwrap();
    for number in 0..RECIPIENTS {
        register(&mut worker, agent_type(number)).await;
        for (subscription, agent_type) in
            [(number, Some(agent_type(number))), (u64::MAX - number, None)]
        {
            let (request, filter) = (CallId(1), TopicFilter::Exact(topic.clone()));
            let subscribe = Subscribe { request, subscription, filter, agent_type };
            ask(&mut worker, Frame::Subscribe(subscribe)).await;
        }
    }
    let mut publisher = room.channel().await;
    register(&mut publisher, agent_type(RECIPIENTS)).await;
    let header = longest_header(AgentId::new(agent_type(RECIPIENTS), key()));
    let publish = PublishFrame {
        request: None,
        ack: None,
        topic: TopicId::new(topic, key()),
        header: header.clone(),
        payload: longest_payload(),
    };
    publisher.send(Frame::from(publish)).await;
    let Some(Frame::Event(event)) = worker.next().await else { panic!("no event") };
    let EventFrame { agents, subscriptions, header: arrived, payload, .. } = *event;
    assert_eq!((agents.len(), subscriptions.len()), (64, 64));
    assert_eq!(HeaderFields { principal: None, ..arrived }, header);
    assert_eq!(payload, longest_payload());
}

#[tokio::test(start_paused = true)]
async fn a_fault_with_the_longest_texts_arrives() {
    let room = Room::open(&[]);
    let mut worker = room.worker("upper").await;
    let mut caller = room.channel().await;
    for [detail, hint, key] in [[14_000, 18_000, 100], [10, 10, 32_715]] {
        caller.call(u64::MAX, "upper/k", "", None).await;
        let call = worker.next_call().await;
        let fault = Fault::new(FaultKind::AgentFailed, "d".repeat(detail))
            .hint("h".repeat(hint))
            .limit("k".repeat(key), Some(u64::MAX));
        // As a worker may write it: its own library would have cut it.
        let text = |number: u16, text: String| {
            let (tag, length) = (number << 3 | 2, text.len());
            let varint = |value: usize| match value {
                0..128 => vec![value as u8],
                128..16_384 => vec![value as u8 | 0x80, (value >> 7) as u8],
                _ => vec![value as u8 | 0x80, (value >> 7) as u8 | 0x80, (value >> 14) as u8],
            };
            [varint(tag.into()), varint(length), text.into_bytes()].concat()
        };
        let header = [
            vec![8, call.id.0 as u8],
            text(19, fault.kind().name().into()),
            text(20, "d".repeat(detail)),
            text(21, "h".repeat(hint)),
            text(24, "k".repeat(key)),
        ]
        .concat();
        let length = header.len();
        let length = [length as u8 | 0x80, (length >> 7) as u8 | 0x80, (length >> 14) as u8];
        worker.send_raw([&[10][..], &length, &header, &[0]].concat().into()).await;
        let (_, reply) = caller.next_reply().await;
        assert_eq!(reply.unwrap_err().kind(), FaultKind::AgentFailed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_text_that_no_frame_can_carry_is_refused_over_http() {
    let room = Room::open(&[]);
    let mut worker = room.worker("upper").await;
    let long = "x".repeat(MAX_TEXT + 1);
    for name in ["traceparent", "idempotency-key"] {
        for path in ["/v1/agents/upper/k/call", "/v1/topics/news/today"] {
            let answer = room.post(path, &format!("{name}: {long}\r\n"), "hello").await;
            assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
            assert!(answer.contains("longer than 1024 bytes"), "{answer}");
        }
    }
    let header = format!("traceparent: {}\r\n", &long[1..]);
    let asked = room.post("/v1/agents/upper/k/call", &header, "hello");
    let answered = async {
        let call = worker.next_call().await;
        worker.send(Frame::Reply(call.id, Ok(Payload::text("HELLO")))).await;
    };
    assert!(tokio::join!(asked, answered).0.ends_with("HELLO"));
}
