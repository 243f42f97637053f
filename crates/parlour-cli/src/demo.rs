//! `parlour demo`: a room at work, one step after the other, each with the time it took.

use std::ffi::OsStr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use parlour::{Client, ErrorKind, FaultKind, PayloadExt};
use parlour_host::{Config, Host};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::TcpListener;
use tokio::process::{Child, ChildStdout, Command};

use crate::args::{Demo, DemoKind};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output, escape};
use crate::signals::Signals;

pub(crate) mod kept;
pub(crate) mod worker;

const GREETING: &str = "Hello distributed HTTP runtime!";
const REVERSED: &str = "!emitnur PTTH detubirtsid olleH";
const UPPERED: &str = "HELLO DISTRIBUTED HTTP RUNTIME!";
const NEWS: &str = "the kettle is on";
/// Every step is a matter of milliseconds; a machine that is busy gets this much.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long the host waits for a worker that was killed. Short: nobody likes to wait at a demo.
const GRACE: Duration = Duration::from_secs(1);

pub(crate) fn run(args: &Demo, output: &Output) -> Result<Code, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Code::Failed, format!("cannot start threads: {error}")))?;
    let code = runtime.block_on(async {
        let mut signals = Signals::install()?;
        let room = tokio::select! {
            room = show(output) => room?,
            code = signals.next() => return Ok(code),
        };
        if !args.once {
            room.suggest(output)?;
            signals.next().await;
        }
        room.close().await;
        Ok(Code::Ok)
    });
    runtime.shutdown_background();
    code
}

/// A room with two workers and a caller.
struct Room {
    url: String,
    reverse: Process,
    upper: Process,
    client: Client,
}

/// Goes through all steps. Fails if one of them shows anything but what it should.
async fn show(output: &Output) -> Result<Room, Failure> {
    let began = now();
    let url = open().await?;
    step(output, json!({"step": "host", "url": url}), began, &format!("host on {url}"))?;

    let began = now();
    let mut reverse = Process::start(DemoKind::Reverse, &url)?;
    let mut upper = Process::start(DemoKind::Upper, &url)?;
    reverse.says(worker::READY).await?;
    upper.says(worker::READY).await?;
    let client = Client::connect(&url).await?;
    let pids = [reverse.pid(), upper.pid()];
    step(
        output,
        json!({"step": "workers", "reverse": pids[0], "upper": pids[1]}),
        began,
        &format!("workers joined: reverse is process {}, upper is process {}", pids[0], pids[1]),
    )?;

    call(&client, "reverse", REVERSED, output).await?;
    call(&client, "upper", UPPERED, output).await?;
    publish(&client, &mut reverse, &mut upper, output).await?;
    lose(&client, &url, output).await?;
    kept::show(output).await?;
    Ok(Room { url, reverse, upper, client })
}

/// Starts a host in this process, on a free port.
async fn open() -> Result<String, Failure> {
    let failed = |error: std::io::Error| Failure::new(Code::Failed, format!("no host: {error}"));
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
    let url = format!("http://{}", listener.local_addr().map_err(failed)?);
    let mut config = Config::default();
    config.timeouts.grace = GRACE;
    let host = Host::new(config);
    tokio::spawn(host.serve(listener, std::future::pending()));
    Ok(url)
}

async fn call(
    client: &Client,
    agent: &str,
    expected: &str,
    output: &Output,
) -> Result<(), Failure> {
    let began = now();
    let reply = client.call(agent, GREETING).timeout(PATIENCE).await?;
    let text = reply.to_text()?;
    let document = json!({"step": "call", "agent": agent, "sent": GREETING, "reply": text});
    step(output, document, began, &format!("{agent} → {}", escape(text)))?;
    same(&format!("the reply of {agent}"), text, expected)
}

/// One event, and both workers say that they have it.
async fn publish(
    client: &Client,
    reverse: &mut Process,
    upper: &mut Process,
    output: &Output,
) -> Result<(), Failure> {
    let began = now();
    let topic = format!("{}/today", worker::TOPIC_TYPE);
    let published = client.publish(&topic, NEWS).await?;
    let document = json!({"step": "publish", "topic": topic, "recipients": published.recipients});
    step(
        output,
        document,
        began,
        &format!("event on {topic} → {} recipients", published.recipients),
    )?;
    same("the number of recipients", &published.recipients.to_string(), "2")?;
    for (name, process) in [("reverse", reverse), ("upper", upper)] {
        let line = process.says(worker::RECEIVED).await?;
        let news = line.strip_prefix(worker::RECEIVED).unwrap_or_default().trim();
        let document = json!({"step": "event", "agent": name, "received": news});
        step(output, document, began, &format!("  {name} received: {}", escape(news)))?;
        same(&format!("the event that {name} received"), news, NEWS)?;
    }
    Ok(())
}

/// A call whose worker is killed while it runs, and what its caller is told.
async fn lose(client: &Client, url: &str, output: &Output) -> Result<(), Failure> {
    let mut slow = Process::start(DemoKind::Slow, url)?;
    slow.says(worker::READY).await?;
    let call = tokio::spawn(client.call("slow", GREETING).timeout(PATIENCE).into_future());
    slow.says(worker::RUNNING).await?;
    let began = now();
    let pid = slow.pid();
    slow.kill().await?;
    let answer = call.await.map_err(|error| Failure::new(Code::Failed, error.to_string()))?;
    let Err(error) = answer else {
        return Err(Failure::new(Code::Failed, "a worker that was killed has answered"));
    };
    let kind = match error.kind() {
        ErrorKind::Fault(kind) => kind.name(),
        _ => "no fault",
    };
    let ran = if error.may_have_run() { "it may have run" } else { "it has not run" };
    let document = json!({
        "step": "loss",
        "agent": "slow",
        "killed": pid,
        "kind": kind,
        "detail": error.to_string(),
        "may_have_run": error.may_have_run(),
    });
    let text = format!(
        "slow, killed at work and not back within {} s → {kind}: {}; {ran}",
        GRACE.as_secs(),
        escape(&error.to_string())
    );
    step(output, document, began, &text)?;
    same("what the caller is told", kind, FaultKind::WorkerLost.name())?;
    same("what the caller is told", ran, "it may have run")
}

impl Room {
    /// Names three things to try, as they can be typed.
    fn suggest(&self, output: &Output) -> Result<(), Failure> {
        let (program, url) = (program(), &self.url);
        let commands = [
            format!("{program} call reverse 'never odd or even' --url {url}"),
            format!("curl -H 'content-type: text/plain' -d hello {url}/v1/agents/upper/me/call"),
            format!("{program} worker words --url {url} -- wc -w"),
        ];
        if output.mode() != Mode::Text {
            return output.json(&json!({"step": "next", "url": url, "commands": commands}));
        }
        output.line("\nThe room stays open until Ctrl-C. Try next, in another terminal:")?;
        commands.iter().try_for_each(|command| output.line(&format!("  {command}")))
    }

    async fn close(mut self) {
        self.client.close().await;
        for process in [&mut self.reverse, &mut self.upper] {
            // It has ended by itself if it cannot be killed.
            let _ = process.child.kill().await;
        }
    }
}

/// A worker or a host in a process of its own. It ends with this value, and with this whole program too.
struct Process {
    name: &'static str,
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    fn start(kind: DemoKind, url: &str) -> Result<Self, Failure> {
        let name = worker::name(kind);
        Self::spawn(name, ["demo-worker", name, "--url", url].map(OsStr::new))
    }

    fn spawn<'a>(
        name: &'static str,
        args: impl IntoIterator<Item = &'a OsStr>,
    ) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| {
            Failure::new(Code::Failed, format!("cannot start the process `{name}`: {error}"))
        };
        let binary = std::env::current_exe().map_err(failed)?;
        let mut child = Command::new(binary)
            .args(args)
            .args(["--output", "text"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let stdout = child.stdout.take().ok_or_else(|| failed(std::io::ErrorKind::Other.into()))?;
        Ok(Self { name, child, lines: BufReader::new(stdout).lines() })
    }

    /// Waits for its next line that begins with `what`.
    async fn says(&mut self, what: &str) -> Result<String, Failure> {
        let name = self.name;
        let search = async {
            while let Ok(Some(line)) = self.lines.next_line().await {
                if line.starts_with(what) {
                    return Some(line);
                }
            }
            None
        };
        tokio::time::timeout(PATIENCE, search).await.ok().flatten().ok_or_else(|| {
            Failure::new(Code::Failed, format!("the process `{name}` did not say `{what}`"))
        })
    }

    /// Kills it, and waits until it has ended.
    async fn kill(&mut self) -> Result<(), Failure> {
        let pid = self.pid();
        self.child.kill().await.map_err(|error| {
            Failure::new(Code::Failed, format!("cannot kill process {pid}: {error}"))
        })
    }

    fn pid(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }
}

/// Prints what happened, and how long it took.
fn step(output: &Output, mut document: Value, began: Instant, text: &str) -> Result<(), Failure> {
    let micros = now().duration_since(began).as_micros() as f64;
    let millis = (micros / 10.0).round() / 100.0;
    if output.mode() == Mode::Text {
        return output.line(&format!("{text}  ({millis} ms)"));
    }
    document["took_ms"] = json!(millis);
    output.json(&document)
}

fn same(what: &str, found: &str, expected: &str) -> Result<(), Failure> {
    if found == expected {
        return Ok(());
    }
    let detail = format!("{what} should be `{expected}`, and is `{}`", escape(found));
    Err(Failure::new(Code::Failed, detail).hint("this is a bug: please report it with this output"))
}

/// How this program was called, as a shell would read it.
fn program() -> String {
    let name = std::env::args().next().unwrap_or_else(|| "parlour".to_owned());
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    if name.chars().all(is_plain) { name } else { format!("'{}'", name.replace('\'', "'\\''")) }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
