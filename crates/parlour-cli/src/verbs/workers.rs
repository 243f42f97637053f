//! `parlour workers`: who is connected, and how busy they are.

use std::time::Duration;

use serde_json::Value;

use crate::args::Client;
use crate::exit::{Code, Failure};
use crate::output::{Output, Table};
use crate::rest::{Rest, items, number, text, texts};
use crate::room;

pub(crate) fn run(client: &Client, output: &Output) -> Result<Code, Failure> {
    room::run(list(client, output))
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
        "IN FLIGHT",
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
            number(worker, "in_flight").to_string(),
            number(worker, "queued").to_string(),
            age(Duration::from_millis(number(worker, "connected_ms"))),
        ]);
    }
    output.list(workers, &document, &table)?;
    Ok(Code::Ok)
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
