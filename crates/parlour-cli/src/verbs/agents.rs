//! `parlour agents`: the agent types that workers serve now, and how those get what was accepted for
//! later.

use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Map, Value};

use crate::args::{Agents, AgentsAction, Client};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output, Table, escape};
use crate::rest::{Rest, count, items, number, text, texts};
use crate::room;
use crate::verbs::deliveries::query;

/// How much longer than anything else a purge may take.
const PURGE: Duration = Duration::from_secs(600);

pub(crate) fn run(args: &Agents, output: &Output) -> Result<Code, Failure> {
    room::run(async {
        match &args.action {
            None => list(&args.client, output).await,
            Some(AgentsAction::Pause(of)) => {
                let answer = Rest::new(&of.client)?.post(&path(&of.agent_type, "pause")).await?;
                say(&answer, "is paused: what is accepted for it waits", output)
            }
            Some(AgentsAction::Resume(of)) => {
                let answer = Rest::new(&of.client)?.post(&path(&of.agent_type, "resume")).await?;
                say(&answer, "is delivered to again", output)
            }
            Some(AgentsAction::Purge { of, reason }) => {
                let reason = query("reason", reason.as_deref());
                let path = format!("{}{reason}", path(&of.agent_type, "purge"));
                let answer =
                    Rest::new(&of.client)?.post_and_wait(&path, &Value::Null, PURGE).await?;
                let (cancelled, left) =
                    (number(&answer, "cancelled"), number(&answer, "in_flight"));
                let text =
                    format!("had {cancelled} that waited, now cancelled; {left} in flight go on");
                say(&answer, &text, output)
            }
            Some(AgentsAction::Settings { agent_type: None, client }) => all(client, output).await,
            Some(AgentsAction::Settings { agent_type: Some(agent_type), client }) => {
                show(&Rest::new(client)?.read(&path(agent_type, "settings")).await?, output)
            }
            Some(AgentsAction::Set { of, settings }) => {
                let patch = Value::Object(settings.iter().map(setting).collect());
                let path = path(&of.agent_type, "settings");
                show(&Rest::new(&of.client)?.patch(&path, &patch).await?, output)
            }
            Some(AgentsAction::Reset(of)) => {
                let path = path(&of.agent_type, "settings");
                show(&Rest::new(&of.client)?.delete(&path).await?, output)
            }
        }
    })
}

fn path(agent_type: &str, door: &str) -> String {
    format!("/v1/agents/{}/{door}", utf8_percent_encode(agent_type, NON_ALPHANUMERIC))
}

/// A setting as the host reads it: a number, true or false where it looks like one, or else a text.
fn setting((name, value): &(String, String)) -> (String, Value) {
    let value = match value.as_str() {
        "" => Value::Null,
        text => serde_json::from_str(text)
            .ok()
            .filter(|it: &Value| it.is_number() || it.is_boolean())
            .unwrap_or_else(|| text.into()),
    };
    (name.clone(), value)
}

/// Says what has become of an agent type.
fn say(answer: &Value, what: &str, output: &Output) -> Result<Code, Failure> {
    if output.mode() == Mode::Text {
        output.line(&format!("{} {what}", escape(&text(answer, "type"))))?;
    } else {
        output.json(answer)?;
    }
    Ok(Code::Ok)
}

/// Shows what was set for one agent type, and what holds.
fn show(settings: &Value, output: &Output) -> Result<Code, Failure> {
    let nothing = Map::new();
    let in_force = settings.get("in_force").and_then(Value::as_object).unwrap_or(&nothing);
    let mut table = Table::new(&["NAME", "SET", "IN FORCE"]);
    for (name, holds) in in_force {
        table.row([name.clone(), cell(settings.get(name)), cell(Some(holds))]);
    }
    output.list(std::slice::from_ref(settings), settings, &table)?;
    Ok(Code::Ok)
}

fn cell(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
    }
}

/// Lists the agent types that something was set for.
async fn all(client: &Client, output: &Output) -> Result<Code, Failure> {
    let document = Rest::new(client)?.read("/v1/settings").await?;
    let agents = items(&document, "agents");
    let mut table = Table::new(&["TYPE", "PAUSED", "SET"]);
    for agent in agents {
        let fields = agent.as_object().into_iter().flatten();
        let set = fields.filter(|(name, value)| {
            !matches!(name.as_str(), "type" | "paused" | "in_force") && !value.is_null()
        });
        let set: Vec<_> =
            set.map(|(name, value)| format!("{name}={}", cell(Some(value)))).collect();
        let paused = if agent.get("paused") == Some(&true.into()) { "yes" } else { "no" };
        table.row([text(agent, "type"), paused.to_owned(), set.join(" ")]);
    }
    output.list(agents, &document, &table)?;
    if agents.is_empty() && output.mode() == Mode::Text {
        output.note("nothing is set for any agent type; `parlour agents set --help` says how");
    }
    Ok(Code::Ok)
}

async fn list(client: &Client, output: &Output) -> Result<Code, Failure> {
    let document = Rest::new(client)?.read("/v1/agents").await?;
    let agents = items(&document, "agents");
    let mut table =
        Table::new(&["TYPE", "WORKERS", "EXCLUSIVE", "PAUSED", "CAPABILITIES", "REGISTERED KEYS"]);
    for agent in agents {
        let is = |name| agent.get(name).and_then(Value::as_bool).unwrap_or_default();
        let yes_or_no = |name| if is(name) { "yes" } else { "no" }.to_owned();
        table.row([
            text(agent, "type"),
            count(items(agent, "workers").len()),
            yes_or_no("exclusive"),
            yes_or_no("paused"),
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
