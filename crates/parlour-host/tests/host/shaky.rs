//! Durable messages on a backbone that is late, loses answers, and has several owners at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use parking_lot::Mutex;
use parlour_core::wire::Frame;
use parlour_core::{Fault, FaultKind};
use parlour_host::backbone::{Ack, Backbone, BackboneError, Work};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::room::Room;

#[path = "../../src/backbone/tests/shaky.rs"]
mod backbone;

use backbone::Shaky;

const SEEDS: u64 = 24;
const HOSTS: usize = 6;
const PUBLISHERS: u64 = 3;
const MESSAGES: u64 = 15;
const SETTINGS: &[(&str, &str)] = &[
    ("durable.max_attempts", "1000"),
    ("durable.max_lost", "1000"),
    ("durable.backoff_base", "5ms"),
    ("durable.backoff_cap", "100ms"),
    ("durable.attempt_timeout", "5s"),
];

/// What everyone writes down, outside the hosts. A message is known by its text.
#[derive(Default)]
struct Book {
    /// The deliveries that were acknowledged, by what they carry. An event has none of its own.
    acknowledged: BTreeMap<String, Option<String>>,
    /// What was never answered, and is not sent again.
    unknown: BTreeSet<String>,
    /// As which deliveries it ran.
    runs: BTreeMap<String, BTreeSet<String>>,
    wrong: Vec<String>,
}

/// Hosts on the same logs, one after the other. Nobody tells the old ones that there is a new one.
struct Storm {
    backbone: Shaky,
    hosts: Mutex<Vec<Arc<Room>>>,
    book: Mutex<Book>,
}

impl Storm {
    fn open(&self) -> Arc<Room> {
        let room = Room::keep(SETTINGS, Arc::new(self.backbone.clone()));
        let room = Arc::new(room);
        self.hosts.lock().push(room.clone());
        room
    }

    /// The host that began last, or now and then the one before.
    fn any(&self, random: &mut Rng) -> Arc<Room> {
        let hosts = self.hosts.lock();
        let back = if random.u8(..5) == 0 { hosts.len().min(2) } else { 1 };
        hosts[hosts.len() - back].clone()
    }

    /// Sends messages and events, under a key until they are answered.
    async fn publish(self: Arc<Self>, number: u64, mut random: Rng) {
        for message in 0..MESSAGES {
            let text = format!("{number}-{message}");
            let path = match random.u8(..2) {
                0 => format!("/v1/agents/job/{}/deliveries", random.u8(..9)),
                _ => format!("/v1/topics/news/{}", random.u8(..9)),
            };
            let has_key = random.u8(..3) > 0;
            let key = if has_key { format!("idempotency-key: {text}\r\n") } else { String::new() };
            let headers = format!("parlour-ack: durable\r\n{key}");
            loop {
                let answer = self.any(&mut random).post(&path, &headers, &text).await;
                if answer.starts_with("HTTP/1.1 202 ") {
                    self.acknowledged(&text, &body(&answer));
                    break;
                } else if !has_key {
                    self.book.lock().unknown.insert(text);
                    break;
                }
                sleep(Duration::from_millis(random.u64(..200))).await;
            }
            sleep(Duration::from_millis(random.u64(..100))).await;
        }
    }

    fn acknowledged(&self, text: &str, answer: &Value) {
        let mut book = self.book.lock();
        let delivery = match answer["recipients"].as_u64() {
            None => answer["id"].as_str().map(str::to_owned),
            Some(1) => None,
            Some(_) => {
                book.wrong.push(format!("{text} is owed to others: {answer}"));
                None
            }
        };
        book.acknowledged.insert(text.to_owned(), delivery);
    }

    /// Serves agents at one host, and dies now and then.
    async fn work(self: Arc<Self>, room: Arc<Room>, mut random: Rng) {
        loop {
            let mut channel = room.worker("job").await;
            while let Some(frame) = channel.next().await {
                let Frame::Call(call) = frame else { continue };
                let text = String::from_utf8_lossy(&call.payload.bytes).into_owned();
                let attempt = call.attempt.unwrap();
                self.ran(text, attempt.delivery.to_string());
                let reply = match random.u8(..100) {
                    0..3 => break,
                    3..15 => Err(Fault::new(FaultKind::AgentFailed, "no luck")),
                    15..30 => {
                        sleep(Duration::from_millis(random.u64(..300))).await;
                        Ok(call.payload)
                    }
                    _ => Ok(call.payload),
                };
                channel.send(Frame::Reply(call.id, reply)).await;
            }
        }
    }

    fn ran(&self, text: String, delivery: String) {
        self.book.lock().runs.entry(text).or_default().insert(delivery);
    }

    /// Waits until the host that began last has all logs, and starts another if that cannot be.
    async fn settle(self: &Arc<Self>) -> Arc<Room> {
        loop {
            let room = self.open();
            // What others are still about to write may come in between.
            for _ in 0..100 {
                sleep(Duration::from_millis(100)).await;
                if get(&room, "/readyz").await.starts_with("HTTP/1.1 200 ") {
                    return room;
                }
            }
        }
    }

    /// What is wrong in the end, as far as `room` and all others tell.
    async fn check(&self, room: &Room) -> Vec<String> {
        let metric = async |name: &str| room.metric(&format!("parlour_deliveries_{name}")).await;
        for _ in 0..60 {
            sleep(Duration::from_secs(1)).await;
            if metric("waiting").await + metric("in_flight").await + metric("owed").await == 0 {
                break;
            }
        }
        let book = std::mem::take(&mut *self.book.lock());
        let mut wrong = book.wrong;
        for (text, delivery) in &book.acknowledged {
            let runs = book.runs.get(text).map_or(0, BTreeSet::len);
            if runs != 1 {
                wrong.push(format!("{text} was acknowledged, and ran as {runs} deliveries"));
            }
            let Some(id) = delivery else { continue };
            let answer = get(room, &format!("/v1/deliveries/{id}/reply")).await;
            if !(answer.starts_with("HTTP/1.1 200 ")
                && answer.ends_with(&format!("\r\n\r\n{text}")))
            {
                wrong.push(format!("{text} was acknowledged as {id}, and in the end: {answer}"));
            }
        }
        for (text, runs) in &book.runs {
            let is_known = book.acknowledged.contains_key(text) || book.unknown.contains(text);
            if !is_known || runs.len() != 1 {
                wrong.push(format!("{text} ran as {runs:?}"));
            }
        }
        let (accepted, completed) =
            (metric("accepted_total").await, metric("completed_total").await);
        if (accepted, completed) != (book.runs.len() as u64, accepted) {
            let ran = book.runs.len();
            wrong.push(format!("{accepted} accepted, {completed} completed, {ran} ran"));
        }
        wrong
    }
}

fn body(answer: &str) -> Value {
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    serde_json::from_str(body).unwrap()
}

async fn get(room: &Room, path: &str) -> String {
    let lines = "HTTP/1.1\r\nhost: localhost\r\nconnection: close";
    room.request(&format!("GET {path} {lines}\r\n\r\n")).await
}

/// Runs a storm on this backbone, and returns what was wrong in the end.
async fn weather(seed: u64, backbone: Shaky) -> Vec<String> {
    let mut random = Rng::with_seed(seed);
    backbone.set_lossy(false);
    let storm = Arc::new(Storm { backbone, hosts: Mutex::default(), book: Mutex::default() });
    let subscription = r#"{"topic_type": "news", "agent_type": "job"}"#;
    let made = storm.settle().await.send("PUT", "/v1/subscriptions/all", "", subscription).await;
    assert!(made.starts_with("HTTP/1.1 201 "), "{made}");
    storm.backbone.set_lossy(true);
    let mut publishers = JoinSet::new();
    for number in 0..PUBLISHERS {
        publishers.spawn(storm.clone().publish(number, random.fork()));
    }
    let mut workers = JoinSet::new();
    for _ in 0..HOSTS {
        let room = storm.open();
        workers.spawn(storm.clone().work(room, random.fork()));
        sleep(Duration::from_millis(random.u64(..1500))).await;
    }
    storm.backbone.set_lossy(false);
    let room = storm.settle().await;
    workers.spawn(storm.clone().work(room.clone(), random.fork()));
    publishers.join_all().await;
    storm.check(&room).await
}

fn run(seed: u64, backbone: &Shaky) -> Vec<String> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(true).build().unwrap();
    runtime.block_on(weather(seed, backbone.clone()))
}

const SLOWEST: Duration = Duration::from_millis(50);

#[test]
fn nothing_that_was_acknowledged_is_lost_when_answers_are_and_hosts_know_nothing_of_each_other() {
    let mut lost = 0;
    for seed in 0..SEEDS {
        let backbone = Shaky::new(seed, 3, SLOWEST);
        let wrong = run(seed, &backbone);
        assert!(wrong.is_empty(), "seed {seed}: {wrong:#?}");
        lost += backbone.lost();
    }
    assert!(lost > 0);
}

#[test]
fn the_control_a_backbone_that_acknowledges_what_it_does_not_write_is_found_out() {
    let is_found = |seed| !run(seed, &Shaky::lying(seed, 3, SLOWEST)).is_empty();
    assert!((0..SEEDS).any(is_found));
}
