//! Messages for later, at a real host and at one that the test plays.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use futures_util::future::join;
use parlour_core::durable::DeliveryId;
use parlour_core::wire::{
    AcceptedFrame, DELIVERIES, DeliveryFrame, Done, Frame, SendFrame, WaitFrame,
};
use parlour_core::{Attempt, CallId, Fault, FaultKind, MessageId};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep};

use super::room::Room;
use super::scripted::{Host, Peer, URL, call, host, welcome};
use super::worker::of;
use crate::{
    Ack, Agent, AgentError, Client, Cx, DeliveryState, Error, ErrorKind, Json, Level, Payload,
    PayloadExt, Worker,
};

const LONG: Duration = Duration::from_secs(3600);

/// A room where agents of the type `a` answer as `agent` does, and a client in it.
async fn serving(agent: Agent) -> (Room, Client) {
    let room = Room::open();
    room.serve(Worker::builder(URL).agent("a", agent)).await;
    let client = room.client().await;
    (room, client)
}

/// An agent that says it has begun, and answers when it may.
fn gated() -> (Agent, mpsc::UnboundedReceiver<u32>, Arc<Notify>) {
    let (begins, begun) = mpsc::unbounded_channel();
    let gate = Arc::new(Notify::new());
    let may = Arc::clone(&gate);
    let agent = Agent::stateless().on_call(move |cx: Cx, text: String| {
        let (begins, may) = (begins.clone(), Arc::clone(&may));
        async move {
            begins.send(cx.attempt()).unwrap();
            cx.progress("half of it").await?;
            may.notified().await;
            Ok::<_, AgentError>(text.to_uppercase())
        }
    });
    (agent, begun, gate)
}

// At a real host

#[tokio::test(start_paused = true)]
async fn what_is_sent_is_accepted_delivered_and_answered() {
    let room = Room::open();
    let client = room.client().await;
    let sent = client.send("a/k", "hello").conversation("talk").await.unwrap();
    assert_eq!((sent.ack(), sent.is_new()), (Ack::Memory, true));
    assert_eq!(sent.conversation().as_str(), "talk");
    let status = sent.status().await.unwrap();
    assert_eq!((status.state, status.generation, status.attempt), (DeliveryState::Accepted, 1, 0));

    let (agent, mut begun, gate) = gated();
    room.serve(Worker::builder(URL).agent("a", agent)).await;
    assert_eq!(begun.recv().await, Some(1));
    sent.reaches(Level::Received).await.unwrap();
    let processing = sent.reaches(Level::Processing).await.unwrap();
    assert_eq!(processing.details, "half of it");
    gate.notify_one();
    let newer = sent.newer_than(processing.generation).await.unwrap();
    assert_eq!(newer.state, DeliveryState::Completed);
    assert_eq!(sent.reply().await.unwrap().to_text().unwrap(), "HELLO");
    // What was reached before counts, and what has ended can be asked for again.
    assert_eq!(sent.reaches(Level::Received).await.unwrap(), newer);
    assert_eq!(sent.clone().reply().await.unwrap().to_text().unwrap(), "HELLO");
}

#[tokio::test(start_paused = true)]
async fn values_go_and_come_as_json() {
    let agent =
        Agent::stateless().on_call_of("Add", async |Json((a, b)): Json<(i64, i64)>| Json(a + b));
    let (_room, client) = serving(agent).await;
    let add = client.typed::<(i64, i64), i64>("a").unwrap().data_type("Add");
    assert_eq!(add.send((1, 2)).await.unwrap().reply().await.unwrap(), 3);
    let sent = client.send("a", Json((1, 2))).data_type("Add").json::<String>().await.unwrap();
    assert_eq!(sent.reply().await.unwrap_err().kind(), ErrorKind::Decode);
}

#[tokio::test(start_paused = true)]
async fn one_key_is_one_delivery_and_another_message_under_it_is_a_conflict() {
    let runs = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&runs);
    let agent = Agent::stateless().on_call(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        async { "done" }
    });
    let (_room, client) = serving(agent).await;
    let send = |text: &'static str| client.send("a", text).idempotency_key("7");
    let (first, again) = (send("x").await.unwrap(), send("x").await.unwrap());
    assert_eq!((first.id(), first.is_new(), again.is_new()), (again.id(), true, false));
    again.reply().await.unwrap();
    let error = send("y").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::Conflict));
    assert_eq!(runs.load(Ordering::Relaxed), 1);
    // The control: without a key each has its own.
    let (first, second) =
        (client.send("a", "x").await.unwrap(), client.send("a", "x").await.unwrap());
    assert_ne!(first.id(), second.id());
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_fails_is_asked_again_and_its_last_fault_is_the_error() {
    let attempts = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&attempts);
    let agent = Agent::stateless().on_call(move |cx: Cx| {
        seen.lock().unwrap().push((cx.attempt(), cx.delivery()));
        async move {
            match cx.agent().key.as_str() {
                "recovers" if cx.attempt() == 3 => Ok("done"),
                _ => Err(AgentError::from("no ink")),
            }
        }
    });
    let (_room, client) = serving(agent).await;
    let sent = client.send("a/recovers", "").await.unwrap();
    assert_eq!(sent.reply().timeout(LONG).await.unwrap().to_text().unwrap(), "done");
    let numbers = [1, 2, 3].map(|number| (number, Some(sent.id())));
    assert_eq!(*attempts.lock().unwrap(), numbers);

    let sent = client.send("a/broken", "").max_attempts(2).await.unwrap();
    let failed = sent.reaches(Level::Failed).timeout(LONG).await.unwrap();
    assert_eq!(failed.fault.unwrap().detail(), "no ink");
    let error = sent.reply().timeout(LONG).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::AgentFailed));
    assert_eq!((error.to_string(), error.may_have_run()), ("no ink".to_owned(), true));
    let status = sent.status().await.unwrap();
    assert_eq!((status.state, status.attempt), (DeliveryState::Dead, 2));
    let error = sent.reaches(Level::Completed).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::AgentFailed));
}

#[tokio::test(start_paused = true)]
async fn what_is_for_later_comes_then_and_what_is_too_late_never() {
    let (agent, mut begun, gate) = gated();
    let (room, client) = serving(agent).await;
    let sent_at = Instant::now();
    client.send("a", "").delay(Duration::from_secs(100)).await.unwrap();
    begun.recv().await.unwrap();
    assert_eq!(sent_at.elapsed().as_secs(), 100);
    gate.notify_one();
    // The host's clock begins with the real time, and goes on as the test's.
    let soon = SystemTime::now() + Duration::from_secs(200);
    let sent = client.send("a", "").deliver_at(soon).await.unwrap();
    assert_eq!(sent.status().await.unwrap().state, DeliveryState::Accepted);
    begun.recv().await.unwrap();
    assert!((190..=210).contains(&sent_at.elapsed().as_secs()), "{:?}", sent_at.elapsed());
    gate.notify_one();

    let sent = room.client().await.send("nobody", "").ttl(Duration::from_secs(9)).await.unwrap();
    let error = sent.reply().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::Gone));
    assert!(error.to_string().ends_with("is expired") && !error.may_have_run(), "{error}");
    let both = client.send("a", "").delay(LONG).deliver_at(soon).await.unwrap_err();
    assert_eq!(both.kind(), ErrorKind::Fault(FaultKind::Invalid));
}

#[tokio::test(start_paused = true)]
async fn a_delivery_is_cancelled_and_its_handler_dropped() {
    let (agent, mut begun, _gate) = gated();
    let (_room, client) = serving(agent).await;
    let sent = client.send("a", "").await.unwrap();
    begun.recv().await.unwrap();
    let reply = tokio::spawn(sent.reply().timeout(LONG).into_future());
    sent.cancel("enough").await.unwrap();
    let error = reply.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::Cancelled));
    assert!(error.to_string().ends_with("was cancelled: enough"), "{error}");
    assert_eq!(sent.status().await.unwrap().state, DeliveryState::Cancelled);
    let again = sent.cancel("").await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Fault(FaultKind::NotFound));
    let long = sent.cancel("x".repeat(2000)).await.unwrap_err();
    assert_eq!(long.kind(), ErrorKind::Invalid, "nothing is sent");
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_with_its_time_and_the_delivery_goes_on() {
    let room = Room::open();
    let client = room.client().await;
    let sent = client.send("a", "hello").await.unwrap();
    let began = Instant::now();
    // Longer than the host lets anybody wait at once.
    let error = sent.reply().timeout(Duration::from_secs(200)).await.unwrap_err();
    assert_eq!((error.kind(), began.elapsed().as_secs()), (ErrorKind::Timeout, 200));
    assert!(error.to_string().contains("goes on"), "{error}");
    let waiting = sent.reply().timeout(LONG).into_future();
    let (agent, _begun, gate) = gated();
    gate.notify_one();
    let serve = async {
        sleep(Duration::from_secs(100)).await;
        room.serve(Worker::builder(URL).agent("a", agent)).await;
    };
    let (reply, ()) = join(waiting, serve).await;
    assert_eq!(reply.unwrap().to_text().unwrap(), "HELLO");
}

#[tokio::test(start_paused = true)]
async fn a_handler_sends_as_part_of_its_conversation() {
    let (says, mut seen) = mpsc::unbounded_channel();
    let back = Agent::stateless().on_call(move |cx: Cx| {
        let sender = cx.sender().map(ToString::to_string);
        says.send((cx.conversation().to_string(), sender, cx.hops())).unwrap();
        async {}
    });
    let front = Agent::stateless().on_call(async |cx: Cx| -> Result<String, Error> {
        let key = format!("after {}", cx.message_id());
        Ok(cx.send("back", "").idempotency_key(key).await?.id().to_string())
    });
    let (room, client) = serving(front).await;
    room.serve(Worker::builder(URL).agent("back", back)).await;
    client.call("a/k", "").conversation("talk").await.unwrap();
    let expected = ("talk".to_owned(), Some("a/k".to_owned()), 1);
    assert_eq!(seen.recv().await, Some(expected));
}

// At a host that the test plays

fn id() -> DeliveryId {
    DeliveryId::parse("3-9f2c11aa-512").unwrap()
}

/// Takes the next connection, and begins a session that ends with it, at a host that keeps messages.
pub(super) async fn begin(host: &mut Host) -> Peer {
    let (mut peer, ..) = host.accept_hello().await;
    let Frame::Welcome(mut usual) = welcome() else { unreachable!() };
    usual.features = vec![DELIVERIES.into()];
    peer.send(&[Frame::Welcome(usual)]).await;
    peer
}

pub(super) async fn connected() -> (Client, Peer, Host) {
    let (dialer, mut host) = host();
    let (client, peer) = join(Client::builder(URL).connect_with(dialer), begin(&mut host)).await;
    (client.unwrap(), peer, host)
}

/// A host that goes away says so.
pub(super) async fn go_away(peer: &mut Peer, request: CallId) {
    let gone = Fault::new(FaultKind::Unavailable, "the host is shutting down");
    let gone = gone.retry_after(Duration::from_secs(1));
    peer.send(&[Frame::Reply(request, Err(gone))]).await;
}

async fn next_send(peer: &mut Peer) -> SendFrame {
    match peer.next().await {
        Frame::Send(send) => *send,
        other => panic!("not a send: {other:?}"),
    }
}

async fn next_wait(peer: &mut Peer) -> WaitFrame {
    match peer.next().await {
        Frame::Wait(wait) => *wait,
        other => panic!("not a wait: {other:?}"),
    }
}

async fn accept(peer: &mut Peer, request: CallId, known: bool) {
    let conversation = MessageId::parse("c").unwrap();
    let (delivery, ack, generation) = (id(), "durable".into(), 1);
    let accepted = AcceptedFrame { request, delivery, conversation, ack, generation, known };
    peer.send(&[accepted.into()]).await;
}

fn told(request: CallId, state: &'static str, levels: &[&'static str]) -> DeliveryFrame {
    DeliveryFrame {
        request,
        delivery: id(),
        state: state.into(),
        generation: 1 + levels.len() as u64,
        attempt: 1,
        levels: levels.iter().map(|&level| level.into()).collect(),
        details: "".into(),
        fault: None,
        reply: (state == "completed").then(|| Payload::text("done")),
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_lost_with_its_acknowledgement_is_sent_again_under_one_key() {
    let (client, mut peer, mut host) = connected().await;
    let send = client.send("a/k", "hello").delay(Duration::from_secs(60)).metadata("tone", "kind");
    let script = async {
        let first = next_send(&mut peer).await;
        assert_eq!(first.delay, Some(Duration::from_secs(60)));
        let key = first.header.idempotency_key.clone().expect("one of the client's own");
        assert_eq!(key.len(), 32);
        sleep(Duration::from_secs(10)).await;
        drop(peer);
        let mut peer = begin(&mut host).await;
        let again = next_send(&mut peer).await;
        assert_eq!((again.header, again.payload), (first.header, first.payload));
        assert!(again.delay.unwrap() <= Duration::from_secs(50), "counted from the first time");
        // The next host takes it.
        go_away(&mut peer, again.request).await;
        let third = next_send(&mut peer).await;
        assert_eq!(third.header.idempotency_key, Some(key));
        accept(&mut peer, third.request, true).await;
        peer
    };
    let (sent, _peer) = join(send.into_future(), script).await;
    let sent = sent.unwrap();
    assert_eq!((sent.id(), sent.ack(), sent.is_new()), (id(), Ack::Durable, false));

    // The control: a call is not sent again.
    let (client, mut peer, _host) = connected().await;
    let script = async {
        peer.next_call().await;
        drop(peer);
    };
    let (reply, ()) = join(client.call("a", "").into_future(), script).await;
    assert_eq!(reply.unwrap_err().kind(), ErrorKind::ConnectionLost);
}

#[tokio::test(start_paused = true)]
async fn a_send_ends_with_its_deadline_and_says_that_it_may_have_been_accepted() {
    let (client, mut peer, _host) = connected().await;
    let send = client.send("a", "").timeout(Duration::from_secs(3)).into_future();
    let began = Instant::now();
    let (error, _) = join(send, next_send(&mut peer)).await;
    let error = error.unwrap_err();
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Timeout, true));
    assert_eq!(began.elapsed().as_secs(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_wait_goes_on_over_another_connection_and_asks_until_there_is_what_it_wants() {
    let (client, mut peer, mut host) = connected().await;
    let script = async {
        let send = next_send(&mut peer).await;
        accept(&mut peer, send.request, false).await;
        let wait = next_wait(&mut peer).await;
        assert_eq!((wait.delivery, wait.generation), (id(), 0));
        assert_eq!((wait.level.as_deref(), wait.timeout), (Some("completed"), Some(LONG)));
        drop(peer);
        let mut peer = begin(&mut host).await;
        // Nothing yet; too much to do; and then.
        let wait = next_wait(&mut peer).await;
        peer.send(&[told(wait.request, "processing", &["dispatched", "processing"]).into()]).await;
        let wait = next_wait(&mut peer).await;
        let busy =
            Fault::new(FaultKind::Overloaded, "busy").retry_after(Duration::from_millis(250));
        peer.send(&[Frame::Reply(wait.request, Err(busy))]).await;
        let wait = next_wait(&mut peer).await;
        peer.send(&[told(wait.request, "completed", &["dispatched", "completed"]).into()]).await;
        peer
    };
    let reply = async {
        let sent = client.send("a", "").await.unwrap();
        sent.reply().timeout(LONG).await
    };
    let (reply, _peer) = join(reply, script).await;
    assert_eq!(reply.unwrap(), Payload::text("done"));
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_is_dropped_is_given_up_at_the_host_too() {
    let (client, mut peer, _host) = connected().await;
    let script = async {
        let send = next_send(&mut peer).await;
        accept(&mut peer, send.request, false).await;
        peer
    };
    let (sent, mut peer) = join(client.send("a", "").into_future(), script).await;
    let sent = sent.unwrap();
    let waiting = tokio::spawn(sent.reply().into_future());
    let wait = next_wait(&mut peer).await;
    waiting.abort();
    assert_eq!(peer.next().await, Frame::Cancel(wait.request));
    // So is one whose time is over.
    let (error, wait) = join(sent.newer_than(1).into_future(), next_wait(&mut peer)).await;
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Timeout);
    assert_eq!(peer.next().await, Frame::Cancel(wait.request));
    // A send that is dropped cannot be taken back: nothing is said.
    let sending = tokio::spawn(client.send("a", "").into_future());
    next_send(&mut peer).await;
    sending.abort();
    drop(sent);
    let script = async {
        let next = next_send(&mut peer).await;
        accept(&mut peer, next.request, false).await;
    };
    let (sent, ()) = join(client.send("a", "").into_future(), script).await;
    sent.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_a_host_cannot_mean_is_said_and_an_older_one_is_not_asked() {
    let (client, mut peer, _host) = connected().await;
    let script = async {
        let send = next_send(&mut peer).await;
        accept(&mut peer, send.request, false).await;
        let wait = next_wait(&mut peer).await;
        peer.send(&[told(wait.request, "levitating", &[]).into()]).await;
        let wait = next_wait(&mut peer).await;
        let done = Done { request: wait.request, recipients: 0, dropped: Vec::new() };
        peer.send(&[Frame::Done(done)]).await;
    };
    let asks = async {
        let sent = client.send("a", "").await.unwrap();
        let strange = sent.status().await.unwrap_err();
        assert_eq!(strange.kind(), ErrorKind::Protocol);
        assert!(strange.to_string().contains("levitating"), "{strange}");
        assert_eq!(sent.status().await.unwrap_err().kind(), ErrorKind::Protocol);
    };
    join(asks, script).await;

    let (dialer, mut host) = host();
    let (client, mut peer) = join(Client::builder(URL).connect_with(dialer), host.accept()).await;
    let client = client.unwrap();
    let error = client.send("a", "").await.unwrap_err();
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Fault(FaultKind::Invalid), false));
    assert_eq!(error.to_string(), "this host keeps nothing for later");
    // Nothing of it was sent.
    let script = async { peer.next_call().await };
    let call = client.call("a", "").timeout(Duration::from_secs(1)).into_future();
    let (reply, _) = join(call, script).await;
    assert_eq!(reply.unwrap_err().kind(), ErrorKind::Timeout);
}

#[tokio::test(start_paused = true)]
async fn a_worker_names_the_attempt_that_it_answers_and_lives_on_when_it_is_stale() {
    let (dialer, mut host) = host();
    let agent = async |text: String| match &*text {
        "bad" => Err(AgentError::from("no ink")),
        _ => Ok(text.to_uppercase()),
    };
    let worker = of(agent).build().unwrap();
    tokio::spawn(worker.run_with(dialer, std::future::pending()));
    let mut peer = host.accept().await;
    peer.confirm().await;
    let attempt = |number| Attempt { delivery: id(), number };
    let durable = |at: u64, text| {
        let Frame::Call(mut it) = call(at, "a/k", text) else { unreachable!() };
        it.attempt = Some(attempt(at as u32));
        Frame::Call(it)
    };
    for (at, text) in [(1, "hi"), (2, "bad")] {
        peer.send(&[durable(at, text)]).await;
        assert_eq!(peer.next().await, Frame::Received(CallId(at)));
        let Frame::Outcome(outcome) = peer.next().await else { panic!("not named") };
        assert_eq!((outcome.id, outcome.attempt), (CallId(at), attempt(at as u32)));
        assert_eq!(outcome.reply.is_ok(), text == "hi");
        peer.send(&[Frame::Stale(CallId(at), attempt(at as u32))]).await;
    }
    // One that is not durable has nothing to name, also under a number that was.
    peer.call(1, "a/k", "still here").await;
    assert_eq!(peer.reply(1).await.unwrap(), Payload::text("STILL HERE"));
}
