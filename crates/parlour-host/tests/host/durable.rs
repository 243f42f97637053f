//! Messages that are accepted for later, on a paused clock.

use std::time::Duration;

use parlour_core::wire::Frame;
use parlour_core::{Fault, FaultKind, Payload};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::room::Room;

async fn send(room: &Room, agent: &str, headers: &str) -> String {
    let answer = room.post(&format!("/v1/agents/{agent}/deliveries"), headers, "work").await;
    assert!(answer.starts_with("HTTP/1.1 202 "), "{answer}");
    body(&answer)["id"].as_str().unwrap().to_owned()
}

fn body(answer: &str) -> Value {
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    serde_json::from_str(body).unwrap()
}

async fn look(room: &Room, id: &str, query: &str) -> Value {
    let request = format!(
        "GET /v1/deliveries/{id}{query} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    );
    body(&room.request(&request).await)
}

fn failed(kind: FaultKind) -> Result<Payload, Fault> {
    Err(Fault::new(kind, "no"))
}

#[tokio::test(start_paused = true)]
async fn pauses_between_attempts_grow_and_are_drawn_at_random() {
    let room = Room::open(&[("durable.max_attempts", "6")]);
    let mut worker = room.worker("job").await;
    send(&room, "job/1", "").await;
    let mut waits = Vec::new();
    let mut then = Instant::now();
    for _ in 0..6 {
        let call = worker.next_call().await;
        waits.push(then.elapsed());
        then = Instant::now();
        worker.send(Frame::Reply(call.id, failed(FaultKind::AgentFailed))).await;
    }
    let longest = [0, 200, 400, 800, 1600, 3200].map(Duration::from_millis);
    for (wait, longest) in waits.iter().zip(longest) {
        // The clock of the log counts whole milliseconds.
        assert!(*wait <= longest + Duration::from_millis(2), "{waits:?}");
    }
    assert!(waits[1..].iter().any(|wait| *wait > Duration::from_millis(10)), "{waits:?}");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_takes_too_long_has_failed_and_its_worker_is_told() {
    let room = Room::open(&[("durable.attempt_timeout", "10s")]);
    let mut worker = room.worker("job").await;
    let id = send(&room, "job/1", "parlour-max-attempts: 1\r\n").await;
    let call = worker.next_call().await;
    assert_eq!(call.timeout, Some(Duration::from_secs(10)));
    let begun = Instant::now();
    let found = look(&room, &id, "?after=2&wait=1m").await;
    assert_eq!(begun.elapsed().as_secs(), 10);
    assert_eq!(
        (&found["state"], &found["fault"]["kind"]),
        (&"dead".into(), &"deadline_exceeded".into())
    );
    assert_eq!(worker.next().await, Some(Frame::Cancel(call.id)));
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_a_worker_waits_for_ever_and_begins_when_one_is_there() {
    let room = Room::open(&[("durable.partitions", "1")]);
    let id = send(&room, "late/1", "").await;
    sleep(Duration::from_secs(30 * 24 * 3600)).await;
    assert_eq!(look(&room, &id, "").await["state"], "accepted");
    let mut worker = room.worker("late").await;
    let call = worker.next_call().await;
    assert_eq!(call.attempt.map(|it| (it.delivery.to_string(), it.number)), Some((id, 1)));
}

/// Has a message accepted and answered.
async fn done(room: &Room) -> String {
    let mut worker = room.worker("job").await;
    let id = send(room, "job/1", "").await;
    let call = worker.next_call().await;
    worker.send(Frame::Reply(call.id, Ok(Payload::text("done")))).await;
    assert_eq!(look(room, &id, "?after=2&wait=1m").await["state"], "completed");
    worker.say_goodbye().await;
    id
}

#[tokio::test(start_paused = true)]
async fn what_has_ended_is_let_go_when_it_is_too_old() {
    let room = Room::open(&[("durable.retention_age", "1h"), ("durable.partitions", "1")]);
    let old = done(&room).await;
    sleep(Duration::from_secs(50 * 60)).await;
    assert_eq!(look(&room, &old, "").await["state"], "completed");
    let young = done(&room).await;
    sleep(Duration::from_secs(12 * 60)).await;
    assert_eq!(look(&room, &old, "").await["kind"], "not_found");
    assert_eq!(look(&room, &young, "").await["state"], "completed");
}

#[tokio::test(start_paused = true)]
async fn what_has_not_ended_is_kept_however_old_it_is() {
    let room = Room::open(&[("durable.retention_age", "1s"), ("durable.partitions", "1")]);
    let waits = send(&room, "late/1", "").await;
    for _ in 0..3 {
        done(&room).await;
        sleep(Duration::from_secs(3600)).await;
    }
    assert_eq!(look(&room, &waits, "").await["state"], "accepted");
    let mut late = room.worker("late").await;
    assert_eq!(late.next_call().await.payload.bytes, "work");
}

#[tokio::test(start_paused = true)]
async fn a_worker_has_no_more_attempts_than_it_may_and_the_rest_follow() {
    let room = Room::open(&[("durable.worker_in_flight", "2")]);
    let mut worker = room.worker("job").await;
    for key in 0..6 {
        send(&room, &format!("job/{key}"), "").await;
    }
    let mut seen = Vec::new();
    for _ in 0..3 {
        let calls = [worker.next_call().await, worker.next_call().await];
        sleep(Duration::from_secs(1)).await;
        assert_eq!(room.metric("parlour_deliveries_in_flight").await, 2);
        for call in calls {
            seen.push(call.target.to_string());
            worker.send(Frame::Reply(call.id, Ok(Payload::default()))).await;
        }
    }
    seen.sort();
    assert_eq!(seen, [0, 1, 2, 3, 4, 5].map(|key| format!("job/{key}")));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(room.metric("parlour_deliveries_completed_total").await, 6);
    assert_eq!(room.metric("parlour_deliveries_in_flight").await, 0);
}
