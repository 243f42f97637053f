//! A session goes on over another connection when one breaks.

use std::time::Duration;

use parlour_core::wire::{DELIVERIES, Frame, RESUME, Welcome};
use parlour_core::{ByteString, CallId, Credit, Payload};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::scripted::{Dialer, HEARTBEAT, Host, MAX_PAYLOAD, Peer, URL, call, host};
use super::worker::{endless, of, upper};
use crate::{Client, Error, Payload as Reply, PayloadExt, WorkerBuilder};

const WIDE: Credit = Credit { messages: 1 << 20, bytes: 1 << 30 };

fn welcome(credit: Credit) -> Welcome {
    Welcome {
        version: 1,
        max_payload: MAX_PAYLOAD,
        heartbeat: HEARTBEAT,
        features: vec![RESUME.into()],
        session: Some(ByteString::from_static("s")),
        grace: Duration::from_secs(5),
        credit,
        ..Welcome::default()
    }
}

/// Takes the next connection, and begins a session.
async fn begin(host: &mut Host, credit: Credit) -> Peer {
    let (mut peer, hello, _) = host.accept_hello().await;
    assert_eq!(hello.features, [RESUME, DELIVERIES]);
    assert_eq!(hello.session, None);
    peer.send(&[Frame::from(welcome(credit))]).await;
    peer
}

/// Takes the next connection, and goes on with the session, of which `received` frames came. Returns
/// how many of the host's the client has received, too.
async fn resume(host: &mut Host, received: u64) -> (Peer, u64) {
    let (mut peer, hello, _) = host.accept_hello().await;
    assert_eq!(hello.session.as_deref(), Some("s"));
    let resumed = Welcome { resumed: true, received, ..welcome(WIDE) };
    peer.send(&[Frame::from(resumed)]).await;
    (peer, hello.received)
}

struct Serving {
    task: JoinHandle<Result<(), Error>>,
    shutdown: oneshot::Sender<()>,
}

/// Starts a worker of one agent type, and begins a session in which that is registered. One frame
/// went each way.
async fn serving(worker: WorkerBuilder) -> (Serving, Peer, Host) {
    let (dialer, mut host) = host();
    let (shutdown, asked) = oneshot::channel();
    let task = tokio::spawn(worker.build().unwrap().run_with(dialer, async {
        let _ = asked.await;
    }));
    let mut peer = begin(&mut host, WIDE).await;
    peer.confirm().await;
    (Serving { task, shutdown }, peer, host)
}

async fn client(dialer: Dialer) -> Client {
    Client::builder(URL).connect_with(dialer).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_is_made_without_a_connection_goes_over_the_next() {
    let slow = |_cx: crate::Cx, message: Reply| async move {
        sleep(Duration::from_millis(1)).await;
        Ok::<_, crate::AgentError>(message.to_text()?.to_uppercase())
    };
    let (_serving, mut peer, mut host) = serving(of(slow)).await;
    peer.call(1, "a/k", "hi").await;
    peer.call(2, "a/k", "ho").await;
    sleep(Duration::from_micros(1)).await;
    drop(peer);
    let (mut peer, received) = resume(&mut host, 1).await;
    assert_eq!(received, 3, "the confirmation and both calls");
    assert_eq!(peer.reply(1).await, Ok(Payload::text("HI")));
    assert_eq!(peer.reply(2).await, Ok(Payload::text("HO")));
    peer.call(3, "a/k", "next").await;
    assert_eq!(peer.reply(3).await, Ok(Payload::text("NEXT")), "nothing was registered again");
}

#[tokio::test(start_paused = true)]
async fn what_the_host_did_not_receive_is_sent_again() {
    let (_serving, mut peer, mut host) = serving(of(upper)).await;
    for (id, text) in [(1, "a"), (2, "b")] {
        peer.call(id, "a/k", text).await;
        peer.reply(id).await.unwrap();
    }
    drop(peer);
    let (mut peer, _) = resume(&mut host, 2).await;
    assert_eq!(peer.reply(2).await, Ok(Payload::text("B")), "but not what it did receive");
    peer.call(3, "a/k", "c").await;
    assert_eq!(peer.reply(3).await, Ok(Payload::text("C")));
}

#[tokio::test(start_paused = true)]
async fn after_the_grace_time_what_runs_is_aborted_and_a_new_session_begins() {
    let (agent, mut seen) = endless();
    let (_serving, mut peer, host) = serving(of(agent)).await;
    peer.call(1, "a/k", "").await;
    assert_eq!(seen.recv().await, Some("began"));
    let broken = tokio::time::Instant::now();
    drop(peer);
    // Nobody answers.
    let (mut host, unanswered) = (host, tokio::time::sleep(Duration::from_secs(6)));
    let mut held = Vec::new();
    tokio::pin!(unanswered);
    loop {
        tokio::select! {
            stream = host.accept_raw() => held.push(stream),
            dropped = seen.recv() => {
                assert_eq!(dropped, Some("dropped"));
                assert_eq!(broken.elapsed().as_secs(), 5);
                break;
            }
            () = &mut unanswered => panic!("it still runs"),
        }
    }
    drop(held);
    let mut peer = begin(&mut host, WIDE).await;
    assert!(matches!(peer.confirm().await, Frame::Register(_)));
}

#[tokio::test(start_paused = true)]
async fn if_the_host_knows_the_session_no_more_what_runs_is_aborted_and_all_is_registered_anew() {
    let (agent, mut seen) = endless();
    let (_serving, mut peer, mut host) = serving(of(agent)).await;
    peer.call(1, "a/k", "").await;
    assert_eq!(seen.recv().await, Some("began"));
    drop(peer);
    let (mut peer, hello, _) = host.accept_hello().await;
    assert!(hello.session.is_some());
    peer.send(&[Frame::from(welcome(WIDE))]).await;
    assert_eq!(seen.recv().await, Some("dropped"));
    assert!(matches!(peer.confirm().await, Frame::Register(_)));
}

#[tokio::test(start_paused = true)]
async fn a_host_that_says_goodbye_has_ended_the_session() {
    let (_serving, peer, mut host) = serving(of(upper)).await;
    peer.say_goodbye().await;
    begin(&mut host, WIDE).await.confirm().await;
}

#[tokio::test(start_paused = true)]
async fn a_host_that_falls_silent_is_left_without_a_goodbye() {
    let (_serving, mut peer, mut host) = serving(of(upper)).await;
    assert_eq!(peer.message().await, Err(None), "no close frame, which would end the session");
    resume(&mut host, 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_call_outlives_its_connection() {
    let (dialer, mut host) = host();
    let (client, mut peer) = tokio::join!(client(dialer), begin(&mut host, WIDE));
    let calls =
        async { tokio::join!(client.call("a/k", "one").into_future(), client.call("a/k", "two")) };
    let host = async {
        let (one, two) = (peer.next_call().await, peer.next_call().await);
        assert!(!one.resent && !two.resent);
        drop(peer);
        let (mut peer, _) = resume(&mut host, 1).await;
        let again = peer.next_call().await;
        assert_eq!((again.id, again.resent), (two.id, true), "only that which did not come");
        for id in [one.id, two.id] {
            peer.send(&[Frame::Reply(id, Ok(Payload::text(id.0.to_string())))]).await;
        }
        peer
    };
    let ((one, two), _peer) = tokio::join!(calls, host);
    assert_ne!(one.unwrap(), two.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_drains_finishes_over_another_connection() {
    let slow = |_cx: crate::Cx, _message: Reply| async move {
        sleep(Duration::from_secs(3)).await;
        Ok::<_, crate::AgentError>("done")
    };
    let (serving, mut peer, mut host) = serving(of(slow)).await;
    peer.call(1, "a/k", "").await;
    sleep(Duration::from_secs(1)).await;
    serving.shutdown.send(()).unwrap();
    assert_eq!(peer.next().await, Frame::Drain);
    drop(peer);
    let (mut peer, _) = resume(&mut host, 2).await;
    for _ in 0..2 {
        let Frame::Ping(number) = peer.next().await else { panic!("not a ping") };
        peer.send(&[Frame::Pong(number)]).await;
    }
    assert_eq!(peer.reply(1).await, Ok(Payload::text("done")));
    assert!(peer.message().await.is_err());
    serving.task.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_client_sends_no_more_than_it_has_credit_for() {
    let (dialer, mut host) = host();
    let credit = Credit { messages: 2, ..WIDE };
    let (client, mut peer) = tokio::join!(client(dialer), begin(&mut host, credit));
    for _ in 0..3 {
        let client = client.clone();
        tokio::spawn(async move { client.call("a/k", "").await });
    }
    let (one, _) = (peer.next_call().await, peer.next_call().await);
    let reply = Frame::Reply(one.id, Ok(Payload::text("")));
    peer.send(&[reply, Frame::Ping(7)]).await;
    assert_eq!(
        peer.next().await,
        Frame::Pong(7),
        "what belongs to the connection waits for nothing"
    );
    assert_eq!(peer.next().await, Frame::Ack(1));
    peer.send(&[Frame::Ack(1)]).await;
    assert_ne!(peer.next_call().await.id, one.id);
}

#[tokio::test(start_paused = true)]
async fn what_came_is_acknowledged_before_the_host_runs_out_of_credit() {
    let (dialer, mut host) = host();
    let given = 64;
    let worker = of(upper).build().unwrap().run_with(dialer, std::future::pending());
    let _worker = tokio::spawn(worker);
    let mut peer = begin(&mut host, Credit { messages: given, ..WIDE }).await;
    peer.confirm().await;
    let mut acknowledged = 0;
    for id in 0..2 * given {
        // The registration was the first frame.
        peer.send(&[Frame::Ack(id + 1), call(id + 1, "a/k", "")]).await;
        loop {
            match peer.next().await {
                Frame::Ack(received) => acknowledged = received,
                Frame::Reply(CallId(at), _) => {
                    assert_eq!(at, id + 1);
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(id + 1 - acknowledged.min(id + 1) < given, "{id}: {acknowledged}");
    }
    assert!(acknowledged > given);
}

#[tokio::test(start_paused = true)]
async fn a_client_with_much_to_say_and_no_credit_hears_that_there_is_some() {
    const CALLS: u64 = 9000;
    let (dialer, mut host) = host();
    let worker = of(upper).build().unwrap().run_with(dialer, std::future::pending());
    let _worker = tokio::spawn(worker);
    let mut peer = begin(&mut host, Credit { messages: 3, ..WIDE }).await;
    peer.confirm().await;
    let calls: Vec<_> = (1..=CALLS).map(|id| call(id, "a/k", "")).collect();
    peer.send(&calls).await;
    let mut received = 1;
    while received < CALLS {
        match sleep_or(peer.next()).await {
            Frame::Reply(..) => received += 1,
            Frame::Ack(_) => {}
            other => panic!("{other:?}"),
        }
        if received % 3 == 0 {
            peer.send(&[Frame::Ack(received)]).await;
        }
    }
}

async fn sleep_or<T>(next: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), next).await.expect("it says nothing more")
}
