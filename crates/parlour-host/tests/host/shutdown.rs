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
