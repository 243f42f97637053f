//! A message whose processing is acknowledged: the agent has it, it says how far it is, it has done it.
//! Start a host with `parlour serve`, then run `cargo run -p parlour --example
//! processing_acknowledged`.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::time::Duration;

use parlour::{AgentError, Client, Cx, DeliveryState, Error, Json, Level, Worker};
use tokio::time::sleep;

/// Translates so many pages, and tells of each. It fails in the middle of its first attempt.
async fn translate(cx: Cx, Json(pages): Json<u32>) -> Result<String, AgentError> {
    for page in 1..=pages {
        cx.progress(format!("page {page} of {pages}")).await?;
        sleep(Duration::from_millis(50)).await;
        if cx.attempt() == 1 && page == 2 {
            return Err("the lamp went out".into());
        }
    }
    Ok(format!("{pages} pages, in attempt {}", cx.attempt()))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let url = std::env::var("PARLOUR_URL").unwrap_or_else(|_| "http://127.0.0.1:9000".into());
    let worker = Worker::builder(&url).agent("translator", translate).start().await?;
    let client = Client::connect(&url).await?;

    let book = client.send("translator", Json(3)).await?;
    let patience = Duration::from_secs(60);
    book.reaches(Level::Received).timeout(patience).await?;
    println!("the translator has it");

    // Each is the newest there is: who looks seldom sees less.
    let mut status = book.reaches(Level::Processing).timeout(patience).await?;
    while status.state != DeliveryState::Completed {
        match (&status.state, &status.fault) {
            (DeliveryState::Processing, _) => println!("processing: {}", status.details),
            (DeliveryState::Waiting, Some(fault)) => println!("failed, to be tried again: {fault}"),
            _ => {}
        }
        status = book.newer_than(status.generation).timeout(patience).await?;
    }
    println!("completed: {}", String::from_utf8_lossy(&book.reply().await?.bytes));
    worker.shutdown().await
}
