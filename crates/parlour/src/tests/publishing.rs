//! Events that are to be kept, at a real host and at one that the test plays.

use std::time::Duration;

use futures_util::future::join;
use parlour_core::wire::{Done, Frame, PublishFrame, PublishedFrame};
use parlour_core::{CallId, FaultKind, MessageId};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::room::Room;
use super::scripted::{Peer, URL, host};
use super::sending::{begin, connected, go_away};
use crate::{Ack, Agent, AgentError, Client, Cx, ErrorKind, TopicId, Worker};

type Heard = mpsc::UnboundedReceiver<(String, Option<u32>)>;

/// A room whose agents of the type `a` hear of `paid` and fail in their first attempt, a client in it,
/// and what they hear: with the attempt, if the event is durable.
async fn hearing() -> (Room, Client, Heard) {
    let (says, heard) = mpsc::unbounded_channel();
    let agent = Agent::stateless().on_event(move |cx: Cx, topic: TopicId, text: String| {
        let attempt = cx.delivery().map(|_| cx.attempt());
        says.send((format!("{topic} {text} {} {}", cx.conversation(), cx.hops()), attempt))
            .unwrap();
        async move { if cx.attempt() == 1 { Err(AgentError::from("not yet")) } else { Ok(()) } }
    });
    let room = Room::open();
    room.serve(Worker::builder(URL).agent("a", agent).subscribe("paid", "a")).await;
    let client = room.client().await;
    (room, client, heard)
}

#[tokio::test(start_paused = true)]
async fn an_event_is_accepted_and_tried_until_its_agent_has_handled_it() {
    let (_room, client, mut heard) = hearing().await;
    let event = client.publish("paid/k", "7").conversation("talk").durable().await.unwrap();
    assert_eq!((event.ack, event.recipients, event.is_new), (Ack::Memory, 1, true));
    assert_eq!(event.conversation.as_str(), "talk");
    for attempt in [1, 2] {
        let expected = ("paid/k 7 talk 0".to_owned(), Some(attempt));
        assert_eq!(heard.recv().await, Some(expected));
    }
    // The control: one that is not kept is handled once, well or not.
    let gone = client.publish("paid/k", "8").conversation("talk").await.unwrap();
    assert_eq!(gone.recipients, 1);
    assert_eq!(heard.recv().await, Some(("paid/k 8 talk 0".to_owned(), None)));
    sleep(Duration::from_secs(3600)).await;
    assert!(heard.try_recv().is_err());
    assert_eq!(client.publish("unheard/k", "").durable().await.unwrap().recipients, 0);
}

#[tokio::test(start_paused = true)]
async fn one_key_is_one_event_and_another_event_under_it_is_a_conflict() {
    let (_room, client, _heard) = hearing().await;
    let publish =
        |text: &'static str| client.publish("paid/k", text).idempotency_key("7").durable();
    let (first, again) = (publish("x").await.unwrap(), publish("x").await.unwrap());
    assert_eq!((&first.id, first.is_new, again.is_new), (&again.id, true, false));
    let error = publish("y").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::Conflict));
    // The control: without a key each is one of its own.
    let other = async || client.publish("paid/k", "x").durable().await.unwrap().id;
    assert_ne!(other().await, other().await);
}

#[tokio::test(start_paused = true)]
async fn a_handler_publishes_as_part_of_its_conversation() {
    let (room, client, mut heard) = hearing().await;
    let front = Agent::stateless().on_call(async |cx: Cx| -> Result<String, AgentError> {
        let key = format!("after {}", cx.message_id());
        let event = cx.publish("paid/till", "9").durable().idempotency_key(key).await?;
        Ok(format!("{} {:?} {}", event.conversation, event.ack, event.recipients))
    });
    room.serve(Worker::builder(URL).agent("front", front)).await;
    let reply = client.call("front/k", "").conversation("talk").await.unwrap();
    assert_eq!(reply.bytes, "talk Memory 1");
    assert_eq!(heard.recv().await, Some(("paid/till 9 talk 1".to_owned(), Some(1))));
}

// At a host that the test plays

async fn next_publish(peer: &mut Peer) -> (CallId, PublishFrame) {
    match peer.next().await {
        Frame::Publish(publish) => (publish.request.unwrap(), *publish),
        other => panic!("not a publish: {other:?}"),
    }
}

async fn accept(peer: &mut Peer, request: CallId, known: bool) {
    let id = |text| MessageId::parse(text).unwrap();
    let (id, conversation, ack) = (id("m"), id("c"), "durable".into());
    let published = PublishedFrame { request, id, conversation, ack, recipients: 3, known };
    peer.send(&[published.into()]).await;
}

#[tokio::test(start_paused = true)]
async fn what_was_lost_with_its_acknowledgement_is_published_again_under_one_key() {
    let (client, mut peer, mut host) = connected().await;
    let script = async {
        let (_, first) = next_publish(&mut peer).await;
        assert_eq!(first.ack.as_deref(), Some("durable"));
        let key = first.header.idempotency_key.clone().expect("one of the client's own");
        assert_eq!(key.len(), 32);
        drop(peer);
        let mut peer = begin(&mut host).await;
        let (again, second) = next_publish(&mut peer).await;
        assert_eq!(PublishFrame { request: first.request, ..second.clone() }, first);
        // The next host takes it.
        go_away(&mut peer, again).await;
        let (third, publish) = next_publish(&mut peer).await;
        assert_eq!(publish.header.idempotency_key, Some(key));
        accept(&mut peer, third, true).await;
        peer
    };
    let event = client.publish("paid/k", "hello").durable().into_future();
    let (event, _peer) = join(event, script).await;
    let event = event.unwrap();
    assert_eq!((event.id.as_str(), event.conversation.as_str()), ("m", "c"));
    assert_eq!((event.ack, event.recipients, event.is_new), (Ack::Durable, 3, false));

    // The control: one that is not kept is not published again.
    let (client, mut peer, _host) = connected().await;
    let script = async {
        let (_, publish) = next_publish(&mut peer).await;
        assert_eq!((publish.ack, publish.header.idempotency_key), (None, None));
        drop(peer);
    };
    let (published, ()) = join(client.publish("paid/k", "").into_future(), script).await;
    assert_eq!(published.unwrap_err().kind(), ErrorKind::ConnectionLost);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_does_not_keep_events_is_not_asked_and_one_that_did_not_is_not_believed() {
    let (client, mut peer, _host) = connected().await;
    let script = async {
        let (request, _) = next_publish(&mut peer).await;
        let done = Done { request, recipients: 1, dropped: Vec::new() };
        peer.send(&[Frame::Done(done)]).await;
    };
    let (event, ()) = join(client.publish("paid/k", "").durable().into_future(), script).await;
    assert_eq!(event.unwrap_err().kind(), ErrorKind::Protocol);

    let (dialer, mut host) = host();
    let (client, mut peer) = join(Client::builder(URL).connect_with(dialer), host.accept()).await;
    let client = client.unwrap();
    let error = client.publish("paid/k", "").durable().await.unwrap_err();
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Fault(FaultKind::Invalid), false));
    assert_eq!(error.to_string(), "this host keeps nothing for later");
    // What follows comes first: nothing of it was sent.
    let (published, frame) =
        join(client.publish("paid/k", "now").into_future(), peer.confirm()).await;
    published.unwrap();
    assert!(matches!(frame, Frame::Publish(publish) if publish.ack.is_none()));
}
