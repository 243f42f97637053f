//! How long a connection may say nothing, or too little, before the host closes it.

use crate::room::{Room, seconds_open};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test(start_paused = true)]
async fn a_connection_that_does_not_begin_is_closed_after_ten_seconds() {
    let room = Room::open(&[]);
    assert_eq!(seconds_open(room.connect()).await, 10, "silent");
    for beginning in ["P", "PRI * HTTP/2.0\r\n\r\nS"] {
        let mut stream = room.connect();
        stream.write_all(beginning.as_bytes()).await.unwrap();
        assert_eq!(seconds_open(stream).await, 10, "{beginning:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn headers_that_do_not_end_are_cut_after_five_seconds() {
    let room = Room::open(&[]);
    let mut stream = room.connect();
    stream.write_all(b"GET /livez HTTP/1.1\r\nhost: localhost\r\nx: ").await.unwrap();
    assert_eq!(seconds_open(stream).await, 5);
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_kept_for_thirty_seconds_and_headers_still_have_five() {
    let room = Room::open(&[]);
    let request = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let mut stream = room.connect();
    for _ in 0..3 {
        stream.write_all(request).await.unwrap();
        let mut answer = [0; 512];
        let n = stream.read(&mut answer).await.unwrap();
        assert!(answer[..n].starts_with(b"HTTP/1.1 200"));
        tokio::time::sleep(std::time::Duration::from_secs(25)).await;
    }
    stream.write_all(b"GET ").await.unwrap();
    assert_eq!(seconds_open(stream).await, 5);
    let mut stream = room.connect();
    stream.write_all(request).await.unwrap();
    assert_eq!(seconds_open(stream).await, 30);
}

#[tokio::test(start_paused = true)]
async fn an_idle_http2_connection_is_closed_too() {
    let room = Room::open(&[]);
    let mut stream = room.connect();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
    let open = seconds_open(stream).await;
    assert!((5..=30).contains(&open), "{open}");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_stalls_is_answered_408() {
    let room = Room::open(&[]);
    let mut stream = room.connect();
    let head =
        b"POST /v1/agents/a/k/call HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\nab";
    stream.write_all(head).await.unwrap();
    let start = tokio::time::Instant::now();
    let mut answer = [0; 1024];
    let n = stream.read(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer[..n]);
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("timeouts.body_stall"), "{answer}");
    assert_eq!(start.elapsed().as_secs(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_channel_without_a_greeting_is_closed_after_ten_seconds() {
    let room = Room::open(&[]);
    let mut stream = room.connect();
    let request = "GET /open_channel HTTP/1.1\r\nhost: localhost\r\nconnection: Upgrade\r\n\
                   upgrade: websocket\r\nsec-websocket-version: 13\r\n\
                   sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                   sec-websocket-protocol: parlour.v1\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let open = seconds_open(stream).await;
    assert!((10..=13).contains(&open), "{open}");
}
