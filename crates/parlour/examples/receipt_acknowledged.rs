//! A message whose receipt is acknowledged: by the host, which keeps it, and by the agent, once it has
//! it. Start a host with `parlour serve`, then run `cargo run -p parlour --example
//! receipt_acknowledged`.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::time::Duration;

use parlour::{Client, Error, Level, Worker};
use tokio::time::sleep;

/// Takes its time: nobody waits for that.
async fn file_away(_letter: String) {
    sleep(Duration::from_millis(200)).await;
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let url = std::env::var("PARLOUR_URL").unwrap_or_else(|_| "http://127.0.0.1:9000".into());
    let client = Client::connect(&url).await?;

    // There is no archive yet. The host has the letter, and this program could end here.
    let letter = client.send("archive", "Dear Ada, …").ttl(Duration::from_secs(60)).await?;
    println!("the host has it, {:?}", letter.status().await?.state);

    let worker = Worker::builder(&url).name("cellar").agent("archive", file_away).start().await?;
    let receipt = letter.reaches(Level::Received).timeout(Duration::from_secs(30)).await?;
    println!("the archive has it, in attempt {}", receipt.attempt);

    worker.shutdown().await
}
