//! A session goes on over another socket when one breaks.

use std::time::Duration;

use crate::room::{Channel, Room};
use parlour_core::wire::{Frame, Hello, RESUME, Welcome};
use parlour_core::{ByteString, Bytes, CallId, Credit, FaultKind, Payload};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep};

/// How a client begins that can resume: as itself, or with a session of which it has received
/// `received` frames.
fn hello(name: &'static str, session: Option<(&ByteString, u64)>) -> Hello {
    Hello {
        name: name.into(),
        versions: vec![1],
        features: vec![RESUME.into()],
        session: session.map(|(session, _)| session.clone()),
        received: session.map_or(0, |(_, received)| received),
        ..Hello::default()
    }
}

/// A worker that serves `upper`, and the name of its session. It has received one frame.
async fn worker(room: &Room) -> (Channel, ByteString) {
    let (mut worker, welcome) = room.greeted(hello("w", None)).await;
    worker.register("upper").await;
    (worker, welcome.session.unwrap())
}

async fn back(room: &Room, session: &ByteString, received: u64) -> (Channel, Welcome) {
    room.greeted(hello("w", Some((session, received)))).await
}

#[tokio::test(start_paused = true)]
async fn a_reply_finds_its_caller_over_another_socket() {
    let room = Room::open(&[]);
    let (mut worker, session) = worker(&room).await;
    let mut caller = room.channel().await;
    caller.call(1, "upper/k", "a", None).await;
    let call = worker.next_call().await;
    drop(worker);
    sleep(Duration::from_secs(4)).await;

    let (mut worker, welcome) = back(&room, &session, 2).await;
    assert!(welcome.resumed);
    assert_eq!(welcome.received, 1, "the registration");
    worker.send(Frame::Reply(call.id, Ok(Payload::text("A")))).await;
    assert_eq!(caller.next_reply().await, (1, Ok(Payload::text("A"))));

    caller.call(2, "upper/k", "b", None).await;
    let next = worker.next_call().await;
    assert!(next.id != call.id && !next.resent, "the first call is not sent again: {next:?}");
}

#[tokio::test(start_paused = true)]
async fn what_the_worker_did_not_receive_is_sent_again_and_marked() {
    let room = Room::open(&[]);
    let (mut worker, session) = worker(&room).await;
    let mut caller = room.channel().await;
    for (id, text) in [(1, "a"), (2, "b")] {
        caller.call(id, "upper/k", text, None).await;
    }
    let (first, second) = (worker.next_call().await, worker.next_call().await);
    drop(worker);

    let (mut worker, _) = back(&room, &session, 2).await;
    let again = worker.next_call().await;
    assert_eq!((again.id, again.resent), (second.id, true));
    worker.send(Frame::Reply(first.id, Ok(Payload::text("A")))).await;
    worker.send(Frame::Reply(second.id, Ok(Payload::text("B")))).await;
    assert_eq!(caller.next_reply().await, (1, Ok(Payload::text("A"))));
    assert_eq!(caller.next_reply().await, (2, Ok(Payload::text("B"))));
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_was_lost_with_the_socket_is_known_to_be_missing() {
    let room = Room::open(&[]);
    let (mut worker, session) = worker(&room).await;
    let mut caller = room.channel().await;
    caller.call(1, "upper/k", "a", None).await;
    let call = worker.next_call().await;
    worker.send(Frame::Reply(call.id, Ok(Payload::text("A")))).await;
    assert_eq!(caller.next_reply().await, (1, Ok(Payload::text("A"))));
    drop(worker);
    let (_, welcome) = back(&room, &session, 2).await;
    assert_eq!(welcome.received, 2, "registration and reply: nothing to be sent again");
}

#[tokio::test(start_paused = true)]
async fn a_reply_right_before_a_reset_is_handled_as_it_is_acknowledged() {
    let room = Room::open(&[]);
    let mut worker = room.begun_brittle(hello("w", None)).await;
    let Some(Frame::Welcome(welcome)) = worker.next().await else { panic!("not greeted") };
    worker.register("upper").await;
    let mut caller = room.channel().await;
    caller.call(1, "upper/k", "a", None).await;
    let call = worker.next_call().await;
    worker.send(Frame::Reply(call.id, Ok(Payload::text("A")))).await;
    drop(worker);
    assert_eq!(caller.next_reply().await, (1, Ok(Payload::text("A"))));
    // The reset is noticed all the same: the session waits for another socket.
    caller.call(2, "upper/k", "b", None).await;
    let (mut worker, welcome) = back(&room, &welcome.session.unwrap(), 2).await;
    assert_eq!((welcome.resumed, welcome.received), (true, 2), "registration and reply");
    assert!(!worker.next_call().await.resent);
}

#[tokio::test(start_paused = true)]
async fn calls_wait_for_a_session_in_grace() {
    let room = Room::open(&[]);
    let (worker, session) = worker(&room).await;
    let mut caller = room.channel().await;
    drop(worker);
    caller.call(1, "upper/k", "a", None).await;
    caller.call(2, "upper/k", "b", Some(Duration::from_secs(1))).await;
    let (id, reply) = caller.next_reply().await;
    let fault = reply.unwrap_err();
    assert_eq!(
        (id, fault.kind(), fault.may_have_run()),
        (2, FaultKind::DeadlineExceeded, false),
        "one that waits keeps its deadline"
    );

    let (mut worker, _) = back(&room, &session, 1).await;
    let call = worker.next_call().await;
    assert!(!call.resent);
    worker.send(Frame::Reply(call.id, Ok(Payload::text("A")))).await;
    assert_eq!(caller.next_reply().await, (1, Ok(Payload::text("A"))));
}

#[tokio::test(start_paused = true)]
async fn after_the_grace_time_what_ran_is_lost_and_what_did_not_goes_to_another_worker() {
    let room = Room::open(&[("timeouts.grace", "3s")]);
    let (mut first, _) = worker(&room).await;
    let mut caller = room.channel().await;
    caller.call(1, "upper/k", "a", None).await;
    first.next_call().await;
    drop(first);
    // Long enough for the host to see it.
    sleep(Duration::from_millis(1)).await;
    caller.call(2, "upper/k", "b", None).await;
    sleep(Duration::from_millis(1)).await;
    let mut other = room.worker("upper").await;
    let start = Instant::now();

    let moved = other.next_call().await;
    assert_eq!(start.elapsed().as_millis(), 2998);
    other.send(Frame::Reply(moved.id, Ok(Payload::text("B")))).await;
    let (id, reply) = caller.next_reply().await;
    let fault = reply.unwrap_err();
    assert_eq!((id, fault.kind(), fault.may_have_run()), (1, FaultKind::WorkerLost, true));
    assert_eq!(caller.next_reply().await, (2, Ok(Payload::text("B"))));
}

#[tokio::test(start_paused = true)]
async fn without_another_worker_what_did_not_run_says_so() {
    let room = Room::open(&[]);
    let (worker, session) = worker(&room).await;
    let mut caller = room.channel().await;
    drop(worker);
    sleep(Duration::from_millis(1)).await;
    caller.call(1, "upper/k", "a", None).await;
    let fault = caller.next_reply().await.1.unwrap_err();
    assert_eq!((fault.kind(), fault.may_have_run()), (FaultKind::WorkerLost, false));
    let (_, welcome) = back(&room, &session, 1).await;
    assert!(!welcome.resumed && welcome.session != Some(session), "that session is over");
}

#[tokio::test(start_paused = true)]
async fn one_that_says_goodbye_has_no_grace() {
    let room = Room::open(&[]);
    let (mut worker, session) = worker(&room).await;
    let mut caller = room.channel().await;
    caller.call(1, "upper/k", "a", None).await;
    worker.next_call().await;
    let start = Instant::now();
    worker.say_goodbye().await;
    let fault = caller.next_reply().await.1.unwrap_err();
    assert_eq!((fault.kind(), fault.may_have_run()), (FaultKind::WorkerLost, true));
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(!back(&room, &session, 2).await.1.resumed);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_was_started_anew_ends_its_former_session() {
    let room = Room::open(&[]);
    let (mut former, session) = worker(&room).await;
    let mut caller = room.channel().await;
    caller.call(1, "upper/k", "a", None).await;
    former.next_call().await;
    drop(former);
    sleep(Duration::from_secs(1)).await;

    let start = Instant::now();
    let (mut anew, _) = worker(&room).await;
    let fault = caller.next_reply().await.1.unwrap_err();
    assert_eq!((fault.kind(), fault.may_have_run()), (FaultKind::WorkerLost, true));
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    caller.call(2, "upper/k", "b", None).await;
    anew.next_call().await;
    assert!(!back(&room, &session, 2).await.1.resumed);
}

#[tokio::test(start_paused = true)]
async fn a_session_can_go_on_before_the_host_knows_that_its_socket_is_broken() {
    let room = Room::open(&[]);
    let (mut worker, session) = worker(&room).await;
    let mut caller = room.channel().await;
    caller.call(1, "upper/k", "a", None).await;
    let call = worker.next_call().await;
    let half_open = worker.fall_silent();
    let (mut worker, welcome) = back(&room, &session, 1).await;
    assert!(welcome.resumed);
    let again = worker.next_call().await;
    assert_eq!((again.id, again.resent), (call.id, true));
    worker.send(Frame::Reply(call.id, Ok(Payload::text("A")))).await;
    assert_eq!(caller.next_reply().await, (1, Ok(Payload::text("A"))));
    drop(half_open);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_moved_can_still_be_given_up() {
    let room = Room::open(&[]);
    let (first, _) = worker(&room).await;
    drop(first);
    let mut caller = room.channel().await;
    caller.call(1, "upper/k", "a", None).await;
    let (mut second, _) = room.greeted(hello("another", None)).await;
    second.register("upper").await;
    let call = second.next_call().await;
    caller.send(Frame::Cancel(CallId(1))).await;
    let (_, reply) = caller.next_reply().await;
    assert_eq!(reply.unwrap_err().kind(), FaultKind::Cancelled);
    assert_eq!(second.next().await, Some(Frame::Cancel(call.id)));
}

#[tokio::test(start_paused = true)]
async fn a_count_that_cannot_be_ends_the_session() {
    let room = Room::open(&[]);
    let (worker, session) = worker(&room).await;
    drop(worker);
    let mut worker = room.begun(hello("w", Some((&session, 9)))).await;
    let fault = loop {
        match worker.next().await {
            Some(Frame::Reply(_, Err(fault))) => break fault,
            Some(_) => {}
            None => panic!("closed without a word"),
        }
    };
    assert_eq!(fault.kind(), FaultKind::Invalid);
    assert_eq!(worker.next().await, None);
}

#[tokio::test(start_paused = true)]
async fn no_more_is_sent_than_there_is_credit_for() {
    let room = Room::open(&[]);
    let credit = Credit { messages: 3, bytes: 1 << 20 };
    let hello = Hello { credit, ..hello("w", None) };
    let (mut worker, _) = room.greeted(hello).await;
    worker.register("upper").await;
    let mut caller = room.channel().await;
    for id in 1..=4 {
        caller.call(id, "upper/k", "a", None).await;
    }
    // The confirmation of its registration counts too.
    worker.next_call().await;
    worker.next_call().await;
    let more = tokio::time::timeout(Duration::from_secs(10), worker.next_call()).await;
    assert!(more.is_err(), "{more:?}");
    worker.send(Frame::Ack(2)).await;
    worker.next_call().await;
    worker.next_call().await;
}

#[tokio::test(start_paused = true)]
async fn calls_queued_for_one_that_breaks_the_protocol_go_to_another() {
    let room = Room::open(&[]);
    let credit = Credit { messages: 2, bytes: 1 << 20 };
    let (mut worker, _) = room.greeted(Hello { credit, ..hello("w", None) }).await;
    worker.register("upper").await;
    let mut caller = room.channel().await;
    for (id, text) in [(1, "a"), (2, "b"), (3, "c")] {
        caller.call(id, "upper/k", text, None).await;
    }
    worker.next_call().await;
    let mut other = room.worker("upper").await;
    // A frame that only a host sends.
    worker.send_raw(Bytes::from_static(&[2, 0, 0])).await;
    let (id, reply) = worker.next_reply().await;
    assert_eq!((id, reply.unwrap_err().kind()), (0, FaultKind::Invalid), "it has no credit left");
    assert_eq!(worker.next().await, None);
    for text in ["b", "c"] {
        let call = other.next_call().await;
        assert_eq!(call.payload, Payload::text(text));
        other.send(Frame::Reply(call.id, Ok(call.payload))).await;
    }
    let (id, reply) = caller.next_reply().await;
    assert_eq!((id, reply.unwrap_err().kind()), (1, FaultKind::WorkerLost));
    assert_eq!(caller.next_reply().await, (2, Ok(Payload::text("b"))));
    assert_eq!(caller.next_reply().await, (3, Ok(Payload::text("c"))));
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_is_not_read_counts_as_refused_and_names_the_limit_that_was_met() {
    for (key, value) in [("limits.queue_messages", "4"), ("limits.queue_bytes", "4KiB")] {
        let room = Room::open(&[(key, value)]);
        let mut worker = room.worker("upper").await;
        let credit = Credit { messages: 2, bytes: 1 << 20 };
        let (mut caller, _) = room.greeted(Hello { credit, ..hello("c", None) }).await;
        let mut calls = Vec::new();
        for id in 1..=7 {
            caller.call(id, "upper/k", "", None).await;
            calls.push(worker.next_call().await);
        }
        for call in calls {
            worker.send(Frame::Reply(call.id, Ok(Payload::text("x".repeat(1000))))).await;
        }
        for id in 1..=7 {
            let (number, reply) = caller.next_reply().await;
            assert_eq!(number, id);
            match reply {
                Ok(_) => assert!(id < 7),
                Err(fault) => assert_eq!(fault.config_key(), Some(key), "{fault}"),
            }
            caller.send(Frame::Ack(id)).await;
        }
        let refused = room.metric("parlour_calls_total{outcome=\"overloaded\"}").await;
        assert!(refused > 0);
        assert_eq!(room.metric("parlour_calls_total{outcome=\"ok\"}").await, 7 - refused);
    }
}

#[tokio::test(start_paused = true)]
async fn progress_that_is_not_read_ends_the_call_and_the_limit_is_named() {
    let room = Room::open(&[("limits.queue_bytes", "4KiB")]);
    let mut worker = room.worker("slow").await;
    let credit = Credit { messages: 2, bytes: 1 << 20 };
    let (mut caller, _) = room.greeted(Hello { credit, ..hello("c", None) }).await;
    caller.call_with_progress(1, "slow/k", true).await;
    let call = worker.next_call().await;
    for _ in 0..7 {
        worker.send(Frame::Progress(call.id, Payload::text("x".repeat(1000)))).await;
    }
    assert_eq!(worker.next().await, Some(Frame::Cancel(call.id)));
    let mut received = 0;
    let fault = loop {
        received += 1;
        match caller.next().await {
            Some(Frame::Progress(..)) => caller.send(Frame::Ack(received)).await,
            Some(Frame::Reply(_, Err(fault))) => break fault,
            other => panic!("neither progress nor a fault: {other:?}"),
        }
    };
    assert_eq!(fault.config_key(), Some("limits.queue_bytes"));
    assert!(fault.detail().contains("progress"), "{fault}");
}

#[tokio::test(start_paused = true)]
async fn progress_that_is_not_read_over_http_ends_the_call_and_the_limit_is_named() {
    let fault = unread_over_http("1MiB").await;
    assert!(fault.contains("limits.queue_bytes"), "{fault}");
    // How many messages may wait there is no setting, and none is named.
    let fault = unread_over_http("8MiB").await;
    assert!(!fault.contains("limits."), "{fault}");
}

/// How a call over HTTP ends whose caller reads none of its progress, 4 MB in 500 messages.
async fn unread_over_http(queue_bytes: &str) -> String {
    let room = Room::open(&[("limits.queue_bytes", queue_bytes)]);
    let mut worker = room.worker("slow").await;
    let mut reader = room.connect();
    let request = "POST /v1/agents/slow/k/call HTTP/1.1\r\nhost: localhost\r\n\
                   accept: text/event-stream\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    reader.write_all(request.as_bytes()).await.unwrap();
    let call = worker.next_call().await;
    for _ in 0..500 {
        worker.send(Frame::Progress(call.id, Payload::text("x".repeat(8000)))).await;
    }
    assert_eq!(worker.next().await, Some(Frame::Cancel(call.id)));
    let mut answer = String::new();
    reader.read_to_string(&mut answer).await.unwrap();
    let fault = answer.split("event: fault\ndata: ").nth(1).unwrap();
    assert!(fault.contains("progress waits to be read"), "{fault}");
    fault.to_owned()
}

#[tokio::test(start_paused = true)]
async fn a_caller_hears_of_progress_if_it_asks() {
    let room = Room::open(&[]);
    let mut worker = room.worker("slow").await;
    let mut caller = room.channel().await;
    for asks in [true, false] {
        caller.call_with_progress(1, "slow/k", asks).await;
        let call = worker.next_call().await;
        assert_eq!(call.progress, asks);
        worker.send(Frame::Progress(call.id, Payload::text("half"))).await;
        worker.send(Frame::Reply(call.id, Ok(Payload::text("whole")))).await;
        if asks {
            let progress = caller.next().await.unwrap();
            assert!(matches!(&progress, Frame::Progress(_, p) if *p == Payload::text("half")));
        }
        assert_eq!(caller.next_reply().await, (1, Ok(Payload::text("whole"))));
    }
}

/// A caller with credit for two frames, for whom as many replies wait as may.
async fn starving(room: &Room) -> Channel {
    let credit = Credit { messages: 2, bytes: 1 << 20 };
    let (mut caller, _) = room.greeted(Hello { credit, ..hello("c", None) }).await;
    for id in 1..=7 {
        caller.call(id, "nobody/k", "", None).await;
    }
    for id in 1..=2 {
        assert_eq!(caller.next_reply().await.0, id);
    }
    let more = tokio::time::timeout(Duration::from_secs(1), caller.next()).await;
    assert!(more.is_err(), "{more:?}");
    caller
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_does_not_keep_the_host_from_hearing_that_there_is_credit() {
    let room = Room::open(&[("limits.queue_messages", "4")]);
    let mut caller = starving(&room).await;
    for id in 3..=7 {
        caller.send(Frame::Ack(id - 1)).await;
        assert_eq!(caller.next_reply().await.0, id);
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_acknowledges_nothing_is_cut() {
    let room = Room::open(&[("limits.queue_messages", "4")]);
    let mut caller = starving(&room).await;
    let since = Instant::now();
    assert_eq!(caller.next().await, None);
    assert_eq!(since.elapsed().as_secs(), 9, "ten, of which one has gone");
}

#[tokio::test(start_paused = true)]
async fn progress_and_reply_come_over_http_as_events() {
    let room = Room::open(&[]);
    let mut worker = room.worker("slow").await;
    let call = async {
        let call = worker.next_call().await;
        assert!(call.progress);
        for text in ["one", "two"] {
            worker.send(Frame::Progress(call.id, Payload::text(text))).await;
        }
        worker.send(Frame::Reply(call.id, Ok(Payload::text("three")))).await;
    };
    let asked = room.post("/v1/agents/slow/k/call", "accept: text/event-stream\r\n", "go");
    let (answer, ()) = tokio::join!(asked, call);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let at = |text: &str| answer.find(text).unwrap_or_else(|| panic!("{text} is not in {answer}"));
    assert!(at("event: progress\ndata: {") < at("\"data\":\"one\""));
    assert!(at("\"data\":\"one\"") < at("\"data\":\"two\""));
    assert!(at("\"data\":\"two\"") < at("event: reply\ndata: {"));
    assert!(at("event: reply\ndata: {") < at("\"data\":\"three\""));
}

#[tokio::test(start_paused = true)]
async fn a_call_that_fails_over_http_is_an_event_unless_it_fails_at_once() {
    let room = Room::open(&[]);
    let accept = "accept: application/json;q=0.5, text/event-stream\r\n";
    let answer = room.post("/v1/agents/nobody/k/call", accept, "").await;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    let _worker = room.worker("slow").await;
    let header = format!("{accept}parlour-deadline-ms: 100\r\n");
    let answer = room.post("/v1/agents/slow/k/call", &header, "").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("event: fault\ndata: {"), "{answer}");
    assert!(answer.contains("\"kind\":\"deadline_exceeded\""), "{answer}");
    let without = room.post("/v1/agents/slow/k/call", "parlour-deadline-ms: 100\r\n", "").await;
    assert!(without.starts_with("HTTP/1.1 504"), "{without}");
}
