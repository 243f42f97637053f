use std::sync::Arc;
use std::time::Duration;

use parlour_core::FaultKind;
use parlour_core::wire::Frame;
use tokio::sync::{Notify, mpsc};
use tokio_websockets::CloseCode;

use super::scripted::{Host, Peer, call, event};
use super::worker::{Dropped, Running, builder, endless, of, serving, upper};
use crate::{Agent, AgentError, Cx, Payload};

#[tokio::test(start_paused = true)]
async fn a_shutdown_finishes_what_runs() {
    let proceed = Arc::new(Notify::new());
    let gate = Arc::clone(&proceed);
    let agent = move || {
        let gate = Arc::clone(&gate);
        async move {
            gate.notified().await;
            "done"
        }
    };
    let (running, mut peer, _host) = serving(of(agent)).await;
    peer.call(1, "a/k", "").await;
    running.shutdown.send(()).unwrap();
    assert_eq!(peer.next().await, Frame::Drain);
    let Frame::Ping(number) = peer.next().await else { panic!("not a ping") };
    // A call can come after the first answer: whoever made it had found the worker before the drain.
    peer.send(&[Frame::Pong(number)]).await;
    let Frame::Ping(number) = peer.next().await else { panic!("not a ping") };
    peer.send(&[call(2, "a/k", ""), Frame::Pong(number)]).await;
    proceed.notify_one();
    assert_eq!(peer.reply(1).await.unwrap(), Payload::text("done"));
    proceed.notify_one();
    assert_eq!(peer.reply(2).await.unwrap(), Payload::text("done"));
    assert_eq!(peer.message().await, Err(Some(CloseCode::NORMAL_CLOSURE)));
    running.task.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_is_asked_to_leave_finishes_what_runs_and_ends() {
    let proceed = Arc::new(Notify::new());
    let gate = Arc::clone(&proceed);
    let agent = move |_cx: Cx, _message: Payload| {
        let gate = Arc::clone(&gate);
        async move {
            gate.notified().await;
            Ok::<_, crate::AgentError>("done")
        }
    };
    let (running, mut peer, _host) = serving(of(agent)).await;
    peer.call(1, "a/k", "").await;
    peer.send(&[Frame::Leave, Frame::Leave]).await;
    assert_eq!(peer.next().await, Frame::Drain);
    for _ in 0..2 {
        let Frame::Ping(number) = peer.next().await else { panic!("not a ping") };
        peer.send(&[Frame::Pong(number)]).await;
    }
    proceed.notify_one();
    assert_eq!(peer.reply(1).await.unwrap(), Payload::text("done"));
    assert_eq!(peer.message().await, Err(Some(CloseCode::NORMAL_CLOSURE)));
    running.task.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_waits_no_longer_than_it_may() {
    let (agent, mut seen) = endless();
    let worker = of(agent).drain_timeout(Duration::from_secs(3));
    let (running, mut peer, _host) = serving(worker).await;
    peer.call(1, "a/k", "").await;
    running.shutdown.send(()).unwrap();
    let began = tokio::time::Instant::now();
    assert_eq!(peer.next().await, Frame::Drain);
    assert!(matches!(peer.next().await, Frame::Ping(_)));
    let fault = peer.reply(1).await.unwrap_err();
    assert_eq!((fault.kind(), fault.may_have_run()), (FaultKind::WorkerLost, true));
    assert_eq!(began.elapsed().as_secs(), 3);
    assert_eq!(peer.message().await, Err(Some(CloseCode::NORMAL_CLOSURE)));
    running.task.await.unwrap().unwrap();
    assert_eq!((seen.recv().await, seen.recv().await), (Some("began"), Some("dropped")));
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_without_a_connection_ends_at_once() {
    let (running, peer, host) = serving(of(upper)).await;
    drop((peer, host));
    tokio::time::sleep(Duration::from_secs(60)).await;
    running.shutdown.send(()).unwrap();
    running.task.await.unwrap().unwrap();
}

/// A worker that is handling an event for 5 s, with a connection that is about to go.
async fn handling() -> (Running, Peer, Host, mpsc::UnboundedReceiver<String>) {
    let (says, seen) = mpsc::unbounded_channel();
    let handler = move |cx: Cx| {
        let says = says.clone();
        async move {
            says.send("began".to_owned())?;
            tokio::time::sleep(Duration::from_secs(5)).await;
            let sent = cx.publish("done", "").await;
            says.send(sent.map_or_else(|error| format!("{:?}", error.kind()), |_| "sent".into()))?;
            Ok::<_, AgentError>(())
        }
    };
    let worker = builder()
        .agent("a", Agent::stateless().on_event(handler))
        .subscribe("news.*", "a")
        .drain_timeout(Duration::from_secs(8));
    let (running, mut peer, host) = serving(worker).await;
    peer.confirm().await;
    peer.send(&[event(&["a"], &[], "")]).await;
    (running, peer, host, seen)
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_without_a_connection_waits_for_the_events_that_are_handled() {
    let (running, peer, host, mut seen) = handling().await;
    assert_eq!(seen.recv().await.unwrap(), "began");
    drop((peer, host));
    tokio::time::sleep(Duration::from_secs(1)).await;
    running.shutdown.send(()).unwrap();
    running.task.await.unwrap().unwrap();
    assert_eq!(seen.recv().await.unwrap(), "Closed", "there is no connection to send over");
}

#[tokio::test(start_paused = true)]
async fn a_connection_lost_during_a_shutdown_leaves_events_the_rest_of_their_time() {
    let (running, mut peer, _host, mut seen) = handling().await;
    assert_eq!(seen.recv().await.unwrap(), "began");
    running.shutdown.send(()).unwrap();
    assert_eq!(peer.next().await, Frame::Drain);
    drop(peer);
    running.task.await.unwrap().unwrap();
    assert_eq!(seen.recv().await.unwrap(), "Closed");
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_without_a_connection_waits_no_longer_than_it_may() {
    let (says, mut seen) = mpsc::unbounded_channel();
    let handler = move || {
        let dropped = Dropped(says.clone());
        async move {
            let _dropped = dropped;
            std::future::pending::<()>().await
        }
    };
    let worker = builder()
        .agent("a", Agent::stateless().on_event(handler))
        .subscribe("news.*", "a")
        .drain_timeout(Duration::from_secs(8));
    let (running, mut peer, host) = serving(worker).await;
    peer.confirm().await;
    peer.send(&[event(&["a"], &[], "")]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    drop((peer, host));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let began = tokio::time::Instant::now();
    running.shutdown.send(()).unwrap();
    running.task.await.unwrap().unwrap();
    assert_eq!(began.elapsed().as_secs(), 8);
    assert_eq!(seen.recv().await, Some("dropped"));
}
