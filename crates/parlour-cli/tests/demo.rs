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
    ] {
        assert!(text.contains(line), "no `{line}` in\n{text}");
    }
    assert_eq!(text.matches("received").count(), 2, "{text}");
    assert_eq!(ended.stderr, "");
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
