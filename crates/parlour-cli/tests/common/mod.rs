//! The real binary, started, watched and ended by tests.

#![allow(clippy::disallowed_methods, reason = "programs that are watched keep real time")]
#![allow(dead_code, reason = "each test file uses what it needs")]

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Nothing a test waits for takes longer, even on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The binary, in an empty directory and with no settings but those of its arguments.
pub(crate) struct Parlour {
    command: Command,
    _home: TempDir,
}

/// How a program ended, and what it printed.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Ended {
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("stdout is UTF-8")
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Fails the test unless the program ended with this code.
    #[track_caller]
    pub(crate) fn with_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        self
    }
}

/// `parlour` with these arguments.
pub(crate) fn parlour<'a>(args: impl IntoIterator<Item = &'a str>) -> Parlour {
    let home = TempDir::new().expect("a directory");
    let mut command = Command::new(env!("CARGO_BIN_EXE_parlour"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PARLOUR_") {
            command.env_remove(name);
        }
    }
    command.args(args).current_dir(home.path()).stdin(Stdio::null());
    command.env("HOME", home.path()).env("XDG_CONFIG_HOME", home.path().join("config"));
    command.env("XDG_DATA_HOME", home.path().join("data"));
    command.env_remove("NO_COLOR");
    Parlour { command, _home: home }
}

impl Parlour {
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Puts a file into the directory that the program starts in.
    pub(crate) fn file(self, name: &str, text: &str) -> Self {
        let path = self._home.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        std::fs::write(path, text).expect("a file");
        self
    }

    /// Runs it to its end.
    #[track_caller]
    pub(crate) fn run(self) -> Ended {
        self.run_with(b"")
    }

    /// Runs it to its end with this on its stdin.
    #[track_caller]
    pub(crate) fn run_with(mut self, input: &[u8]) -> Ended {
        let stdin = if input.is_empty() { Stdio::null() } else { Stdio::piped() };
        let mut child = Guard(
            self.command
                .stdin(stdin)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .expect("the binary starts"),
        );
        if let Some(mut stdin) = child.0.stdin.take() {
            let input = input.to_vec();
            thread::spawn(move || stdin.write_all(&input));
        }
        let stdout = collect(child.0.stdout.take().expect("stdout"));
        let stderr = collect(child.0.stderr.take().expect("stderr"));
        let status = child.wait();
        let all =
            |stream: Receiver<Vec<u8>>| stream.recv_timeout(PATIENCE).expect("the stream ends");
        Ended {
            code: status.code(),
            stdout: all(stdout),
            stderr: String::from_utf8(all(stderr)).expect("stderr is UTF-8"),
        }
    }

    /// Starts it, to be watched while it runs.
    pub(crate) fn start(mut self) -> Running {
        let mut child = self
            .command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let stdout = lines(child.stdout.take().expect("stdout"));
        let stderr = lines(child.stderr.take().expect("stderr"));
        Running { child: Guard(child), stdout, stderr, _home: self._home }
    }
}

/// A program that runs; it is killed when this is dropped.
pub(crate) struct Running {
    child: Guard,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
    _home: TempDir,
}

impl Running {
    /// The next line on stderr that holds this text.
    #[track_caller]
    pub(crate) fn said(&self, text: &str) -> String {
        next(&self.stderr, text)
    }

    /// The next line on stdout that holds this text.
    #[track_caller]
    pub(crate) fn printed(&self, text: &str) -> String {
        next(&self.stdout, text)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it runs");
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child.0)
    }

    /// The ids of the processes that it started and has not waited for.
    pub(crate) fn children(&self) -> Vec<String> {
        let tasks = format!("/proc/{}/task", self.pid().as_raw_nonzero());
        let children = |task: std::fs::DirEntry| {
            let ids = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            ids.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        std::fs::read_dir(tasks).expect("it runs").flatten().flat_map(children).collect()
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.child.wait()
    }

    /// Closes the reading end of its stdout.
    pub(crate) fn stop_reading(&mut self) {
        let (_, nobody) = channel();
        self.stdout = nobody;
    }
}

/// A host of its own, on a free port.
pub(crate) struct Room {
    pub(crate) host: Running,
    pub(crate) url: String,
}

impl Room {
    pub(crate) fn open() -> Self {
        Self::open_with([])
    }

    pub(crate) fn open_with<'a>(more: impl IntoIterator<Item = &'a str>) -> Self {
        Self::open_at("127.0.0.1:0", more)
    }

    /// One at this address.
    pub(crate) fn open_at<'a>(address: &'a str, more: impl IntoIterator<Item = &'a str>) -> Self {
        Self::start(["serve", "--listen", address, "--memory"].into_iter().chain(more))
    }

    /// One at this address that keeps its data in this directory.
    pub(crate) fn kept_at(address: &str, data: &str) -> Self {
        Self::start(["serve", "--listen", address, "--data", data])
    }

    fn start<'a>(args: impl IntoIterator<Item = &'a str>) -> Self {
        let host = parlour(args).start();
        let line = host.said("listening on http://");
        let (_, url) = line.split_once("listening on ").expect("an address");
        Self { url: url.to_owned(), host }
    }

    /// `parlour` with these arguments and the address of this room.
    pub(crate) fn parlour<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Parlour {
        parlour(args).env("PARLOUR_URL", &self.url)
    }

    /// A worker with these arguments, once it is registered.
    pub(crate) fn worker<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Running {
        let worker = self.parlour(["worker"].into_iter().chain(args)).start();
        worker.said("serving ");
        worker
    }
}

/// Waits until this holds.
#[track_caller]
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "never: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Whether a process of this id exists and has not ended.
pub(crate) fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim().starts_with('Z'))
}

struct Guard(Child);

impl Guard {
    #[track_caller]
    fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        until("the program ends", || {
            status = self.0.try_wait().expect("it can be waited for");
            status.is_some()
        });
        status.expect("a status")
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn collect(mut stream: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (all, receiver) = channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let _ = all.send(bytes);
    });
    receiver
}

/// The lines of a stream. Without a receiver, the stream is closed.
fn lines(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (line, receiver) = channel();
    thread::spawn(move || {
        for text in BufReader::new(stream).lines().map_while(Result::ok) {
            if line.send(text).is_err() {
                break;
            }
        }
    });
    receiver
}

#[track_caller]
fn next(lines: &Receiver<String>, text: &str) -> String {
    let end = Instant::now() + PATIENCE;
    let mut seen = Vec::new();
    loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) if line.contains(text) => return line,
            Ok(line) => seen.push(line),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                panic!("never printed `{text}`, only {seen:#?}")
            }
        }
    }
}
