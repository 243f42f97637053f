//! A worker of the demonstration: tells on stdout what it lives through, and ends with its stdin.

use std::time::Duration;

use parlour::{Agent, AgentError, Cx, Payload, PayloadExt, TopicId, Worker};
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
            .agent(name, move |_key| DemoAgent { kind, output });
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

struct DemoAgent {
    kind: DemoKind,
    output: Output,
}

impl Agent for DemoAgent {
    async fn call(&self, _cx: Cx, message: Payload) -> Result<Payload, AgentError> {
        let text = message.to_text()?;
        match self.kind {
            DemoKind::Reverse => Ok(Payload::text(text.chars().rev().collect::<String>())),
            DemoKind::Upper => Ok(Payload::text(text.to_uppercase())),
            DemoKind::Slow => {
                say(&self.output, RUNNING);
                tokio::time::sleep(Duration::from_secs(60)).await;
                Ok(message)
            }
        }
    }

    async fn event(&self, _cx: Cx, _: TopicId, message: Payload) -> Result<(), AgentError> {
        say(&self.output, &format!("{RECEIVED} {}", message.to_text()?));
        Ok(())
    }
}

/// Tells the demonstration. If it has gone, `orphaned` ends this process too.
fn say(output: &Output, line: &str) {
    let _ = output.line(line);
}

/// Waits until the demonstration has ended, however it did: its end of the pipe closes with it.
async fn orphaned() {
    let mut stdin = tokio::io::stdin();
    let mut nothing = [0];
    while stdin.read(&mut nothing).await.is_ok_and(|length| length > 0) {}
}
