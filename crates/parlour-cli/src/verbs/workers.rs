//! `parlour workers`: who is connected, and how busy they are; and having one of them leave.

use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use crate::args::{Client, Drain, Workers, WorkersAction};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output, Table, escape};
use crate::rest::{Rest, items, number, text, texts};
use crate::room;

pub(crate) fn run(args: &Workers, output: &Output) -> Result<Code, Failure> {
    match &args.action {
        None => room::run(list(&args.client, output)),
        Some(WorkersAction::Drain(args)) => room::run(drain(args, output)),
    }
}

async fn list(client: &Client, output: &Output) -> Result<Code, Failure> {
    let document = Rest::new(client)?.read("/v1/workers").await?;
    let workers = items(&document, "workers");
    let mut table = Table::new(&[
        "ID",
        "NAME",
        "PROTOCOL",
        "PRINCIPAL",
        "STATE",
        "AGENT TYPES",
        "CAPACITY",
        "IN FLIGHT",
        "KEYS",
        "CREDIT",
        "QUEUED",
        "FOR",
    ]);
    for worker in workers {
        table.row([
            text(worker, "id"),
            text(worker, "name"),
            text(worker, "protocol"),
            text(worker, "principal"),
            state(worker).to_owned(),
            texts(worker, "agent_types"),
            capacity(worker),
            number(worker, "in_flight").to_string(),
            number(worker, "keys").to_string(),
            text(worker, "credit"),
            number(worker, "queued").to_string(),
            age(Duration::from_millis(number(worker, "connected_ms"))),
        ]);
    }
    output.list(workers, &document, &table)?;
    Ok(Code::Ok)
}

async fn drain(args: &Drain, output: &Output) -> Result<Code, Failure> {
    let name = utf8_percent_encode(&args.worker, NON_ALPHANUMERIC);
    let document = Rest::new(&args.client)?.post(&format!("/v1/workers/{name}/drain")).await?;
    if output.mode() != Mode::Text {
        output.json(&document)?;
        return Ok(Code::Ok);
    }
    let (name, id) = (text(&document, "name"), number(&document, "id"));
    let running = match number(&document, "in_flight") {
        1 => "1 call".to_owned(),
        calls => format!("{calls} calls"),
    };
    output.line(&format!("{} ({id}) drains, with {running} in flight", escape(&name)))?;
    Ok(Code::Ok)
}

/// For each agent type how much it takes, or once if that is the same for all.
fn capacity(worker: &Value) -> String {
    let types = worker.get("capacity").and_then(Value::as_object);
    let mut all: Vec<_> = types.into_iter().flat_map(|types| types.values()).collect();
    all.dedup();
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn state(worker: &Value) -> &'static str {
    let is = |key| worker.get(key).and_then(Value::as_bool).unwrap_or_default();
    match (is("connected"), is("draining")) {
        (_, true) => "draining",
        (true, _) => "connected",
        (false, _) => "away",
    }
}

fn age(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..60 => format!("{seconds}s"),
        seconds @ 60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        seconds => format!("{}h{}m", seconds / 3600, seconds / 60 % 60),
    }
}
