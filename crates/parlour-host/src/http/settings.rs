//! What the room asks for the deliveries to agents of one type, kept until somebody changes it.

use std::time::Duration;

use axum::extract::{Request, State};
use parlour_core::durable::{AgentSettings, Rate, RoomSettings, Tally};
use parlour_core::{AgentType, Fault};
use serde_json::{Map, Value, json};

use super::answer::{Answer, Refusal, invalid, json as json_answer};
use super::body;
use super::deliveries::Reason;
use super::router::{App, Fields, Segments};
use crate::config;
use crate::durable::{Action, Terms};

/// The greatest number of a setting, and the longest time.
const MOST: u32 = 10_000_000;
const LONGEST: Duration = Duration::from_secs(8760 * 3600);
/// The fastest rate, in attempts per second.
const FASTEST: f64 = 1_000_000.0;

/// `GET /v1/settings`: every agent type that something is asked for.
pub(crate) async fn all(State(app): State<App>) -> Answer {
    let room = app.durable.room().await?;
    let mut agents = Vec::with_capacity(room.agents.len());
    for agent_type in room.agents.keys() {
        agents.push(view(&app, &room, agent_type).await);
    }
    Ok(json_answer(&json!({"agents": agents})))
}

/// `GET /v1/agents/{type}/settings`
pub(crate) async fn one(State(app): State<App>, Segments(agent_type): Segments<String>) -> Answer {
    let agent_type = AgentType::parse(agent_type)?;
    let room = app.durable.room().await?;
    Ok(json_answer(&view(&app, &room, &agent_type).await))
}

/// `PATCH /v1/agents/{type}/settings`: changes what the body names, as a JSON merge patch (RFC 7396).
pub(crate) async fn change(
    State(app): State<App>,
    Segments(agent_type): Segments<String>,
    request: Request,
) -> Answer {
    let agent_type = AgentType::parse(agent_type)?;
    let patch: Map<String, Value> = body::object(request, &app.exchange).await?;
    changed(&app, agent_type, move |it| {
        // A burst is that of a rate.
        let (rate, others) = patch.iter().partition::<Vec<_>, _>(|(name, _)| *name == "rate");
        rate.into_iter().chain(others).try_for_each(|(name, value)| set(it, name, value))?;
        if let (Some(base), Some(cap)) = (it.backoff_base, it.backoff_cap)
            && base > cap
        {
            let detail = "`backoff_base` is longer than `backoff_cap`";
            return Err(invalid(detail).hint("give a longer cap, or a shorter base"));
        }
        Ok(())
    })
    .await
}

/// `DELETE /v1/agents/{type}/settings`: the settings of the host hold again, and nothing is paused.
pub(crate) async fn reset(
    State(app): State<App>,
    Segments(agent_type): Segments<String>,
) -> Answer {
    changed(&app, AgentType::parse(agent_type)?, |it| {
        *it = AgentSettings::default();
        Ok(())
    })
    .await
}

/// `POST /v1/agents/{type}/pause`: what is accepted waits, and what is in flight goes on.
pub(crate) async fn pause(
    State(app): State<App>,
    Segments(agent_type): Segments<String>,
) -> Answer {
    set_paused(&app, agent_type, true).await
}

/// `POST /v1/agents/{type}/resume`
pub(crate) async fn resume(
    State(app): State<App>,
    Segments(agent_type): Segments<String>,
) -> Answer {
    set_paused(&app, agent_type, false).await
}

async fn set_paused(app: &App, agent_type: String, paused: bool) -> Answer {
    changed(app, AgentType::parse(agent_type)?, move |it| {
        it.paused = paused;
        Ok(())
    })
    .await
}

/// `POST /v1/agents/{type}/purge`: cancels what waits. What is in flight is let be.
pub(crate) async fn purge(
    State(app): State<App>,
    Segments(agent_type): Segments<String>,
    Fields(reason): Fields<Reason>,
) -> Answer {
    let agent_type = AgentType::parse(agent_type)?;
    let reason = Reason { reason: reason.reason.or_else(|| Some("purged".to_owned())) };
    let action = Action::Cancel(reason.text()?);
    let purged = app.durable.all(&agent_type, action, usize::MAX).await?;
    Ok(json_answer(&json!({
        "type": agent_type.as_str(),
        "cancelled": purged.done,
        "in_flight": purged.in_flight,
    })))
}

async fn changed(
    app: &App,
    agent_type: AgentType,
    change: impl FnOnce(&mut AgentSettings) -> Result<(), Fault> + Send + 'static,
) -> Answer {
    let of = agent_type.clone();
    let room = app.durable.change_room(move |room: &mut RoomSettings| room.change(&of, change));
    let room = room.await.map_err(Refusal::from)?;
    Ok(json_answer(&view(app, &room, &agent_type).await))
}

/// What is asked for, by the names of [`set`], and what holds.
async fn view(app: &App, room: &RoomSettings, agent_type: &AgentType) -> Value {
    let it = room.of(agent_type);
    let time = |time: Option<Duration>| time.map(config::written);
    let per_second = it.rate.map(|rate| f64::from(rate.per_1000_s) / 1000.0);
    let Tally { standing, dead_bytes } = app.durable.tally(agent_type).await;
    let terms = Terms::new(app.exchange.config(), room, agent_type);
    json!({
        "type": agent_type.as_str(),
        "paused": it.paused,
        "concurrency": it.concurrency,
        "rate": per_second,
        "burst": it.rate.map(|rate| rate.burst),
        "order": it.strict.then_some("strict"),
        "max_attempts": it.max_attempts,
        "max_lost": it.max_lost,
        "backoff_base": time(it.backoff_base),
        "backoff_cap": time(it.backoff_cap),
        "attempt_timeout": time(it.attempt_timeout),
        "max_dead": it.max_dead,
        "in_force": {
            "paused": it.paused,
            "concurrency": terms.concurrency,
            "rate": per_second,
            "burst": it.rate.map(|rate| rate.burst),
            "order": if terms.strict { "strict" } else { "relaxed" },
            "max_attempts": terms.retry.max_attempts,
            "max_lost": terms.retry.max_lost,
            "backoff_base": config::written(terms.retry.base),
            "backoff_cap": config::written(terms.retry.cap),
            "attempt_timeout": config::written(terms.attempt_timeout),
            "max_dead": terms.max_dead,
        },
        "deliveries": {
            "waiting": standing.waiting,
            "in_flight": standing.in_flight,
            "dead": standing.dead,
            "dead_bytes": dead_bytes,
        },
    })
}

/// Sets the setting of this name; `null` leaves it to the host.
fn set(it: &mut AgentSettings, name: &str, value: &Value) -> Result<(), Fault> {
    let refuse = |expected: String| {
        let detail = format!("`{name}` cannot be {value}");
        invalid(detail).hint(format!("give {expected}, or null for what the host has"))
    };
    let number = |least: u32| match value {
        Value::Null => Ok(None),
        _ => match value.as_u64().and_then(|it| u32::try_from(it).ok()) {
            Some(number) if (least..=MOST).contains(&number) => Ok(Some(number)),
            _ => Err(refuse(format!("a whole number from {least} to {MOST}"))),
        },
    };
    let time = || match value {
        Value::Null => Ok(None),
        _ => match value.as_str().and_then(config::duration) {
            Some(time) if time <= LONGEST => Ok(Some(time)),
            _ => Err(refuse("a time such as 500ms, 30s or 10m, up to 8760h".into())),
        },
    };
    match name {
        "paused" => match value {
            Value::Null => it.paused = false,
            Value::Bool(paused) => it.paused = *paused,
            _ => return Err(refuse("true or false".into())),
        },
        "order" => match value.as_str() {
            None if value.is_null() => it.strict = false,
            Some("relaxed") => it.strict = false,
            Some("strict") => it.strict = true,
            _ => return Err(refuse("\"strict\" or \"relaxed\"".into())),
        },
        "concurrency" => it.concurrency = number(1)?,
        "rate" => {
            let burst = it.rate.map(|rate| rate.burst);
            it.rate = match value.as_f64() {
                None if value.is_null() => None,
                Some(rate) if (0.001..=FASTEST).contains(&rate) => Some(Rate {
                    per_1000_s: (rate * 1000.0).round() as u32,
                    burst: burst.unwrap_or_else(|| rate.ceil() as u32),
                }),
                _ => return Err(refuse(format!("attempts per second from 0.001 to {FASTEST}"))),
            };
        }
        "burst" => match (number(1)?, &mut it.rate) {
            (Some(burst), Some(rate)) => rate.burst = burst,
            (Some(_), None) => {
                return Err(invalid("there is a `burst`, and no `rate`")
                    .hint("give a rate too, in attempts per second"));
            }
            (None, Some(rate)) => rate.burst = rate.per_1000_s.div_ceil(1000),
            (None, None) => {}
        },
        "max_attempts" => it.max_attempts = number(1)?,
        "max_lost" => it.max_lost = number(1)?,
        "backoff_base" => it.backoff_base = time()?,
        "backoff_cap" => it.backoff_cap = time()?,
        "attempt_timeout" => it.attempt_timeout = time()?,
        "max_dead" => it.max_dead = number(1)?,
        _ => {
            let detail = format!("there is no setting `{}` of an agent type", name.escape_debug());
            let nearest = NAMES
                .into_iter()
                .min_by_key(|known| strsim::damerau_levenshtein(name, known))
                .unwrap_or_default();
            let names = NAMES.join(", ");
            return Err(invalid(detail).hint(format!("is it `{nearest}`? There are: {names}")));
        }
    }
    Ok(())
}

const NAMES: [&str; 11] = [
    "paused",
    "concurrency",
    "rate",
    "burst",
    "order",
    "max_attempts",
    "max_lost",
    "backoff_base",
    "backoff_cap",
    "attempt_timeout",
    "max_dead",
];
