//! Dead letters: deliveries that failed for good, kept until somebody sends them back or gives them up.

use axum::extract::{Query, State};
use parlour_core::durable::{DeliveryId, State as Life};
use parlour_core::{Fault, FaultKind};
use serde_json::{Value, json};

use super::answer::{Answer, json as json_answer};
use super::deliveries::{Filter, Reason, list, summary, view};
use super::router::{App, Segments};
use super::sse::Content;

/// `GET /v1/dead-letters`
pub(crate) async fn all(State(app): State<App>, Query(filter): Query<Filter>) -> Answer {
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
    Query(Reason { reason }): Query<Reason>,
) -> Answer {
    let id = DeliveryId::parse(&id)?;
    app.durable.discard(id, reason.unwrap_or_default().into()).await?;
    Ok(json_answer(&json!({"id": id.to_string(), "discarded": true})))
}
