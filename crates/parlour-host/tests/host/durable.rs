//! Messages that are accepted for later, on a paused clock.

use std::collections::HashMap;
use std::time::Duration;

use parlour_core::wire::{CallFrame, Frame};
use parlour_core::{Fault, FaultKind, Payload};
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};

use crate::room::{Channel, Room};

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

/// Changes what the room asks for agents of a type.
async fn configure(room: &Room, agent_type: &str, patch: &str) {
    let length = patch.len();
    let request = format!(
        "PATCH /v1/agents/{agent_type}/settings HTTP/1.1\r\nhost: localhost\r\n\
         connection: close\r\ncontent-length: {length}\r\n\r\n{patch}"
    );
    let answer = room.request(&request).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

/// Has so many messages accepted, for agents in all partitions.
async fn send_many(room: &Room, agent_type: &str, count: usize) {
    for key in 0..count {
        send(room, &format!("{agent_type}/{key}"), "").await;
    }
}

#[tokio::test(start_paused = true)]
async fn attempts_begin_no_faster_than_the_rate_whichever_partition_they_are_of() {
    let room = Room::open(&[]);
    configure(&room, "job", r#"{"rate": 2, "burst": 3}"#).await;
    let mut worker = room.worker("job").await;
    send_many(&room, "job", 40).await;
    let mut begun = Vec::new();
    while begun.len() < 40 {
        let call = worker.next_call().await;
        begun.push(Instant::now());
        worker.send(Frame::Reply(call.id, Ok(Payload::default()))).await;
    }
    // The clock of timers counts whole milliseconds.
    let slack = Duration::from_millis(2);
    for window in begun.windows(4) {
        assert!(window[3] - window[0] + slack >= Duration::from_millis(500), "{begun:?}");
    }
    let whole = begun[39] - begun[0];
    assert!(whole + slack >= Duration::from_millis(37 * 500), "{whole:?}");
    assert!(whole <= Duration::from_millis(38 * 500) + slack, "{whole:?}");
}

#[tokio::test(start_paused = true)]
async fn without_a_rate_they_begin_at_once() {
    let room = Room::open(&[]);
    let mut worker = room.worker("job").await;
    let begun = Instant::now();
    send_many(&room, "job", 40).await;
    for _ in 0..40 {
        let call = worker.next_call().await;
        worker.send(Frame::Reply(call.id, Ok(Payload::default()))).await;
    }
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_rate_that_is_raised_holds_for_what_waits() {
    let room = Room::open(&[]);
    configure(&room, "job", r#"{"rate": 0.001}"#).await;
    let mut worker = room.worker("job").await;
    send_many(&room, "job", 9).await;
    worker.next_call().await;
    sleep(Duration::from_secs(10)).await;
    assert_eq!(room.metric("parlour_deliveries_in_flight").await, 1);
    let then = Instant::now();
    configure(&room, "job", r#"{"rate": 1000}"#).await;
    for _ in 0..8 {
        worker.next_call().await;
    }
    assert!(then.elapsed() < Duration::from_secs(1));
}

/// Answers all calls of a type, each after a while, and sees how many there are at once.
struct Bench {
    worker: Channel,
    under_way: Vec<CallFrame>,
    most: usize,
    ended: HashMap<String, u64>,
}

impl Bench {
    async fn open(room: &Room, agent_type: &'static str) -> Self {
        let worker = room.worker(agent_type).await;
        Self { worker, under_way: Vec::new(), most: 0, ended: HashMap::new() }
    }

    /// Takes what comes within a second.
    async fn take(&mut self) {
        let second = Duration::from_secs(1);
        while let Ok(call) = timeout(second, self.worker.next_call()).await {
            self.under_way.push(call);
            self.most = self.most.max(self.under_way.len());
        }
    }

    /// Answers some of what there is.
    async fn answer(&mut self, count: usize) {
        for _ in 0..count.min(self.under_way.len()) {
            let call = self.under_way.swap_remove(fastrand::usize(..self.under_way.len()));
            *self.ended.entry(call.target.to_string()).or_default() += 1;
            self.worker.send(Frame::Reply(call.id, Ok(Payload::default()))).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_type_has_no_more_attempts_at_once_than_it_may_over_all_partitions() {
    let room = Room::open(&[]);
    for most in [1, 3] {
        configure(&room, "job", &format!(r#"{{"concurrency": {most}}}"#)).await;
        let mut bench = Bench::open(&room, "job").await;
        send_many(&room, "job", 60).await;
        while bench.ended.values().sum::<u64>() < 60 {
            bench.take().await;
            assert!(!bench.under_way.is_empty(), "something waits although there is room");
            bench.answer(fastrand::usize(1..=most)).await;
        }
        assert_eq!((bench.most, bench.ended.len()), (most, 60));
        bench.worker.say_goodbye().await;
    }
}

/// In a room that lets one attempt run at a time, many are given up that wait behind it, and one is not.
async fn the_last_of_many_begins(room: &Room) {
    let mut bench = Bench::open(room, "job").await;
    let mut names = Vec::new();
    for key in 0..40 {
        names.push(send(room, &format!("job/{key}"), "").await);
    }
    bench.take().await;
    let running = bench.under_way[0].attempt.map(|it| it.delivery.to_string());
    let kept = names.iter().rev().find(|name| Some(*name) != running.as_ref()).unwrap();
    for name in names.iter().filter(|name| *name != kept && Some(*name) != running.as_ref()) {
        room.post(&format!("/v1/deliveries/{name}/cancel"), "", "").await;
    }
    bench.answer(1).await;
    bench.take().await;
    let begun = bench.under_way.first().and_then(|call| call.attempt);
    assert_eq!(begun.map(|it| it.delivery.to_string()).as_ref(), Some(kept));
}

#[tokio::test(start_paused = true)]
async fn room_that_one_partition_does_not_want_any_more_goes_to_another() {
    let room = Room::open(&[]);
    configure(&room, "job", r#"{"concurrency": 1}"#).await;
    the_last_of_many_begins(&room).await;
}

#[tokio::test(start_paused = true)]
async fn room_at_a_worker_that_one_partition_does_not_want_any_more_goes_to_another() {
    let room = Room::open(&[("durable.worker_in_flight", "1")]);
    the_last_of_many_begins(&room).await;
}

#[tokio::test(start_paused = true)]
async fn a_concurrency_that_is_raised_or_reset_lets_more_begin_at_once() {
    let room = Room::open(&[]);
    configure(&room, "job", r#"{"concurrency": 1, "rate": 100}"#).await;
    let mut bench = Bench::open(&room, "job").await;
    send_many(&room, "job", 20).await;
    bench.take().await;
    assert_eq!(bench.under_way.len(), 1);
    configure(&room, "job", r#"{"concurrency": 4}"#).await;
    bench.take().await;
    assert_eq!(bench.under_way.len(), 4);
    configure(&room, "job", r#"{"concurrency": null}"#).await;
    bench.take().await;
    assert_eq!(bench.under_way.len(), 20);
}
