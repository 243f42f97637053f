//! What must hold once all faults have ended: everyone finds back, everything works again, and in
//! the end nothing is left.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fastrand::Rng;
use futures_util::future::join_all;
use parlour_test::Direction;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::agents::{COMMON, Work, event_text};
use super::book::Token;
use super::callers::{Errand, TOPICS, call};
use super::old::OLD;
use super::slots::Order;
use super::web::{Door, Web};
use super::{RECOVERY, Stage};

/// How long a message and its consequences may be under way.
const PROMPTLY: Duration = Duration::from_millis(20);

/// Waits until everyone is connected, and nobody else.
pub(crate) async fn recover(stage: &Stage) {
    let deadline = Instant::now() + RECOVERY;
    loop {
        let missing = missing(stage).await;
        let Some(missing) = missing else { return };
        if Instant::now() > deadline {
            stage.book.violation(format!("not recovered within {RECOVERY:?}: {missing}"));
            return;
        }
        sleep(Duration::from_millis(250)).await;
    }
}

/// What keeps the room from being as it was.
async fn missing(stage: &Stage) -> Option<String> {
    let Ok(workers) = stage.room.get("/v1/workers").await else {
        return Some("the host does not answer".into());
    };
    let workers: Value = serde_json::from_str(&workers).unwrap_or_default();
    let mut workers = workers["workers"].as_array().cloned().unwrap_or_default();
    workers.retain(|it| it["name"] != "referee");
    let (olds, mut workers): (Vec<_>, Vec<_>) = workers.into_iter().partition(is_old);
    let is_up = stage.is_old_up.load(Ordering::Relaxed);
    if olds.len() != 1 || !is_up || olds[0]["connected"] != true || olds[0]["agent_types"][0] != OLD
    {
        return Some(format!("clients of the dialect are {olds:?}"));
    }
    let listeners = workers.iter().filter(|it| it["protocol"] == "sse").count();
    if listeners != 1 {
        return Some(format!("{listeners} listeners are there"));
    }
    workers.retain(|it| it["protocol"] != "sse");
    let mut names: Vec<_> = workers.iter().filter_map(|it| it["name"].as_str()).collect();
    names.sort_unstable();
    let slots = stage.slots.iter().map(|slot| format!("slot {}", slot.number));
    let callers = stage.callers.iter().map(|caller| format!("caller {}", caller.number));
    let mut wanted: Vec<_> = slots.chain(callers).collect();
    wanted.sort_unstable();
    if names != wanted {
        return Some(format!("connected are {names:?}"));
    }
    if workers.iter().any(|it| it["connected"] != true) {
        return Some("a session waits for its client".into());
    }
    let serving = |it: &&Value| it["agent_types"].as_array().is_some_and(|it| !it.is_empty());
    if workers.iter().filter(serving).count() != stage.slots.len()
        || !stage.slots.iter().all(|slot| slot.is_up.load(Ordering::Relaxed))
    {
        return Some("not all workers serve".into());
    }
    let subscriptions = stage.room.get("/v1/subscriptions").await.unwrap_or_default();
    let subscriptions: Value = serde_json::from_str(&subscriptions).unwrap_or_default();
    let count = subscriptions["subscriptions"].as_array().map_or(0, Vec::len);
    // That of the dialect's client is one.
    let wanted = stage.slots.len() + 1 + stage.book.subscriptions();
    (count != wanted).then(|| format!("{count} subscriptions instead of {wanted}"))
}

/// More events at once than some take: each reaches whom it is for, or they are named.
async fn flood(stage: &Stage, rng: &mut Rng) {
    let publisher = &stage.callers[rng.usize(..stage.callers.len())];
    let slow = &stage.callers[rng.usize(..stage.callers.len())].network;
    slow.narrow(Direction::FromHost, 100_000, 4096);
    let topic = TOPICS[rng.usize(..TOPICS.len())];
    let events = (0..rng.usize(50..150)).map(|_| {
        let number = stage.book.next_number();
        let text = format!("{} {}", event_text(publisher.number, number), "x".repeat(1000));
        let request = publisher.client.publish(format!("{topic}/flood"), text);
        async move { (number, request.timeout(Duration::from_secs(60)).await) }
    });
    stage.book.note(format_args!("{} floods {topic}", publisher.number));
    let events = join_all(events).await;
    slow.heal();
    sleep(Duration::from_secs(5)).await;
    let wanted = agents_of(topic) + stage.book.listeners(topic);
    for (number, published) in events {
        let (listeners, agents) = stage.book.heard(publisher.number, number);
        match published {
            Ok(published)
                if listeners + agents == published.recipients as usize
                    && listeners + agents + published.dropped.len() == wanted =>
            {
                stage.book.counts_many("recipients named", published.dropped.len() as u64);
            }
            other => stage.book.violation(format!(
                "{}-{number} reached {} of {wanted}: {other:?}",
                publisher.number,
                listeners + agents
            )),
        }
    }
}

/// A caller that reads more slowly than an agent speaks hears all, or that it was too slow.
async fn listens(stage: &Stage, rng: &mut Rng) {
    let caller = &stage.callers[rng.usize(..stage.callers.len())];
    let token = Token { caller: caller.number, number: stage.book.next_number() };
    let (target, limit) = (format!("{COMMON}/calm-slow"), Duration::from_secs(60));
    let errand = Errand::new(token, target, Work::Tell(400), limit);
    caller.network.narrow(Direction::FromHost, 1000, 512);
    call(stage.book.clone(), caller.client.clone(), errand).await;
    caller.network.heal();
    // What waited for it comes.
    sleep(Duration::from_secs(5)).await;
}

/// How many agents an event of this topic is for: one in a process, and one of the dialect.
fn agents_of(topic: &str) -> usize {
    if topic.starts_with("news.") { 2 } else { 0 }
}

fn is_old(worker: &Value) -> bool {
    worker["protocol"] == "autogen-0.1.0"
}

/// A round in which everything must succeed.
pub(crate) async fn check(stage: &Arc<Stage>, rng: &mut Rng) {
    stage.book.calms();
    for _ in 0..3 {
        calls(stage, rng).await;
        events(stage, rng).await;
    }
    flood(stage, rng).await;
    listens(stage, rng).await;
    cancels(stage, rng).await;
    if stage.slots.len() > 1 {
        drain(stage, rng).await;
    }
}

/// Calls that must succeed, some at once.
async fn calls(stage: &Arc<Stage>, rng: &mut Rng) {
    let mut open = JoinSet::new();
    let web = Arc::new(Web::new(stage));
    for door in [Door::Rest, Door::Rest, Door::Rpc] {
        let work = Work::Tell(rng.u64(..10));
        let limit = match door {
            Door::Rest => Duration::from_secs(10),
            Door::Rpc => stage.default_timeout,
        };
        let types = [COMMON, OLD];
        let target = format!("{}/calm-{}", types[rng.usize(..2)], rng.u8(..8));
        let errand = Errand::new(web.token(), target, work, limit);
        let asks = door == Door::Rest;
        let (web, errand) = (web.clone(), Errand { asks, ..errand });
        open.spawn(async move {
            web.call(door, &errand).await;
            errand.token
        });
    }
    for caller in &stage.callers {
        for _ in 0..4 {
            let work = match rng.u8(..5) {
                0 => Work::Ask,
                1 => Work::Sleep(rng.u64(1..100)),
                2 => Work::Grow(rng.usize(1..20_000)),
                3 => Work::Tell(rng.u64(..10)),
                _ => Work::Echo,
            };
            let types = [COMMON, COMMON, COMMON, OLD];
            let target = format!("{}/calm-{}", types[rng.usize(..4)], rng.u8(..8));
            let token = Token { caller: caller.number, number: stage.book.next_number() };
            let (book, client) = (stage.book.clone(), caller.client.clone());
            let errand = Errand::new(token, target, work, Duration::from_secs(10));
            open.spawn(async move {
                call(book, client, errand).await;
                token
            });
        }
    }
    while let Some(ended) = open.join_next().await {
        if let Ok(token) = ended {
            stage.book.must_have_succeeded(token);
        }
    }
}

/// Events that must reach everyone they are for, once.
async fn events(stage: &Stage, rng: &mut Rng) {
    for caller in &stage.callers {
        let (number, topic) = (stage.book.next_number(), TOPICS[rng.usize(..TOPICS.len())]);
        let target = format!("{topic}/{}", rng.u8(..3));
        stage.book.note(format_args!("{}-{number} is published on {topic}", caller.number));
        let published = caller.client.publish(target, event_text(caller.number, number)).await;
        let agents = agents_of(topic);
        let listeners = stage.book.listeners(topic);
        match published {
            Ok(published) if published.recipients == (agents + listeners) as u64 => {}
            other => stage.book.violation(format!("{}-{number}: {other:?}", caller.number)),
        }
        sleep(PROMPTLY).await;
        let heard = stage.book.heard(caller.number, number);
        if heard != (listeners, agents) {
            stage.book.violation(format!(
                "{}-{number} on {topic} reached {heard:?} of {:?} subscriptions and agents",
                caller.number,
                (listeners, agents)
            ));
        }
    }
}

/// Calls that are given up, or come to their deadline, end in the worker too.
async fn cancels(stage: &Stage, rng: &mut Rng) {
    let web = Web::new(stage);
    for caller in &stage.callers {
        for door in [None, Some(Door::Rest), Some(Door::Rpc)] {
            let token = match door {
                None => Token { caller: caller.number, number: stage.book.next_number() },
                Some(_) => web.token(),
            };
            let target = format!("{COMMON}/calm-{}", rng.u8(..8));
            let asks = door != Some(Door::Rpc) && rng.bool();
            let limit = Duration::from_millis(rng.u64(100..1000));
            let errand = if rng.bool() {
                let (work, patience) = (Work::Hang, Some(limit));
                Errand { token, target, work, asks, limit: Duration::from_secs(60), patience }
            } else {
                let limit = if door == Some(Door::Rpc) { stage.default_timeout } else { limit };
                Errand { token, target, work: Work::Hang, asks, limit, patience: None }
            };
            match door {
                None => call(stage.book.clone(), caller.client.clone(), errand).await,
                Some(door) => web.call(door, &errand).await,
            }
            sleep(PROMPTLY).await;
            if stage.book.run_ended(token).is_none() {
                stage.book.violation(format!("{token} is over, and its handler goes on"));
            }
        }
    }
}

/// A worker that shuts down in order answers what it was asked.
async fn drain(stage: &Arc<Stage>, rng: &mut Rng) {
    let mut open = JoinSet::new();
    for caller in &stage.callers {
        for key in 0..6 {
            let token = Token { caller: caller.number, number: stage.book.next_number() };
            let (book, client) = (stage.book.clone(), caller.client.clone());
            let work = Work::Sleep(rng.u64(500..2000));
            let target = format!("{COMMON}/calm-{key}");
            let errand = Errand::new(token, target, work, Duration::from_secs(10));
            open.spawn(async move {
                call(book, client, errand).await;
                token
            });
        }
    }
    sleep(Duration::from_millis(100)).await;
    let slot = &stage.slots[rng.usize(1..stage.slots.len())];
    slot.order(Order::Drain(Duration::from_millis(500)));
    sleep(Duration::from_millis(100)).await;
    calls(stage, rng).await;
    while let Some(ended) = open.join_next().await {
        if let Ok(token) = ended {
            stage.book.must_have_succeeded(token);
        }
    }
    recover(stage).await;
    calls(stage, rng).await;
}

/// Counts the sessions that went on over another socket, as the host did.
pub(crate) async fn count_resumed(stage: &Stage) {
    let metrics = stage.room.get("/metrics").await.unwrap_or_default();
    let resumed = metric(&metrics, "sessions_resumed_total").unwrap_or_default();
    stage.book.counts_many("sessions resumed", resumed);
}

fn metric(metrics: &str, name: &str) -> Option<u64> {
    let prefix = format!("parlour_{name} ");
    metrics.lines().find_map(|line| line.strip_prefix(&prefix))?.parse().ok()
}

/// Once nobody asks for anything, no call is open and no queue holds anything.
async fn nothing_waits(stage: &Stage) {
    sleep(Duration::from_secs(1)).await;
    let answer = stage.room.get("/v1/workers").await.unwrap_or_default();
    let answer: Value = serde_json::from_str(&answer).unwrap_or_default();
    for worker in answer["workers"].as_array().into_iter().flatten() {
        for field in ["in_flight", "queued", "queued_bytes"] {
            if worker[field] != 0 {
                let (name, left) = (&worker["name"], &worker[field]);
                stage.book.violation(format!("{name} still has {left} {field}"));
            }
        }
    }
}

/// Everyone leaves, and nothing may be left of them.
pub(crate) async fn leave(stage: Arc<Stage>) {
    count_resumed(&stage).await;
    nothing_waits(&stage).await;
    let Ok(stage) = Arc::try_unwrap(stage).map_err(|stage| {
        stage.book.violation("somebody still works".to_owned());
    }) else {
        return;
    };
    let Stage { room, book, slots, callers, .. } = stage;
    for slot in slots {
        slot.stopped().await;
    }
    for caller in callers {
        caller.client.close().await;
    }
    sleep(Duration::from_secs(10)).await;
    let metrics = room.get("/metrics").await.unwrap_or_default();
    // The connection that asks is one.
    for (name, wanted) in [("calls_in_flight", 0), ("channels", 0), ("connections", 1)] {
        let value = metric(&metrics, name);
        if value != Some(wanted) {
            book.violation(format!("at the end {name} is {value:?}"));
        }
    }
    for (path, field) in [
        ("/v1/workers", "workers"),
        ("/v1/subscriptions", "subscriptions"),
        ("/v1/agents", "agents"),
    ] {
        let answer = room.get(path).await.unwrap_or_default();
        let answer: Value = serde_json::from_str(&answer).unwrap_or_default();
        if answer[field].as_array().is_none_or(|all| !all.is_empty()) {
            book.violation(format!("at the end {path} says {answer}"));
        }
    }
    book.close();
    room.stop().await;
}
