//! A worker with two agents, and a client that uses them. Start a host with `parlour serve --memory`,
//! then run `cargo run -p parlour --example hello`.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parlour::{
    Agent, AgentError, Client, Cx, Error, Json, Payload, PayloadExt, TopicId, Worker, typed,
};
use tokio::sync::oneshot;

/// Counts the events of its source, and tells how many there were.
#[derive(Default)]
struct Counter(AtomicU64);

impl Agent for Counter {
    async fn call(&self, _cx: Cx, _message: Payload) -> Result<Payload, AgentError> {
        Ok(Payload::text(self.0.load(Ordering::Relaxed).to_string()))
    }

    async fn event(&self, _cx: Cx, _topic: TopicId, _message: Payload) -> Result<(), AgentError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let url = std::env::var("PARLOUR_URL").unwrap_or_else(|_| "http://127.0.0.1:9000".into());

    let (connected, is_connected) = oneshot::channel();
    let connected = std::sync::Mutex::new(Some(connected));
    let (shutdown, asked) = oneshot::channel::<()>();
    let worker = Worker::builder(&url)
        .name("hello")
        .agent("greeter", |_key| {
            typed(|_cx: Cx, who: String| async move { Ok(format!("hello {who}")) })
        })
        .agent("counter", |_key| Counter::default())
        .subscribe("visit", "counter")
        .on_connected(move || {
            if let Some(connected) = connected.lock().ok().and_then(|mut once| once.take()) {
                let _ = connected.send(());
            }
        })
        .build()?;
    let worker = tokio::spawn(worker.run_until(async {
        let _ = asked.await;
    }));
    if is_connected.await.is_err() {
        return worker.await.unwrap_or(Ok(()));
    }

    let client = Client::connect(&url).await?;
    let greeting: String = client.call("greeter", Json("Ada")).json().await?;
    println!("{greeting}");

    for _ in 0..3 {
        let published = client.publish("visit/home", "someone came").await?;
        println!("the visit went to {} recipient", published.recipients);
    }
    println!("visits of home: {}", client.call("counter/home", "").await?.to_text()?);

    if let Err(error) = client.call("greeter", "no JSON").await {
        println!("{:?}: {error}", error.kind());
    }

    let began = tokio::time::Instant::now().into_std();
    let calls: Vec<_> = (0..1000)
        .map(|n| tokio::spawn(client.call("greeter", Json(n.to_string())).into_future()))
        .collect();
    for call in calls {
        if let Ok(reply) = call.await {
            reply?;
        }
    }
    let took = Instant::elapsed(&began);
    println!("1000 calls at once took {took:?}");

    client.close().await;
    let _ = shutdown.send(());
    worker.await.unwrap_or(Ok(()))
}
