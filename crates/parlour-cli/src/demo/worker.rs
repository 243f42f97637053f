//! A worker of the demonstration: tells on stdout what it lives through, and ends with its stdin.

use std::future::ready;
use std::time::Duration;

use parlour::{Agent, Payload, Worker};
use tokio::io::AsyncReadExt;

use crate::args::{DemoKind, DemoWorker};
use crate::exit::{Code, Failure};
use crate::output::Output;
use crate::room;

/// What a worker of the demonstration says, a line each.
pub(super) const READY: &str = "ready";
pub(super) const RUNNING: &str = "running";
pub(super) const RECEIVED: &str = "received";

/// The topic that these workers listen to.
pub(super) const TOPIC_TYPE: &str = "demo.news";

pub(crate) fn run(args: &DemoWorker, output: &Output) -> Result<Code, Failure> {
    let runtime = room::runtime()?;
    let code = runtime.block_on(async {
        let name = name(args.kind);
        let (kind, output) = (args.kind, *output);
        let mut worker = Worker::builder(&args.url)
            .name(format!("demo {name}"))
            .on_connected(move || say(&output, READY))
            .agent(name, agent(kind, output));
        if kind != DemoKind::Slow {
            worker = worker.subscribe(TOPIC_TYPE, name);
        }
        tokio::select! {
            ended = worker.run() => ended.map(|()| Code::Ok).map_err(Failure::from),
            () = orphaned() => Ok(Code::Ok),
        }
    });
    // A thread waits for stdin.
    runtime.shutdown_background();
    code
}

/// The agent type that a worker of this kind serves.
pub(super) fn name(kind: DemoKind) -> &'static str {
    match kind {
        DemoKind::Reverse => "reverse",
        DemoKind::Upper => "upper",
        DemoKind::Slow => "slow",
    }
}

fn agent(kind: DemoKind, output: Output) -> Agent {
    let receive = move |text: String| {
        say(&output, &format!("{RECEIVED} {text}"));
        ready(())
    };
    let agent = Agent::stateless().on_event(receive);
    match kind {
        DemoKind::Reverse => {
            agent.on_call(async |text: String| text.chars().rev().collect::<String>())
        }
        DemoKind::Upper => agent.on_call(async |text: String| text.to_uppercase()),
        DemoKind::Slow => agent.on_call(move |message: Payload| async move {
            say(&output, RUNNING);
            tokio::time::sleep(Duration::from_secs(60)).await;
            message
        }),
    }
}

/// Tells the demonstration. If it has gone, `orphaned` ends this process too.
pub(super) fn say(output: &Output, line: &str) {
    let _ = output.line(line);
}

/// Waits until the demonstration has ended, however it did: its end of the pipe closes with it.
pub(super) async fn orphaned() {
    let mut stdin = tokio::io::stdin();
    let mut nothing = [0];
    while stdin.read(&mut nothing).await.is_ok_and(|length| length > 0) {}
}
