//! When a host has ended, nothing of it goes on.

use parlour_core::CallId;
use parlour_core::TopicFilter;
use parlour_core::wire::{Frame, Hello, RESUME, Subscribe};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use crate::room::Room;

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_answer_the_close_has_no_socket_when_the_host_has_ended() {
    let (stop, stopped) = oneshot::channel::<()>();
    let room = Room::open_until(&[], async { drop(stopped.await) });
    let mut silent = room.channel().await.fall_silent().into_inner();
    silent.write_all(b"").await.unwrap();
    drop(stop);
    room.has_ended().await;
    let written = silent.write_all(b"hello?").await;
    assert!(written.is_err(), "somebody still has the other end");
}

#[tokio::test(start_paused = true)]
async fn a_session_that_stalls_while_it_closes_does_not_wait_for_another_socket() {
    let (stop, stopped) = oneshot::channel::<()>();
    let room = Room::open_until(&[], async { drop(stopped.await) });
    let hello = Hello { versions: vec![1], features: vec![RESUME.into()], ..Hello::default() };
    let (mut listener, _) = room.greeted(hello).await;
    let subscribe = Subscribe {
        request: CallId(1),
        subscription: 1,
        filter: TopicFilter::parse("news").unwrap(),
        agent_type: None,
    };
    listener.send(Frame::Subscribe(subscribe)).await;
    assert!(matches!(listener.next().await, Some(Frame::Done(_))));
    let _unread = listener.fall_silent();
    // More than the way to the client holds, and less than the host keeps waiting for it.
    for _ in 0..12 {
        let answer = room.post("/v1/topics/news/today", "", &"x".repeat(8 * 1024)).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    sleep(Duration::from_millis(9500)).await;
    let since = Instant::now();
    drop(stop);
    room.has_ended().await;
    // Half a second until it has taken no byte for ten, and one in which it could read on.
    assert_eq!(since.elapsed().as_millis(), 1500);
}
