//! A host that is killed again and again under clients that send and wait.

#![allow(clippy::print_stdout, reason = "a person wants to see the figure")]

mod common;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use common::{PATIENCE, Room, until};
use parlour::{Ack, Agent, Client, Cx, DeliveryId, PayloadExt, Worker};
use rustix::process::Signal;

const KILLS: usize = 8;
const SENDERS: usize = 8;

/// Under which names each message came to its agent.
type Seen = Arc<Mutex<HashMap<String, HashSet<DeliveryId>>>>;

/// Kills the host when more is accepted, and starts it anew, [`KILLS`] times.
fn killed_again_and_again(mut room: Room, data: &str, accepted: &AtomicUsize) -> Room {
    let address = room.url.trim_start_matches("http://").to_owned();
    for _ in 0..KILLS {
        let before = accepted.load(Relaxed);
        until("acknowledgements", || accepted.load(Relaxed) > before + 20);
        room.host.signal(Signal::KILL);
        room.host.wait();
        room = Room::kept_at(&address, data);
    }
    room
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_sent_while_the_host_is_killed_is_accepted_once_and_answered() {
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("data");
    let data = data.to_str().unwrap();
    let room = Room::kept_at("127.0.0.1:0", data);

    let seen = Seen::default();
    let notes = Arc::clone(&seen);
    let echo = move |cx: Cx, text: String| {
        let names = cx.delivery();
        notes.lock().unwrap().entry(text.clone()).or_default().extend(names);
        async move { text }
    };
    let worker = Worker::builder(&room.url).agent("echo", echo).start().await.unwrap();
    let client = Client::builder(&room.url).default_timeout(PATIENCE).connect().await.unwrap();

    let (accepted, ends) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let senders: Vec<_> = (0..SENDERS)
        .map(|sender| {
            let (client, accepted, ends) = (client.clone(), accepted.clone(), ends.clone());
            tokio::spawn(async move {
                let mut all = Vec::new();
                while !ends.load(Relaxed) {
                    let text = format!("{sender} {}", all.len());
                    let sent = client.send(format!("echo/{sender}"), &*text).await.unwrap();
                    assert_eq!(sent.ack(), Ack::Durable);
                    accepted.fetch_add(1, Relaxed);
                    all.push((text, sent));
                }
                all
            })
        })
        .collect();
    let _room = killed_again_and_again(room, data, &accepted);
    ends.store(true, Relaxed);

    let mut again = 0;
    for sender in senders {
        for (text, sent) in sender.await.unwrap() {
            let reply = sent.reply().await.unwrap();
            assert_eq!(reply.to_text().unwrap(), text);
            again += usize::from(!sent.is_new());
            assert_eq!(seen.lock().unwrap()[&text], HashSet::from([sent.id()]), "{text}");
        }
    }
    let accepted = accepted.load(Relaxed);
    assert_eq!(seen.lock().unwrap().len(), accepted, "nothing was invented");
    println!(
        "{accepted} accepted over {KILLS} kills, {again} of them after a lost acknowledgement"
    );

    // The control: under two keys it is two deliveries.
    for key in ["one", "two"] {
        let sent = client.send("echo/0", "twice").idempotency_key(key).await.unwrap();
        sent.reply().await.unwrap();
    }
    assert_eq!(seen.lock().unwrap()["twice"].len(), 2);
    worker.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_published_while_the_host_is_killed_is_owed_once_and_delivered() {
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("data");
    let data = data.to_str().unwrap();
    let room = Room::kept_at("127.0.0.1:0", data);
    room.parlour(["subscriptions", "set", "all", "tick.*", "clerk"]).run().with_code(0);

    let client = Client::builder(&room.url).default_timeout(PATIENCE).connect().await.unwrap();
    let (accepted, ends) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let publishers: Vec<_> = (0..SENDERS)
        .map(|publisher| {
            let (client, accepted, ends) = (client.clone(), accepted.clone(), ends.clone());
            tokio::spawn(async move {
                let (mut all, mut again) = (Vec::new(), 0);
                while !ends.load(Relaxed) {
                    let text = format!("{publisher} {}", all.len());
                    let topic = format!("tick.{publisher}/k");
                    let event = client.publish(topic, &*text).durable().await.unwrap();
                    assert_eq!((event.ack, event.recipients), (Ack::Durable, 1));
                    accepted.fetch_add(1, Relaxed);
                    again += usize::from(!event.is_new);
                    all.push(text);
                }
                (all, again)
            })
        })
        .collect();
    let room = killed_again_and_again(room, data, &accepted);
    ends.store(true, Relaxed);
    let (mut published, mut again) = (Vec::new(), 0);
    for publisher in publishers {
        let (texts, known) = publisher.await.unwrap();
        published.extend(texts);
        again += known;
    }

    // Nobody was there to hear of any of them.
    let seen = Seen::default();
    let notes = Arc::clone(&seen);
    let clerk = Agent::stateless().on_event(move |cx: Cx, text: String| {
        notes.lock().unwrap().entry(text).or_default().extend(cx.delivery());
        async {}
    });
    let worker = Worker::builder(&room.url).agent("clerk", clerk).start().await.unwrap();
    let lag = || {
        let shown = room.parlour(["subscriptions", "show", "all", "--json"]).run().with_code(0);
        shown.json()["lag"].as_u64().unwrap()
    };
    until("all to be delivered", || lag() == 0);
    let heard = seen.lock().unwrap().clone();
    assert_eq!(heard.len(), published.len(), "nothing was lost or invented");
    for text in &published {
        assert_eq!(heard[text].len(), 1, "{text}");
    }
    let count = published.len();
    println!("{count} published over {KILLS} kills, {again} of them after a lost acknowledgement");

    // The control: under two keys it is two events.
    for key in ["one", "two"] {
        let event = client.publish("tick.x/k", "twice").durable().idempotency_key(key);
        assert!(event.await.unwrap().is_new);
    }
    until("both to be delivered", || lag() == 0);
    assert_eq!(seen.lock().unwrap()["twice"].len(), 2);
    worker.shutdown().await.unwrap();
}
