//! `parlour dead-letters`: what failed for good, and what to do with it.

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use crate::args::{DeadLetters, DeadLettersAction};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output, escape};
use crate::rest::{Rest, text};
use crate::room;
use crate::verbs::deliveries::{list, query, show};

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
            DeadLettersAction::Redrive { ids, .. } => each(&rest, ids, "redrive", "", output).await,
            DeadLettersAction::Discard { ids, reason, .. } => {
                let reason = query("reason", reason.as_deref());
                each(&rest, ids, "discard", &reason, output).await
            }
        }
    })
}

fn path(id: &str) -> String {
    format!("/v1/dead-letters/{}", utf8_percent_encode(id, NON_ALPHANUMERIC))
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
