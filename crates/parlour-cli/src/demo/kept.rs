//! A message that outlives its host, and the host that is killed for it.

use std::ffi::OsStr;
use std::sync::Arc;

use http::HeaderMap;
use parlour_host::{Config, Host};
use serde_json::json;
use tempfile::TempDir;
use tokio::net::TcpListener;

use super::worker::{self, READY, orphaned, say};
use super::{GREETING, PATIENCE, Process, UPPERED, now, same, step};
use crate::args::{Client, DemoHost, DemoKind};
use crate::data;
use crate::exit::{Code, Failure};
use crate::output::{Output, escape};
use crate::rest::{Rest, number, text};
use crate::room;
use crate::verbs::deliveries::{self, ended};

/// A message is accepted, its host killed and started again, and then there is a worker for it.
pub(super) async fn show(output: &Output) -> Result<(), Failure> {
    let began = now();
    let dir = TempDir::with_prefix("parlour-demo-").map_err(|error| {
        Failure::new(Code::Failed, format!("cannot make a temporary directory: {error}"))
    })?;
    let (mut host, rest, _) = open(&dir).await?;
    let agent = worker::name(DemoKind::Upper);
    let path = format!("/v1/agents/{agent}/me/deliveries");
    let accepted = rest.send(&path, HeaderMap::new(), GREETING.into()).await?;
    let (id, ack, killed) = (text(&accepted, "id"), text(&accepted, "ack"), host.pid());
    let document = json!({
        "step": "send",
        "host": killed,
        "agent": agent,
        "sent": GREETING,
        "id": id,
        "ack": ack,
    });
    let said = format!(
        "sent for later to {agent}, which nobody serves on a second host → accepted as {id}: {ack}"
    );
    step(output, document, began, &said)?;
    same("what the host promises", &ack, "durable")?;

    let began = now();
    host.kill().await?;
    let (mut host, rest, url) = open(&dir).await?;
    let started = host.pid();
    let found = rest.read(&deliveries::path(&id)).await?;
    let (state, attempt) = (text(&found, "state"), number(&found, "attempt"));
    let document = json!({
        "step": "restart",
        "killed": killed,
        "started": started,
        "id": id,
        "state": state,
    });
    let said = format!(
        "that host, process {killed}, killed; started again as process {started} → {id} is {state}"
    );
    step(output, document, began, &said)?;
    same("the message", &format!("{state}, attempt {attempt}"), "accepted, attempt 0")?;

    let began = now();
    let mut upper = Process::start(DemoKind::Upper, &url)?;
    ended(&rest, &id, PATIENCE).await?;
    let reply = rest.bytes(&format!("{}/reply", deliveries::path(&id))).await?;
    let reply = String::from_utf8_lossy(&reply);
    let document = json!({"step": "arrival", "agent": agent, "id": id, "reply": reply});
    let said = format!("{agent} joined there, and the message arrived → {}", escape(&reply));
    step(output, document, began, &said)?;
    same("the reply to what was sent for later", &reply, UPPERED)?;
    upper.kill().await?;
    host.kill().await
}

/// Starts a host in a process of its own that keeps what it accepts in `dir`. Returns its address too.
async fn open(dir: &TempDir) -> Result<(Process, Rest, String), Failure> {
    let args = ["demo-host", "--data"].map(OsStr::new);
    let args = args.into_iter().chain([dir.path().as_os_str()]);
    let mut host = Process::spawn("host", args)?;
    let ready = host.says(READY).await?;
    let url = ready.strip_prefix(READY).unwrap_or_default().trim().to_owned();
    let rest = Rest::new(&Client { url: url.clone(), token_file: None })?;
    Ok((host, rest, url))
}

/// Is that host, on a free port, until it is killed or the demonstration has ended.
pub(crate) fn run(args: &DemoHost, output: &Output) -> Result<Code, Failure> {
    let runtime = room::runtime()?;
    let code = runtime.block_on(async {
        let failed =
            |error: std::io::Error| Failure::new(Code::Failed, format!("no host: {error}"));
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
        let mut config = Config::default();
        config.server.data.clone_from(&args.data);
        let host = Host::new(config.clone()).keep(Arc::new(data::open(&config)?));
        say(output, &format!("{READY} http://{}", listener.local_addr().map_err(failed)?));
        tokio::select! {
            ended = host.serve(listener, std::future::pending()) => {
                ended.map(|()| Code::Ok).map_err(failed)
            }
            () = orphaned() => Ok(Code::Ok),
        }
    });
    // A thread waits for stdin.
    runtime.shutdown_background();
    code
}
