//! Starting and ending a host.

mod common;

use std::net::TcpListener;

use common::{Room, parlour};
use rustix::process::Signal;

#[test]
fn a_port_in_use_is_said_with_a_hint() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ended = parlour(["serve", "--memory", "--listen", &address]).run().with_code(75);
    assert!(ended.stderr.contains(&format!("error: {address} is in use")), "{}", ended.stderr);
    assert!(ended.stderr.contains("hint: "), "{}", ended.stderr);
    assert!(ended.stdout.is_empty());
}

#[test]
fn an_address_that_others_can_reach_needs_a_token_or_consent() {
    for address in ["0.0.0.0:0", "[::]:0"] {
        let ended = parlour(["serve", "--memory", "--listen", address]).run().with_code(78);
        assert!(ended.stderr.contains("--token-file"), "{}", ended.stderr);
        assert!(ended.stderr.contains("--insecure"), "{}", ended.stderr);
    }
    let open = parlour(["serve", "--memory", "--listen", "0.0.0.0:0", "--insecure"]).start();
    open.said("listening on http://0.0.0.0:");
    let guarded = parlour(["serve", "--memory", "--listen", "0.0.0.0:0", "--token-file", "token"])
        .file("token", "secret\n")
        .start();
    guarded.said("listening on http://0.0.0.0:");
}

#[test]
fn a_token_file_that_says_nothing_is_refused() {
    for (name, text) in [("missing", None), ("empty", Some("\n"))] {
        let mut serve =
            parlour(["serve", "--memory", "--listen", "127.0.0.1:0", "--token-file", name]);
        if let Some(text) = text {
            serve = serve.file(name, text);
        }
        let ended = serve.run().with_code(78);
        assert!(ended.stderr.contains(name), "{}", ended.stderr);
    }
}

#[test]
fn an_address_that_is_none_is_refused() {
    let ended = parlour(["serve", "--memory", "--listen", "9000"]).run().with_code(78);
    assert!(ended.stderr.contains("127.0.0.1:9000"), "{}", ended.stderr);
}

#[test]
fn data_is_kept_where_the_environment_says_unless_a_flag_says_otherwise() {
    let home = tempfile::tempdir().expect("a directory");
    let [given, data] = ["given", "data"].map(|name| home.path().join(name));
    let text = |path: &std::path::Path| path.to_str().expect("UTF-8").to_owned();
    let (given_text, data_text) = (text(&given), text(&data));
    let start = |args: &[&str]| {
        let args = ["serve", "--listen", "127.0.0.1:0"].into_iter().chain(args.iter().copied());
        let host = parlour(args).env("XDG_DATA_HOME", &data_text).start();
        host.said("listening on http://127.0.0.1:");
    };
    start(&["--memory"]);
    assert!(!data.exists());
    start(&["--data", &given_text]);
    assert!(given.join("parlour.db").exists() && !data.exists());
    start(&[]);
    assert!(data.join("parlour/parlour.db").exists());
}

#[test]
fn each_number_of_threads_serves() {
    for threads in ["1", "2"] {
        let room = Room::open_with(["--set", &format!("server.threads={threads}")]);
        room.parlour(["status"]).run().with_code(0);
    }
}

#[test]
fn a_signal_ends_an_idle_host_well() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut room = Room::open();
        room.host.signal(signal);
        assert_eq!(room.host.wait().code(), Some(0));
    }
}

#[test]
fn a_call_in_flight_is_finished_before_the_end() {
    let mut room = Room::open();
    let worker = room.worker(["slow", "--", "sh", "-c", "sleep 1; echo done"]);
    let call = room.parlour(["call", "slow", "x"]).start();
    busy(&room);
    room.host.signal(Signal::TERM);
    room.host.said("draining");
    call.printed("done");
    assert_eq!(room.host.wait().code(), Some(0));
    drop(worker);
}

#[test]
fn a_second_signal_ends_the_host_at_once() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let mut room = Room::open();
        let _worker = room.worker(["stuck", "--", "sleep", "60"]);
        let _call = room.parlour(["call", "stuck", "x"]).start();
        busy(&room);
        room.host.signal(signal);
        room.host.said("draining");
        room.host.signal(signal);
        assert_eq!(room.host.wait().code(), Some(code));
    }
}

/// Waits until one call is in flight.
fn busy(room: &Room) {
    common::until("a call is in flight", || {
        room.parlour(["status", "--json"]).run().with_code(0).json()["in_flight"] == 1
    });
}
