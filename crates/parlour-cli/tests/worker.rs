//! Programs as agents.

mod common;

use common::{Room, is_alive, parlour, until};
use rustix::process::Signal;

#[test]
fn a_program_gets_the_payload_and_its_output_is_the_reply() {
    let room = Room::open();
    let _worker = room.worker(["upper", "--", "tr", "a-z", "A-Z"]);
    let ended = room.parlour(["call", "upper", "hello"]).run().with_code(0);
    assert_eq!((ended.text(), ended.stderr.as_str()), ("HELLO", ""));
}

#[test]
fn a_program_finds_what_it_handles_in_its_environment() {
    let room = Room::open();
    let script = "echo $PARLOUR_KEY,$PARLOUR_DATA_TYPE,$PARLOUR_ATTEMPT,$PARLOUR_HOPS; \
                  echo $PARLOUR_META_TENANT_ID,$PARLOUR_URL; \
                  echo $PARLOUR_CONVERSATION,$PARLOUR_CAUSE";
    let _worker = room.worker(["env", "--", "sh", "-c", script]);
    let ended = room
        .parlour(["call", "env/k 7", "x", "--data-type", "Query", "--meta", "Tenant-Id=acme"])
        .run()
        .with_code(0);
    let lines: Vec<_> = ended.text().lines().collect();
    assert_eq!(lines[0], "k 7,Query,1,0");
    assert_eq!(lines[1], format!("acme,{}", room.url));
    let (conversation, cause) = lines[2].split_once(',').unwrap();
    assert!(!conversation.is_empty() && !cause.is_empty(), "{}", lines[2]);
}

#[test]
fn metadata_of_the_workers_own_environment_is_not_passed_on() {
    let room = Room::open();
    let worker = room
        .parlour(["worker", "env", "--", "sh", "-c", "echo [$PARLOUR_META_A$PARLOUR_DATA_TYPE]"])
        .env("PARLOUR_META_A", "stale")
        .env("PARLOUR_DATA_TYPE", "stale")
        .start();
    worker.said("serving env at ");
    let ended = room.parlour(["call", "env", "x"]).run().with_code(0);
    assert_eq!(ended.text(), "[]\n");
}

#[test]
fn a_failing_program_is_told_with_its_status_and_its_stderr() {
    let room = Room::open();
    let _worker = room.worker(["bad", "--", "sh", "-c", "echo no such order >&2; exit 3"]);
    let ended = room.parlour(["call", "bad", "x"]).run().with_code(1);
    assert!(ended.stdout.is_empty());
    assert!(ended.stderr.contains("exit status 3"), "{}", ended.stderr);
    assert!(ended.stderr.contains("no such order"), "{}", ended.stderr);

    let ended = room.parlour(["call", "bad", "x", "--json"]).run().with_code(1);
    let problem: serde_json::Value = serde_json::from_str(&ended.stderr).unwrap();
    assert_eq!(problem["kind"], "agent_failed");
    assert_eq!(problem["may_have_run"], true);
}

#[test]
fn endless_complaints_are_cut() {
    let room = Room::open();
    let _worker =
        room.worker(["bad", "--", "sh", "-c", "yes complaint | head -c 1000000 >&2; exit 1"]);
    let ended = room.parlour(["call", "bad", "x"]).run().with_code(1);
    assert!(ended.stderr.contains("complaint"));
    assert!(ended.stderr.len() < 20_000, "{} bytes", ended.stderr.len());
}

#[test]
fn endless_output_is_refused_and_the_program_ended() {
    let room = Room::open();
    let _worker = room.worker(["much", "--", "yes"]);
    let ended = room.parlour(["call", "much", "x"]).run().with_code(1);
    assert!(ended.stderr.contains("limits.payload_bytes"), "{}", ended.stderr);
}

#[test]
fn a_program_that_cannot_start_is_named() {
    let room = Room::open();
    let _worker = room.worker(["none", "--", "/no/such/program"]);
    let ended = room.parlour(["call", "none", "x"]).run().with_code(1);
    assert!(ended.stderr.contains("/no/such/program"), "{}", ended.stderr);
}

#[test]
fn a_worker_whose_program_is_not_there_says_so_when_it_starts() {
    for (program, is_there) in
        [("no-such-program", false), ("/no/such/program", false), ("tr", true)]
    {
        let ended = parlour(["worker", "any", "--url", "ftp://nowhere", "--", program]).run();
        let warned = ended.stderr.contains(&format!("there is no program `{program}`"));
        assert_eq!(warned, !is_there, "{}", ended.stderr);
    }
}

#[test]
fn a_program_need_not_read_its_input() {
    let room = Room::open();
    let _worker = room.worker(["deaf", "--", "echo", "fine"]);
    let ended = room.parlour(["call", "deaf", "-"]).run_with(&vec![b'x'; 500_000]).with_code(0);
    assert_eq!(ended.text(), "fine\n");
}

#[test]
fn a_call_past_its_deadline_ends_the_program_and_what_it_started() {
    let room = Room::open();
    let directory = tempfile::tempdir().unwrap();
    let pids = directory.path().join("pids");
    let script = format!("sleep 60 & echo $$ $! > {}; wait", pids.display());
    let worker = room.worker(["slow", "--", "sh", "-c", &script]);
    let ended = room.parlour(["call", "slow", "x", "--timeout", "1s"]).run().with_code(6);
    assert!(ended.stderr.starts_with("error: "), "{}", ended.stderr);
    assert!(ended.stderr.contains("may have run"), "{}", ended.stderr);
    assert_ended(&pids);
    until("the worker has waited for the program", || worker.children().is_empty());
}

#[test]
fn a_call_given_up_ends_the_program() {
    let room = Room::open();
    let directory = tempfile::tempdir().unwrap();
    let pids = directory.path().join("pids");
    let script = format!("sleep 60 & echo $$ $! > {}; wait", pids.display());
    let _worker = room.worker(["slow", "--", "sh", "-c", &script]);
    let mut call = room.parlour(["call", "slow", "x"]).start();
    until("the program runs", || std::fs::read_to_string(&pids).is_ok_and(|t| t.ends_with('\n')));
    call.signal(Signal::INT);
    assert_eq!(call.wait().code(), Some(130));
    assert_ended(&pids);
}

#[test]
fn a_worker_ended_at_once_takes_its_programs_along() {
    let room = Room::open();
    let directory = tempfile::tempdir().unwrap();
    let pids = directory.path().join("pids");
    let script = format!("sleep 60 & echo $$ $! > {}; wait", pids.display());
    let mut worker = room.worker(["slow", "--", "sh", "-c", &script]);
    let _call = room.parlour(["call", "slow", "x"]).start();
    until("the program runs", || std::fs::read_to_string(&pids).is_ok_and(|t| t.ends_with('\n')));
    worker.signal(Signal::TERM);
    worker.said("draining");
    worker.signal(Signal::TERM);
    assert_eq!(worker.wait().code(), Some(143));
    assert_ended(&pids);
}

#[test]
fn a_worker_told_to_end_finishes_its_call_first() {
    let room = Room::open();
    let directory = tempfile::tempdir().unwrap();
    let begun = directory.path().join("begun");
    let script = format!("echo yes > {}; sleep 1; echo finished", begun.display());
    let mut worker = room.worker(["slow", "--", "sh", "-c", &script]);
    let call = room.parlour(["call", "slow", "x"]).start();
    until("the program runs", || begun.exists());
    worker.signal(Signal::TERM);
    call.printed("finished");
    assert_eq!(worker.wait().code(), Some(0));
}

#[test]
fn the_content_type_of_output_is_seen_or_said() {
    let room = Room::open();
    let of = |agent: &str| {
        let ended = room.parlour(["call", agent, "x", "--json"]).run().with_code(0);
        ended.json()["content_type"].as_str().unwrap().to_owned()
    };
    let _text = room.worker(["text", "--", "echo", "ü"]);
    let _bytes = room.worker(["bytes", "--", "printf", "\\377\\376"]);
    let _json = room.worker(["json", "--content-type", "application/json", "--", "echo", "{}"]);
    assert_eq!(of("text"), "text/plain; charset=utf-8");
    assert_eq!(of("bytes"), "application/octet-stream");
    assert_eq!(of("json"), "application/json");
}

#[test]
fn an_echo_keeps_everything() {
    let room = Room::open();
    let _worker = room.worker(["echo", "--echo"]);
    let bytes: Vec<u8> = (0..=255).collect();
    let ended = room.parlour(["call", "echo", "-"]).run_with(&bytes).with_code(0);
    assert_eq!(ended.stdout, bytes);

    let ended = room
        .parlour([
            "call",
            "echo",
            "{}",
            "--json",
            "--data-type",
            "Order",
            "--content-type",
            "application/x",
        ])
        .run()
        .with_code(0);
    let reply = ended.json();
    assert_eq!(reply["content_type"], "application/x");
    assert_eq!(reply["data_type"], "Order");
    assert_eq!(reply["data"], "{}");
}

#[test]
fn a_second_exclusive_worker_is_refused() {
    let room = Room::open();
    let _worker = room.worker(["only", "--exclusive", "--echo"]);
    let ended = room.parlour(["worker", "only", "--exclusive", "--echo"]).run().with_code(5);
    assert!(ended.stderr.contains("only"), "{}", ended.stderr);
}

#[test]
fn a_loop_of_calls_ends_at_the_hop_limit() {
    let room = Room::open();
    let binary = env!("CARGO_BIN_EXE_parlour");
    let _worker = room.worker(["loop", "--", binary, "call", "loop"]);
    let ended = room.parlour(["call", "loop", "x"]).run().with_code(1);
    assert!(ended.stderr.contains("17 messages deep"), "{}", ended.stderr);
    assert!(ended.stderr.contains("limits.hops, which is 16"), "{}", ended.stderr);
}

/// Waits until every process whose id stands in this file has ended.
fn assert_ended(pids: &std::path::Path) {
    let text = std::fs::read_to_string(pids).expect("the ids");
    for pid in text.split_whitespace() {
        until("the program has ended", || !is_alive(pid));
    }
}
