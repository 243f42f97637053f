//! `parlour subscriptions`: durable subscriptions, which outlive their workers and the host.

use parlour_core::{AgentType, TopicFilter, TopicType};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};

use crate::args::{Order, Subscriptions, SubscriptionsAction};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output, Table, escape};
use crate::rest::{Rest, items, number, text};
use crate::room;
use crate::verbs::deliveries::duration;

pub(crate) fn run(args: &Subscriptions, output: &Output) -> Result<Code, Failure> {
    room::run(async {
        let rest = Rest::new(args.action.client())?;
        match &args.action {
            SubscriptionsAction::Ls { .. } => list(&rest, output).await,
            SubscriptionsAction::Show { name, .. } => show(&rest.read(&path(name)).await?, output),
            SubscriptionsAction::Set { name, pattern, agent_type, order, .. } => {
                let wanted = wanted(pattern, agent_type, *order)?;
                show(&rest.put(&path(name), &wanted).await?, output)
            }
            SubscriptionsAction::Rm { name, .. } => {
                let removed = rest.delete(&path(name)).await?;
                if output.mode() != Mode::Text {
                    output.json(&removed)?;
                    return Ok(Code::Ok);
                }
                output.line(&format!("{} is removed", escape(name)))?;
                match number(&removed, "lag") {
                    0 => {}
                    lag => output.note(&format!("what it was owed goes on: {lag} have not ended")),
                }
                Ok(Code::Ok)
            }
        }
    })
}

/// Where the host tells of one.
fn path(name: &str) -> String {
    format!("/v1/subscriptions/{}", utf8_percent_encode(name, NON_ALPHANUMERIC))
}

/// What the host is asked for. A wrong name needs no host to be told.
fn wanted(pattern: &str, agent_type: &str, order: Order) -> Result<Value, Failure> {
    let filter = match pattern.strip_suffix('*') {
        Some(prefix) => TopicFilter::prefix(prefix)?,
        None => TopicFilter::Exact(TopicType::parse(pattern)?),
    };
    let (field, topics) = match &filter {
        TopicFilter::Exact(topic_type) => ("topic_type", topic_type.as_str()),
        TopicFilter::Prefix(prefix) => ("topic_type_prefix", &**prefix),
    };
    let agent_type = AgentType::parse(agent_type)?;
    let order = if order == Order::Strict { "strict" } else { "relaxed" };
    Ok(json!({field: topics, "agent_type": agent_type.as_str(), "order": order}))
}

async fn list(rest: &Rest, output: &Output) -> Result<Code, Failure> {
    let document = rest.read("/v1/subscriptions").await?;
    // Those of workers are among them, and end with those.
    let all = items(&document, "subscriptions").iter();
    let durable: Vec<Value> =
        all.filter(|it| it.get("durable") == Some(&true.into())).cloned().collect();
    let mut table = Table::new(&["NAME", "TOPICS", "AGENT TYPE", "ORDER", "LAG", "OLDEST"]);
    for it in &durable {
        table.row([
            text(it, "id"),
            pattern(it),
            text(it, "agent_type"),
            text(it, "order"),
            text(it, "lag"),
            oldest(it),
        ]);
    }
    output.list(&durable, &json!({"subscriptions": durable}), &table)?;
    if durable.is_empty() && output.mode() == Mode::Text {
        output.note("there are none; `parlour subscriptions set --help` says how to make one");
    }
    Ok(Code::Ok)
}

fn show(subscription: &Value, output: &Output) -> Result<Code, Failure> {
    if output.mode() != Mode::Text {
        output.json(subscription)?;
        return Ok(Code::Ok);
    }
    let field = |name: &str, value: &str| output.line(&format!("{name:<12}{}", escape(value)));
    field("name", &text(subscription, "id"))?;
    field("topics", &pattern(subscription))?;
    field("agent type", &text(subscription, "agent_type"))?;
    field("order", &text(subscription, "order"))?;
    field("lag", &text(subscription, "lag"))?;
    let oldest = oldest(subscription);
    if !oldest.is_empty() {
        field("oldest", &oldest)?;
    }
    Ok(Code::Ok)
}

/// The topic types, as they are typed.
fn pattern(subscription: &Value) -> String {
    match subscription.get("topic_type_prefix") {
        Some(_) => format!("{}*", text(subscription, "topic_type_prefix")),
        None => text(subscription, "topic_type"),
    }
}

/// How long the first of what is owed has waited.
fn oldest(subscription: &Value) -> String {
    let millis = subscription.get("oldest_ms").and_then(Value::as_u64);
    millis.map(duration).unwrap_or_default()
}
