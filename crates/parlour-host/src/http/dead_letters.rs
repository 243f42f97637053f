//! Dead letters: deliveries that failed for good, kept until somebody sends them back or gives them up.

use axum::extract::{Request, State};
use parlour_core::durable::{DeliveryId, State as Life};
use parlour_core::{AgentType, Fault, FaultKind};
use serde::Deserialize;
use serde_json::{Value, json};

use super::answer::{Answer, Refusal, invalid, json as json_answer};
use super::body;
use super::deliveries::{Filter, Reason, list, summary, view};
use super::router::{App, Fields, Segments};
use super::sse::Content;
use crate::durable::Action;

/// `GET /v1/dead-letters`
pub(crate) async fn all(State(app): State<App>, Fields(filter): Fields<Filter>) -> Answer {
    list(&app, filter, Some(Life::Dead), "dead_letters").await
}

/// `GET /v1/dead-letters/{id}`: the whole story, and what was to be delivered.
pub(crate) async fn one(State(app): State<App>, Segments(id): Segments<String>) -> Answer {
    let id = DeliveryId::parse(&id)?;
    let found = app.durable.get(id, None).await?;
    let delivery = found.delivery();
    if delivery.state != Life::Dead {
        let detail = format!("the delivery {id} is {}", delivery.state.name());
        let hint = format!("see GET /v1/deliveries/{id}");
        return Err(Fault::new(FaultKind::NotFound, detail).hint(hint).into());
    }
    let message = app.durable.message(id).await?;
    let header = &message.header;
    let metadata = message.payload.metadata.iter();
    let metadata: serde_json::Map<String, Value> =
        metadata.map(|(name, value)| (name.to_owned(), value.into())).collect();
    let mut answer = view(delivery, 0);
    answer["message"] = json!({
        "id": header.id.as_str(),
        "cause": header.cause.as_ref().map(|cause| cause.as_str()),
        "principal": header.principal.as_str(),
        "sender": header.sender.as_ref().map(ToString::to_string),
        "idempotency_key": header.idempotency_key.as_deref(),
        "metadata": metadata,
        "content": Content::from(&message.payload),
    });
    Ok(json_answer(&answer))
}

/// `POST /v1/dead-letters/{id}/redrive`: it has all its attempts again.
pub(crate) async fn redrive(State(app): State<App>, Segments(id): Segments<String>) -> Answer {
    let id = DeliveryId::parse(&id)?;
    app.durable.redrive(id).await?;
    let found = app.durable.get(id, None).await?;
    Ok(json_answer(&summary(found.delivery())))
}

/// `POST /v1/dead-letters/{id}/discard`
pub(crate) async fn discard(
    State(app): State<App>,
    Segments(id): Segments<String>,
    Fields(reason): Fields<Reason>,
) -> Answer {
    let id = DeliveryId::parse(&id)?;
    app.durable.discard(id, reason.text()?).await?;
    Ok(json_answer(&json!({"id": id.to_string(), "discarded": true})))
}

/// Which dead letters something is done to at once.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Many {
    /// Those of this type.
    agent_type: String,
    /// At most so many, or else all.
    limit: Option<usize>,
    reason: Option<String>,
}

impl Many {
    async fn read(app: &App, request: Request) -> Result<(AgentType, usize, Reason), Refusal> {
        let Self { agent_type, limit, reason } = body::object(request, &app.exchange).await?;
        if limit == Some(0) {
            return Err(invalid("`limit` is 0, so that nothing would be done")
                .hint("ask for 1 or more, or leave it out for all")
                .into());
        }
        let agent_type = AgentType::parse(agent_type)?;
        Ok((agent_type, limit.unwrap_or(usize::MAX), Reason { reason }))
    }
}

/// `POST /v1/dead-letters/redrive`: has those of a type attempted again, the oldest of each partition
/// first.
pub(crate) async fn redrive_many(State(app): State<App>, request: Request) -> Answer {
    let (agent_type, limit, reason) = Many::read(&app, request).await?;
    if reason.reason.is_some() {
        return Err(invalid("a redrive has no `reason`").hint("leave it out").into());
    }
    let worked = app.durable.all(&agent_type, Action::Redrive, limit).await?;
    many(&app, &agent_type, "redriven", worked.done).await
}

/// `POST /v1/dead-letters/discard`: gives those of a type up, the oldest of each partition first.
pub(crate) async fn discard_many(State(app): State<App>, request: Request) -> Answer {
    let (agent_type, limit, reason) = Many::read(&app, request).await?;
    let worked = app.durable.all(&agent_type, Action::Discard(reason.text()?), limit).await?;
    many(&app, &agent_type, "discarded", worked.done).await
}

async fn many(app: &App, agent_type: &AgentType, what: &str, done: usize) -> Answer {
    let left = app.durable.tally(agent_type).await.standing.dead;
    Ok(json_answer(&json!({"agent_type": agent_type.as_str(), what: done, "left": left})))
}
