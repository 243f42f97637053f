//! What stays true of very long times, and of hosts that are slow to read.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join;
use parlour_core::CallId;
use parlour_core::wire::{CallFrame, Frame, Welcome};
use tokio::sync::oneshot;

use super::scripted::{HEARTBEAT, URL, call, host, welcome};
use crate::{AgentError, Client, Payload, PayloadExt, Worker};

#[tokio::test(start_paused = true)]
async fn a_client_takes_times_too_long_for_the_clock() {
    let (dialer, mut host) = host();
    let connect = Client::builder(URL).default_timeout(Duration::MAX).connect_with(dialer);
    let script = async {
        let (mut peer, ..) = host.accept_hello().await;
        let Frame::Welcome(usual) = welcome() else { unreachable!() };
        let heartbeat = Duration::from_millis(u64::MAX);
        peer.send(&[Frame::from(Welcome { heartbeat, ..*usual })]).await;
        peer
    };
    let (client, mut peer) = join(connect, script).await;
    let client = client.unwrap();
    let (news, _) = join(client.subscribe("news.*"), peer.confirm()).await;
    news.unwrap();
    let calls = join(
        client.call("a", "").into_future(),
        client.call("a", "").timeout(Duration::MAX).into_future(),
    );
    let script = async {
        assert!(matches!(peer.next().await, Frame::Unsubscribe { .. }));
        for _ in 0..2 {
            let id = peer.next_call().await.id;
            tokio::time::sleep(Duration::from_secs(3600)).await;
            peer.send(&[Frame::Reply(id, Ok(Payload::text("late")))]).await;
        }
    };
    let ((first, second), ()) = join(calls, script).await;
    assert_eq!((first.unwrap(), second.unwrap()), (Payload::text("late"), Payload::text("late")));
}

#[tokio::test(start_paused = true)]
async fn a_worker_takes_times_too_long_for_the_clock() {
    let agent = |message: Payload| async move {
        tokio::time::sleep(Duration::from_secs(3)).await;
        message
    };
    let (dialer, mut host) = host();
    let (shutdown, asked) = oneshot::channel();
    let worker = Worker::builder(URL)
        .agent("a", agent)
        .default_timeout(Duration::MAX)
        .drain_timeout(Duration::MAX)
        .build()
        .unwrap();
    let running = tokio::spawn(worker.run_with(dialer, async {
        let _ = asked.await;
    }));
    let mut peer = host.accept().await;
    peer.confirm().await;
    let Frame::Call(usual) = call(1, "a/k", "hi") else { unreachable!() };
    let timeout = Some(Duration::from_millis(u64::MAX));
    let unbounded = CallFrame { id: CallId(2), timeout: None, ..CallFrame::clone(&usual) };
    peer.send(&[Frame::from(CallFrame { timeout, ..*usual }), Frame::from(unbounded)]).await;
    shutdown.send(()).unwrap();
    assert_eq!(peer.next().await, Frame::Drain);
    for _ in 0..2 {
        let Frame::Ping(number) = peer.next().await else { panic!("not a ping") };
        peer.send(&[Frame::Pong(number)]).await;
    }
    assert_eq!(peer.reply(1).await.unwrap(), Payload::text("hi"));
    assert_eq!(peer.reply(2).await.unwrap(), Payload::text("hi"));
    peer.message().await.unwrap_err();
    running.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_host_that_is_not_listened_to_is_not_silent() {
    const CALLS: u64 = 8300;
    // A few large answers fill the stream; those behind them fill what waits to be written.
    let large = Bytes::from(vec![0; 90_000]);
    let agent = move |message: Payload| {
        let large = large.clone();
        async move {
            Ok::<_, AgentError>(match message.to_text()? {
                "large" => Payload { bytes: large, ..Payload::default() },
                _ => message,
            })
        }
    };
    let (dialer, mut host) = host();
    let worker =
        Worker::builder(URL).agent("a", agent).max_in_flight(2 * CALLS as usize).build().unwrap();
    let running = tokio::spawn(worker.run_with(dialer, std::future::pending()));
    let mut peer = host.accept().await;
    peer.confirm().await;
    let text = |id| if id < 20 { "large" } else { "small" };
    let calls: Vec<_> = (0..CALLS).map(|id| call(id + 1, "a/k", text(id))).collect();
    peer.send(&calls).await;
    tokio::time::sleep(HEARTBEAT * 20).await;
    for _ in 0..CALLS {
        assert!(matches!(peer.next().await, Frame::Reply(_, Ok(_))));
    }
    // From then on, its silence counts again.
    let began = tokio::time::Instant::now();
    host.accept().await;
    assert!(began.elapsed() > HEARTBEAT * 2, "{:?}", began.elapsed());
    running.abort();
}
