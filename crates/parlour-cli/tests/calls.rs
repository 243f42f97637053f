//! Callers: what is printed where, and with which code they end.

mod common;

use common::{Room, parlour};
use rustix::process::Signal;

#[test]
fn a_wrong_command_line_is_told_what_was_meant() {
    let ended = parlour(["wroker", "echo", "--echo"]).run().with_code(2);
    assert!(ended.stderr.contains("worker"), "{}", ended.stderr);
    let ended = parlour(["call", "echo", "x", "--timeout", "5"]).run().with_code(2);
    assert!(ended.stderr.contains("5s"), "{}", ended.stderr);
    for args in [["call", "not a name"], ["publish", "not a name/x"], ["subscribe", "not a name"]] {
        let ended = parlour(args).run().with_code(2);
        assert!(ended.stderr.contains("`not a name`"), "{}", ended.stderr);
    }
}

#[test]
fn a_wrong_command_line_is_a_problem_in_json_mode() {
    let ended = parlour(["call", "--json", "echo", "x", "--tmeout", "5s"]).run().with_code(2);
    let problem: serde_json::Value = serde_json::from_str(&ended.stderr).unwrap();
    assert_eq!(problem["kind"], "invalid");
    assert!(ended.stdout.is_empty());
}

#[test]
fn no_host_is_told_apart() {
    for args in [
        &["call", "echo", "x"][..],
        &["publish", "news/a", "x"],
        &["subscribe", "news"],
        &["agents"],
        &["status"],
    ] {
        let ended = parlour(args.iter().copied())
            .env("PARLOUR_URL", "http://127.0.0.1:1")
            .run()
            .with_code(7);
        assert!(ended.stderr.starts_with("error: "), "{}", ended.stderr);
        assert!(ended.stderr.contains("hint: "), "{}", ended.stderr);
        assert!(!ended.stderr.contains("parlour explain"), "no host spoke: {}", ended.stderr);
    }
}

#[test]
fn an_agent_that_nobody_serves_is_not_found() {
    let room = Room::open();
    let ended = room.parlour(["call", "nobody", "x"]).run().with_code(3);
    assert!(ended.stdout.is_empty());
    assert!(
        ended.stderr.contains("error: ") && ended.stderr.contains("hint: "),
        "{}",
        ended.stderr
    );
    assert!(ended.stderr.contains("parlour explain unknown_agent"), "{}", ended.stderr);

    let ended = room.parlour(["call", "nobody", "x", "--output", "jsonl"]).run().with_code(3);
    let problem: serde_json::Value = serde_json::from_str(&ended.stderr).unwrap();
    assert_eq!(problem["kind"], "unknown_agent");
    assert_eq!(problem["may_have_run"], false);
    assert!(problem["hint"].is_string());
}

#[test]
fn a_host_with_a_token_wants_it() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    std::fs::write(&file, "secret\n").unwrap();
    let file = file.to_str().unwrap();
    let room = Room::open_with(["--token-file", file]);
    for args in [&["call", "echo", "x"][..], &["agents"]] {
        room.parlour(args.iter().copied()).run().with_code(4);
    }
    room.parlour(["agents", "--token-file", file]).run().with_code(0);
    room.parlour(["call", "nobody", "x"]).env("PARLOUR_TOKEN_FILE", file).run().with_code(3);
}

#[test]
fn a_body_comes_as_text_from_a_file_or_on_stdin() {
    let room = Room::open();
    let _worker = room.worker(["echo", "--echo"]);
    let call = |args: &[&'static str]| {
        room.parlour(["call", "echo"].into_iter().chain(args.iter().copied()))
            .file("body.txt", "from a file")
    };
    assert_eq!(call(&["text"]).run().with_code(0).text(), "text");
    assert_eq!(call(&["@body.txt"]).run().with_code(0).text(), "from a file");
    assert_eq!(call(&["-"]).run_with(b"from stdin").with_code(0).text(), "from stdin");
    assert_eq!(call(&[]).run_with(b"from stdin").with_code(0).text(), "from stdin");
    assert_eq!(call(&["-7"]).run().with_code(0).text(), "-7");
    let ended = call(&["@missing.txt"]).run().with_code(2);
    assert!(ended.stderr.contains("missing.txt"), "{}", ended.stderr);
}

#[test]
fn a_payload_over_the_limit_names_the_setting() {
    let room = Room::open();
    let _worker = room.worker(["echo", "--echo"]);
    let ended =
        room.parlour(["call", "echo", "-"]).run_with(&vec![b'x'; (1 << 20) + 1]).with_code(1);
    assert!(ended.stderr.contains("payload"), "{}", ended.stderr);
    room.parlour(["call", "echo", "-"]).run_with(&vec![b'x'; 1 << 20]).with_code(0);
}

#[test]
fn an_event_is_printed_as_one_line_of_json() {
    let room = Room::open();
    let mut subscriber = room.parlour(["subscribe", "news.*", "--count", "2"]).start();
    subscriber.said("subscribed");
    let listed = room.parlour(["workers", "--json"]).run().with_code(0);
    assert_eq!(listed.json()["workers"][0]["name"], "parlour subscribe");
    let ended = room
        .parlour(["publish", "news.tech/today", "the kettle\nis on", "--json"])
        .run()
        .with_code(0);
    assert_eq!(ended.json()["recipients"], 1);
    room.parlour(["publish", "news.tech/today", "-"]).run_with(b"\xff\xfe").with_code(0);

    let event: serde_json::Value = serde_json::from_str(&subscriber.printed("topic")).unwrap();
    assert_eq!(event["topic"]["type"], "news.tech");
    assert_eq!(event["topic"]["source"], "today");
    assert_eq!(event["data"], "the kettle\nis on");
    let event: serde_json::Value = serde_json::from_str(&subscriber.printed("topic")).unwrap();
    assert_eq!(event["data_base64"], "//4=");
    assert_eq!(subscriber.wait().code(), Some(0));
}

#[test]
fn an_event_that_finds_a_full_queue_is_told() {
    let room = Room::open_with(["--set", "limits.queue_bytes=1MiB"]);
    let subscriber = room.parlour(["subscribe", "news"]).start();
    subscriber.said("subscribed");
    subscriber.signal(Signal::STOP);
    let event = vec![b'x'; 1 << 20];
    let ended = (0..40)
        .map(|_| room.parlour(["publish", "news/a", "-"]).run_with(&event))
        .find(|ended| ended.code != Some(0))
        .expect("the queue of a subscriber that reads nothing fills up")
        .with_code(8);
    assert!(ended.text().contains("dropped"), "{}", ended.text());
    assert!(ended.stderr.contains("full queue"), "{}", ended.stderr);
}

#[test]
fn quiet_means_errors_only() {
    let room = Room::open();
    let ended = room.parlour(["agents", "--quiet"]).run().with_code(0);
    assert_eq!(ended.stderr, "");
    let ended = room.parlour(["agents"]).run().with_code(0);
    assert!(ended.stderr.contains("no worker"), "{}", ended.stderr);
    let ended = room.parlour(["call", "nobody", "x", "-q"]).run().with_code(3);
    assert!(ended.stderr.starts_with("error: "), "{}", ended.stderr);
}

#[test]
fn a_subscriber_can_ask_for_one_source_only() {
    let room = Room::open();
    let mut subscriber = room.parlour(["subscribe", "news/b", "--count", "1"]).start();
    subscriber.said("subscribed");
    room.parlour(["publish", "news/a", "not this"]).run().with_code(0);
    room.parlour(["publish", "news/b", "this"]).run().with_code(0);
    assert!(subscriber.printed("topic").contains("\"this\""));
    assert_eq!(subscriber.wait().code(), Some(0));
}

#[test]
fn what_others_name_and_send_cannot_drive_the_terminal() {
    let room = Room::open();
    let name = "evil\u{1b}[2Jname";
    let _worker = room.worker(["echo", "--echo", "--capability", "a\u{202e}b"]);
    let mut subscriber =
        room.parlour(["subscribe", "news", "--output", "text", "--count", "1"]).start();
    subscriber.said("subscribed");
    room.parlour(["publish", "news/a\u{202e}b", "x\u{1b}]0;owned\u{7}\r\ny"]).run().with_code(0);
    let line = subscriber.printed("news");
    assert!(line.contains("\\u{202e}") && line.contains("\\u{1b}"), "{line:?}");
    assert!(!line.contains(['\u{1b}', '\u{7}', '\u{202e}']), "{line:?}");
    assert_eq!(subscriber.wait().code(), Some(0));

    let ended = room.parlour(["agents"]).run().with_code(0);
    assert!(ended.text().contains("a\\u{202e}b"), "{}", ended.text());
    let ended = room.parlour(["agents", "--json"]).run().with_code(0);
    assert_eq!(ended.json()["agents"][0]["capabilities"][0], "a\u{202e}b");

    let ended = room.parlour(["call", name, "x"]).run().with_code(2);
    assert!(!ended.stderr.contains('\u{1b}'), "{:?}", ended.stderr);
    // The reply's body is the one thing that is never touched.
    let ended = room.parlour(["call", "echo", "\u{1b}[2J"]).run().with_code(0);
    assert_eq!(ended.text(), "\u{1b}[2J");
}

#[test]
fn a_reader_that_leaves_ends_the_program_quietly() {
    let room = Room::open();
    let mut subscriber = room.parlour(["subscribe", "news"]).start();
    subscriber.said("subscribed");
    subscriber.stop_reading();
    for _ in 0..3 {
        room.parlour(["publish", "news/a", "x"]).run();
    }
    assert_eq!(subscriber.wait().code(), Some(0));
}

#[test]
fn ctrl_c_ends_a_subscriber() {
    let room = Room::open();
    let mut subscriber = room.parlour(["subscribe", "news"]).start();
    subscriber.said("subscribed");
    subscriber.signal(Signal::INT);
    assert_eq!(subscriber.wait().code(), Some(130));
}

#[test]
fn agents_workers_and_status_tell_what_is_there() {
    let room = Room::open();
    let empty = room.parlour(["agents", "--json"]).run().with_code(0);
    assert_eq!(empty.json()["agents"].as_array().unwrap().len(), 0);
    let _worker = room.worker(["echo", "--echo", "--name", "parrot", "--capability", "repeat"]);
    let ended = room.parlour(["agents"]).run().with_code(0);
    assert!(ended.text().contains("echo") && ended.text().contains("repeat"), "{}", ended.text());
    let ended = room.parlour(["workers", "--output", "jsonl"]).run().with_code(0);
    let worker: serde_json::Value = serde_json::from_str(ended.text()).unwrap();
    assert_eq!(worker["name"], "parrot");
    let ended = room.parlour(["status"]).run().with_code(0);
    assert!(ended.text().contains("ready"), "{}", ended.text());
    let status = room.parlour(["status", "--json"]).run().with_code(0).json();
    assert_eq!((&status["ready"], &status["workers"]), (&true.into(), &1.into()));
}

#[test]
fn a_worker_can_be_told_to_leave() {
    let room = Room::open();
    let mut worker = room.worker(["echo", "--echo", "--name", "parrot 1", "--capacity", "3"]);
    let list = room.parlour(["workers"]).run().with_code(0);
    let (head, row) = list.text().split_once('\n').unwrap();
    assert!(head.contains("CAPACITY") && head.contains("KEYS"), "{head}");
    assert!(row.contains("parrot 1") && row.contains(" 3 "), "{row}");

    let ended = room.parlour(["workers", "drain", "parrot"]).run().with_code(3);
    assert!(ended.stderr.contains("hint: `parlour workers` lists names"), "{}", ended.stderr);
    let ended = room.parlour(["workers", "drain", "parrot 1"]).run().with_code(0);
    assert!(ended.text().contains("drains, with 0 calls in flight"), "{}", ended.text());
    assert_eq!(worker.wait().code(), Some(0));
    room.parlour(["call", "echo", "x"]).run().with_code(3);

    parlour(["worker", "echo", "--echo", "--capacity", "0"]).run().with_code(2);
    parlour(["workers", "--quiet", "--url", "http://127.0.0.1:1", "drain", "x"]).run().with_code(2);
}

#[test]
fn faults_are_explained_without_a_host() {
    let ended = parlour(["explain", "worker_lost"]).run().with_code(0);
    assert!(ended.text().contains("502"), "{}", ended.text());
    let ended = parlour(["explain", "worker_lots"]).run().with_code(3);
    assert!(ended.stderr.contains("worker_lost"), "{}", ended.stderr);
    let all = parlour(["explain", "--json"]).run().with_code(0).json();
    assert_eq!(all.as_array().unwrap().len(), parlour_core::FaultKind::ALL.len());
}

#[test]
fn help_begins_with_examples_and_completion_and_version_print() {
    for verb in [
        "demo",
        "serve",
        "worker",
        "call",
        "publish",
        "subscribe",
        "subscriptions",
        "agents",
        "workers",
        "config",
    ] {
        let text = parlour([verb, "--help"]).run().with_code(0).text().to_owned();
        let (examples, usage) = (text.find("Examples:").unwrap(), text.find("Usage:").unwrap());
        assert!(examples < usage, "{text}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(parlour(["completion", shell]).run().with_code(0).text().contains("parlour"));
    }
    let version = parlour(["version", "--json"]).run().with_code(0).json();
    assert_eq!(version["name"], "parlour");
    assert!(parlour(["--version"]).run().with_code(0).text().starts_with("parlour "));
}

#[test]
fn colours_are_used_when_asked_for_only() {
    let colored = parlour(["--color", "always", "explain", "nothing"]).run().with_code(3);
    assert!(colored.stderr.contains('\u{1b}'));
    let plain = parlour(["explain", "nothing"]).run().with_code(3);
    assert!(!plain.stderr.contains('\u{1b}'));
}
