//! What one peer can do to the others: nothing.

use std::io::ErrorKind;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use parlour_core::wire::{Frame, PublishFrame, Register, Subscribe};
use parlour_core::{
    AgentType, CallId, FaultKind, Key, Payload, Registration, TopicFilter, TopicId, TopicType,
};

use tokio::time::Instant;

use crate::room::Room;

fn register(request: u64, agent_type: &str, key: Option<&str>, exclusive: bool) -> Frame {
    Frame::Register(Register {
        request: CallId(request),
        agent_type: AgentType::parse(agent_type).unwrap(),
        key: key.map(|key| Key::parse(key).unwrap()),
        registration: Registration { exclusive, ..Registration::default() },
    })
}

fn listen(request: u64) -> Frame {
    Frame::Subscribe(Subscribe {
        request: CallId(request),
        subscription: request,
        filter: TopicFilter::parse("*").unwrap(),
        agent_type: None,
    })
}

#[tokio::test(start_paused = true)]
async fn registrations_and_listeners_of_one_connection_are_limited() {
    let room = Room::open(&[("limits.registrations", "2"), ("limits.subscriptions", "2")]);
    let mut channel = room.channel().await;
    for (request, frame) in [
        (1, register(1, "a", None, false)),
        (2, register(2, "b", Some("k"), false)),
        (3, listen(3)),
        (4, listen(4)),
    ] {
        channel.send(frame).await;
        assert!(matches!(channel.next().await, Some(Frame::Done(_))), "{request}");
    }
    for (frame, key) in [
        (register(5, "c", None, false), "limits.registrations"),
        (register(6, "b", Some("l"), false), "limits.registrations"),
        (listen(7), "limits.subscriptions"),
    ] {
        channel.send(frame).await;
        let fault = channel.next_reply().await.1.unwrap_err();
        assert_eq!((fault.kind(), fault.config_key()), (FaultKind::Overloaded, Some(key)));
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_cannot_be_taken_out_of_an_exclusive_type() {
    let room = Room::open(&[]);
    let mut owner = room.channel().await;
    owner.send(register(1, "vault", None, true)).await;
    assert!(matches!(owner.next().await, Some(Frame::Done(_))));
    let mut thief = room.channel().await;
    thief.send(register(1, "vault", Some("alice"), false)).await;
    let fault = thief.next_reply().await.1.unwrap_err();
    assert_eq!(fault.kind(), FaultKind::Conflict);
}

#[tokio::test(start_paused = true)]
async fn a_refused_request_forgets_no_call_of_the_same_number() {
    let room = Room::open(&[]);
    let mut worker = room.worker("slow").await;
    let mut caller = room.channel().await;
    caller.call(9, "slow/k", "", None).await;
    let call = worker.next_call().await;
    caller.send(Frame::Unsubscribe { request: CallId(9), subscription: 1 }).await;
    assert_eq!(caller.next_reply().await.1.unwrap_err().kind(), FaultKind::NotFound);
    drop(caller);
    assert_eq!(worker.next().await, Some(Frame::Cancel(call.id)));
}

#[tokio::test(start_paused = true)]
async fn a_cancel_said_many_times_reaches_the_worker_once() {
    let room = Room::open(&[]);
    let mut worker = room.worker("slow").await;
    let mut caller = room.channel().await;
    caller.call(1, "slow/k", "", None).await;
    let call = worker.next_call().await;
    let mut cancels = BytesMut::new();
    for _ in 0..5_000 {
        cancels.put_slice(&[13, 2, 8, 1, 0]);
    }
    caller.send_raw(cancels.freeze()).await;
    // The worker's queue has room for others at once.
    caller.call(2, "slow/k", "", None).await;
    assert_eq!(worker.next().await, Some(Frame::Cancel(call.id)));
    assert_eq!(caller.next_reply().await.1.unwrap_err().kind(), FaultKind::Cancelled);
    let second = worker.next_call().await;
    worker.send(Frame::Reply(second.id, Ok(Payload::text("done")))).await;
    assert_eq!(caller.next_reply().await, (2, Ok(Payload::text("done"))));
}

#[tokio::test(start_paused = true)]
async fn a_deadline_holds_while_its_workers_socket_is_never_silent() {
    let room = Room::open(&[]);
    let mut worker = room.worker("busy").await;
    let mut caller = room.channel().await;
    caller.call(1, "busy/k", "", Some(Duration::from_secs(2))).await;
    worker.next_call().await;
    let noise = tokio::spawn(async move {
        let topic = TopicId::new(TopicType::parse("t").unwrap(), Key::parse("s").unwrap());
        for _ in 0..200_000 {
            worker
                .send(Frame::from(PublishFrame {
                    request: None,
                    ack: None,
                    topic: topic.clone(),
                    header: Default::default(),
                    payload: Payload::text("noise"),
                }))
                .await;
            tokio::time::advance(Duration::from_micros(50)).await;
        }
    });
    let fault = caller.next_reply().await.1.unwrap_err();
    assert_eq!(fault.kind(), FaultKind::DeadlineExceeded);
    assert!(!noise.is_finished(), "it was still sending");
    noise.abort();
}

#[tokio::test(start_paused = true)]
async fn a_frame_against_the_rules_is_answered_before_the_channel_closes() {
    let room = Room::open(&[]);
    for (bytes, reason) in [
        (&[14, 5, 8][..], "header"),
        (&[8, 2, 8, 0, 0], "needs `agent_type`"),
        (&[2, 0, 0], "only a host sends"),
    ] {
        let mut channel = room.channel().await;
        channel.send_raw(bytes::Bytes::from_static(bytes)).await;
        let (id, reply) = channel.next_reply().await;
        let fault = reply.unwrap_err();
        assert_eq!((id, fault.kind()), (0, FaultKind::Invalid));
        assert!(fault.detail().contains(reason), "{}", fault.detail());
        assert_eq!(channel.next().await, None);
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_fails_before_it_is_taken_keeps_no_other_waiting() {
    let room = Room::open(&[]);
    let request = "GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    for (error, waits) in
        [(ErrorKind::ConnectionAborted, 0), (ErrorKind::ConnectionReset, 0), (ErrorKind::Other, 1)]
    {
        let since = Instant::now();
        room.fail_to_connect(error);
        assert!(room.request(request).await.ends_with("ok\n"));
        // Such as when there are no descriptors left, the host rests.
        assert_eq!(since.elapsed().as_millis(), 100 * waits, "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn channels_count_as_connections() {
    let room = Room::open(&[("limits.connections", "2")]);
    let _first = room.channel().await;
    let _second = room.channel().await;
    assert_eq!(room.request("GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n").await, "");
}
