//! The agent types of the room, and what they say of themselves.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use axum::extract::{Request, State};
use bytestring::ByteString;
use parlour_core::wire::HeaderFields;
use parlour_core::{AgentId, AgentType, Call, FaultKind, Key, Payload};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::answer::{Answer, json as json_answer};
use super::rest::{DEADLINE_MS, number, origin};
use super::router::{App, Segments};
use crate::channel::dialect;

/// The data type of the call that every agent answers with what it is.
const DESCRIBE: ByteString = ByteString::from_static("parlour.describe");
/// How long a worker may take for that, unless the request says otherwise.
const DESCRIBE_TIME: Duration = Duration::from_secs(5);

/// `GET /v1/agents`
pub(crate) async fn all(State(app): State<App>) -> Answer {
    Ok(json_answer(&json!({"agents": entries(&app, |_| true)})))
}

/// `GET /v1/agents/{type}`
pub(crate) async fn one(
    State(app): State<App>,
    Segments(agent_type): Segments<String>,
    request: Request,
) -> Answer {
    let agent_type = AgentType::parse(agent_type)?;
    let timeout = number(request.headers(), &DEADLINE_MS)?.map(Duration::from_millis);
    let mut entry = entries(&app, |listed| *listed == agent_type).pop().unwrap_or_default();
    // All agents of a type say the same. Where only single ones are served, it takes one of these.
    let directory = app.exchange.directory();
    let mut agent = AgentId::new(agent_type.clone(), Key::parse("default")?);
    if directory.route(&agent).is_none()
        && let Some(key) = entry["instances"][0].as_str()
    {
        agent = AgentId::new(agent_type, Key::parse(key)?);
    }
    let protocol = directory.route(&agent).map(|(_, peer)| peer.protocol);
    let described = if protocol == Some(dialect::NAME) {
        // An agent there would take it for a message like any other.
        Err(format!("its worker speaks {}, which has no descriptions", dialect::NAME))
    } else {
        let now = Instant::now();
        let payload = Payload { data_type: DESCRIBE, ..Payload::default() };
        let header = app.exchange.stamp(HeaderFields::default(), &origin(&request), now);
        let deadline = app.exchange.deadline(timeout.or(Some(DESCRIBE_TIME)), now).into_std();
        let call = Call {
            header,
            target: agent,
            deadline,
            progress: false,
            attempt: None,
            topic: None,
            payload,
        };
        match app.exchange.call(call, None).await {
            Ok(payload) => serde_json::from_slice::<Value>(&payload.bytes)
                .map_err(|error| format!("its answer to {DESCRIBE} is no JSON: {error}")),
            Err(fault) if fault.kind() == FaultKind::UnknownAgent => return Err(fault.into()),
            Err(fault) => Err(fault.to_string()),
        }
    };
    match described {
        Ok(description) => entry["description"] = description,
        Err(why) => {
            entry["description"] = Value::Null;
            entry["undescribed"] = why.into();
        }
    }
    Ok(json_answer(&entry))
}

/// The agent types that are wanted, in the order of their names.
fn entries(app: &App, wanted: impl Fn(&AgentType) -> bool) -> Vec<Value> {
    let directory = app.exchange.directory();
    let names: HashMap<_, _> =
        app.exchange.peers().into_iter().map(|peer| (peer.id, peer.name())).collect();
    let room = app.durable.room_so_far();
    let is_paused = |agent_type: &AgentType| room.of(agent_type).paused;
    let mut agents = BTreeMap::<&str, Value>::new();
    for (agent_type, exclusive, workers) in directory.agent_types() {
        if !wanted(agent_type) {
            continue;
        }
        let workers: Vec<_> = workers.collect();
        let mut capabilities: Vec<&str> =
            workers.iter().flat_map(|(_, names)| names.iter()).map(|name| &**name).collect();
        capabilities.sort_unstable();
        capabilities.dedup();
        let workers = workers
            .iter()
            .map(|(id, _)| json!({"id": id.0, "name": names.get(id).map_or("", |name| &**name)}));
        agents.insert(
            agent_type.as_str(),
            json!({
                "type": agent_type.as_str(),
                "exclusive": exclusive,
                "paused": is_paused(agent_type),
                "workers": workers.collect::<Vec<_>>(),
                "capabilities": capabilities,
                "instances": [],
            }),
        );
    }
    for (agent, worker) in directory.instances() {
        if !wanted(&agent.agent_type) {
            continue;
        }
        let entry = agents.entry(agent.agent_type.as_str()).or_insert_with(|| {
            json!({
                "type": agent.agent_type.as_str(),
                "exclusive": false,
                "paused": is_paused(&agent.agent_type),
                "workers": [{
                    "id": worker.0,
                    "name": names.get(&worker).map_or("", |name| &**name),
                }],
                "capabilities": [],
                "instances": [],
            })
        });
        if let Some(instances) = entry["instances"].as_array_mut() {
            instances.push(agent.key.as_str().into());
        }
    }
    agents.into_values().collect()
}
