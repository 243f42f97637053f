//! A killed host and the thousand workers that come back to the next one.

#![allow(clippy::print_stdout, reason = "a person wants to see the figure")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use common::{PATIENCE, Room};
use parlour::{Client, PayloadExt, Worker};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

/// How long after the host is there again the last worker may be back.
const ALL_BACK: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[allow(clippy::disallowed_methods, reason = "programs that are watched keep real time")]
async fn after_a_killed_host_a_thousand_workers_are_back_within_half_a_minute() {
    let limit = getrlimit(Resource::Nofile);
    let files = limit.maximum.unwrap_or(u64::MAX).min(20_000);
    setrlimit(Resource::Nofile, Rlimit { current: Some(files), maximum: limit.maximum }).unwrap();
    // Fewer where the machine allows fewer files; said aloud.
    let workers = usize::try_from(files).unwrap_or(usize::MAX).saturating_sub(64).min(1000);
    if workers < 1000 {
        println!("only {workers} workers: the limit of open files is {files}");
    }

    let mut room = Room::open();
    let port = room.url.rsplit(':').next().unwrap().to_owned();
    let connected = Arc::new(AtomicUsize::new(0));
    let mut running = Vec::new();
    for number in 0..workers {
        let connected = Arc::clone(&connected);
        let worker = Worker::builder(&room.url)
            .name(format!("w{number}"))
            .agent(format!("t{number}"), async |text: String| text.to_uppercase())
            .on_connected(move || {
                connected.fetch_add(1, Relaxed);
            });
        running.push(worker.start().await.unwrap());
    }
    assert_eq!(connected.load(Relaxed), workers);

    room.host.signal(Signal::KILL);
    room.host.wait();
    // The control: with nobody there, nobody is back.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(connected.load(Relaxed), workers);
    let room = Room::open_at(&format!("127.0.0.1:{port}"), []);
    let since = Instant::now();
    while connected.load(Relaxed) < 2 * workers {
        let back = connected.load(Relaxed) - workers;
        assert!(since.elapsed() < ALL_BACK, "{back} of {workers} are back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!(
        "{workers} workers were back {:.2} s after the host was",
        since.elapsed().as_secs_f64()
    );

    let client = Client::connect(&room.url).await.unwrap();
    for number in 0..workers {
        let reply = client.call(format!("t{number}"), "hello").timeout(PATIENCE).await.unwrap();
        assert_eq!(reply.to_text().unwrap(), "HELLO");
    }
    drop(running);
}
