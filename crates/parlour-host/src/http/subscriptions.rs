//! Durable subscriptions: they outlive their workers and the host, until somebody removes them.

use axum::extract::{Request, State};
use bytestring::ByteString;
use http::StatusCode;
use parlour_core::durable::{DurableSubscription, RoomSettings};
use parlour_core::{AgentType, Fault, FaultKind, InvalidName, TopicFilter, TopicType};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::answer::{Answer, invalid, json as json_answer};
use super::body;
use super::router::{App, Segments};
use crate::config;
use crate::durable::Lag;

/// What a subscription is asked for.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    topic_type: Option<String>,
    topic_type_prefix: Option<String>,
    agent_type: String,
    order: Option<String>,
}

impl Wanted {
    fn read(self) -> Result<DurableSubscription, Fault> {
        let name = |error: InvalidName| super::answer::bad_name(&error);
        let filter = match (self.topic_type, self.topic_type_prefix) {
            (Some(exact), None) => TopicType::parse(exact).map(TopicFilter::Exact),
            (None, Some(prefix)) => TopicFilter::prefix(&prefix),
            _ => {
                return Err(invalid("one of `topic_type` and `topic_type_prefix` is needed")
                    .hint("give the one or the other"));
            }
        };
        let strict = match self.order.as_deref() {
            None | Some("relaxed") => false,
            Some("strict") => true,
            Some(other) => {
                let detail = format!("`order` cannot be `{}`", other.escape_debug());
                return Err(invalid(detail).hint("give \"strict\" or \"relaxed\""));
            }
        };
        Ok(DurableSubscription {
            filter: filter.map_err(name)?,
            agent_type: AgentType::parse(self.agent_type).map_err(name)?,
            strict,
        })
    }
}

/// `PUT /v1/subscriptions/{name}`: makes it, or changes it for the events that come.
pub(crate) async fn put(
    State(app): State<App>,
    Segments(name): Segments<String>,
    request: Request,
) -> Answer {
    let name = parse(&name)?;
    let wanted = body::object::<Wanted>(request, &app.exchange).await?.read()?;
    let most = app.exchange.config().durable.subscriptions;
    let metrics = app.exchange.metrics().clone();
    let (of, subscription) = (name.clone(), wanted.clone());
    let is_new = !app.durable.room().await?.subscriptions.contains_key(&name);
    let changed = app.durable.change_room(move |room: &mut RoomSettings| {
        if room.subscriptions.len() >= most && !room.subscriptions.contains_key(&of) {
            let detail = format!("there are {most} durable subscriptions");
            let fault = Fault::new(FaultKind::Overloaded, detail)
                .hint("remove one with `parlour subscriptions rm`, or raise the limit");
            return Err(metrics.limit_met(config::durable::subscriptions, Some(most), fault));
        }
        room.subscriptions.insert(of, subscription);
        Ok(())
    });
    changed.await?;
    let lags = app.durable.lags().await?;
    let lag = lags.iter().find(|lag| *lag.name == *name);
    let mut response = json_answer(&view(&name, &wanted, lag, &app));
    *response.status_mut() = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok(response)
}

/// `GET /v1/subscriptions/{name}`
pub(crate) async fn one(State(app): State<App>, Segments(name): Segments<String>) -> Answer {
    let name = parse(&name)?;
    let room = app.durable.room().await?;
    let wanted = room.subscriptions.get(&name).ok_or_else(|| unknown(&name))?;
    let lags = app.durable.lags().await?;
    let lag = lags.iter().find(|lag| *lag.name == *name);
    Ok(json_answer(&view(&name, wanted, lag, &app)))
}

/// `DELETE /v1/subscriptions/{name}`: nothing more is owed to it. What was accepted for it is delivered.
pub(crate) async fn delete(State(app): State<App>, Segments(name): Segments<String>) -> Answer {
    let name = parse(&name)?;
    let of = name.clone();
    let room = app.durable.room().await?;
    let wanted = room.subscriptions.get(&name).ok_or_else(|| unknown(&name))?.clone();
    let changed = app.durable.change_room(move |room: &mut RoomSettings| {
        room.subscriptions.remove(&of).map(drop).ok_or_else(|| unknown(&of))
    });
    changed.await?;
    let lags = app.durable.lags().await?;
    let lag = lags.iter().find(|lag| *lag.name == *name);
    Ok(json_answer(&view(&name, &wanted, lag, &app)))
}

/// All of them, as a list shows them.
pub(super) async fn all(app: &App) -> Result<Vec<Value>, Fault> {
    let (room, lags) = (app.durable.room().await?, app.durable.lags().await?);
    let all = room
        .subscriptions
        .iter()
        .map(|(name, it)| view(name, it, lags.iter().find(|lag| *lag.name == **name), app));
    Ok(all.collect())
}

fn view(name: &str, it: &DurableSubscription, lag: Option<&Lag>, app: &App) -> Value {
    let (key, pattern) = pattern(&it.filter);
    let now = app.exchange.unix_time(Instant::now()).as_millis() as u64;
    json!({
        "id": name,
        "durable": true,
        key: pattern,
        "agent_type": it.agent_type.as_str(),
        "order": if it.strict { "strict" } else { "relaxed" },
        "lag": lag.map_or(0, |lag| lag.unsettled),
        "oldest_ms": lag.map(|lag| now.saturating_sub(lag.oldest.0)),
    })
}

/// What a filter is called in JSON, and its text.
pub(super) fn pattern(filter: &TopicFilter) -> (&'static str, &str) {
    match filter {
        TopicFilter::Exact(topic_type) => ("topic_type", topic_type.as_str()),
        TopicFilter::Prefix(prefix) => ("topic_type_prefix", prefix),
    }
}

fn parse(name: &str) -> Result<ByteString, Fault> {
    let is_letter = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    if name.is_empty() || name.len() > 256 || !name.chars().all(is_letter) {
        let detail = format!("`{}` is no name of a subscription", name.escape_debug());
        return Err(invalid(detail).hint("use 1 to 256 ASCII letters, digits, `_`, `.` and `-`"));
    }
    Ok(name.into())
}

fn unknown(name: &str) -> Fault {
    Fault::new(FaultKind::NotFound, format!("there is no durable subscription {name}"))
        .hint("`parlour subscriptions ls` and GET /v1/subscriptions list those that there are")
}
