//! `parlour deliveries`: what became of messages that were accepted for later.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::args::{Deliveries, DeliveriesAction, Listed};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output, Table, escape};
use crate::rest::{Rest, items, number, text};
use crate::room;

/// How many the host tells of at once.
const PAGE: u64 = 1000;
/// How long the host is asked to wait for the next step, at a time.
const TURN: Duration = Duration::from_secs(30);

pub(crate) fn run(args: &Deliveries, output: &Output) -> Result<Code, Failure> {
    room::run(async {
        let rest = Rest::new(args.action.client())?;
        match &args.action {
            DeliveriesAction::Ls { state, listed, .. } => {
                let state = state.as_ref().map(|state| ("state", state.as_str()));
                list(&rest, "deliveries", "deliveries", state, listed, output).await
            }
            DeliveriesAction::Show { id, .. } => show(&rest.read(&path(id)).await?, output),
            DeliveriesAction::Wait { id, timeout, .. } => reply(&rest, id, *timeout, output).await,
            DeliveriesAction::Cancel { id, reason, .. } => {
                let reason = query("reason", reason.as_deref());
                show(&rest.post(&format!("{}/cancel{reason}", path(id))).await?, output)
            }
        }
    })
}

/// Where the host tells of a delivery.
pub(crate) fn path(id: &str) -> String {
    format!("/v1/deliveries/{}", utf8_percent_encode(id, NON_ALPHANUMERIC))
}

/// A query with this field, if it has a value.
pub(crate) fn query(name: &str, value: Option<&str>) -> String {
    let encoded = value.map(|value| utf8_percent_encode(value, NON_ALPHANUMERIC));
    encoded.map(|value| format!("?{name}={value}")).unwrap_or_default()
}

/// Prints a list that is under `name` in the documents at `/v1/{place}`, over as many pages as it takes.
pub(crate) async fn list(
    rest: &Rest,
    place: &str,
    name: &str,
    more: Option<(&str, &str)>,
    listed: &Listed,
    output: &Output,
) -> Result<Code, Failure> {
    let (mut found, mut begins) = (Vec::new(), None::<String>);
    loop {
        let left = listed.limit - found.len() as u64;
        let limit = left.min(PAGE).to_string();
        let mut fields = vec![("limit", limit.as_str())];
        fields.extend(listed.agent_type.as_deref().map(|agent_type| ("agent_type", agent_type)));
        fields.extend(more);
        fields.extend(begins.as_deref().map(|begins| ("after", begins)));
        let fields: Vec<_> = fields
            .iter()
            .map(|(name, value)| format!("{name}={}", utf8_percent_encode(value, NON_ALPHANUMERIC)))
            .collect();
        let page = rest.read(&format!("/v1/{place}?{}", fields.join("&"))).await?;
        found.extend_from_slice(items(&page, name));
        begins = page.get("next").and_then(Value::as_str).map(str::to_owned);
        if begins.is_none() || found.len() as u64 >= listed.limit {
            break;
        }
    }
    let mut table = Table::new(&["ID", "AGENT", "STATE", "ATTEMPT", "AGE", "NEXT", "FAULT"]);
    for delivery in &found {
        table.row([
            text(delivery, "id"),
            text(delivery, "agent"),
            text(delivery, "state"),
            format!("{}/{}", number(delivery, "attempt"), number(delivery, "max_attempts")),
            ago(number(delivery, "accepted_at")),
            next(delivery),
            delivery.get("fault").map(|fault| text(fault, "detail")).unwrap_or_default(),
        ]);
    }
    let document = json!({ name: &found, "next": &begins });
    output.list(&found, &document, &table)?;
    if begins.is_some() {
        output.note(&format!("there are more than {}: ask for more with --limit", listed.limit));
    }
    Ok(Code::Ok)
}

/// Prints one delivery with its steps.
pub(crate) fn show(delivery: &Value, output: &Output) -> Result<Code, Failure> {
    if output.mode() != Mode::Text {
        output.json(delivery)?;
        return Ok(Code::Ok);
    }
    let field = |name: &str, value: &str| output.line(&format!("{name:<14}{}", escape(value)));
    for name in ["id", "agent", "state", "conversation"] {
        field(name, &text(delivery, name))?;
    }
    let count = |name| number(delivery, name);
    field(
        "attempts",
        &format!(
            "{}, of which {} failed (at most {}) and {} were lost (at most {})",
            count("attempt"),
            count("failed"),
            count("max_attempts"),
            count("lost"),
            count("max_lost"),
        ),
    )?;
    field("accepted", &format!("{} ago", ago(count("accepted_at"))))?;
    let upcoming = next(delivery);
    if !upcoming.is_empty() {
        field("next attempt", &upcoming)?;
    }
    let mut table = Table::new(&["STEP", "LEVEL", "ATTEMPT", "WORKER", "AFTER", "DETAILS"]);
    for step in items(delivery, "steps") {
        let after = number(step, "at").saturating_sub(count("accepted_at"));
        table.row([
            text(step, "generation"),
            text(step, "level"),
            text(step, "attempt"),
            text(step, "worker"),
            format!("{:?}", Duration::from_millis(after)),
            text(step, "details"),
        ]);
    }
    output.line("")?;
    output.list(&[], delivery, &table)?;
    Ok(Code::Ok)
}

/// Waits until a delivery has ended, and prints its reply.
pub(crate) async fn reply(
    rest: &Rest,
    id: &str,
    timeout: Duration,
    output: &Output,
) -> Result<Code, Failure> {
    ended(rest, id, timeout).await?;
    let body = rest.bytes(&format!("{}/reply", path(id))).await?;
    match output.mode() {
        Mode::Text => output.data(&body)?,
        Mode::Json | Mode::Jsonl => output.json(&rest.read(&path(id)).await?)?,
    }
    Ok(Code::Ok)
}

/// Waits until a delivery has ended well. Any other end is a failure.
pub(crate) async fn ended(rest: &Rest, id: &str, timeout: Duration) -> Result<(), Failure> {
    let until = Instant::now() + timeout;
    let mut seen = 0;
    loop {
        let left = until.saturating_duration_since(Instant::now()).min(TURN);
        let wait = format!("{}?after={seen}&wait={}ms", path(id), left.as_millis().max(1));
        let delivery = rest.wait(&wait, left).await?;
        seen = number(&delivery, "generation");
        match text(&delivery, "state").as_str() {
            "completed" => return Ok(()),
            state @ ("dead" | "cancelled" | "expired") => {
                let why = delivery.get("fault").map(|fault| text(fault, "detail"));
                let why = why.filter(|why| !why.is_empty());
                let why = why.map(|why| format!(": {why}")).unwrap_or_default();
                return Err(Failure::new(
                    Code::Failed,
                    format!("the delivery {id} is {state}{why}"),
                )
                .hint(format!("`parlour deliveries show {id}` has the whole story")));
            }
            state if Instant::now() >= until => {
                let detail = format!("the delivery {id} is still {state}");
                return Err(Failure::new(Code::Timeout, detail)
                    .hint(format!("wait on with `parlour deliveries wait {id}`")));
            }
            _ => {}
        }
    }
}

fn ago(at: u64) -> String {
    duration(now().saturating_sub(at))
}

/// When the next attempt may begin, if that is not now.
fn next(delivery: &Value) -> String {
    match number(delivery, "next_attempt_at").saturating_sub(now()) {
        0 => String::new(),
        millis => format!("in {}", duration(millis)),
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// A time in the two largest of its units.
pub(crate) fn duration(millis: u64) -> String {
    match millis / 1000 {
        seconds @ 0..60 => format!("{seconds}s"),
        seconds @ 60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        seconds @ 3600..86400 => format!("{}h{}m", seconds / 3600, seconds / 60 % 60),
        seconds => format!("{}d{}h", seconds / 86400, seconds / 3600 % 24),
    }
}
