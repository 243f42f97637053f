//! A worker with two agents, and a client that uses them. Start a host with `parlour serve --memory`,
//! then run `cargo run -p parlour --example hello`.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::sync::atomic::{AtomicU64, Ordering};

use parlour::{Agent, Client, Error, Json, PayloadExt, State, Worker};

async fn greet(Json(who): Json<String>) -> Json<String> {
    Json(format!("hello {who}"))
}

/// How many events one source has had.
#[derive(Default)]
struct Visits(AtomicU64);

async fn note(State(visits): State<Visits>) {
    visits.0.fetch_add(1, Ordering::Relaxed);
}

async fn count(State(visits): State<Visits>) -> String {
    visits.0.load(Ordering::Relaxed).to_string()
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let url = std::env::var("PARLOUR_URL").unwrap_or_else(|_| "http://127.0.0.1:9000".into());

    let worker = Worker::builder(&url)
        .name("hello")
        .agent("greeter", greet)
        .agent("visits", Agent::new(|_key| Visits::default()).on_call(count).on_event(note))
        .subscribe("visit", "visits")
        .start()
        .await?;

    let client = Client::connect(&url).await?;
    let greeting: String = client.call("greeter", Json("Ada")).json().await?;
    println!("{greeting}");

    for _ in 0..3 {
        let published = client.publish("visit/home", "someone came").await?;
        println!("the visit went to {} recipient", published.recipients);
    }
    println!("visits of home: {}", client.call("visits/home", "").await?.to_text()?);

    if let Err(error) = client.call("greeter", "no JSON").await {
        println!("{:?}: {error}", error.kind());
    }

    client.close().await;
    worker.shutdown().await
}
