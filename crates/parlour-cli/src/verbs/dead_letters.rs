//! `parlour dead-letters`: what failed for good, and what to do with it.

use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::json;

use crate::args::{DeadLetters, DeadLettersAction, Which};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output, escape};
use crate::rest::{Rest, number, text};
use crate::room;
use crate::verbs::deliveries::{list, query, show};

/// How much longer than anything else it may take to do something to many.
const MANY: Duration = Duration::from_secs(600);

pub(crate) fn run(args: &DeadLetters, output: &Output) -> Result<Code, Failure> {
    room::run(async {
        let rest = Rest::new(args.action.client())?;
        match &args.action {
            DeadLettersAction::Ls { listed, .. } => {
                list(&rest, "dead-letters", "dead_letters", None, listed, output).await
            }
            DeadLettersAction::Show { id, .. } => {
                let letter = rest.read(&path(id)).await?;
                show(&letter, output)?;
                if output.mode() == Mode::Text
                    && let Some(content) = letter.pointer("/message/content")
                {
                    output.line("")?;
                    output.line(&escape(&text(content, "data")))?;
                }
                Ok(Code::Ok)
            }
            DeadLettersAction::Redrive { which, .. } => match &which.agent_type {
                Some(agent_type) => all(&rest, agent_type, which, "redrive", None, output).await,
                None => each(&rest, &which.ids, "redrive", "", output).await,
            },
            DeadLettersAction::Discard { which, reason, .. } => match &which.agent_type {
                Some(agent_type) => {
                    all(&rest, agent_type, which, "discard", reason.as_deref(), output).await
                }
                None => {
                    let reason = query("reason", reason.as_deref());
                    each(&rest, &which.ids, "discard", &reason, output).await
                }
            },
        }
    })
}

fn path(id: &str) -> String {
    format!("/v1/dead-letters/{}", utf8_percent_encode(id, NON_ALPHANUMERIC))
}

/// Does the same to all of a type.
async fn all(
    rest: &Rest,
    agent_type: &str,
    which: &Which,
    action: &str,
    reason: Option<&str>,
    output: &Output,
) -> Result<Code, Failure> {
    let mut body = json!({"agent_type": agent_type});
    if let Some(limit) = which.limit {
        body["limit"] = limit.into();
    }
    if let Some(reason) = reason {
        body["reason"] = reason.into();
    }
    let answer = rest.post_and_wait(&format!("/v1/dead-letters/{action}"), &body, MANY).await?;
    if output.mode() != Mode::Text {
        output.json(&answer)?;
        return Ok(Code::Ok);
    }
    let (what, done) = match action {
        "redrive" => ("are attempted again", number(&answer, "redriven")),
        _ => ("were given up", number(&answer, "discarded")),
    };
    let left = number(&answer, "left");
    output.line(&format!("{done} of {} {what}, {left} are left", escape(agent_type)))?;
    Ok(Code::Ok)
}

/// Does the same to each, and says of which it was not possible.
async fn each(
    rest: &Rest,
    ids: &[String],
    action: &str,
    query: &str,
    output: &Output,
) -> Result<Code, Failure> {
    let mut failures = Vec::new();
    for id in ids {
        match rest.post(&format!("{}/{action}{query}", path(id))).await {
            Ok(answer) => match output.mode() {
                Mode::Text => output.line(id)?,
                Mode::Json | Mode::Jsonl => output.json(&answer)?,
            },
            Err(failure) => failures.push(failure),
        }
    }
    let failed = failures.len();
    let Some(first) = failures.into_iter().next() else { return Ok(Code::Ok) };
    if failed == ids.len() {
        return Err(first);
    }
    output.failure(&first);
    Err(Failure::new(Code::PartlyFailed, format!("{failed} of {} could not be done", ids.len())))
}
