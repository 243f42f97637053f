//! Every call ends exactly once, by its deadline, and says whether the agent may have run.

use std::time::Duration;

use crate::room::Room;
use futures_util::StreamExt;
use parlour_core::wire::{Frame, PublishFrame};
use parlour_core::{Bytes, CallId, Fault, FaultKind, Key, Payload, TopicId, TopicType};
use tokio::time::Instant;

#[tokio::test(start_paused = true)]
async fn a_reply_goes_to_whoever_asked_under_the_name_they_gave() {
    let room = Room::open(&[]);
    let mut worker = room.worker("upper").await;
    let (mut alice, mut bob) = (room.channel().await, room.channel().await);
    alice.call(7, "upper/1", "a", None).await;
    let first = worker.next_call().await;
    bob.call(7, "upper/1", "b", None).await;
    let second = worker.next_call().await;
    assert_ne!(first.id, second.id, "the host names calls anew");
    assert_eq!(first.header.principal.unwrap().as_str(), "anonymous");

    worker.send(Frame::Reply(second.id, Ok(Payload::text("B")))).await;
    worker.send(Frame::Reply(first.id, Ok(Payload::text("A")))).await;
    assert_eq!(bob.next_reply().await, (7, Ok(Payload::text("B"))));
    assert_eq!(alice.next_reply().await, (7, Ok(Payload::text("A"))));
}

#[tokio::test(start_paused = true)]
async fn a_call_ends_at_its_deadline_and_the_worker_is_told() {
    let room = Room::open(&[]);
    let mut worker = room.worker("slow").await;
    let mut caller = room.channel().await;
    let start = Instant::now();
    caller.call(1, "slow/k", "", Some(Duration::from_millis(1500))).await;
    let call = worker.next_call().await;
    assert_eq!(call.timeout, Some(Duration::from_millis(1500)));

    let (_, reply) = caller.next_reply().await;
    let fault = reply.unwrap_err();
    assert_eq!((fault.kind(), fault.may_have_run()), (FaultKind::DeadlineExceeded, true));
    assert_eq!(start.elapsed().as_millis(), 1500);
    assert_eq!(worker.next().await, Some(Frame::Cancel(call.id)));
}

#[tokio::test(start_paused = true)]
async fn a_lost_worker_ends_its_calls_at_once() {
    let room = Room::open(&[]);
    let mut worker = room.worker("upper").await;
    let mut caller = room.channel().await;
    caller.call(1, "upper/k", "", None).await;
    worker.next_call().await;
    drop(worker);

    let start = Instant::now();
    let fault = caller.next_reply().await.1.unwrap_err();
    assert_eq!((fault.kind(), fault.may_have_run()), (FaultKind::WorkerLost, true));
    assert!(start.elapsed() < Duration::from_millis(10), "{:?}", start.elapsed());

    caller.call(2, "upper/k", "", None).await;
    let fault = caller.next_reply().await.1.unwrap_err();
    assert_eq!((fault.kind(), fault.may_have_run()), (FaultKind::UnknownAgent, false));
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_falls_silent_is_dead_after_two_heartbeats() {
    let room = Room::open(&[]);
    let mut worker = room.worker("upper").await;
    let mut caller = room.channel().await;
    caller.call(1, "upper/k", "", Some(Duration::from_secs(300))).await;
    worker.next_call().await;
    let start = Instant::now();
    let _open = worker.fall_silent();
    let fault = caller.next_reply().await.1.unwrap_err();
    assert_eq!(fault.kind(), FaultKind::WorkerLost);
    assert!((15..=45).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn nobody_settles_a_call_that_another_has() {
    let room = Room::open(&[]);
    let mut worker = room.worker("upper").await;
    let mut stranger = room.worker("other").await;
    let mut caller = room.channel().await;
    caller.call(1, "upper/k", "", None).await;
    let call = worker.next_call().await;
    for id in 0..call.id.0 + 5 {
        stranger.send(Frame::Reply(CallId(id), Ok(Payload::text("forged")))).await;
    }
    worker.send(Frame::Reply(call.id, Ok(Payload::text("true")))).await;
    assert_eq!(caller.next_reply().await.1, Ok(Payload::text("true")));
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_leaves_or_cancels_gives_its_calls_up() {
    let room = Room::open(&[]);
    let mut worker = room.worker("upper").await;
    let mut caller = room.channel().await;
    caller.call(1, "upper/k", "", None).await;
    let first = worker.next_call().await;
    caller.call(2, "upper/k", "", None).await;
    let second = worker.next_call().await;

    caller.send(Frame::Cancel(CallId(1))).await;
    assert_eq!(worker.next().await, Some(Frame::Cancel(first.id)));
    let fault = caller.next_reply().await.1.unwrap_err();
    assert_eq!(fault.kind(), FaultKind::Cancelled);

    drop(caller);
    assert_eq!(worker.next().await, Some(Frame::Cancel(second.id)));
}

#[tokio::test(start_paused = true)]
async fn a_worker_has_no_more_calls_than_it_may_have() {
    let room = Room::open(&[("limits.worker_in_flight", "2")]);
    let mut worker = room.worker("upper").await;
    let mut caller = room.channel().await;
    for id in 1..=3 {
        caller.call(id, "upper/k", "", None).await;
    }
    let (id, reply) = caller.next_reply().await;
    let fault = reply.unwrap_err();
    assert_eq!((id, fault.kind(), fault.may_have_run()), (3, FaultKind::Overloaded, false));
    assert_eq!(fault.config_key(), Some("limits.worker_in_flight"));
    assert!(fault.retry_after_time().is_some());
    worker.next_call().await;
}

#[tokio::test(start_paused = true)]
async fn an_agents_failure_reaches_the_caller_with_its_text() {
    let room = Room::open(&[]);
    let mut worker = room.worker("upper").await;
    let caller =
        async { room.post("/v1/agents/upper/k/call", "content-type: text/plain\r\n", "hi").await };
    let agent = async {
        let call = worker.next_call().await;
        assert_eq!(
            (&*call.payload.content_type, &call.payload.bytes[..]),
            ("text/plain", &b"hi"[..])
        );
        let fault = Fault::new(FaultKind::AgentFailed, "boom");
        worker.send(Frame::Reply(call.id, Err(fault))).await;
    };
    let (answer, ()) = tokio::join!(caller, agent);
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
    assert!(answer.contains("application/problem+json"), "{answer}");
    for part in [r#""kind":"agent_failed""#, r#""detail":"boom""#, r#""may_have_run":true"#] {
        assert!(answer.contains(part), "{part} is not in {answer}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_event_that_a_protocol_cannot_carry_counts_as_dropped() {
    let room = Room::open(&[]);
    let headers = "content-type: application/json\r\nx-client-id: c1\r\n";
    for (method, params) in [
        ("runtime.register_agent", r#"{"type": "old"}"#),
        (
            "runtime.add_subscription",
            r#"{"id": "s", "type_subscription": {"topic_type": "news", "agent_type": "old"}}"#,
        ),
    ] {
        let body = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"{method}","params":{params}}}"#);
        let answer = room.post("/rpc", headers, &body).await;
        assert!(answer.contains("result"), "{answer}");
    }
    let mut old = room.dialect("c1").await;
    let topic = TopicId::new(TopicType::parse("news").unwrap(), Key::parse("today").unwrap());
    let mut publisher = room.channel().await;
    for bytes in [&b"\xff no text"[..], b"a text"] {
        let payload = Payload { bytes: Bytes::from_static(bytes), ..Payload::default() };
        let (topic, header) = (topic.clone(), Default::default());
        let publish = PublishFrame { request: Some(CallId(1)), ack: None, topic, header, payload };
        publisher.send(Frame::from(publish)).await;
        let done = publisher.next().await;
        assert!(matches!(&done, Some(Frame::Done(done)) if done.recipients == 1), "{done:?}");
    }
    let event = old.next().await.unwrap().unwrap();
    assert!(event.as_text().unwrap().contains("a text"), "{event:?}");
    assert_eq!(room.metric("parlour_events_dropped_total").await, 1);
}
