//! Several workers of one agent type: where a key is, and when it moves.

use std::time::Duration;

use parlour_core::wire::{CallFrame, Frame, Hello, RESUME, Register, Subscribe};
use parlour_core::{
    AgentType, CallId, Credit, Fault, FaultKind, Payload, Registration, Reply, TopicFilter,
};
use tokio::time::timeout;

use crate::room::{Channel, Room};

/// Two workers of the type `a`, a caller, and a key at each of the two.
struct Pool {
    room: Room,
    workers: [Channel; 2],
    caller: Channel,
    keys: [String; 2],
    calls: u64,
}

impl Pool {
    async fn open(settings: &[(&str, &str)]) -> Self {
        Self::in_room(Room::open(settings)).await
    }

    async fn in_room(room: Room) -> Self {
        let workers = [room.worker("a").await, room.worker("a").await];
        let caller = room.channel().await;
        let keys = [String::new(), String::new()];
        let mut pool = Self { room, workers, caller, keys, calls: 0 };
        for n in 0.. {
            let key = format!("key {n}");
            let (worker, call) = pool.ask(&key).await;
            pool.answer(worker, &call).await;
            pool.keys[worker] = key;
            if pool.keys.iter().all(|key| !key.is_empty()) {
                break;
            }
        }
        pool
    }

    /// Calls the agent with this key, and returns under which number.
    async fn begin(&mut self, key: &str) -> u64 {
        self.calls += 1;
        self.caller.call(self.calls, &format!("a/{key}"), &self.calls.to_string(), None).await;
        self.calls
    }

    /// Calls the agent with this key, and returns which worker gets it.
    async fn ask(&mut self, key: &str) -> (usize, CallFrame) {
        self.begin(key).await;
        self.next().await
    }

    /// The next call at either worker.
    async fn next(&mut self) -> (usize, CallFrame) {
        let [first, second] = &mut self.workers;
        tokio::select! {
            call = first.next_call() => (0, call),
            call = second.next_call() => (1, call),
        }
    }

    /// Whether no worker gets a call now.
    async fn is_quiet(&mut self) -> bool {
        timeout(Duration::from_millis(100), self.next()).await.is_err()
    }

    /// Has the worker answer, and the caller take the answer.
    async fn answer(&mut self, worker: usize, call: &CallFrame) {
        self.reply(worker, call).await;
        let (_, reply) = self.caller.next_reply().await;
        assert_eq!(reply, Ok(call.payload.clone()));
    }

    async fn reply(&mut self, worker: usize, call: &CallFrame) {
        let reply = Frame::Reply(call.id, Ok(call.payload.clone()));
        self.workers[worker].send(reply).await;
    }

    /// Has the first worker drain as an operator does, and hear of it.
    async fn drain_the_first(&mut self) {
        let number = self.document("/v1/workers").await["workers"][0]["id"].to_string();
        let answer = self.room.post(&format!("/v1/workers/{number}/drain"), "", "").await;
        assert!(answer.starts_with("HTTP/1.1 202 "), "{answer}");
        assert_eq!(self.workers[0].next().await, Some(Frame::Leave));
    }

    async fn document(&self, path: &str) -> serde_json::Value {
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        json(&self.room.request(&request).await)
    }
}

fn json(answer: &str) -> serde_json::Value {
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}

fn fault(reply: (u64, Reply)) -> (u64, Fault) {
    (reply.0, reply.1.unwrap_err())
}

#[tokio::test(start_paused = true)]
async fn a_key_with_calls_in_flight_stays_where_it_is_until_they_have_ended() {
    let room = Room::open(&[]);
    let mut first = room.worker("a").await;
    let mut caller = room.channel().await;
    let agents: Vec<String> = (0..20).map(|n| format!("a/{n}")).collect();
    let mut running = Vec::new();
    for (id, agent) in (1..).zip(&agents) {
        caller.call(id, agent, "", None).await;
        running.push(first.next_call().await);
    }

    let mut second = room.worker("a").await;
    for (id, agent) in (21..).zip(&agents) {
        caller.call(id, agent, "", None).await;
        running.push(first.next_call().await);
    }
    for call in running {
        first.send(Frame::Reply(call.id, Ok(Payload::default()))).await;
        assert!(caller.next_reply().await.1.is_ok());
    }
    let mut moved = 0;
    for (id, agent) in (41..).zip(&agents) {
        caller.call(id, agent, "", None).await;
        tokio::select! {
            _ = first.next_call() => {}
            _ = second.next_call() => moved += 1,
        }
    }
    assert!((1..20).contains(&moved), "{moved} of 20 keys belong to the new worker");
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_drains_ends_what_it_has_and_gets_nothing_new() {
    let mut pool = Pool::open(&[]).await;
    let keys = pool.keys.clone();
    let (at, running) = pool.ask(&keys[0]).await;
    assert_eq!(at, 0);
    pool.drain_the_first().await;

    // A key with nothing in flight has moved.
    let (at, other) = pool.ask(&format!("{} or another", keys[0])).await;
    assert_eq!(at, 1);
    pool.answer(1, &other).await;

    // One with a call in flight waits, and moves in between.
    let waiting = [pool.begin(&keys[0]).await, pool.begin(&keys[0]).await];
    assert!(pool.is_quiet().await);
    pool.answer(0, &running).await;
    for number in waiting {
        let (at, call) = pool.next().await;
        assert_eq!((at, &call.payload), (1, &Payload::text(number.to_string())));
        pool.answer(1, &call).await;
    }

    let document = pool.document("/v1/workers").await;
    let drained = &document["workers"][0];
    assert_eq!((&drained["draining"], &drained["in_flight"]), (&true.into(), &0.into()));
}

#[tokio::test(start_paused = true)]
async fn events_follow_the_calls_of_their_agent() {
    let mut pool = Pool::open(&[]).await;
    for (number, worker) in (1..).zip(&mut pool.workers) {
        let subscribe = Subscribe {
            request: CallId(9),
            subscription: number,
            filter: TopicFilter::parse("news").unwrap(),
            agent_type: Some(AgentType::parse("a").unwrap()),
        };
        worker.send(Frame::Subscribe(subscribe)).await;
        assert!(matches!(worker.next().await, Some(Frame::Done(_))));
    }
    let key = pool.keys[0].clone();
    let (_, running) = pool.ask(&key).await;
    pool.drain_the_first().await;

    pool.begin(&key).await;
    let path = format!("/v1/topics/news/{}", key.replace(' ', "%20"));
    let answer = json(&pool.room.post(&path, "", "extra").await);
    assert_eq!((&answer["recipients"], &answer["dropped"]), (&1.into(), &serde_json::json!([])));
    assert!(pool.is_quiet().await, "nothing overtakes the call");
    pool.answer(0, &running).await;
    pool.workers[1].next_call().await;
    match pool.workers[1].next().await {
        Some(Frame::Event(event)) => assert_eq!(event.payload.bytes, "extra"),
        other => panic!("not the event: {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn an_event_whose_agent_has_nowhere_to_move_counts_as_dropped() {
    let mut pool = Pool::open(&[]).await;
    let subscribe = Subscribe {
        request: CallId(9),
        subscription: 1,
        filter: TopicFilter::parse("news").unwrap(),
        agent_type: Some(AgentType::parse("a").unwrap()),
    };
    pool.workers[0].send(Frame::Subscribe(subscribe)).await;
    assert!(matches!(pool.workers[0].next().await, Some(Frame::Done(_))));
    let key = pool.keys[0].clone();
    let (_, running) = pool.ask(&key).await;
    pool.drain_the_first().await;
    let path = format!("/v1/topics/news/{}", key.replace(' ', "%20"));
    let answer = json(&pool.room.post(&path, "", "extra").await);
    assert_eq!((&answer["recipients"], &answer["dropped"]), (&1.into(), &serde_json::json!([])));

    let agent_type = AgentType::parse("a").unwrap();
    let unregister = Frame::Unregister { request: CallId(2), agent_type, key: None };
    pool.workers[1].send(unregister).await;
    assert!(matches!(pool.workers[1].next().await, Some(Frame::Done(_))));
    assert_eq!(pool.room.metric("parlour_events_dropped_total").await, 0);
    pool.answer(0, &running).await;
    assert_eq!(pool.room.metric("parlour_events_dropped_total").await, 1);
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_its_agent_to_move_ends_by_its_deadline_or_when_it_is_given_up() {
    let mut pool = Pool::open(&[]).await;
    let key = pool.keys[0].clone();
    let (_, running) = pool.ask(&key).await;
    pool.drain_the_first().await;

    let agent = format!("a/{key}");
    pool.caller.call(101, &agent, "", Some(Duration::from_secs(3))).await;
    pool.caller.call(102, &agent, "", None).await;
    pool.caller.call(103, &agent, "", None).await;
    pool.caller.send(Frame::Cancel(CallId(102))).await;
    for expected in [(102, FaultKind::Cancelled), (101, FaultKind::DeadlineExceeded)] {
        let (id, fault) = fault(pool.caller.next_reply().await);
        assert_eq!((id, fault.kind(), fault.may_have_run()), (expected.0, expected.1, false));
    }

    // The third goes on, and can still be given up.
    pool.answer(0, &running).await;
    let call = pool.workers[1].next_call().await;
    pool.caller.send(Frame::Cancel(CallId(103))).await;
    assert_eq!(pool.workers[1].next().await, Some(Frame::Cancel(call.id)));
    let (id, fault) = fault(pool.caller.next_reply().await);
    assert_eq!((id, fault.kind(), fault.may_have_run()), (103, FaultKind::Cancelled, true));
    assert!(pool.is_quiet().await, "neither of the others is sent");
}

#[tokio::test(start_paused = true)]
async fn the_death_of_a_worker_that_drains_sets_its_keys_free() {
    let mut pool = Pool::open(&[]).await;
    let key = pool.keys[0].clone();
    pool.ask(&key).await;
    pool.drain_the_first().await;
    let waiting = pool.begin(&key).await;
    assert!(pool.is_quiet().await);

    let substitute = pool.room.channel().await;
    drop(std::mem::replace(&mut pool.workers[0], substitute));
    let (id, fault) = fault(pool.caller.next_reply().await);
    assert_eq!(id, waiting - 1);
    assert_eq!((fault.kind(), fault.may_have_run()), (FaultKind::WorkerLost, true));
    let (at, call) = pool.next().await;
    assert_eq!((at, call.payload), (1, Payload::text(waiting.to_string())));
}

#[tokio::test(start_paused = true)]
async fn calls_that_a_drained_worker_never_had_come_before_those_that_wait() {
    let room = Room::open(&[]);
    // For its DONE and one call.
    let credit = Credit { messages: 2, bytes: 1 << 20 };
    let hello = Hello { name: "w".into(), versions: vec![1], credit, ..Hello::default() };
    let hello = Hello { features: vec![RESUME.into()], ..hello };
    let (mut first, _) = room.greeted(hello).await;
    first.register("a").await;
    let mut caller = room.channel().await;
    for id in 1..=3 {
        caller.call(id, "a/k", &id.to_string(), None).await;
    }
    first.next_call().await;
    let mut second = room.worker("a").await;
    let answer = room.post("/v1/workers/w/drain", "", "").await;
    assert!(answer.starts_with("HTTP/1.1 202 "), "{answer}");
    caller.call(4, "a/k", "4", None).await;
    assert!(timeout(Duration::from_millis(100), second.next_call()).await.is_err());

    first.say_goodbye().await;
    for text in ["2", "3", "4"] {
        assert_eq!(second.next_call().await.payload, Payload::text(text));
    }
    let (id, fault) = fault(caller.next_reply().await);
    assert_eq!((id, fault.kind(), fault.may_have_run()), (1, FaultKind::WorkerLost, true));
}

#[tokio::test(start_paused = true)]
async fn without_another_worker_a_type_that_drains_is_unknown() {
    let room = Room::open(&[]);
    let mut worker = room.worker("a").await;
    let mut caller = room.channel().await;
    caller.call(1, "a/k", "", None).await;
    let call = worker.next_call().await;
    worker.send(Frame::Drain).await;
    worker.send(Frame::Ping(1)).await;
    assert_eq!(worker.next().await, Some(Frame::Pong(1)));

    caller.call(2, "a/k", "", None).await;
    let (id, fault) = fault(caller.next_reply().await);
    assert_eq!((id, fault.kind()), (2, FaultKind::UnknownAgent));
    worker.send(Frame::Reply(call.id, Ok(Payload::default()))).await;
    assert_eq!(caller.next_reply().await, (1, Ok(Payload::default())));
}

#[tokio::test(start_paused = true)]
async fn no_more_waits_for_agents_to_move_than_may() {
    let mut pool = Pool::open(&[("limits.queue_messages", "3")]).await;
    let key = pool.keys[0].clone();
    let (_, running) = pool.ask(&key).await;
    pool.drain_the_first().await;
    let waiting = [pool.begin(&key).await, pool.begin(&key).await, pool.begin(&key).await];
    let excess = pool.begin(&key).await;
    let (id, fault) = fault(pool.caller.next_reply().await);
    assert_eq!((id, fault.kind(), fault.may_have_run()), (excess, FaultKind::Overloaded, false));
    assert!(fault.to_string().contains("to move"), "{fault}");

    pool.answer(0, &running).await;
    for number in waiting {
        let (_, call) = pool.next().await;
        assert_eq!(call.payload, Payload::text(number.to_string()));
        pool.answer(1, &call).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_ends_what_waits_for_its_agent_to_move() {
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let settings = [("server.drain_timeout", "2s")];
    let room = Room::open_until(&settings, async {
        let _ = stopped.await;
    });
    let mut pool = Pool::in_room(room).await;
    let key = pool.keys[0].clone();
    let running = pool.calls + 1;
    pool.ask(&key).await;
    pool.drain_the_first().await;
    let waiting = pool.begin(&key).await;
    assert!(pool.is_quiet().await);
    stop.send(()).unwrap();
    assert_eq!(pool.caller.next().await, Some(Frame::Drain));
    for (id, may_have_run) in [(waiting, false), (running, true)] {
        let (ended, fault) = fault(pool.caller.next_reply().await);
        assert_eq!((ended, fault.kind()), (id, FaultKind::Unavailable));
        assert_eq!(fault.may_have_run(), may_have_run);
    }
}

#[tokio::test(start_paused = true)]
async fn a_drained_worker_takes_no_more_registrations() {
    let mut pool = Pool::open(&[]).await;
    pool.drain_the_first().await;
    let register = Register {
        request: CallId(7),
        agent_type: AgentType::parse("b").unwrap(),
        key: None,
        registration: Registration::default(),
    };
    pool.workers[0].send(Frame::Register(register)).await;
    let (id, fault) = fault(pool.workers[0].next_reply().await);
    assert_eq!((id, fault.kind()), (7, FaultKind::Conflict));
}

#[tokio::test(start_paused = true)]
async fn operators_see_load_keys_and_capacity() {
    let mut pool = Pool::open(&[]).await;
    let register = Register {
        request: CallId(2),
        agent_type: AgentType::parse("a").unwrap(),
        key: None,
        registration: Registration { capacity: 300, ..Registration::default() },
    };
    pool.workers[1].send(Frame::Register(register)).await;
    assert!(matches!(pool.workers[1].next().await, Some(Frame::Done(_))));
    let key = pool.keys[1].clone();
    for key in [&key, &key, &format!("{key} beside")] {
        pool.ask(key).await;
    }
    let document = pool.document("/v1/workers").await;
    let seen = |index: usize| {
        let worker = &document["workers"][index];
        let of = |key: &str| worker[key].as_u64().unwrap();
        (of("in_flight"), of("keys"), worker["capacity"]["a"].as_u64().unwrap())
    };
    assert_eq!([seen(0), seen(1)], [(0, 0, 1), (3, 2, 300)]);

    let credit = Credit { messages: 5, bytes: 1 << 20 };
    let hello = Hello { name: "w".into(), versions: vec![1], credit, ..Hello::default() };
    let hello = Hello { features: vec![RESUME.into()], ..hello };
    let (mut worker, _) = pool.room.greeted(hello).await;
    worker.register("b").await;
    pool.caller.call(99, "b/k", "", None).await;
    worker.next_call().await;
    let document = pool.document("/v1/workers").await;
    let credit = |index: usize| document["workers"][index]["credit"].as_u64();
    assert_eq!([credit(0), credit(3)], [None, Some(3)], "less its DONE and its CALL");
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_drained_is_told_with_what_to_change() {
    let pool = Pool::open(&[]).await;
    for (name, status, hint) in [
        ("nobody", "404", "parlour workers"),
        ("99", "404", "parlour workers"),
        ("test", "409", "number: 1, 2"),
        ("3", "409", "parlour workers"),
    ] {
        let answer = pool.room.post(&format!("/v1/workers/{name}/drain"), "", "").await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        let problem = json(&answer);
        assert!(problem["hint"].as_str().unwrap().contains(hint), "{problem}");
    }
    // From a page in a browser that is not the operator's, no drain is taken at all.
    let origin = "origin: http://evil.example\r\n";
    let answer = pool.room.post("/v1/workers/1/drain", origin, "").await;
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
}
