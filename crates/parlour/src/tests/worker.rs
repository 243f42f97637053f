use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parlour_core::wire::Frame;
use parlour_core::{CallId, Fault, FaultKind, TopicFilter};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_websockets::CloseCode;

use super::scripted::{Host, MAX_PAYLOAD, Peer, URL, call, event, host};
use crate::{
    Agent, AgentError, Cx, Error, ErrorKind, IntoAgent, Json, Payload, PayloadExt, State, TopicId,
    Worker, WorkerBuilder,
};

/// A worker that runs, and how to end it.
pub(super) struct Running {
    pub(super) task: JoinHandle<Result<(), Error>>,
    pub(super) shutdown: oneshot::Sender<()>,
}

impl Running {
    fn start(worker: WorkerBuilder) -> (Self, Host) {
        let (dialer, host) = host();
        let (shutdown, asked) = oneshot::channel();
        let task = tokio::spawn(worker.build().unwrap().run_with(dialer, async {
            let _ = asked.await;
        }));
        (Self { task, shutdown }, host)
    }
}

/// Starts a worker of one agent type, and confirms its registration.
pub(super) async fn serving(worker: WorkerBuilder) -> (Running, Peer, Host) {
    let (running, mut host) = Running::start(worker);
    let mut peer = host.accept().await;
    peer.confirm().await;
    (running, peer, host)
}

pub(super) fn builder() -> WorkerBuilder {
    Worker::builder(URL)
}

/// A worker of the type `a` whose agents are `agent`.
pub(super) fn of<Parts>(agent: impl IntoAgent<Parts>) -> WorkerBuilder {
    builder().agent("a", agent)
}

pub(super) async fn upper(text: String) -> String {
    text.to_uppercase()
}

/// Says so when it is dropped.
pub(super) struct Dropped(pub(super) mpsc::UnboundedSender<&'static str>);

impl Drop for Dropped {
    fn drop(&mut self) {
        let _ = self.0.send("dropped");
    }
}

/// An agent that never answers, and a way to see its handlers begin and be dropped.
pub(super) fn endless() -> (Agent, mpsc::UnboundedReceiver<&'static str>) {
    let (says, seen) = mpsc::unbounded_channel();
    let handler = move || {
        let dropped = Dropped(says.clone());
        let _ = says.send("began");
        async move {
            let _dropped = dropped;
            std::future::pending::<()>().await
        }
    };
    (Agent::stateless().on_call(handler), seen)
}

#[tokio::test(start_paused = true)]
async fn it_registers_subscribes_and_answers() {
    let connected = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&connected);
    let agent = Agent::stateless().on_call(upper).exclusive().capability("shouting");
    let worker =
        builder().agent("upper", agent).subscribe("news.*", "upper").on_connected(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
    let (_running, mut host) = Running::start(worker);
    let mut peer = host.accept().await;
    let Frame::Register(register) = peer.confirm().await else { panic!("not a registration") };
    assert_eq!((register.agent_type.as_str(), register.key), ("upper", None));
    assert!(register.registration.exclusive);
    assert_eq!(register.registration.capabilities, ["shouting"]);
    assert_eq!(connected.load(Ordering::Relaxed), 0);
    let Frame::Subscribe(subscribe) = peer.confirm().await else { panic!("not a subscription") };
    assert_eq!(subscribe.filter, TopicFilter::parse("news.*").unwrap());
    assert_eq!(subscribe.agent_type.unwrap().as_str(), "upper");

    peer.send(&[call(1, "upper/x", "hi"), call(2, "upper/y", "there")]).await;
    let frames = peer.message().await.unwrap();
    let reply = |id, text| Frame::Reply(CallId(id), Ok(Payload::text(text)));
    assert_eq!(frames, [reply(1, "HI"), reply(2, "THERE")]);
    assert_eq!(connected.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn an_error_and_a_panic_reach_the_caller_as_agent_failed() {
    async fn agent(text: String) -> Result<(), AgentError> {
        match &*text {
            "error" => Err("the printer is out of paper".into()),
            "fault" => Err(Fault::new(FaultKind::Conflict, "already printed").into()),
            other => panic!("cannot print {other}"),
        }
    }
    let (_running, mut peer, _host) = serving(of(agent)).await;
    peer.call(1, "a/k", "error").await;
    let fault = peer.reply(1).await.unwrap_err();
    assert_eq!(fault.kind(), FaultKind::AgentFailed);
    assert_eq!((fault.detail(), fault.may_have_run()), ("the printer is out of paper", true));
    peer.call(2, "a/k", "fault").await;
    assert_eq!(peer.reply(2).await.unwrap_err().kind(), FaultKind::Conflict);
    peer.call(3, "a/k", "money").await;
    let fault = peer.reply(3).await.unwrap_err();
    assert_eq!(fault.kind(), FaultKind::AgentFailed);
    assert_eq!(fault.detail(), "the agent panicked: cannot print money");
}

#[tokio::test(start_paused = true)]
async fn a_handler_of_json_speaks_json_and_says_what_it_cannot_read() {
    let sum = async |Json(numbers): Json<Vec<i64>>| Json(numbers.iter().sum::<i64>());
    let (_running, mut peer, _host) = serving(of(sum)).await;
    peer.call(1, "a/k", "[1, 2]").await;
    let reply = peer.reply(1).await.unwrap();
    assert_eq!((&*reply.content_type, reply.json::<i64>().unwrap()), ("application/json", 3));
    peer.call(2, "a/k", "[1, \"two\"]").await;
    let fault = peer.reply(2).await.unwrap_err();
    assert_eq!(fault.kind(), FaultKind::Invalid);
    let text = "the payload does not decode as Vec<i64>: invalid type: string \"two\"";
    assert!(fault.detail().starts_with(text), "{}", fault.detail());
}

#[tokio::test(start_paused = true)]
async fn each_key_has_an_agent_of_its_own_that_is_kept() {
    struct Counter {
        key: String,
        count: AtomicU64,
    }
    async fn count(State(counter): State<Counter>, cx: Cx) -> String {
        assert_eq!(cx.agent().key.as_str(), counter.key);
        let count = counter.count.fetch_add(1, Ordering::Relaxed) + 1;
        format!("{} {count}", counter.key)
    }
    let counter = Agent::new(|key| Counter { key: key.to_string(), count: 0.into() });
    let (_running, mut peer, _host) = serving(of(counter.on_call(count))).await;
    for (id, key, expected) in [(1, "a/x", "x 1"), (2, "a/y", "y 1"), (3, "a/x", "x 2")] {
        peer.call(id, key, "").await;
        assert_eq!(peer.reply(id).await.unwrap(), Payload::text(expected));
    }
}

#[tokio::test(start_paused = true)]
async fn events_reach_the_agent_of_their_source_and_failing_at_one_harms_nothing() {
    let (heard, mut news) = mpsc::unbounded_channel();
    let handler = move |cx: Cx, topic: TopicId, text: String| {
        let heard = heard.clone();
        async move {
            assert_ne!(text, "panic");
            assert_eq!((cx.agent().to_string(), cx.deadline()), ("a/paper".to_owned(), None));
            heard.send(format!("{topic} {text}"))
        }
    };
    let worker = of(Agent::stateless().on_event(handler)).subscribe("news.*", "a");
    let (_running, mut peer, _host) = serving(worker).await;
    peer.confirm().await;
    peer.send(&[event(&["a"], &[], "panic"), event(&["a", "gone"], &[], "it works")]).await;
    assert_eq!(news.recv().await.unwrap(), "news.tech/paper it works");
    peer.call(1, "a/k", "").await;
    assert_eq!(peer.reply(1).await.unwrap_err().kind(), FaultKind::Invalid, "takes no calls");
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_call_drops_its_handler_and_is_not_answered() {
    let (agent, mut seen) = endless();
    let (_running, mut peer, _host) = serving(of(agent)).await;
    peer.call(1, "a/k", "").await;
    assert_eq!(seen.recv().await, Some("began"));
    peer.send(&[Frame::Cancel(CallId(1)), Frame::Cancel(CallId(9))]).await;
    assert_eq!(seen.recv().await, Some("dropped"));
    peer.send(&[Frame::Ping(1)]).await;
    assert_eq!(peer.next().await, Frame::Pong(1));
}

#[tokio::test(start_paused = true)]
async fn a_call_that_comes_to_its_deadline_drops_its_handler() {
    let (agent, mut seen) = endless();
    let (_running, mut peer, _host) = serving(of(agent)).await;
    peer.call(1, "a/k", "").await;
    let fault = peer.reply(1).await.unwrap_err();
    assert_eq!((fault.kind(), fault.may_have_run()), (FaultKind::DeadlineExceeded, true));
    assert_eq!((seen.recv().await, seen.recv().await), (Some("began"), Some("dropped")));
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_waited_until_its_callers_deadline_is_late_and_has_not_failed() {
    #[derive(Debug, thiserror::Error)]
    #[error("no paper from the store")]
    struct NoPaper(#[source] Error);

    async fn print(cx: Cx, text: String) -> Result<Payload, AgentError> {
        Ok(match &*text {
            "impatient" => cx.call("store", "").timeout(Duration::from_millis(1)).await?,
            "plain" => cx.call("store", "").await?,
            _ => cx.call("store", "").await.map_err(NoPaper)?,
        })
    }
    let (_running, mut peer, _host) = serving(of(print)).await;
    for (id, text, kind) in [
        (1, "plain", FaultKind::DeadlineExceeded),
        (2, "wrapped", FaultKind::DeadlineExceeded),
        (3, "impatient", FaultKind::AgentFailed),
    ] {
        peer.call(id, "a/k", text).await;
        let asked = peer.next_call().await;
        let late = Fault::new(FaultKind::DeadlineExceeded, "the deadline passed");
        peer.send(&[Frame::Reply(asked.id, Err(late))]).await;
        let fault = peer.reply(id).await.unwrap_err();
        assert_eq!((fault.kind(), fault.may_have_run()), (kind, true), "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn calls_beyond_the_bound_are_answered_overloaded() {
    let (agent, _seen) = endless();
    let (_running, mut peer, _host) = serving(of(agent).max_in_flight(2)).await;
    peer.send(&[call(1, "a/k", ""), call(2, "a/k", ""), call(3, "a/k", "")]).await;
    let fault = peer.reply(3).await.unwrap_err();
    assert_eq!((fault.kind(), fault.may_have_run()), (FaultKind::Overloaded, false));
    peer.call(4, "b/k", "").await;
    assert_eq!(peer.reply(4).await.unwrap_err().kind(), FaultKind::UnknownAgent);
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_is_too_large_is_a_fault_that_names_the_limit() {
    let agent = async || vec![0_u8; MAX_PAYLOAD as usize + 1];
    let (_running, mut peer, _host) = serving(of(agent)).await;
    peer.call(1, "a/k", "").await;
    let fault = peer.reply(1).await.unwrap_err();
    assert_eq!((fault.kind(), fault.may_have_run()), (FaultKind::TooLarge, true));
    assert_eq!(fault.config_key(), Some("limits.payload_bytes"));
    assert_eq!(fault.limit_value(), Some(MAX_PAYLOAD));
}

#[tokio::test(start_paused = true)]
async fn what_a_handler_sends_follows_from_what_it_handles() {
    let agent = async |cx: Cx| {
        assert_eq!((cx.hops(), cx.attempt(), cx.cause()), (3, 1, None));
        assert!(cx.time_left().unwrap() <= Duration::from_secs(10));
        cx.publish("news", "working").await?;
        cx.call("b", "question").timeout(Duration::from_secs(60)).await
    };
    let (_running, mut peer, _host) = serving(of(agent)).await;
    peer.call(1, "a/k", "").await;
    let Frame::Publish(publish) = peer.confirm().await else { panic!("not a publish") };
    let asked = peer.next_call().await;
    for header in [&publish.header, &asked.header] {
        assert_eq!(header.conversation.as_ref().unwrap().as_str(), "c");
        assert_eq!(header.cause.as_ref().unwrap().as_str(), "m1");
        assert_eq!(header.sender.as_ref().unwrap().to_string(), "a/k");
        assert_eq!((header.hops, header.traceparent.as_deref()), (4, Some("00-trace")));
    }
    assert!(asked.timeout.unwrap() <= Duration::from_secs(10), "no longer than its own caller");
    let fault = Fault::new(FaultKind::UnknownAgent, "nobody serves `b`");
    peer.send(&[Frame::Reply(asked.id, Err(fault))]).await;
    let fault = peer.reply(1).await.unwrap_err();
    // The agent itself did run.
    assert_eq!((fault.kind(), fault.detail()), (FaultKind::AgentFailed, "nobody serves `b`"));
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_is_made_anew_and_everything_registered_again() {
    let (agent, mut seen) = endless();
    let worker = of(agent).agent("upper", upper).subscribe("news.*", "a");
    let (_running, mut peer, mut host) = serving(worker).await;
    peer.confirm().await;
    peer.confirm().await;
    peer.call(1, "a/k", "").await;
    assert_eq!(seen.recv().await, Some("began"));
    drop(peer);
    let mut peer = host.accept().await;
    for _ in 0..2 {
        assert!(matches!(peer.confirm().await, Frame::Register(_)));
    }
    assert!(matches!(peer.confirm().await, Frame::Subscribe(_)));
    assert_eq!(seen.recv().await, Some("dropped"));
    peer.call(1, "upper/k", "again").await;
    assert_eq!(peer.reply(1).await.unwrap(), Payload::text("AGAIN"));
}

#[tokio::test(start_paused = true)]
async fn a_registration_refused_at_first_is_an_error_and_later_is_tried_again() {
    let refuse = async |peer: &mut Peer| {
        let Frame::Register(register) = peer.next().await else { panic!("not a registration") };
        let fault = Fault::new(FaultKind::Conflict, "agent type a already registered.");
        peer.send(&[Frame::Reply(register.request, Err(fault))]).await;
    };
    let (running, mut host) = Running::start(of(upper));
    let mut peer = host.accept().await;
    refuse(&mut peer).await;
    assert_eq!(peer.message().await, Err(Some(CloseCode::NORMAL_CLOSURE)));
    let error = running.task.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::Conflict));

    let (_running, peer, mut host) = serving(of(upper)).await;
    drop(peer);
    let mut peer = host.accept().await;
    refuse(&mut peer).await;
    assert_eq!(peer.message().await, Err(Some(CloseCode::NORMAL_CLOSURE)));
    host.accept().await.confirm().await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_lost_before_anything_is_registered_is_an_error() {
    let (running, mut host) = Running::start(of(upper));
    drop(host.accept().await);
    let error = running.task.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionLost);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_drains_is_answered_until_it_goes_and_then_found_again() {
    let (_running, mut peer, mut host) = serving(of(upper)).await;
    peer.send(&[call(1, "a/k", "last"), Frame::Drain]).await;
    assert_eq!(peer.reply(1).await.unwrap(), Payload::text("LAST"));
    drop(peer);
    host.accept().await.confirm().await;
}

#[test]
fn a_worker_that_cannot_be_is_refused_when_it_is_built() {
    let kind = |worker: WorkerBuilder| worker.build().unwrap_err().kind();
    assert_eq!(kind(builder().agent("no name", upper)), ErrorKind::InvalidName);
    let twice = of(upper).agent("a", upper);
    assert_eq!(kind(twice), ErrorKind::Invalid);
    assert_eq!(kind(of(upper).subscribe("news.*", "b")), ErrorKind::Invalid);
    assert_eq!(kind(of(upper).subscribe("a b", "a")), ErrorKind::InvalidName);
    let nowhere = Worker::builder("https://room.test").agent("a", upper);
    assert_eq!(kind(nowhere), ErrorKind::Invalid);
}
