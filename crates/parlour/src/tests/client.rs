use std::time::Duration;

use futures_util::future::join;
use http::header;
use parlour_core::wire::{Done, Frame};
use parlour_core::{CallId, Fault, FaultKind, Payload};
use tokio_websockets::CloseCode;

use super::scripted::{Dialer, HEARTBEAT, Host, MAX_PAYLOAD, Peer, URL, host, welcome};
use crate::{Client, Error, ErrorKind, FaultKind as Kind, Json, PayloadExt};

pub(super) async fn connected() -> (Client, Peer, Host) {
    let (dialer, mut host) = host();
    let (client, peer) = join(connect(dialer), host.accept()).await;
    (client.unwrap(), peer, host)
}

async fn connect(dialer: Dialer) -> Result<Client, Error> {
    Client::builder(URL).connect_with(dialer).await
}

pub(super) fn text(text: &str) -> Payload {
    Payload::text(text)
}

#[tokio::test(start_paused = true)]
async fn each_call_gets_its_own_reply() {
    let (client, mut peer, _host) = connected().await;
    let calls =
        join(client.call("upper", "a").into_future(), client.call("upper/2", "b").into_future());
    let script = async {
        let (first, second) = (peer.next_call().await, peer.next_call().await);
        assert_eq!(first.target.to_string(), "upper/default");
        assert_eq!(second.target.to_string(), "upper/2");
        assert_eq!(first.timeout, Some(Duration::from_secs(30)), "the default");
        let replies = [(second.id, "B"), (first.id, "A")];
        // Both, and something nobody waits for, in one message.
        let stray = Frame::Reply(CallId(999), Ok(text("?")));
        let replies = replies.map(|(id, reply)| Frame::Reply(id, Ok(text(reply))));
        peer.send(&[stray, replies[0].clone(), Frame::Ping(5), replies[1].clone()]).await;
        assert_eq!(peer.next().await, Frame::Pong(5));
    };
    let ((a, b), ()) = join(calls, script).await;
    assert_eq!((a.unwrap(), b.unwrap()), (text("A"), text("B")));
}

#[tokio::test(start_paused = true)]
async fn what_a_call_says_about_itself_arrives() {
    let (client, mut peer, _host) = connected().await;
    let call = client
        .call("sum", Json([1, 2]))
        .timeout(Duration::from_secs(5))
        .conversation("c1")
        .cause("m1")
        .hops(2)
        .sender("me/1")
        .metadata("tone", "kind")
        .data_type("Numbers")
        .traceparent("00-x");
    let script = async {
        let call = peer.next_call().await;
        assert_eq!(call.timeout, Some(Duration::from_secs(5)));
        let header = &call.header;
        assert_eq!(header.conversation.as_ref().unwrap().as_str(), "c1");
        assert_eq!(header.cause.as_ref().unwrap().as_str(), "m1");
        assert_eq!(header.sender.as_ref().unwrap().to_string(), "me/1");
        assert_eq!((header.hops, header.traceparent.as_deref()), (2, Some("00-x")));
        assert_eq!(call.payload.metadata.get("Tone"), Some("kind"));
        assert_eq!(&*call.payload.data_type, "Numbers");
        assert_eq!(&*call.payload.content_type, "application/json");
        peer.send(&[Frame::Reply(call.id, Ok(text("3")))]).await;
    };
    let (sum, ()) = join(call.json::<u8>().into_future(), script).await;
    assert_eq!(sum.unwrap(), 3);
}

#[tokio::test(start_paused = true)]
async fn wrong_arguments_are_said_before_anything_is_sent() {
    let (client, _peer, _host) = connected().await;
    let kind = |result: Result<Payload, Error>| result.unwrap_err().kind();
    assert_eq!(kind(client.call("no name", "").await), ErrorKind::InvalidName);
    assert_eq!(kind(client.call("a", "").sender("?/").await), ErrorKind::InvalidName);
    assert_eq!(kind(client.call("a", "").metadata("a b", "").await), ErrorKind::Invalid);
    let error = client.publish("a b", "").await.unwrap_err();
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::InvalidName, false));
}

#[tokio::test(start_paused = true)]
async fn a_text_that_no_frame_can_carry_is_not_sent() {
    let (client, mut peer, _host) = connected().await;
    let long = "x".repeat(2048);
    let kind = |result: Result<Payload, Error>| result.unwrap_err().kind();
    assert_eq!(kind(client.call("a", "").traceparent(&*long).await), ErrorKind::Invalid);
    assert_eq!(kind(client.call("a", "").idempotency_key(&*long).await), ErrorKind::Invalid);
    let error = client.publish("a", "").idempotency_key(&*long).await.unwrap_err();
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Invalid, false));
    let invalid = ErrorKind::Fault(Kind::Invalid);
    assert_eq!(kind(client.call("a", "").data_type(&*long).await), invalid);
    let error = client.publish("a", "").content_type(&*long).await.unwrap_err();
    assert_eq!((error.kind(), error.may_have_run()), (invalid, false));

    let call = client.call("a", "").idempotency_key(&long[..1024]).data_type(&long[..1024]);
    let script = async {
        let call = peer.next_call().await;
        peer.send(&[Frame::Reply(call.id, Ok(text("A")))]).await;
    };
    assert_eq!(join(call.into_future(), script).await.0.unwrap(), text("A"));
}

#[tokio::test(start_paused = true)]
async fn a_call_ends_at_its_deadline_and_the_host_is_told() {
    let (client, mut peer, _host) = connected().await;
    let call = client.call("slow", "").timeout(Duration::from_secs(2)).into_future();
    let script = async {
        let call = peer.next_call().await;
        assert_eq!(peer.next().await, Frame::Cancel(call.id));
    };
    let began = tokio::time::Instant::now();
    let (reply, ()) = join(call, script).await;
    let error = reply.unwrap_err();
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Timeout, true));
    let took = began.elapsed();
    assert!((2000..2050).contains(&took.as_millis()), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn dropping_a_call_cancels_it_at_the_host() {
    let (client, mut peer, _host) = connected().await;
    let call = tokio::spawn(client.call("slow", "").into_future());
    let id = peer.next_call().await.id;
    call.abort();
    assert_eq!(peer.next().await, Frame::Cancel(id));
}

#[tokio::test(start_paused = true)]
async fn many_small_requests_share_a_message() {
    let (client, mut peer, _host) = connected().await;
    let calls: Vec<_> =
        (0..20).map(|_| tokio::spawn(client.call("upper", "a").into_future())).collect();
    let frames = peer.message().await.unwrap();
    assert_eq!(frames.len(), 20);
    let replies: Vec<_> = frames
        .iter()
        .map(|frame| match frame {
            Frame::Call(call) => Frame::Reply(call.id, Ok(text("A"))),
            other => panic!("not a call: {other:?}"),
        })
        .collect();
    peer.send(&replies).await;
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap(), text("A"));
    }
}

#[tokio::test(start_paused = true)]
async fn of_many_requests_at_once_none_is_lost() {
    let (client, mut peer, _host) = connected().await;
    let calls: Vec<_> =
        (0..3000).map(|_| tokio::spawn(client.call("upper", "a").into_future())).collect();
    let script = async {
        for _ in 0..3000 {
            let id = peer.next_call().await.id;
            peer.send(&[Frame::Reply(id, Ok(text("A")))]).await;
        }
    };
    let replies = async {
        for call in calls {
            assert_eq!(call.await.unwrap().unwrap(), text("A"));
        }
    };
    join(replies, script).await;
}

#[tokio::test(start_paused = true)]
async fn large_requests_do_not_share_one() {
    let (client, mut peer, _host) = connected().await;
    for _ in 0..3 {
        tokio::spawn(client.call("upper", vec![0_u8; 40_000]).into_future());
    }
    for _ in 0..3 {
        assert_eq!(peer.message().await.unwrap().len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_fails_what_was_sent_and_is_made_anew_for_what_was_not() {
    let (client, mut peer, mut host) = connected().await;
    let sent = tokio::spawn(client.call("upper", "a").into_future());
    peer.next_call().await;
    drop(peer);
    let error = sent.await.unwrap().unwrap_err();
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::ConnectionLost, true));
    assert!(error.is_retryable());

    let waits = tokio::spawn(client.call("upper", "b").into_future());
    let mut peer = host.accept().await;
    let call = peer.next_call().await;
    assert!(call.timeout.unwrap() > Duration::from_secs(29), "what is left of it");
    peer.send(&[Frame::Reply(call.id, Ok(text("B")))]).await;
    assert_eq!(waits.await.unwrap().unwrap(), text("B"));
}

#[tokio::test(start_paused = true)]
async fn without_a_connection_a_call_still_ends_in_time_and_cannot_have_run() {
    let (client, peer, host) = connected().await;
    drop((peer, host));
    // The first may be written before the loss is noticed.
    let _ = client.call("upper", "a").timeout(Duration::from_millis(1)).await;
    let error = client.call("upper", "a").timeout(Duration::from_secs(20)).await.unwrap_err();
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Timeout, false));
}

#[tokio::test(start_paused = true)]
async fn calls_given_up_without_a_connection_leave_no_trace() {
    let (client, peer, mut host) = connected().await;
    drop(peer);
    // The first may be written before the loss is noticed.
    let _ = client.call("upper", "a").timeout(Duration::from_millis(1)).await;
    for _ in 0..5000 {
        let call = client.call("upper", "a").timeout(Duration::from_millis(1));
        assert_eq!(call.await.unwrap_err().kind(), ErrorKind::Timeout);
    }
    let call = tokio::spawn(client.call("upper", "b").into_future());
    let mut peer = host.accept().await;
    assert_eq!(peer.next_call().await.payload, text("b"));
    call.abort();
}

#[tokio::test(start_paused = true)]
async fn a_fault_arrives_whole() {
    let (client, mut peer, _host) = connected().await;
    let fault = Fault::new(FaultKind::UnknownAgent, "nobody serves `x`").hint("start a worker");
    let script = async {
        let call = peer.next_call().await;
        peer.send(&[Frame::Reply(call.id, Err(fault.clone()))]).await;
    };
    let (reply, ()) = join(client.call("x", "").into_future(), script).await;
    let error = reply.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fault(Kind::UnknownAgent));
    assert_eq!((error.hint(), error.fault()), (Some("start a worker"), Some(&fault)));
    assert!(error.is_retryable() && !error.may_have_run());
}

#[tokio::test(start_paused = true)]
async fn what_is_larger_than_the_host_takes_is_not_sent() {
    let (client, _peer, _host) = connected().await;
    let large = vec![0; MAX_PAYLOAD as usize + 1];
    let error = client.call("upper", large).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fault(Kind::TooLarge));
    assert!(!error.may_have_run());
    assert_eq!(error.fault().unwrap().limit_value(), Some(MAX_PAYLOAD));
}

#[tokio::test(start_paused = true)]
async fn a_publish_says_who_got_it() {
    let (client, mut peer, _host) = connected().await;
    let script = async {
        let Frame::Publish(publish) = peer.next().await else { panic!("not a publish") };
        assert_eq!(publish.topic.to_string(), "news/paper");
        let request = publish.request.unwrap();
        let dropped = vec!["slow/paper".into()];
        peer.send(&[Frame::Done(Done { request, recipients: 2, dropped })]).await;
    };
    let (published, ()) =
        join(client.publish("news/paper", "it works").into_future(), script).await;
    let published = published.unwrap();
    assert_eq!((published.recipients, published.dropped), (2, vec!["slow/paper".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn the_first_connection_fails_fast_and_says_what_to_do() {
    let (dialer, host) = host();
    drop(host);
    let error = connect(dialer).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connect);
    assert_eq!(error.to_string(), format!("cannot connect to {URL}"));
    assert!(error.hint().unwrap().contains("parlour serve"));

    let error = Client::connect("https://room.test").await.unwrap_err();
    assert!(error.to_string().contains("TLS"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_never_answers_is_given_up() {
    let (dialer, mut host) = host();
    let (client, stream) = join(connect(dialer), host.accept_raw()).await;
    assert_eq!(client.unwrap_err().kind(), ErrorKind::Connect);
    drop(stream);
}

#[tokio::test(start_paused = true)]
async fn a_refused_handshake_is_explained() {
    use tokio::io::AsyncWriteExt;

    for (status, kind, hint) in [
        ("401 Unauthorized", ErrorKind::Fault(Kind::Unauthenticated), "the token"),
        ("403 Forbidden", ErrorKind::Fault(Kind::Forbidden), "server.allowed_hosts"),
        ("404 Not Found", ErrorKind::Connect, "parlour serve"),
        ("503 Service Unavailable", ErrorKind::Connect, "later"),
    ] {
        let (dialer, mut host) = host();
        let script = async {
            let mut stream = host.accept_raw().await;
            stream.write_all(format!("HTTP/1.1 {status}\r\n\r\n").as_bytes()).await.unwrap();
            stream
        };
        let (client, _stream) = join(connect(dialer), script).await;
        let error = client.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.hint().unwrap().contains(hint), "{error:?}");
    }

    let (dialer, mut host) = host();
    let script = async {
        let (mut peer, hello, request) = host.accept_hello().await;
        assert_eq!((hello.versions, &*hello.name), (vec![1], "client"));
        assert_eq!(request.headers().get(header::AUTHORIZATION), None);
        let fault = Fault::new(FaultKind::Invalid, "this host speaks version 9");
        peer.send(&[Frame::Reply(CallId(0), Err(fault))]).await;
    };
    let (client, ()) = join(connect(dialer), script).await;
    assert_eq!(client.unwrap_err().to_string(), "this host speaks version 9");
}

#[tokio::test(start_paused = true)]
async fn a_token_is_shown_at_the_door() {
    let (dialer, mut host) = host();
    let script = async {
        let (mut peer, hello, request) = host.accept_hello().await;
        assert_eq!(request.headers()[header::AUTHORIZATION], "Bearer secret");
        assert_eq!(request.uri().path(), "/open_channel");
        assert_eq!(&*hello.name, "tester");
        peer.send(&[welcome()]).await;
        peer
    };
    let client = Client::builder(URL).token("secret").name("tester").connect_with(dialer);
    let (client, _peer) = join(client, script).await;
    client.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_host_that_falls_silent_is_left_for_another_connection() {
    let (client, mut peer, mut host) = connected().await;
    let began = tokio::time::Instant::now();
    peer.send(&[Frame::Ping(1)]).await;
    let call = tokio::spawn(client.call("x", "").timeout(Duration::from_secs(300)).into_future());
    let mut again = host.accept().await;
    assert!(began.elapsed() > HEARTBEAT * 2);
    assert_eq!(call.await.unwrap().unwrap_err().kind(), ErrorKind::ConnectionLost);
    let call = tokio::spawn(client.call("x", "").into_future());
    again.next_call().await;
    call.abort();
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_read_ends_the_connection_and_not_the_client() {
    let (client, mut peer, mut host) = connected().await;
    // A client's frame.
    peer.send(&[Frame::Unsubscribe { request: CallId(1), subscription: 1 }]).await;
    assert_eq!(peer.message().await, Err(Some(CloseCode::PROTOCOL_ERROR)));
    let mut peer = host.accept().await;
    let call = tokio::spawn(client.call("x", "").into_future());
    peer.next_call().await;
    call.abort();
}

#[tokio::test(start_paused = true)]
async fn closing_says_goodbye_and_ends_what_waits() {
    let (client, mut peer, _host) = connected().await;
    let waits = tokio::spawn(client.call("x", "").into_future());
    peer.next_call().await;
    let ((), goodbye) = join(client.close(), peer.message()).await;
    assert_eq!(goodbye, Err(Some(CloseCode::NORMAL_CLOSURE)));
    let error = waits.await.unwrap().unwrap_err();
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Closed, true));
    let error = client.call("x", "").await.unwrap_err();
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Closed, false));
}

#[tokio::test(start_paused = true)]
async fn the_connection_ends_with_the_last_clone() {
    let (client, mut peer, _host) = connected().await;
    let other = client.clone();
    drop(client);
    let call = tokio::spawn(other.call("x", "").into_future());
    peer.next_call().await;
    call.abort();
    peer.next().await;
    drop(other);
    assert_eq!(peer.message().await, Err(Some(CloseCode::NORMAL_CLOSURE)));
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_the_wrong_kind_is_a_protocol_error() {
    let (client, mut peer, _host) = connected().await;
    let script = async {
        let request = peer.next_call().await.id;
        peer.send(&[Frame::Done(Done { request, recipients: 0, dropped: vec![] })]).await;
    };
    let (reply, ()) = join(client.call("x", "").into_future(), script).await;
    assert_eq!(reply.unwrap_err().kind(), ErrorKind::Protocol);
    assert!(text("x").to_text().is_ok());
}
