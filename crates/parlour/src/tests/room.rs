//! Workers and clients at a real host, in memory and on a paused clock.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use parlour_host::{Config, Io, Listener};
use serde_json::{Value, json};
use tokio::io::DuplexStream;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::scripted::URL;
use super::worker::{Dropped, upper};
use crate::transport::Connect;
use crate::{
    Agent, AgentError, Client, Cx, Error, ErrorKind, FaultKind, IntoAgent, Json, MessageId,
    Payload, PayloadExt, State, TopicId, Worker, WorkerBuilder,
};

/// A host that is reached through its connector alone.
#[derive(Clone)]
pub(super) struct Room(mpsc::UnboundedSender<DuplexStream>);

struct InMemory(mpsc::UnboundedReceiver<DuplexStream>);

impl Listener for InMemory {
    async fn accept(&mut self) -> io::Result<Box<dyn Io>> {
        match self.0.recv().await {
            Some(stream) => Ok(Box::new(stream)),
            None => std::future::pending().await,
        }
    }
}

impl Connect for Room {
    type Io = DuplexStream;

    async fn connect(&self, _host: &str, _port: u16) -> io::Result<DuplexStream> {
        let (near, far) = tokio::io::duplex(64 * 1024);
        self.0.send(far).map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
        Ok(near)
    }
}

impl Room {
    pub(super) fn open() -> Self {
        let (connections, incoming) = mpsc::unbounded_channel();
        let mut config = Config::default();
        config.set("server.allowed_hosts", "room.test").unwrap();
        let host = parlour_host::Host::new(config);
        tokio::spawn(host.serve(InMemory(incoming), std::future::pending()));
        Self(connections)
    }

    pub(super) async fn client(&self) -> Client {
        Client::builder(URL).connect_with(self.clone()).await.unwrap()
    }

    /// Starts a worker, and returns once the host has confirmed what it serves.
    pub(super) async fn serve(&self, worker: WorkerBuilder) -> JoinHandle<Result<(), Error>> {
        let (connected, is_connected) = oneshot::channel();
        let connected = Mutex::new(Some(connected));
        let worker = worker.on_connected(move || {
            connected.lock().unwrap().take().map(|connected| connected.send(()));
        });
        let worker = worker.build().unwrap().run_with(self.clone(), std::future::pending());
        let task = tokio::spawn(worker);
        is_connected.await.unwrap();
        task
    }
}

/// A room where the agent type `a` is served, and a client in it.
async fn serving<Parts>(agent: impl IntoAgent<Parts>) -> (Room, Client) {
    let room = Room::open();
    room.serve(Worker::builder(URL).agent("a", agent)).await;
    let client = room.client().await;
    (room, client)
}

fn counter() -> Agent<AtomicU64> {
    async fn count(count: State<AtomicU64>) -> String {
        (count.fetch_add(1, Ordering::Relaxed) + 1).to_string()
    }
    Agent::new(|_key| AtomicU64::new(0)).on_call(count)
}

async fn text(client: &Client, agent: &str) -> String {
    client.call(agent, "").await.unwrap().to_text().unwrap().to_owned()
}

#[tokio::test(start_paused = true)]
async fn conversation_cause_trace_hops_and_deadline_pass_from_agent_to_agent() {
    type Seen = (String, Option<MessageId>, Option<String>, u8, Option<String>);
    let (says, mut seen) = mpsc::unbounded_channel::<(MessageId, Seen)>();
    let note = move |cx: &Cx| {
        let sender = cx.sender().map(ToString::to_string);
        let trace = cx.traceparent().map(str::to_owned);
        let seen = (cx.conversation().to_string(), cx.cause().cloned(), trace, cx.hops(), sender);
        says.send((cx.message_id().clone(), seen)).unwrap();
    };
    let (first, second, third) = (note.clone(), note.clone(), note);
    let front = move |cx: Cx| {
        first(&cx);
        async move {
            cx.publish("news/k", "").await?;
            // Asks for more than its caller allows.
            cx.call("back", "").timeout(Duration::from_secs(60)).await
        }
    };
    let back = move |cx: Cx| {
        second(&cx);
        async move { Json(cx.time_left().map(|left| left.as_secs())) }
    };
    let listener = Agent::stateless().on_event(move |cx: Cx| {
        third(&cx);
        async {}
    });
    let (room, client) = serving(front).await;
    let others = Worker::builder(URL).agent("back", back).agent("listener", listener);
    room.serve(others.subscribe("news", "listener")).await;

    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let call = client.call("a/k", "").timeout(Duration::from_secs(5));
    let left = call.conversation("talk").traceparent(trace).json::<Option<u64>>().await.unwrap();
    assert!(left.unwrap() <= 5, "no longer than the first caller waits");

    let (asked, front) = seen.recv().await.unwrap();
    assert_eq!(front, ("talk".to_owned(), None, Some(trace.to_owned()), 0, None));
    let sender = Some("a/k".to_owned());
    let follows = ("talk".to_owned(), Some(asked), Some(trace.to_owned()), 1, sender);
    for _ in 0..2 {
        assert_eq!(seen.recv().await.unwrap().1, follows);
    }

    // The control: what a client sends by itself begins a conversation of its own.
    client.call("back", "").await.unwrap();
    let (id, (conversation, cause, trace, hops, _)) = seen.recv().await.unwrap();
    assert_eq!((conversation, cause, trace, hops), (id.to_string(), None, None, 0));
}

#[tokio::test(start_paused = true)]
async fn an_agent_ends_with_its_callers_deadline() {
    let (says, mut seen) = mpsc::unbounded_channel();
    let back = move || {
        let dropped = Dropped(says.clone());
        async move {
            let _dropped = dropped;
            std::future::pending::<()>().await
        }
    };
    let front = async |cx: Cx| cx.call("back", "").await;
    let (room, client) = serving(front).await;
    room.serve(Worker::builder(URL).agent("back", back)).await;
    let began = Instant::now();
    let error = client.call("a", "").timeout(Duration::from_secs(3)).await.unwrap_err();
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Timeout, true));
    assert_eq!(seen.recv().await, Some("dropped"));
    assert_eq!(began.elapsed().as_secs(), 3);
}

#[tokio::test(start_paused = true)]
async fn one_call_to_many_agents_gives_each_ones_reply_or_fault() {
    async fn agent(cx: Cx, Json(add): Json<u64>) -> Result<Json<u64>, AgentError> {
        match cx.agent().key.as_str() {
            "fails" => Err("out of ink".into()),
            "slow" => std::future::pending().await,
            key => Ok(Json(key.parse::<u64>()? + add)),
        }
    }
    let (_room, client) = serving(agent).await;
    let agents = ["a/1", "a/fails", "nobody/1", "a/slow", "a/2"];
    let calls = client.call_each(agents, Json(10)).timeout(Duration::from_secs(2));
    let began = Instant::now();
    let answers = calls.json::<u64>().await.unwrap();
    assert_eq!(began.elapsed().as_secs(), 2, "all at once, and no longer than the deadline");
    let names: Vec<_> = answers.iter().map(|answer| answer.agent.to_string()).collect();
    assert_eq!(names, agents);
    let outcome: Vec<_> = answers
        .into_iter()
        .map(|answer| answer.reply.map_err(|error| (error.kind(), error.may_have_run())))
        .collect();
    let fault = ErrorKind::Fault;
    assert_eq!(
        outcome,
        [
            Ok(11),
            Err((fault(FaultKind::AgentFailed), true)),
            Err((fault(FaultKind::UnknownAgent), false)),
            Err((ErrorKind::Timeout, true)),
            Ok(12)
        ]
    );
    let error = client.call_each(["a/1", "not a name"], "").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidName, "nothing is sent");
    assert!(client.call_each(Vec::<String>::new(), "").await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_agent_asks_many_as_part_of_its_conversation() {
    let back = async |cx: Cx| cx.conversation().to_string();
    let front = async |cx: Cx| -> Result<Json<Vec<String>>, AgentError> {
        let answers = cx.call_each(["back/1", "back/2"], "").await?;
        let texts = answers.into_iter().map(|answer| Ok(answer.reply?.to_text()?.to_owned()));
        Ok(Json(texts.collect::<Result<_, AgentError>>()?))
    };
    let (room, client) = serving(front).await;
    room.serve(Worker::builder(URL).agent("back", back)).await;
    let call = client.call("a", "").conversation("talk").json::<Vec<String>>();
    assert_eq!(call.await.unwrap(), ["talk", "talk"]);
}

#[tokio::test(start_paused = true)]
async fn a_typed_agent_takes_and_gives_values() {
    let agent = Agent::stateless()
        .on_call_of("Add", async |Json((a, b)): Json<(i64, i64)>| Json(a + b))
        .on_call_of("Negate", async |Json(a): Json<i64>| Json(-a));
    let (_room, client) = serving(agent).await;
    let add = client.typed::<(i64, i64), i64>("a").unwrap().data_type("Add");
    let negate = client.typed::<i64, i64>("a").unwrap().data_type("Negate");
    assert_eq!(add.call((1, 2)).await.unwrap(), 3);
    assert_eq!(negate.call(7).await.unwrap(), -7);

    let error = client.typed::<i64, i64>("a").unwrap().call(7).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::Invalid));
    assert_eq!(error.to_string(), "a answers no calls without a data type");
    assert_eq!(error.hint(), Some("it answers Add, Negate"));
    let wrong = client.typed::<i64, String>("a").unwrap().data_type("Negate").call(7).await;
    assert_eq!(wrong.unwrap_err().kind(), ErrorKind::Decode);
    assert_eq!(client.typed::<(), ()>("a b").unwrap_err().kind(), ErrorKind::InvalidName);
}

/// Calls one agent many times at once, and returns in which order the handlers began.
async fn order(agent: fn(Agent<Log>) -> Agent<Log>) -> (Vec<u64>, u64) {
    async fn note(log: State<Log>, Json(number): Json<u64>) {
        log.begun.lock().unwrap().push(number);
        let running = log.running.fetch_add(1, Ordering::SeqCst) + 1;
        log.most.fetch_max(running, Ordering::SeqCst);
        // As long as the number says, so that they end in another order.
        sleep(Duration::from_millis(number * 7 % 5)).await;
        log.running.fetch_sub(1, Ordering::SeqCst);
    }
    let log = Arc::new(Log::default());
    let shared = Arc::clone(&log);
    let new = move |_key: &crate::Key| Log { ..shared.share() };
    let (_room, client) = serving(agent(Agent::new(new).on_call(note))).await;
    let calls = (0..200).map(|number| client.call("a/k", Json(number)).into_future());
    let calls: Vec<_> = calls.map(tokio::spawn).collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    let begun = log.begun.lock().unwrap().clone();
    (begun, log.most.load(Ordering::SeqCst))
}

#[derive(Default)]
struct Log {
    begun: Arc<Mutex<Vec<u64>>>,
    running: Arc<AtomicU64>,
    most: Arc<AtomicU64>,
}

impl Log {
    fn share(&self) -> Self {
        let Self { begun, running, most } = self;
        Self { begun: begun.clone(), running: running.clone(), most: most.clone() }
    }
}

#[tokio::test(start_paused = true)]
async fn messages_for_one_key_begin_in_order_and_run_together() {
    let (begun, most) = order(|agent| agent).await;
    assert_eq!(begun, (0..200).collect::<Vec<_>>());
    assert!(most > 1, "several ran at once");
}

#[tokio::test(start_paused = true)]
async fn one_at_a_time_they_run_one_after_the_other() {
    let (begun, most) = order(Agent::one_at_a_time).await;
    assert_eq!(begun, (0..200).collect::<Vec<_>>());
    assert_eq!(most, 1);
}

#[tokio::test(start_paused = true)]
async fn one_that_is_given_up_while_it_waits_lets_nobody_pass_who_runs() {
    let (says, mut seen) = mpsc::unbounded_channel();
    let proceed = Arc::new(Notify::new());
    let gate = Arc::clone(&proceed);
    let handler = move |text: String| {
        says.send(text).unwrap();
        let gate = Arc::clone(&gate);
        async move { gate.notified().await }
    };
    let (_room, client) = serving(Agent::stateless().on_call(handler).one_at_a_time()).await;
    let call = |text: &'static str| tokio::spawn(client.call("a", text).into_future());
    let first = call("first");
    assert_eq!(seen.recv().await.unwrap(), "first");
    let (second, third) = (call("second"), call("third"));
    let waits = client.call("a", "late").timeout(Duration::from_secs(1));
    assert_eq!(waits.await.unwrap_err().kind(), ErrorKind::Timeout);
    second.abort();
    client.call("a", "ping").data_type("parlour.describe").await.unwrap();
    assert!(seen.try_recv().is_err(), "the first still runs");
    proceed.notify_one();
    first.await.unwrap().unwrap();
    assert_eq!(seen.recv().await.unwrap(), "third");
    proceed.notify_one();
    third.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn idle_agents_are_let_go_after_their_time_and_busy_ones_are_not() {
    let (says, mut seen) = mpsc::unbounded_channel();
    struct Memory(AtomicU64, #[expect(dead_code, reason = "says when it is dropped")] Dropped);
    async fn count(State(memory): State<Memory>, text: String) -> String {
        if text == "slow" {
            sleep(Duration::from_secs(25)).await;
        }
        (memory.0.fetch_add(1, Ordering::Relaxed) + 1).to_string()
    }
    let new = move |_key: &crate::Key| Memory(AtomicU64::new(0), Dropped(says.clone()));
    let agent = Agent::new(new).on_call(count).idle_timeout(Duration::from_secs(10));
    let (_room, client) = serving(agent).await;
    assert_eq!(text(&client, "a/k").await, "1");
    sleep(Duration::from_secs(9)).await;
    assert_eq!(text(&client, "a/k").await, "2", "kept");
    sleep(Duration::from_secs(9)).await;
    assert_eq!(text(&client, "a/k").await, "3", "used in between");
    let began = Instant::now();
    assert_eq!(seen.recv().await, Some("dropped"));
    assert_eq!(began.elapsed().as_secs(), 10);
    assert_eq!(text(&client, "a/k").await, "1", "made anew");

    let slow = client.call("a/k", "slow").await.unwrap();
    assert_eq!(slow, Payload::text("2"), "busy for longer than it may be idle");
    assert!(seen.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn without_an_idle_time_agents_are_kept() {
    let (_room, client) = serving(counter()).await;
    assert_eq!(text(&client, "a/k").await, "1");
    sleep(Duration::from_secs(24 * 3600)).await;
    assert_eq!(text(&client, "a/k").await, "2");
}

#[tokio::test(start_paused = true)]
async fn it_describes_itself() {
    let agent = counter()
        .on_call_of("Reset", async |Json(_): Json<u64>| ())
        .on_save_state(async || "")
        .version("1.2.0")
        .metadata("owner", "ledger team");
    let (_room, client) = serving(agent).await;
    let call = client.call("a/any", "").data_type("parlour.describe");
    assert_eq!(
        call.json::<Value>().await.unwrap(),
        json!({
            "version": "1.2.0",
            "agent_type": "a",
            "handles": [{"data_type": ""}, {"data_type": "Reset"}],
            "metadata": {"owner": "ledger team"},
        })
    );
}

#[cfg(feature = "schemars")]
#[tokio::test(start_paused = true)]
async fn with_schemas_it_says_what_it_takes_and_gives() {
    #[derive(serde::Deserialize, schemars::JsonSchema)]
    struct Add {
        #[expect(dead_code, reason = "only described")]
        numbers: Vec<i64>,
    }
    let agent = Agent::stateless()
        .on_call_of("Add", async |Json(_): Json<Add>| Json(0))
        .schema::<Add, i64>("Add");
    let (_room, client) = serving(agent).await;
    let description = client.call("a", "").data_type("parlour.describe").json::<Value>();
    let handles = description.await.unwrap()["handles"][0].clone();
    assert_eq!(handles["schema"]["properties"]["numbers"]["type"], "array");
    assert_eq!(handles["schema"]["required"], json!(["numbers"]));
    assert_eq!(handles["reply_schema"]["type"], "integer");

    let unhandled = Agent::stateless().schema::<i64, i64>("Add");
    let error = Worker::builder(URL).agent("a", unhandled).build().unwrap_err();
    assert_eq!(error.to_string(), "there is a schema for `Add`, and no handler");
}

#[tokio::test(start_paused = true)]
async fn state_is_saved_loaded_and_let_go_by_reserved_calls() {
    async fn save(count: State<AtomicU64>) -> Json<u64> {
        Json(count.load(Ordering::Relaxed))
    }
    async fn load(count: State<AtomicU64>, Json(saved): Json<u64>) {
        count.store(saved, Ordering::Relaxed);
    }
    let (_room, client) = serving(counter().on_save_state(save).on_load_state(load)).await;
    let reserved = |agent: &str, name: &str, payload: Payload| {
        client.call(agent, payload).data_type(format!("parlour.{name}")).into_future()
    };
    text(&client, "a/k").await;
    text(&client, "a/k").await;
    let saved = reserved("a/k", "save_state", Payload::default()).await.unwrap();
    assert_eq!(saved.json::<u64>().unwrap(), 2);

    reserved("a/k", "passivate", Payload::default()).await.unwrap();
    assert_eq!(text(&client, "a/k").await, "1", "it has forgotten");
    reserved("a/other", "load_state", saved).await.unwrap();
    assert_eq!(text(&client, "a/other").await, "3");
    reserved("a/nobody", "passivate", Payload::default()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_agent_is_let_go_when_what_it_runs_has_ended_and_before_what_comes_later() {
    let proceed = Arc::new(Notify::new());
    let gate = Arc::clone(&proceed);
    let handler = move |count: State<AtomicU64>, message: String| {
        let gate = Arc::clone(&gate);
        async move {
            if message == "slow" {
                gate.notified().await;
            }
            (count.fetch_add(1, Ordering::Relaxed) + 1).to_string()
        }
    };
    let agent = Agent::new(|_key| AtomicU64::new(0)).on_call(handler);
    let (_room, client) = serving(agent).await;
    let slow = tokio::spawn(client.call("a/k", "slow").into_future());
    text(&client, "a/k").await;
    let passivate = client.call("a/k", "").data_type("parlour.passivate").into_future();
    let passivate = tokio::spawn(passivate);
    let later = tokio::spawn(client.call("a/k", "").into_future());
    client.call("a/k", "").data_type("parlour.describe").await.unwrap();
    assert!(!passivate.is_finished() && !later.is_finished());
    proceed.notify_one();
    assert_eq!(slow.await.unwrap().unwrap(), Payload::text("2"));
    passivate.await.unwrap().unwrap();
    assert_eq!(later.await.unwrap().unwrap(), Payload::text("1"));
}

#[tokio::test(start_paused = true)]
async fn reserved_names_are_refused_where_they_mean_nothing() {
    let (_room, client) = serving(upper).await;
    for name in ["parlour.save_state", "parlour.load_state", "parlour.teleport"] {
        let error = client.call("a", "x").data_type(name).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::Invalid), "{name}");
        assert!(error.to_string().contains(name) && error.hint().is_some(), "{error:?}");
    }
    let agent = Agent::stateless().on_call_of("parlour.mine", async || ());
    let error = Worker::builder(URL).agent("a", agent).build().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[tokio::test(start_paused = true)]
async fn handlers_take_the_parts_they_name() {
    type Parts = (Option<TopicId>, crate::Bytes, Payload);
    async fn all((topic, bytes, payload): Parts, text: String, cx: Cx) -> String {
        assert_eq!((&bytes, topic), (&payload.bytes, None));
        format!("{} {text} {}", cx.agent(), payload.metadata.get("mood").unwrap())
    }
    let (room, client) = serving(all).await;
    let reply = client.call("a", "hello").metadata("mood", "fine").await.unwrap();
    assert_eq!(reply, Payload::text("a/default hello fine"));
    let error = client.call("a", vec![0xff]).metadata("mood", "").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::Invalid));
    assert!(error.to_string().starts_with("the payload is not UTF-8 text"), "{error}");

    room.serve(Worker::builder(URL).agent("b", async |topic: TopicId| topic.to_string())).await;
    let error = client.call("b", "").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::Invalid), "a call has no topic");
}

#[tokio::test(start_paused = true)]
async fn a_factory_that_panics_fails_its_call_and_is_asked_again() {
    let tries = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&tries);
    let new = move |_key: &crate::Key| {
        assert!(counted.fetch_add(1, Ordering::Relaxed) > 0, "no luck");
    };
    let (_room, client) = serving(Agent::new(new).on_call(async || "made")).await;
    let error = client.call("a", "").await.unwrap_err();
    assert_eq!(error.to_string(), "the agent panicked: no luck");
    assert_eq!(text(&client, "a").await, "made");
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_ends_answers_what_runs_and_is_given_nothing_new() {
    let room = Room::open();
    let proceed = Arc::new(Notify::new());
    let gate = Arc::clone(&proceed);
    let handler = move || {
        let gate = Arc::clone(&gate);
        async move {
            gate.notified().await;
            "done"
        }
    };
    let (stop, stopped) = oneshot::channel::<()>();
    let (connected, mut is_connected) = mpsc::unbounded_channel();
    let worker = Worker::builder(URL).agent("a", handler).on_connected(move || {
        connected.send(()).unwrap();
    });
    let worker = tokio::spawn(worker.build().unwrap().run_with(room.clone(), async {
        let _ = stopped.await;
    }));
    is_connected.recv().await.unwrap();
    let client = room.client().await;
    let running = tokio::spawn(client.call("a", "").into_future());
    client.call("a", "").data_type("parlour.describe").await.unwrap();
    drop(stop);
    let error = loop {
        // Answered for as long as the host has not heard of it.
        match client.call("a", "").data_type("parlour.describe").await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::UnknownAgent));
    assert!(!error.may_have_run());
    proceed.notify_one();
    assert_eq!(running.await.unwrap().unwrap(), Payload::text("done"));
    worker.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_was_started_serves_until_it_is_shut_down_or_dropped() {
    let room = Room::open();
    let client = room.client().await;
    let start = || Worker::builder(URL).agent("a", upper).build().unwrap().start_with(room.clone());
    let worker = start().await.unwrap();
    assert_eq!(text(&client, "a").await, "");
    worker.shutdown().await.unwrap();
    let refused = |error: Error| (error.kind(), error.may_have_run());
    let unknown = (ErrorKind::Fault(FaultKind::UnknownAgent), false);
    assert_eq!(refused(client.call("a", "").await.unwrap_err()), unknown);

    let worker = start().await.unwrap();
    assert_eq!(text(&client, "a").await, "");
    drop(worker);
    loop {
        // Until the host has seen that the connection is gone.
        match client.call("a", "").await {
            Ok(_) => {}
            Err(error) if error.kind() == unknown.0 => break,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::WorkerLost)),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_the_host_refuses_does_not_start() {
    let room = Room::open();
    let start = || {
        let agent = Agent::stateless().on_call(upper).exclusive();
        Worker::builder(URL).agent("a", agent).build().unwrap().start_with(room.clone())
    };
    let first = start().await.unwrap();
    let error = start().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::Conflict));
    first.shutdown().await.unwrap();
    start().await.unwrap().shutdown().await.unwrap();
}
