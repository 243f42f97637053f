//! The REST door: calls, events, and what is in the room.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::response::Response;
use bytestring::ByteString;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use parlour_core::wire::HeaderFields;
use parlour_core::{
    AgentId, AgentType, Call, Directory, Event, Fault, Key, MessageId, Metadata, Payload,
    Principal, Target, TopicId, WorkerId,
};
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::answer::{Answer, Refusal, bad_name, invalid, json as json_answer};
use super::body;
use super::router::{App, Segments};
use super::{sse, subscriptions};
use crate::config::limits;
use crate::durable::{Publishing, no_ack};
use crate::exchange::{Origin, topic};
use crate::peer::Peer;

const DATA_TYPE: HeaderName = HeaderName::from_static("parlour-data-type");
pub(super) const DEADLINE_MS: HeaderName = HeaderName::from_static("parlour-deadline-ms");
pub(crate) const CONVERSATION: HeaderName = HeaderName::from_static("parlour-conversation");
const CAUSE: HeaderName = HeaderName::from_static("parlour-cause");
const HOPS: HeaderName = HeaderName::from_static("parlour-hops");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const ACK: HeaderName = HeaderName::from_static("parlour-ack");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const META: &str = "parlour-meta-";

/// `POST /v1/agents/{type}/{key}/call`
pub(crate) async fn call(
    State(app): State<App>,
    Segments((agent_type, key)): Segments<(String, String)>,
    request: Request,
) -> Answer {
    let target = AgentId::new(AgentType::parse(agent_type)?, Key::parse(key)?);
    let origin = origin(&request);
    let (parts, body) = request.into_parts();
    let timeout = number(&parts.headers, &DEADLINE_MS)?.map(Duration::from_millis);
    // The caller's patience begins when it asks, not when its body has come.
    let now = Instant::now();
    let deadline = app.exchange.deadline(timeout, now).into_std();
    let header = app.exchange.stamp(header_fields(&parts.headers)?, &origin, now);
    let conversation = header.conversation.clone();
    let payload = payload(&app, &parts.headers, body).await?;
    let progress = sse::is_wanted(&parts.headers);
    let call = Call { header, target, deadline, progress, attempt: None, topic: None, payload };
    if progress {
        return sse::call(&app.exchange, call).await;
    }
    let reply = app.exchange.call(call, None).await;
    let payload =
        reply.map_err(|fault| Refusal::from(fault).conversation(conversation.as_str()))?;
    Ok(reply_of(payload, &conversation))
}

/// An agent's reply as a response.
pub(super) fn reply_of(payload: Payload, conversation: &MessageId) -> Response {
    let mut response = Response::new(axum::body::Body::from(payload.bytes));
    let headers = response.headers_mut();
    set(headers, CONVERSATION, conversation.as_str());
    if !payload.content_type.is_empty() {
        set(headers, header::CONTENT_TYPE, &payload.content_type);
    }
    if !payload.data_type.is_empty() {
        set(headers, DATA_TYPE, &payload.data_type);
    }
    for (name, value) in payload.metadata.iter() {
        if let Ok(name) = HeaderName::try_from(format!("{META}{name}")) {
            set(headers, name, value);
        }
    }
    response
}

/// `POST /v1/topics/{type}/{source}`
pub(crate) async fn publish(
    State(app): State<App>,
    Segments((topic_type, source)): Segments<(String, String)>,
    request: Request,
) -> Answer {
    publish_to(&app, topic(&topic_type, &source)?, request).await
}

/// The same for the source `events`, whose path is that of the stream.
pub(crate) async fn publish_to_events(
    State(app): State<App>,
    Segments(topic_type): Segments<String>,
    request: Request,
) -> Answer {
    publish_to(&app, topic(&topic_type, "events")?, request).await
}

async fn publish_to(app: &App, topic: TopicId, request: Request) -> Answer {
    let origin = origin(&request);
    let (parts, body) = request.into_parts();
    let now = Instant::now();
    let header = app.exchange.stamp(header_fields(&parts.headers)?, &origin, now);
    let payload = payload(app, &parts.headers, body).await?;
    match text(&parts.headers, &ACK)?.as_deref() {
        None | Some("memory") => {}
        Some("durable") => {
            let publishing = Publishing { topic, header, payload };
            let published = app.durable.publish(publishing).await?;
            let mut response = json_answer(&json!({
                "id": published.id.as_str(),
                "conversation": published.conversation.as_str(),
                "ack": app.durable.ack().name(),
                "recipients": published.recipients,
                "dropped": [],
            }));
            *response.status_mut() = StatusCode::ACCEPTED;
            return Ok(response);
        }
        Some(other) => return Err(no_ack(ACK.as_str(), other).into()),
    }
    let published = app.exchange.publish(Event { header, topic, payload }, None, now)?;
    Ok(json_answer(&json!({
        "id": published.id.as_str(),
        "conversation": published.conversation.as_str(),
        "ack": "memory",
        "recipients": published.recipients,
        "dropped": published.dropped.iter().map(|name| &**name).collect::<Vec<_>>(),
    })))
}

/// `GET /v1/workers`
pub(crate) async fn workers(State(app): State<App>) -> Answer {
    let (directory, keys) = (app.exchange.directory(), app.exchange.agents_in_flight());
    let workers = app.exchange.peers().into_iter().map(|peer| worker(&peer, &directory, &keys));
    Ok(json_answer(&json!({"workers": workers.collect::<Vec<_>>()})))
}

/// `POST /v1/workers/{worker}/drain`
pub(crate) async fn drain(State(app): State<App>, Segments(name): Segments<String>) -> Answer {
    let peer = app.exchange.retire(&name)?;
    let (directory, keys) = (app.exchange.directory(), app.exchange.agents_in_flight());
    let mut response = json_answer(&worker(&peer, &directory, &keys));
    // It has only begun to.
    *response.status_mut() = StatusCode::ACCEPTED;
    Ok(response)
}

fn worker(peer: &Peer, directory: &Directory<Peer>, keys: &HashMap<WorkerId, usize>) -> Value {
    let (queued, queued_bytes) = peer.waiting();
    let (types, capacity): (Vec<_>, Map<_, _>) = directory
        .types_of(peer.id)
        .map(|(name, capacity)| (name.as_str(), (name.as_str().to_owned(), capacity.into())))
        .unzip();
    let credit = peer.credit.load(Relaxed);
    json!({
        "id": peer.id.0,
        "name": &*peer.name(),
        "protocol": peer.protocol,
        "principal": peer.principal.as_str(),
        "connected": peer.connected.load(Relaxed),
        "draining": peer.draining.load(Relaxed),
        "agent_types": types,
        "capacity": capacity,
        "in_flight": peer.in_flight.load(Relaxed),
        "keys": keys.get(&peer.id).copied().unwrap_or_default(),
        "credit": (credit < u64::MAX).then_some(credit),
        "queued": queued,
        "queued_bytes": queued_bytes,
        "connected_ms": peer.opened.elapsed().as_millis() as u64,
    })
}

/// `GET /v1/subscriptions`
pub(crate) async fn subscriptions(State(app): State<App>) -> Answer {
    let mut listed = subscriptions::all(&app).await?;
    let directory = app.exchange.directory();
    let mut all: Vec<_> = directory.subscriptions().collect();
    all.sort_by_key(|(id, worker, _)| (*worker, id.to_string()));
    let all = all.into_iter().map(|(id, worker, subscription)| {
        let (key, pattern) = subscriptions::pattern(&subscription.filter);
        let agent_type = match &subscription.target {
            Target::Agent(agent_type) => Some(agent_type.as_str()),
            Target::Listener(_) => None,
        };
        json!({
            "id": id.to_string(),
            key: pattern,
            "agent_type": agent_type,
            "worker": worker.0,
        })
    });
    listed.extend(all);
    Ok(json_answer(&json!({"subscriptions": listed})))
}

/// Whom a request comes from. A request has no connection that serves agents.
pub(crate) fn origin(request: &Request) -> Origin {
    let principal = request.extensions().get::<Principal>().cloned();
    Origin { principal: principal.unwrap_or(Principal::ANONYMOUS), worker: None }
}

pub(super) fn header_fields(headers: &HeaderMap) -> Result<HeaderFields, Fault> {
    let id = |name: &HeaderName| {
        let id = text(headers, name)?.map(MessageId::parse).transpose();
        id.map_err(|error| bad_name(&error))
    };
    Ok(HeaderFields {
        conversation: id(&CONVERSATION)?,
        cause: id(&CAUSE)?,
        traceparent: text(headers, &TRACEPARENT)?,
        hops: number(headers, &HOPS)?.unwrap_or(0).min(u8::MAX.into()) as u8,
        idempotency_key: text(headers, &IDEMPOTENCY_KEY)?,
        ..HeaderFields::default()
    })
}

pub(super) async fn payload(
    app: &App,
    headers: &HeaderMap,
    body: axum::body::Body,
) -> Result<Payload, Refusal> {
    let mut metadata = Metadata::default();
    for name in headers.keys() {
        if let Some(short) = name.as_str().strip_prefix(META) {
            let value = text(headers, name)?.unwrap_or_default();
            metadata.insert(short, value).map_err(|error| invalid(error.to_string()))?;
        }
    }
    let limit = (limits::payload_bytes, app.exchange.config().limits.payload_bytes);
    Ok(Payload {
        data_type: text(headers, &DATA_TYPE)?.unwrap_or_default(),
        content_type: text(headers, &header::CONTENT_TYPE)?.unwrap_or_default(),
        metadata,
        bytes: body::read(body, limit, &app.exchange).await?,
    })
}

pub(super) fn text(headers: &HeaderMap, name: &HeaderName) -> Result<Option<ByteString>, Fault> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    match std::str::from_utf8(value.as_bytes()) {
        Ok(text) => Ok(Some(text.into())),
        Err(_) => Err(invalid(format!("the header {name} is not UTF-8"))
            .hint("percent-encode it, or leave it out")),
    }
}

pub(super) fn number(headers: &HeaderMap, name: &HeaderName) -> Result<Option<u64>, Fault> {
    let Some(text) = text(headers, name)? else { return Ok(None) };
    let number = text.parse().map_err(|_| {
        invalid(format!("the header {name} is not a whole number: `{}`", text.escape_debug()))
            .hint("times are in milliseconds, and points in time those since 1970")
    })?;
    Ok(Some(number))
}

/// Sets a header from text that a worker chose; what no header can hold is left out.
pub(super) fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_bytes(value.as_bytes()) {
        headers.insert(name, value);
    }
}
