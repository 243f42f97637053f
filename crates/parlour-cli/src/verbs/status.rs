//! `parlour status`: whether the host is ready, and what it has to do.

use serde_json::json;

use crate::args::Client;
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output, escape};
use crate::rest::{Rest, items, number, text};
use crate::room;

pub(crate) fn run(client: &Client, output: &Output) -> Result<Code, Failure> {
    room::run(status(client, output))
}

async fn status(client: &Client, output: &Output) -> Result<Code, Failure> {
    let rest = Rest::new(client)?;
    let is_ready = rest.is_ok("/readyz").await?;
    let version = rest.read("/version").await?;
    let workers = rest.read("/v1/workers").await?;
    let agents = rest.read("/v1/agents").await?;
    let workers = items(&workers, "workers");
    let sum = |key| workers.iter().map(|worker| number(worker, key)).sum::<u64>();
    let document = json!({
        "url": client.url,
        "ready": is_ready,
        "version": text(&version, "version"),
        "workers": workers.len(),
        "agent_types": items(&agents, "agents").len(),
        "in_flight": sum("in_flight"),
        "queued": sum("queued"),
        "queued_bytes": sum("queued_bytes"),
    });
    if output.mode() == Mode::Text {
        let state = if is_ready { "ready" } else { "not ready: it is shutting down" };
        output.line(&format!(
            "{} {} at {}: {state}",
            escape(&text(&version, "name")),
            escape(&text(&version, "version")),
            escape(&client.url)
        ))?;
        for (name, key) in [
            ("connected", "workers"),
            ("agent types", "agent_types"),
            ("calls in flight", "in_flight"),
            ("messages queued", "queued"),
            ("bytes queued", "queued_bytes"),
        ] {
            output.line(&format!("{name:<16}{}", number(&document, key)))?;
        }
    } else {
        output.json(&document)?;
    }
    Ok(if is_ready { Code::Ok } else { Code::Failed })
}
