//! `parlour agents`: the agent types that workers serve now.

use serde_json::Value;

use crate::args::Client;
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output, Table};
use crate::rest::{Rest, count, items, text, texts};
use crate::room;

pub(crate) fn run(client: &Client, output: &Output) -> Result<Code, Failure> {
    room::run(list(client, output))
}

async fn list(client: &Client, output: &Output) -> Result<Code, Failure> {
    let document = Rest::new(client)?.read("/v1/agents").await?;
    let agents = items(&document, "agents");
    let mut table =
        Table::new(&["TYPE", "WORKERS", "EXCLUSIVE", "CAPABILITIES", "REGISTERED KEYS"]);
    for agent in agents {
        let exclusive = agent.get("exclusive").and_then(Value::as_bool).unwrap_or_default();
        table.row([
            text(agent, "type"),
            count(items(agent, "workers").len()),
            if exclusive { "yes" } else { "no" }.to_owned(),
            texts(agent, "capabilities"),
            count(items(agent, "instances").len()),
        ]);
    }
    output.list(agents, &document, &table)?;
    if agents.is_empty() && output.mode() == Mode::Text {
        output.note("no worker serves an agent now; `parlour worker echo --echo` starts one");
    }
    Ok(Code::Ok)
}
