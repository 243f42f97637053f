//! A pool under load: four workers serve one agent type, one of them is shut down and one is lost while
//! many callers call. Every call ends, and says what came of it. Start a host with
//! `parlour serve --memory`, then run `cargo run --release -p parlour --example pool`.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parlour::{Agent, Client, Cx, Error, RunningWorker, Worker};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

const WORKERS: u64 = 4;
const CALLERS: u64 = 64;
const CALLS: u64 = 50;
const KEYS: u64 = 100;

/// A member of the pool. The host gives each key to one of them.
async fn start(url: &str, number: u64) -> Result<RunningWorker, Error> {
    let paint = move |cx: Cx, picture: String| async move {
        tokio::time::sleep(Duration::from_millis(1)).await;
        format!("worker {number} painted {picture} for {}", cx.agent().key)
    };
    let painter = Agent::stateless().on_call(paint).one_at_a_time();
    Worker::builder(url).name(format!("painter {number}")).agent("painter", painter).start().await
}

/// Calls again for as long as that cannot have it painted twice. Returns what came of it in the end.
async fn paint(client: &Client, key: u64, retries: &AtomicU64) -> String {
    loop {
        let call = client.call(format!("painter/{key}"), "a door");
        match call.timeout(Duration::from_secs(20)).await {
            Ok(_) => return "painted".to_owned(),
            Err(error) if error.is_retryable() && !error.may_have_run() => {
                retries.fetch_add(1, Ordering::Relaxed);
                let wait = error.fault().and_then(|fault| fault.retry_after_time());
                tokio::time::sleep(wait.unwrap_or(Duration::from_millis(10))).await;
            }
            Err(error) => return format!("{:?}: {error}", error.kind()),
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let url = std::env::var("PARLOUR_URL").unwrap_or_else(|_| "http://127.0.0.1:9000".into());
    let mut workers = Vec::new();
    for number in 0..WORKERS {
        workers.push(start(&url, number).await?);
    }

    let began = Instant::now();
    let (done, mut ended) = watch::channel(0);
    let (done, retries) = (Arc::new(done), Arc::new(AtomicU64::new(0)));
    let mut callers = JoinSet::new();
    for caller in 0..CALLERS {
        let client = Client::connect(&url).await?;
        let (done, retries) = (Arc::clone(&done), Arc::clone(&retries));
        callers.spawn(async move {
            let mut outcomes = BTreeMap::<String, u64>::new();
            for call in 0..CALLS {
                let outcome = paint(&client, (caller * CALLS + call) % KEYS, &retries).await;
                *outcomes.entry(outcome).or_default() += 1;
                done.send_modify(|done| *done += 1);
            }
            outcomes
        });
    }

    let total = CALLERS * CALLS;
    let _ = ended.wait_for(|done| *done > total / 3).await;
    if let Some(worker) = workers.pop() {
        worker.shutdown().await?;
        println!("a worker was shut down, and had ended what it had begun");
    }
    let _ = ended.wait_for(|done| *done > total * 2 / 3).await;
    drop(workers.pop());
    println!("a worker was lost");

    let mut outcomes = BTreeMap::<String, u64>::new();
    while let Some(Ok(part)) = callers.join_next().await {
        part.into_iter()
            .for_each(|(outcome, count)| *outcomes.entry(outcome).or_default() += count);
    }
    let took = began.elapsed();
    println!("{} of {total} calls ended, in {took:.1?}", outcomes.values().sum::<u64>());
    println!("{} were made again at no risk", retries.load(Ordering::Relaxed));
    for (outcome, count) in &outcomes {
        println!("{count:6}  {outcome}");
    }
    for worker in workers {
        worker.shutdown().await?;
    }
    Ok(())
}
