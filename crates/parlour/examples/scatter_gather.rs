//! One question to many agents at once, and what comes of each: a jury of critics, of whom one is too
//! slow and one cannot read. Start a host with `parlour serve --memory`, then run
//! `cargo run -p parlour --example scatter_gather`.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::time::Duration;

use parlour::{AgentError, Client, Cx, Error, ErrorKind, Json, PayloadExt, Worker};

/// The opinion of one critic, who is named by the key.
async fn critic(cx: Cx, poem: String) -> Result<Json<f64>, AgentError> {
    match cx.agent().key.as_str() {
        "slow" => std::future::pending().await,
        "blind" => Err("I have lost my glasses".into()),
        name => Ok(Json(10.0 / (1.0 + name.len().abs_diff(poem.lines().count()) as f64))),
    }
}

/// The mean of whatever opinions come in time. Its calls end with its own caller's patience at the
/// latest, without being told.
async fn jury(cx: Cx, poem: String) -> Result<String, AgentError> {
    let critics = ["critic/ada", "critic/alan", "critic/slow", "critic/blind"];
    let answers = cx.call_each(critics, poem).timeout(Duration::from_secs(1)).json::<f64>().await?;
    let mut marks = Vec::new();
    for answer in answers {
        match answer.reply {
            Ok(mark) => marks.push(mark),
            Err(error) if error.kind() == ErrorKind::Timeout => {
                println!("{} is too slow", answer.agent);
            }
            Err(error) => println!("{} says nothing: {error}", answer.agent),
        }
    }
    let count = marks.len();
    Ok(format!("{:.1} of {count} critics", marks.iter().sum::<f64>() / count.max(1) as f64))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let url = std::env::var("PARLOUR_URL").unwrap_or_else(|_| "http://127.0.0.1:9000".into());
    let worker = Worker::builder(&url)
        .name("critics")
        .agent("critic", critic)
        .agent("jury", jury)
        .start()
        .await?;
    let client = Client::connect(&url).await?;
    let mark = client.call("jury", "an old pond\na frog leaps in\nthe sound of water").await?;
    println!("the jury's mark: {}", mark.to_text()?);
    worker.shutdown().await
}
