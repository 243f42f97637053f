//! The durable door: messages that are accepted for later, and what became of them.

use std::time::Duration;

use axum::extract::{Request, State};
use bytes::{Bytes, BytesMut};
use bytestring::ByteString;
use futures_util::StreamExt as _;
use futures_util::stream::unfold;
use http::{HeaderName, StatusCode, header};
use http_body::Frame;
use http_body_util::StreamBody;
use parlour_core::durable::{Accepted, Delivery, DeliveryId, State as Life, Step, Timestamp};
use parlour_core::{AgentId, AgentType, Fault, FaultKind, Key};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use super::answer::{Answer, Refusal, invalid, json as json_answer};
use super::problem::Problem;
use super::rest::{header_fields, number, origin, payload, reply_of, set};
use super::router::{App, Fields, Segments};
use super::sse::{HEARTBEAT, streaming, write_named};
use crate::durable::{self, Sending};

const DELAY_MS: HeaderName = HeaderName::from_static("parlour-delay-ms");
const DELIVER_AT: HeaderName = HeaderName::from_static("parlour-deliver-at");
const TTL_MS: HeaderName = HeaderName::from_static("parlour-ttl-ms");
pub(super) const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
const MAX_ATTEMPTS: HeaderName = HeaderName::from_static("parlour-max-attempts");

/// How many deliveries a list has unless it is asked for more or fewer, and at the most.
const PAGE: usize = 100;
const LONGEST_PAGE: usize = 1000;
/// The longest reason, in bytes.
const LONGEST_REASON: usize = 1024;

/// `POST /v1/agents/{type}/{key}/deliveries`
pub(crate) async fn accept(
    State(app): State<App>,
    Segments((agent_type, key)): Segments<(String, String)>,
    request: Request,
) -> Answer {
    let agent = AgentId::new(AgentType::parse(agent_type)?, Key::parse(key)?);
    let origin = origin(&request);
    let (parts, body) = request.into_parts();
    let headers = &parts.headers;
    let millis = |name| Ok::<_, Fault>(number(headers, name)?.map(Duration::from_millis));
    let (delay, ttl) = (millis(&DELAY_MS)?, millis(&TTL_MS)?);
    let deliver_at = number(headers, &DELIVER_AT)?.map(Timestamp);
    let max_attempts = number(headers, &MAX_ATTEMPTS)?;
    let max_attempts = max_attempts.map(|most| most.try_into().unwrap_or(u32::MAX));
    let now = Instant::now();
    let header = app.exchange.stamp(header_fields(headers)?, &origin, now);
    let payload = payload(&app, headers, body).await?;
    let sending = Sending { agent, header, payload, delay, deliver_at, ttl, max_attempts };
    let accepted = app.durable.send(sending, now).await?;
    let Accepted { id, conversation, .. } = accepted;
    let location = format!("/v1/deliveries/{id}");
    let mut response = json_answer(&Receipt {
        ack: app.durable.ack().name(),
        conversation: conversation.as_str(),
        generation: 1,
        id: &location["/v1/deliveries/".len()..],
    });
    *response.status_mut() = StatusCode::ACCEPTED;
    set(response.headers_mut(), header::LOCATION, &location);
    Ok(response)
}

/// What is said of a message that was accepted.
#[derive(Serialize)]
struct Receipt<'a> {
    ack: &'static str,
    conversation: &'a str,
    generation: u64,
    id: &'a str,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Patience {
    /// Only what is newer than this generation.
    after: Option<u64>,
    /// How long to wait for it.
    wait: Option<String>,
}

/// `GET /v1/deliveries/{id}`
pub(crate) async fn one(
    State(app): State<App>,
    Segments(id): Segments<String>,
    Fields(patience): Fields<Patience>,
) -> Answer {
    let id = DeliveryId::parse(&id)?;
    let wait = match &patience.wait {
        None => Duration::ZERO,
        Some(text) => crate::config::duration(text).ok_or_else(|| {
            let detail = format!("`wait` is no time: `{}`", text.escape_debug());
            invalid(detail).hint("write it like 500ms, 30s or 1m")
        })?,
    };
    let after = patience.after.unwrap_or_default();
    let found = app.durable.wait(id, after, None, Some(wait)).await?;
    Ok(json_answer(&view(found.delivery(), after)))
}

/// `GET /v1/deliveries/{id}/reply`
pub(crate) async fn reply(State(app): State<App>, Segments(id): Segments<String>) -> Answer {
    let id = DeliveryId::parse(&id)?;
    let found = app.durable.get(id, None).await?;
    let delivery = found.delivery();
    match found.reply() {
        Some(reply) => Ok(reply_of(reply.clone(), &delivery.conversation)),
        None if delivery.state.is_settled() => {
            let detail = format!("the delivery is {} and has no reply", delivery.state.name());
            let fault = delivery.fault().cloned();
            Err(Refusal::from(fault.unwrap_or_else(|| Fault::new(FaultKind::Gone, detail)))
                .conversation(delivery.conversation.as_str()))
        }
        None => {
            let detail = format!("the delivery is {} and has no reply yet", delivery.state.name());
            let hint = format!("wait for it: GET /v1/deliveries/{id}?wait=30s");
            Err(Fault::new(FaultKind::NotFound, detail).hint(hint).into())
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Reason {
    pub(super) reason: Option<String>,
}

impl Reason {
    /// The text, which each delivery that it is about keeps.
    pub(super) fn text(self) -> Result<ByteString, Fault> {
        let reason = self.reason.unwrap_or_default();
        if reason.len() > LONGEST_REASON {
            let detail = format!("`reason` has {} bytes", reason.len());
            return Err(invalid(detail).hint(format!("give at most {LONGEST_REASON}")));
        }
        Ok(reason.into())
    }
}

/// `POST /v1/deliveries/{id}/cancel`
pub(crate) async fn cancel(
    State(app): State<App>,
    Segments(id): Segments<String>,
    Fields(reason): Fields<Reason>,
) -> Answer {
    let id = DeliveryId::parse(&id)?;
    app.durable.cancel(id, reason.text()?).await?;
    let found = app.durable.get(id, None).await?;
    Ok(json_answer(&view(found.delivery(), 0)))
}

/// What a list is to have.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Filter {
    agent_type: Option<String>,
    state: Option<String>,
    limit: Option<usize>,
    /// The `next` of the list before.
    after: Option<String>,
}

/// `GET /v1/deliveries`: those that have not ended, and the dead, the oldest first.
pub(crate) async fn all(State(app): State<App>, Fields(filter): Fields<Filter>) -> Answer {
    list(&app, filter, None, "deliveries").await
}

/// A page of a list under this name.
pub(super) async fn list(
    app: &App,
    filter: Filter,
    state: Option<Life>,
    name: &'static str,
) -> Answer {
    let asked = filter.state.map(|name| {
        Life::from_name(&name).ok_or_else(|| {
            let states = Life::ALL.map(Life::name).join(", ");
            let detail = format!("`{}` is no state", name.escape_debug());
            invalid(detail).hint(format!("the states: {states}"))
        })
    });
    let after = filter.after.map(|text| {
        let cursor = text
            .split_once('_')
            .and_then(|(at, id)| Some((Timestamp(at.parse().ok()?), DeliveryId::parse(id).ok()?)));
        cursor.ok_or_else(|| {
            let detail = format!("`after` is no `next` of a list: `{}`", text.escape_debug());
            invalid(detail).hint("give the `next` of the last answer, or leave it out")
        })
    });
    let limit = filter.limit.unwrap_or(PAGE);
    if limit == 0 || limit > LONGEST_PAGE {
        let detail = format!("`limit` is {limit}");
        return Err(invalid(detail).hint(format!("ask for 1 to {LONGEST_PAGE}")).into());
    }
    let query = durable::Query {
        agent_type: filter.agent_type.map(AgentType::parse).transpose()?,
        state: state.or(asked.transpose()?),
        after: after.transpose()?,
        limit,
    };
    let page = app.durable.list(query).await?;
    let next = page.last().filter(|_| page.len() == limit);
    let next = next.map(|last| format!("{}_{}", last.accepted_at.0, last.id));
    Ok(json_answer(&json!({
        name: page.iter().map(summary).collect::<Vec<_>>(),
        "next": next,
    })))
}

/// `GET /v1/deliveries/{id}/events`: the steps as server-sent events, and the end of the stream with
/// that of the delivery. `Last-Event-ID` is the generation of the last one that came.
pub(crate) async fn events(
    State(app): State<App>,
    Segments(id): Segments<String>,
    request: Request,
) -> Answer {
    let id = DeliveryId::parse(&id)?;
    let after = number(request.headers(), &LAST_EVENT_ID)?.unwrap_or(0);
    let found = app.durable.get(id, None).await?;
    if !has_all_behind(found.delivery(), after) {
        let detail = format!("some of the steps behind {after} were let go");
        let hint = format!("begin with what is there: GET /v1/deliveries/{id}");
        return Err(Fault::new(FaultKind::Gone, detail).hint(hint).into());
    }
    let heartbeat = app.exchange.config().timeouts.heartbeat;
    let steps = unfold(Some((after, Some(found))), move |state| {
        let durable = app.durable.clone();
        async move {
            let (after, known) = state?;
            let found = match known {
                Some(found) => found,
                None => match timeout(heartbeat, durable.get(id, Some(after))).await {
                    Ok(found) => found.ok()?,
                    Err(_) => {
                        return Some((Bytes::from_static(HEARTBEAT), Some((after, None))));
                    }
                },
            };
            let delivery = found.delivery();
            // Whoever comes again is told that it has missed some.
            if !has_all_behind(delivery, after) {
                return None;
            }
            let mut text = BytesMut::new();
            for it in delivery.known_steps().filter(|step| step.generation > after) {
                let generation = it.generation.to_string();
                text.extend_from_slice(b"id: ");
                text.extend_from_slice(generation.as_bytes());
                text.extend_from_slice(b"\n");
                text.extend_from_slice(&write_named("step", &step(&it, delivery)));
            }
            let next = (!delivery.state.is_settled()).then_some((delivery.generation, None));
            Some((text.freeze(), next))
        }
    });
    Ok(streaming(StreamBody::new(steps.map(|text| Ok(Frame::data(text))))))
}

/// Whether no step behind this generation was let go.
fn has_all_behind(it: &Delivery, after: u64) -> bool {
    let newer = it.known_steps().filter(|step| step.generation > after).count() as u64;
    newer == it.generation.saturating_sub(after)
}

/// A delivery as a list shows it.
pub(super) fn summary(it: &Delivery) -> Value {
    let mut summary = view(it, u64::MAX);
    if let Some(fields) = summary.as_object_mut() {
        fields.remove("steps");
    }
    summary
}

/// A delivery as JSON, with the steps that are newer than `after`.
pub(super) fn view(it: &Delivery, after: u64) -> Value {
    let newer = it.known_steps().filter(|step| step.generation > after);
    json!({
        "id": it.id.to_string(),
        "agent": it.agent.to_string(),
        "state": it.state.name(),
        "generation": it.generation,
        "attempt": it.attempt,
        "max_attempts": it.max_attempts,
        "failed": it.failed,
        "lost": it.lost,
        "max_lost": it.max_lost,
        "next_attempt_at": it.next_attempt_at.map(|at| at.0),
        "expires_at": it.expires_at.map(|at| at.0),
        "conversation": it.conversation.as_str(),
        "accepted_at": it.accepted_at.0,
        "fault": it.fault().map(fault),
        "steps": newer.map(|step| self::step(&step, it)).collect::<Vec<_>>(),
    })
}

fn step(step: &Step, of: &Delivery) -> Value {
    let worker = step.worker.as_deref();
    json!({
        "generation": step.generation,
        "level": step.level.name(),
        "agent": of.agent.to_string(),
        "worker": worker,
        "attempt": step.attempt,
        "at": step.at.0,
        "details": match &step.fault {
            Some(fault) => fault.detail(),
            None => &*step.details,
        },
        "fault": step.fault.as_ref().map(fault),
    })
}

fn fault(fault: &Fault) -> Value {
    let status = super::problem::status(fault.kind());
    serde_json::to_value(Problem::new(fault, status, None)).unwrap_or_default()
}
