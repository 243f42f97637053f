//! What is heard of a call before it ends.

use parlour_core::wire::{CallFrame, Frame};
use parlour_core::{CallId, FaultKind, Payload};

use super::scripted::{URL, call, host};
use super::worker::{of, serving};
use crate::{AgentError, Client, Cx, ErrorKind, PayloadExt};

fn asking(id: u64) -> Frame {
    match call(id, "a/k", "") {
        Frame::Call(call) => Frame::from(CallFrame { progress: true, ..*call }),
        other => other,
    }
}

#[tokio::test(start_paused = true)]
async fn a_handler_is_heard_before_its_reply_by_those_who_asked() {
    let agent = async |cx: Cx| {
        for number in 0..50 {
            cx.progress(number.to_string()).await?;
        }
        Ok::<_, AgentError>(if cx.wants_progress() { "asked" } else { "not asked" })
    };
    let (_running, mut peer, _host) = serving(of(agent)).await;
    peer.send(&[asking(1)]).await;
    for number in 0..50 {
        let text = Payload::text(number.to_string());
        assert_eq!(peer.next().await, Frame::Progress(CallId(1), text));
    }
    assert_eq!(peer.reply(1).await, Ok(Payload::text("asked")));
    peer.call(2, "a/k", "").await;
    assert_eq!(peer.reply(2).await, Ok(Payload::text("not asked")));
}

async fn client() -> (Client, super::scripted::Peer, super::scripted::Host) {
    let (dialer, mut host) = host();
    let (client, peer) = tokio::join!(Client::builder(URL).connect_with(dialer), host.accept());
    (client.unwrap(), peer, host)
}

#[tokio::test(start_paused = true)]
async fn a_caller_reads_updates_and_then_the_reply() {
    let (client, mut peer, _host) = client().await;
    let mut call = client.call("a/k", "").with_progress();
    let host = async {
        let call = peer.next_call().await;
        assert!(call.progress);
        let update = |text| Frame::Progress(call.id, Payload::text(text));
        peer.send(&[update("one"), update("two")]).await;
        peer.send(&[update("three"), Frame::Reply(call.id, Ok(Payload::text("end")))]).await;
    };
    let caller = async {
        let mut heard = Vec::new();
        while let Some(update) = call.next().await {
            heard.push(update.to_text().unwrap().to_owned());
        }
        (heard, call.reply().await.unwrap())
    };
    let ((heard, reply), ()) = tokio::join!(caller, host);
    assert_eq!(
        (&heard[..], reply),
        (&["one", "two", "three"].map(String::from)[..], Payload::text("end"))
    );

    let plain = client.call("a/k", "");
    let host = async {
        let call = peer.next_call().await;
        assert!(!call.progress);
        let update = Frame::Progress(call.id, Payload::text("unasked"));
        peer.send(&[update, Frame::Reply(call.id, Ok(Payload::text("end")))]).await;
    };
    assert_eq!(tokio::join!(plain.into_future(), host).0.unwrap(), Payload::text("end"));
}

#[tokio::test(start_paused = true)]
async fn updates_that_nobody_reads_end_the_call() {
    let (client, mut peer, _host) = client().await;
    let mut call = client.call("a/k", "").with_progress();
    let host = async {
        let call = peer.next_call().await;
        let update = Frame::Progress(call.id, Payload::text("more"));
        peer.send(&vec![update; 300]).await;
        assert_eq!(peer.next().await, Frame::Cancel(call.id));
    };
    // Polled once, so that it begins, and then not until it has failed.
    let first = futures_util::FutureExt::now_or_never(call.next());
    assert_eq!(first, None);
    host.await;
    let error = call.reply().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::Overloaded));
    assert!(error.may_have_run());
}

#[tokio::test(start_paused = true)]
async fn to_drop_it_is_to_give_the_call_up() {
    let (client, mut peer, _host) = client().await;
    let mut call = client.call("a/k", "").with_progress();
    assert_eq!(futures_util::FutureExt::now_or_never(call.next()), None);
    let id = peer.next_call().await.id;
    drop(call);
    assert_eq!(peer.next().await, Frame::Cancel(id));
}
