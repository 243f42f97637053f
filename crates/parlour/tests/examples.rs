//! The examples, each run as a program at a host.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::process::Output;

use parlour_host::{Config, Host};
use tokio::net::TcpListener;
use tokio::process::Command;

/// What an example prints, at a host of its own.
async fn run(example: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(Host::new(Config::default()).serve(listener, std::future::pending()));
    let output = start(example, &url).await;
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
    out
}

async fn start(example: &str, url: &str) -> Output {
    // Cargo builds them beside the directory of the tests.
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.extend([
        "examples".into(),
        PathBuf::from(example).with_extension(std::env::consts::EXE_EXTENSION),
    ]);
    Command::new(path).env("PARLOUR_URL", url).kill_on_drop(true).output().await.unwrap()
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hello_greets_counts_and_shows_an_error() {
    let out = run("hello").await;
    for line in ["hello Ada", "the visit went to 1 recipient", "visits of home: 3"] {
        assert!(out.lines().any(|printed| printed == line), "{out}");
    }
    assert!(out.contains("Fault(Invalid): the payload does not decode"), "{out}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_the_chat_room_all_hear_all_in_order() {
    let out = run("chat_room").await;
    let lines: Vec<_> = out.lines().collect();
    let expected = [
        "lobby hears Ada: good evening",
        "lobby hears Ada: will it rain?",
        "lobby hears Sibyl: who knows, Ada",
        "3 lines were said in the lobby",
        "0 lines were said in the cellar",
    ];
    assert_eq!(lines, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scatter_gather_takes_what_comes_in_time() {
    let out = run("scatter_gather").await;
    let lines: Vec<_> = out.lines().collect();
    let expected = [
        "critic/slow is too slow",
        "critic/blind says nothing: I have lost my glasses",
        "the jury's mark: 7.5 of 2 critics",
    ];
    assert_eq!(lines, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_job_is_heard_of_and_can_be_given_up() {
    let out = run("long_job").await;
    let lines: Vec<_> = out.lines().collect();
    let expected = [
        "loaf 1 of 3",
        "loaf 2 of 3",
        "loaf 3 of 3",
        "here they are: 3 loaves",
        "loaf 1 of 1000000: that is too many",
        "the oven is turned off",
    ];
    assert_eq!(lines, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_the_pool_every_call_ends() {
    let out = run("pool").await;
    assert!(out.contains("a worker was shut down, and had ended what it had begun"), "{out}");
    assert!(out.contains("3200 of 3200 calls ended"), "{out}");
    // All but the few that ran at the worker that was lost.
    let painted = out.lines().find_map(|line| line.trim().strip_suffix("  painted")).unwrap();
    assert!(painted.parse::<u64>().unwrap() > 3_000, "{out}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn receipt_is_acknowledged_by_the_host_and_by_the_agent() {
    let out = run("receipt_acknowledged").await;
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines, ["the host has it, Accepted", "the archive has it, in attempt 1"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processing_is_acknowledged_step_by_step() {
    let out = run("processing_acknowledged").await;
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines.first(), Some(&"the translator has it"), "{out}");
    assert_eq!(lines.last(), Some(&"completed: 3 pages, in attempt 2"), "{out}");
    assert!(lines.iter().any(|line| line.starts_with("processing: page ")), "{out}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_result_is_acknowledged_by_the_sender() {
    let out = run("result_acknowledged").await;
    let lines: Vec<_> = out.lines().collect();
    let acknowledged = "the result is acknowledged; results that are still kept: 0";
    assert_eq!(lines, ["the result: 42", acknowledged]);
}

#[tokio::test]
async fn without_a_host_an_example_says_so() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let output = start("hello", &url).await;
    assert!(!output.status.success());
    assert!(text(output.stderr).contains("parlour serve"));
}
