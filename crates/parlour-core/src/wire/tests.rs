//! Frames there and back, and bytes that are none.

use proptest::prelude::*;

use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::number::kind;
use super::*;
use crate::durable::{DeliveryId, Timestamp};
use crate::{
    AgentId, AgentType, Attempt, CallId, Fault, FaultKind, Key, MessageId, Payload, Principal,
    Registration, TopicFilter, TopicId, TopicType,
};

#[test]
fn every_kind_of_frame_survives_the_wire() {
    let mut metadata = crate::Metadata::default();
    metadata.insert("request-type", "sum ✓").unwrap();
    let payload = Payload {
        data_type: "Text".into(),
        content_type: "application/json".into(),
        metadata,
        bytes: Bytes::from_static(b"{\"a\":1}"),
    };
    let header = HeaderFields {
        id: Some(MessageId::parse("m1").unwrap()),
        conversation: Some(MessageId::parse("c1").unwrap()),
        cause: Some(MessageId::parse("m0").unwrap()),
        principal: Some(Principal::named("token")),
        sender: Some(AgentId::parse("a/k/2").unwrap()),
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
        hops: 3,
        idempotency_key: Some("once".into()),
    };
    let agent_type = AgentType::parse("upper").unwrap();
    let delivery = DeliveryId::parse("3-9f2c11aa-512").unwrap();
    let attempt = Attempt { delivery, number: 2 };
    let topic = TopicId::new(TopicType::parse("a:b").unwrap(), Key::parse("s").unwrap());
    let fault = Fault::new(FaultKind::Overloaded, "full")
        .hint("wait")
        .retry_after(Duration::from_millis(250))
        .limit("limits.queue_messages", Some(4096));
    let registration =
        Registration { exclusive: true, capacity: 300, capabilities: vec!["sum".into()] };
    let frames = [
        Frame::from(Hello {
            name: "me".into(),
            versions: vec![1, 2],
            features: vec!["resume".into()],
            session: Some("s1".into()),
            received: 12,
            credit: crate::Credit { messages: 1024, bytes: 1 << 20 },
        }),
        Frame::from(Welcome {
            version: 1,
            features: vec![],
            name: "room".into(),
            max_payload: 1 << 20,
            heartbeat: Duration::from_secs(15),
            session: Some("s2".into()),
            resumed: true,
            received: 300,
            credit: crate::Credit { messages: 4096, bytes: 8 << 20 },
            grace: Duration::from_secs(5),
        }),
        Frame::Register(Register {
            request: CallId(1),
            agent_type: agent_type.clone(),
            key: Some(Key::parse("k").unwrap()),
            registration,
        }),
        Frame::Unregister { request: CallId(2), agent_type: agent_type.clone(), key: None },
        Frame::Subscribe(Subscribe {
            request: CallId(3),
            subscription: 7,
            filter: TopicFilter::parse("news.*").unwrap(),
            agent_type: Some(agent_type.clone()),
        }),
        Frame::Unsubscribe { request: CallId(4), subscription: 7 },
        Frame::Done(Done { request: CallId(4), recipients: 2, dropped: vec!["a/b".into()] }),
        Frame::from(CallFrame {
            id: CallId(u64::MAX),
            target: AgentId::parse("upper/1").unwrap(),
            timeout: Some(Duration::from_millis(1500)),
            progress: true,
            resent: true,
            attempt: None,
            topic: None,
            header: header.clone(),
            payload: payload.clone(),
        }),
        Frame::Reply(CallId(5), Ok(payload.clone())),
        Frame::Reply(CallId(6), Err(fault.clone())),
        Frame::from(Outcome { id: CallId(5), attempt, reply: Ok(payload.clone()) }),
        Frame::from(Outcome { id: CallId(6), attempt, reply: Err(fault.clone()) }),
        Frame::from(PublishFrame {
            request: None,
            ack: None,
            topic: topic.clone(),
            header: HeaderFields::default(),
            payload: payload.clone(),
        }),
        Frame::from(PublishFrame {
            request: Some(CallId(9)),
            ack: Some("durable".into()),
            topic: topic.clone(),
            header: header.clone(),
            payload: payload.clone(),
        }),
        Frame::from(PublishedFrame {
            request: CallId(9),
            id: MessageId::parse("m1").unwrap(),
            conversation: MessageId::parse("c1").unwrap(),
            ack: "durable".into(),
            recipients: 300,
            known: true,
        }),
        Frame::from(EventFrame {
            agents: vec![agent_type],
            subscriptions: vec![7, 300],
            topic,
            header: header.clone(),
            payload: payload.clone(),
        }),
        Frame::from(SendFrame {
            request: CallId(9),
            target: AgentId::parse("upper/1").unwrap(),
            delay: Some(Duration::from_secs(60)),
            deliver_at: Some(Timestamp(1 << 41)),
            ttl: Some(Duration::MAX.min(Duration::from_millis(u64::MAX))),
            max_attempts: Some(3),
            header,
            payload: payload.clone(),
        }),
        Frame::from(AcceptedFrame {
            request: CallId(9),
            delivery: attempt.delivery,
            conversation: MessageId::parse("c1").unwrap(),
            ack: "durable".into(),
            generation: 1,
            known: true,
        }),
        Frame::from(WaitFrame {
            request: CallId(10),
            delivery: attempt.delivery,
            generation: 3,
            level: Some("received".into()),
            timeout: Some(Duration::ZERO),
        }),
        Frame::from(DeliveryFrame {
            request: CallId(10),
            delivery: attempt.delivery,
            state: "waiting".into(),
            generation: 7,
            attempt: 2,
            levels: vec!["dispatched".into(), "failed".into()],
            details: "half of it".into(),
            fault: Some(fault),
            reply: None,
        }),
        Frame::from(DeliveryFrame {
            request: CallId(11),
            delivery: attempt.delivery,
            state: "completed".into(),
            generation: 9,
            attempt: 0,
            levels: vec![],
            details: "".into(),
            fault: None,
            reply: Some(payload),
        }),
        Frame::CancelDelivery {
            request: CallId(12),
            delivery: attempt.delivery,
            reason: "enough".into(),
        },
        Frame::Stale(CallId(5), attempt),
        Frame::Cancel(CallId(7)),
        Frame::Ping(8),
        Frame::Pong(9),
        Frame::Drain,
        Frame::Ack(70_000),
        Frame::Progress(CallId(8), Payload::text("half of it")),
        Frame::Leave,
    ];

    let mut message = BytesMut::new();
    frames.iter().for_each(|frame| encode(frame, &mut message));
    let mut message = message.freeze();
    for frame in frames {
        assert_eq!(decode(&mut message).unwrap(), Some(frame));
    }
    assert!(message.is_empty());
}

#[test]
fn what_is_unknown_is_skipped() {
    // Kind 200; then a ping with fields 100 of every type before its number.
    #[rustfmt::skip]
    let bytes: &[u8] = &[
        200, 1, 0xff, 2, 1, 2,
        kind::PING, 25,
        0xa0, 6, 1,
        0xa1, 6, 1, 2, 3, 4, 5, 6, 7, 8,
        0xa2, 6, 1, 9,
        0xa5, 6, 1, 2, 3, 4,
        8, 5,
        0,
    ];
    let mut message = Bytes::from_static(bytes);
    assert_eq!(decode(&mut message), Ok(None));
    assert_eq!(decode(&mut message), Ok(Some(Frame::Ping(5))));
}

#[test]
fn an_event_that_is_to_be_kept_is_for_later_and_needs_a_number() {
    let topic = TopicId::new(TopicType::parse("a:b").unwrap(), Key::parse("s").unwrap());
    let for_later = |request, ack: Option<&'static str>| {
        let (ack, header) = (ack.map(Into::into), HeaderFields::default());
        let payload = Payload::text("hello");
        let publish = PublishFrame { request, ack, topic: topic.clone(), header, payload };
        let mut message = BytesMut::new();
        encode(&publish.into(), &mut message);
        encode(&Frame::Drain, &mut message);
        (is_for_later(&message), decode(&mut message.freeze()))
    };
    assert!(for_later(Some(CallId(1)), Some("durable")).0);
    assert!(!for_later(Some(CallId(1)), None).0);
    assert_eq!(for_later(None, Some("durable")).1, Err(DecodeError::Missing(kind::PUBLISH, 1)));
    assert!(for_later(None, None).1.is_ok());
    assert!(!is_for_later(&[kind::PUBLISH, 5, 8]) && !is_for_later(&[]));
}

#[test]
fn broken_frames_are_named() {
    let error = |bytes: &'static [u8]| decode(&mut Bytes::from_static(bytes)).unwrap_err();
    assert_eq!(error(&[]), DecodeError::Truncated("kind"));
    assert_eq!(error(&[14, 5, 8]), DecodeError::Truncated("header"));
    assert_eq!(error(&[14, 2, 8, 1]), DecodeError::Truncated("payload"));
    assert_eq!(error(&[14, 0, 0]), DecodeError::Missing(14, 1));
    assert_eq!(error(&[14, 2, 10, 0, 0]), DecodeError::FieldType(1));
    assert_eq!(error(&[14, 1, 11, 0]), DecodeError::FieldType(1));
    assert_eq!(error(&[1, 5, 0x92, 2, 2, 0xc3, 0x28, 0]), DecodeError::Utf8(34));
    assert_eq!(error(&[21, 2, 8, 1, 0]), DecodeError::Missing(21, 2));
    assert_eq!(error(&[23, 2, 8, 1, 0]), DecodeError::Missing(23, 46));
    let accepted: &[u8] = &[22, 9, 8, 1, 0x5a, 1, b'c', 0xa2, 3, 1, b'd', 0];
    assert_eq!(error(accepted), DecodeError::Missing(22, 46));
    let id = error(&[23, 7, 8, 1, 0xf2, 2, 2, b'3', b'-', 0]);
    assert!(matches!(id, DecodeError::Name(_)), "{id}");
    assert_eq!(error(&[26, 2, 8, 1, 0]).to_string(), "STALE needs `delivery` (field 46)");
    assert_eq!(error(&[14, 0, 0]).to_string(), "PING needs `id` (field 1)");
    assert_eq!(error(&[14, 2, 10, 0, 0]).to_string(), "`id` (field 1) has the wrong type");
    assert_eq!(
        error(&[14, 12, 8, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2, 0, 0]),
        DecodeError::Varint
    );
}

proptest! {
    #[test]
    fn no_bytes_make_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut message = Bytes::from(bytes);
        while !message.is_empty() && decode(&mut message).is_ok() {}
    }
}

#[test]
fn what_a_host_sends_on_is_written_like_the_frame() {
    let (target, payload) = (AgentId::parse("upper/1").unwrap(), Payload::text("hello"));
    let fields = HeaderFields {
        id: Some(MessageId::parse("m").unwrap()),
        conversation: Some(MessageId::parse("c").unwrap()),
        cause: Some(MessageId::parse("b").unwrap()),
        principal: Some(Principal::named("alice")),
        sender: Some(AgentId::parse("asker/2").unwrap()),
        traceparent: Some("00-1-2-03".into()),
        hops: 3,
        idempotency_key: Some("once".into()),
    };
    let header = crate::Header {
        id: MessageId::parse("m").unwrap(),
        conversation: MessageId::parse("c").unwrap(),
        cause: fields.cause.clone(),
        principal: Principal::named("alice"),
        sender: fields.sender.clone(),
        traceparent: fields.traceparent.clone(),
        hops: 3,
        idempotency_key: fields.idempotency_key.clone(),
    };
    let timeout = Duration::from_secs(1);
    #[expect(clippy::disallowed_methods, reason = "not written")]
    let deadline = std::time::Instant::now();
    let call = crate::Call {
        attempt: None,
        topic: None,
        header,
        target: target.clone(),
        deadline,
        progress: true,
        payload: payload.clone(),
    };
    let frame = Frame::from(CallFrame {
        id: CallId(7),
        target,
        timeout: Some(timeout),
        progress: true,
        resent: false,
        attempt: None,
        topic: None,
        header: fields,
        payload: payload.clone(),
    });
    let (mut as_frame, mut as_call) = (BytesMut::new(), BytesMut::new());
    encode(&frame, &mut as_frame);
    encode_call(CallId(7), &call, timeout, &mut as_call);
    assert_eq!(as_call, as_frame);

    let faults = Fault::new(FaultKind::Internal, "broken");
    for reply in [Ok(payload), Err(faults)] {
        let (mut as_frame, mut as_reply) = (BytesMut::new(), BytesMut::new());
        encode_reply(CallId(7), &reply, &mut as_reply);
        encode(&Frame::Reply(CallId(7), reply), &mut as_frame);
        assert_eq!(as_reply, as_frame);
    }
}

#[test]
fn a_header_of_any_length_stands_where_it_should() {
    for length in [0, 1, 100, 126, 127, 128, 129, 1000, 16_383, 16_384, 30_000] {
        let mut out = BytesMut::from(&b"before"[..]);
        let payload = Payload { bytes: Bytes::from("payload"), ..Payload::default() };
        let payload = Payload { data_type: "x".repeat(length).into(), ..payload };
        let frame = Frame::Reply(CallId(1), Ok(payload));
        encode(&frame, &mut out);
        encode(&Frame::Drain, &mut out);
        let mut message = out.freeze();
        assert_eq!(message.split_to(6), "before");
        assert_eq!(decode(&mut message), Ok(Some(frame)), "{length}");
        assert_eq!(decode(&mut message), Ok(Some(Frame::Drain)));
    }
}
