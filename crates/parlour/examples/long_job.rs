//! A long job that is heard of before its end, and one that its caller gives up. Start a host with
//! `parlour serve --memory`, then run `cargo run -p parlour --example long_job`.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::time::Duration;

use parlour::{AgentError, Client, Cx, Error, Json, PayloadExt, Worker};
use tokio::time::sleep;

/// Says when a job ends before it is done.
struct Unfinished(bool);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.0 {
            println!("the oven is turned off");
        }
    }
}

/// Bakes so many loaves, one after the other, and tells of each.
async fn bake(cx: Cx, Json(loaves): Json<u32>) -> Result<String, AgentError> {
    let mut unfinished = Unfinished(true);
    for loaf in 1..=loaves {
        sleep(Duration::from_millis(20)).await;
        cx.progress(format!("loaf {loaf} of {loaves}")).await?;
    }
    unfinished.0 = false;
    Ok(format!("{loaves} loaves"))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let url = std::env::var("PARLOUR_URL").unwrap_or_else(|_| "http://127.0.0.1:9000".into());
    let worker = Worker::builder(&url).name("bakery").agent("baker", bake).start().await?;
    let client = Client::connect(&url).await?;

    let mut baking = client.call("baker", Json(3)).with_progress();
    while let Some(update) = baking.next().await {
        println!("{}", update.to_text()?);
    }
    println!("here they are: {}", baking.reply().await?.to_text()?);

    let mut baking =
        client.call("baker", Json(1_000_000)).timeout(Duration::from_secs(300)).with_progress();
    if let Some(update) = baking.next().await {
        println!("{}: that is too many", update.to_text()?);
    }
    // Dropped, it is given up: the host and the agent are told.
    drop(baking);
    // The same connection, and so the agent has heard it before this call.
    client.call("baker", Json(1)).await?;
    worker.shutdown().await
}
