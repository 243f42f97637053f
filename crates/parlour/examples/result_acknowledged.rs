//! A message whose result the sender acknowledges: until then the agent keeps the result, and gives it
//! again to whoever asks for the same. Start a host with `parlour serve`, then run
//! `cargo run -p parlour --example result_acknowledged`.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use parlour::{Agent, AgentError, Client, Cx, Error, Json, State, Worker};

/// The results of one agent that nobody has acknowledged, by their conversations.
#[derive(Default)]
struct Kept(Mutex<HashMap<String, u64>>);

/// Adds numbers up. A conversation that was answered before gets the same answer, and no second run.
async fn add(
    State(kept): State<Kept>,
    cx: Cx,
    Json(numbers): Json<Vec<u64>>,
) -> Result<Json<u64>, AgentError> {
    let mut kept = kept.0.lock().map_err(|_| "the books are broken")?;
    let sum = kept.entry(cx.conversation().to_string()).or_insert_with(|| numbers.iter().sum());
    Ok(Json(*sum))
}

/// The sender has the result of this conversation.
async fn result_received(State(kept): State<Kept>, cx: Cx) -> Result<Json<usize>, AgentError> {
    let mut kept = kept.0.lock().map_err(|_| "the books are broken")?;
    kept.remove(cx.conversation().as_str());
    Ok(Json(kept.len()))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let url = std::env::var("PARLOUR_URL").unwrap_or_else(|_| "http://127.0.0.1:9000".into());
    let books = Agent::new(|_key| Kept::default())
        .on_call_of("Add", add)
        .on_call_of("ResultReceived", result_received);
    let worker = Worker::builder(&url).agent("books", books).start().await?;
    let client = Client::connect(&url).await?;
    let patience = Duration::from_secs(60);

    let sums = client.send("books/ada", Json([20, 22])).data_type("Add").json::<u64>().await?;
    println!("the result: {}", sums.reply().timeout(patience).await?);

    // A message like any other, which follows from the first: it, too, is kept until it is delivered.
    let thanks = client.send("books/ada", "").data_type("ResultReceived");
    let thanks = thanks.conversation(sums.conversation().as_str()).json::<usize>().await?;
    let left = thanks.reply().timeout(patience).await?;
    println!("the result is acknowledged; results that are still kept: {left}");
    worker.shutdown().await
}
