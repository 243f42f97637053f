use std::time::Duration;

use futures_util::future::join;
use parlour_core::wire::Frame;
use parlour_core::{Fault, FaultKind};

use super::client::{connected, text};
use super::scripted::{Host, Peer, event};
use crate::{Client, ErrorKind, FaultKind as Kind, Subscription};

#[tokio::test(start_paused = true)]
async fn a_subscription_gets_events_across_connections_until_it_is_dropped() {
    let (client, mut peer, mut host) = connected().await;
    let (news, frame) = join(client.subscribe("news.*"), peer.confirm()).await;
    let mut news = news.unwrap();
    let Frame::Subscribe(subscribe) = frame else { panic!("not a subscription") };
    peer.send(&[event(&[], &[subscribe.subscription, 998], "one")]).await;
    let event_one = news.next().await.unwrap();
    assert_eq!(
        (event_one.payload, event_one.topic.to_string()),
        (text("one"), "news.tech/paper".into())
    );
    drop(peer);

    let mut peer = host.accept().await;
    let Frame::Subscribe(again) = peer.confirm().await else { panic!("not a subscription") };
    assert_eq!((again.subscription, &again.filter), (subscribe.subscription, &subscribe.filter));
    peer.send(&[event(&[], &[again.subscription], "two")]).await;
    assert_eq!(news.next().await.unwrap().payload, text("two"));

    drop(news);
    match peer.next().await {
        Frame::Unsubscribe { subscription, .. } => assert_eq!(subscription, again.subscription),
        other => panic!("not an unsubscription: {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_subscription_that_is_not_read_counts_what_it_misses() {
    let (client, mut peer, _host) = connected().await;
    let (news, frame) = join(client.subscribe("news.tech"), peer.confirm()).await;
    let mut news = news.unwrap();
    let Frame::Subscribe(subscribe) = frame else { panic!("not a subscription") };
    let events = vec![event(&[], &[subscribe.subscription], "x"); 1030];
    peer.send(&events).await;
    peer.send(&[Frame::Ping(1)]).await;
    assert_eq!(peer.next().await, Frame::Pong(1));
    assert_eq!(news.missed(), 6);
    assert_eq!(news.next().await.unwrap().payload, text("x"));
}

#[tokio::test(start_paused = true)]
async fn a_refused_subscription_is_an_error() {
    let (client, mut peer, _host) = connected().await;
    assert_eq!(client.subscribe("a b").await.unwrap_err().kind(), ErrorKind::InvalidName);
    let script = async {
        let Frame::Subscribe(subscribe) = peer.next().await else { panic!("not a subscription") };
        let fault = Fault::new(FaultKind::Overloaded, "too many");
        peer.send(&[Frame::Reply(subscribe.request, Err(fault))]).await;
    };
    let (news, ()) = join(client.subscribe("news.*"), script).await;
    assert_eq!(news.unwrap_err().kind(), ErrorKind::Fault(Kind::Overloaded));
}

/// A subscription whose connection was lost, and the one after it.
async fn resubscribing() -> (Client, Subscription, Peer, Host) {
    let (client, mut peer, mut host) = connected().await;
    let (news, _) = join(client.subscribe("news.*"), peer.confirm()).await;
    drop(peer);
    let peer = host.accept().await;
    (client, news.unwrap(), peer, host)
}

#[tokio::test(start_paused = true)]
async fn a_subscription_that_cannot_be_made_anew_yet_is_tried_again() {
    let (client, mut news, mut peer, _host) = resubscribing().await;
    let mut again = async || {
        loop {
            match peer.next().await {
                Frame::Subscribe(subscribe) => break subscribe,
                Frame::Unsubscribe { .. } => {}
                other => panic!("not a subscription: {other:?}"),
            }
        }
    };
    // Not answered in time, and then refused for now.
    let unanswered = again().await;
    let refused = again().await;
    assert_eq!(unanswered.subscription, refused.subscription);
    let fault = Fault::new(FaultKind::Overloaded, "too many");
    peer.send(&[Frame::Reply(refused.request, Err(fault))]).await;
    // One of which only the answer was late is ended first, or its number would be taken.
    assert!(matches!(
        peer.next().await,
        Frame::Unsubscribe { subscription, .. } if subscription == refused.subscription
    ));
    peer.confirm().await;
    peer.send(&[event(&[], &[refused.subscription], "news")]).await;
    assert_eq!(news.next().await.unwrap().payload, text("news"));
    assert!(news.error().is_none());
    client.close().await;
    assert_eq!(news.next().await, None);
    assert!(news.error().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_subscription_that_is_refused_for_good_ends_and_says_why() {
    let (client, mut news, mut peer, _host) = resubscribing().await;
    let Frame::Subscribe(subscribe) = peer.next().await else { panic!("not a subscription") };
    let fault = Fault::new(FaultKind::Forbidden, "not for you");
    peer.send(&[Frame::Reply(subscribe.request, Err(fault))]).await;
    assert_eq!(news.next().await, None);
    assert_eq!(news.error().unwrap().kind(), ErrorKind::Fault(Kind::Forbidden));
    // The client itself goes on.
    let call = tokio::spawn(client.call("x", "").into_future());
    peer.next_call().await;
    call.abort();
}

#[tokio::test(start_paused = true)]
async fn a_subscription_dropped_before_it_is_tried_again_is_not() {
    let (client, news, mut peer, _host) = resubscribing().await;
    let Frame::Subscribe(subscribe) = peer.next().await else { panic!("not a subscription") };
    let fault = Fault::new(FaultKind::Overloaded, "too many");
    peer.send(&[Frame::Reply(subscribe.request, Err(fault)), Frame::Ping(1)]).await;
    assert_eq!(peer.next().await, Frame::Pong(1));
    drop(news);
    assert!(matches!(peer.next().await, Frame::Unsubscribe { .. }));
    tokio::time::sleep(Duration::from_secs(5)).await;
    let call = tokio::spawn(client.call("x", "").into_future());
    peer.next_call().await;
    call.abort();
}

#[tokio::test(start_paused = true)]
async fn a_subscription_that_is_given_up_before_it_is_confirmed_is_ended() {
    let (client, mut peer, _host) = connected().await;
    let subscribing = tokio::spawn(async move { client.subscribe("news.*").await });
    let Frame::Subscribe(subscribe) = peer.next().await else { panic!("not a subscription") };
    subscribing.abort();
    match peer.next().await {
        Frame::Unsubscribe { subscription, .. } => assert_eq!(subscription, subscribe.subscription),
        other => panic!("not an unsubscription: {other:?}"),
    }
}
