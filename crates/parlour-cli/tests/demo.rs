//! The demonstration shows what it promises.

mod common;

use common::{is_alive, parlour, until};
use rustix::process::Signal;

#[test]
fn the_demonstration_shows_every_step_and_ends() {
    let ended = parlour(["demo", "--once"]).run().with_code(0);
    let text = ended.text();
    for line in [
        "reverse → !emitnur PTTH detubirtsid olleH",
        "upper → HELLO DISTRIBUTED HTTP RUNTIME!",
        "worker_lost",
        "may have run",
        "on a second host → accepted as",
        "started again as process",
        "the message arrived → HELLO DISTRIBUTED HTTP RUNTIME!",
    ] {
        assert!(text.contains(line), "no `{line}` in\n{text}");
    }
    assert_eq!(text.matches("received").count(), 2, "{text}");
    assert_eq!(ended.stderr, "");
}

#[test]
fn the_message_that_outlives_its_host_is_the_one_that_was_sent() {
    let dir = tempfile::TempDir::new().unwrap();
    let place = dir.path().to_str().unwrap();
    let ended = parlour(["demo", "--once", "--output", "jsonl"]).env("TMPDIR", place).run();
    let ended = ended.with_code(0);
    let steps: Vec<serde_json::Value> =
        ended.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let step = |name: &str| steps.iter().find(|step| step["step"] == name).unwrap();
    let (sent, restart, arrival) = (step("send"), step("restart"), step("arrival"));
    assert_eq!(sent["ack"], "durable");
    assert_eq!((&sent["id"], &sent["id"]), (&restart["id"], &arrival["id"]));
    assert_eq!(sent["host"], restart["killed"]);
    assert_ne!(restart["killed"], restart["started"]);
    assert_eq!(arrival["reply"], "HELLO DISTRIBUTED HTTP RUNTIME!");
    // Nothing is left of it.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_step_that_fails_is_the_end_of_the_demonstration() {
    let ended = parlour(["demo", "--once"]).env("TMPDIR", "/nowhere").run().with_code(1);
    assert!(ended.stderr.contains("cannot make a temporary directory"), "{}", ended.stderr);
    assert!(!ended.text().contains("arrived"), "{}", ended.text());
}

#[test]
fn the_demonstration_stays_up_and_takes_its_workers_along() {
    let mut demo = parlour(["demo"]).start();
    let line = demo.printed("parlour call reverse");
    let url = line.split_whitespace().find(|word| word.starts_with("http://")).unwrap();
    let ended = parlour(["call", "reverse", "abc", "--url", url]).run().with_code(0);
    assert_eq!(ended.text(), "cba");

    let children = demo.children();
    assert_eq!(children.len(), 2, "{children:?}");
    demo.signal(Signal::KILL);
    demo.wait();
    for pid in children {
        until("the worker has ended", || !is_alive(&pid));
    }
}

#[test]
fn ctrl_c_ends_the_demonstration_well() {
    let mut demo = parlour(["demo"]).start();
    demo.printed("parlour call reverse");
    demo.signal(Signal::INT);
    assert_eq!(demo.wait().code(), Some(0));
}
