//! `parlour explain`: what a kind of fault means and what to do about it, without a host.

use parlour_core::FaultKind;
use parlour_host::{JSON_RPC_FAULT, http_status};
use serde_json::{Value, json};

use crate::args::Explain;
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output, Table, escape};

pub(crate) fn run(args: &Explain, output: &Output) -> Result<Code, Failure> {
    let Some(name) = &args.kind else { return list(output) };
    let kind = FaultKind::from_name(name).ok_or_else(|| unknown(name))?;
    if output.mode() != Mode::Text {
        output.json(&page(kind))?;
        return Ok(Code::Ok);
    }
    output.line(&format!("{kind}: {}", kind.title()))?;
    output.line(&format!("\n{}\n", kind.meaning()))?;
    output.line(&format!("HTTP status    {}", http_status(kind)))?;
    output.line(&format!("JSON-RPC code  {JSON_RPC_FAULT}"))?;
    output.line(&format!("exit code      {}", Code::of(kind) as u8))?;
    output.line(&format!("retryable      {}", yes_or_no(kind.is_retryable())))?;
    output.line(&format!("\nWhat to do: {}", advice(kind)))?;
    Ok(Code::Ok)
}

fn list(output: &Output) -> Result<Code, Failure> {
    let mut table = Table::new(&["KIND", "HTTP", "RETRYABLE", "MEANING"]);
    for &kind in FaultKind::ALL {
        let status = http_status(kind).to_string();
        table.row([kind.name(), &status, yes_or_no(kind.is_retryable()), kind.meaning()]);
    }
    let pages: Vec<_> = FaultKind::ALL.iter().map(|&kind| page(kind)).collect();
    output.list(&pages, &Value::Array(pages.clone()), &table)?;
    Ok(Code::Ok)
}

fn page(kind: FaultKind) -> Value {
    json!({
        "kind": kind.name(),
        "title": kind.title(),
        "meaning": kind.meaning(),
        "http_status": http_status(kind),
        "json_rpc_code": JSON_RPC_FAULT,
        "exit_code": Code::of(kind) as u8,
        "retryable": kind.is_retryable(),
        "what_to_do": advice(kind),
    })
}

fn unknown(name: &str) -> Failure {
    let distance = |kind: &&FaultKind| strsim::damerau_levenshtein(name, kind.name());
    let failure =
        Failure::new(Code::NotFound, format!("there is no kind of fault `{}`", escape(name)));
    match FaultKind::ALL.iter().min_by_key(distance).filter(|kind| distance(kind) <= 4) {
        Some(kind) => failure.hint(format!("did you mean `parlour explain {kind}`?")),
        None => failure.hint("`parlour explain` lists them all"),
    }
}

fn yes_or_no(truth: bool) -> &'static str {
    if truth { "yes" } else { "no" }
}

fn advice(kind: FaultKind) -> &'static str {
    match kind {
        FaultKind::UnknownAgent => {
            "See who is served with `parlour agents`. Start a worker of this type, then call again: \
             nothing has run."
        }
        FaultKind::NotFound => {
            "Check the name in the address; `parlour agents` lists what there is."
        }
        FaultKind::Gone => "Begin again from what is still kept; what is gone does not come back.",
        FaultKind::Unauthenticated => {
            "Give the host's token: --token-file or PARLOUR_TOKEN_FILE, or the header \
             `Authorization: Bearer TOKEN`."
        }
        FaultKind::Forbidden => {
            "If a page or a proxy asks, add its origin to `server.allowed_origins` or the name it \
             uses to `server.allowed_hosts`."
        }
        FaultKind::Invalid => "Read the detail, change the request, and send it again.",
        FaultKind::TooLarge => {
            "Send less, or raise the setting that the error names, such as \
             `parlour serve --set limits.payload_bytes=4MiB`."
        }
        FaultKind::Conflict => {
            "Look at what is there: `parlour workers` shows who serves the type. Stop the other \
             one, or do without --exclusive."
        }
        FaultKind::Overloaded => {
            "Wait as long as `retry_after_ms` says, then send again; unless `may_have_run` is true, \
             nothing has run. If it lasts, start more workers."
        }
        FaultKind::CircuitOpen => {
            "Wait as long as `retry_after_ms` says, and find out why it fails."
        }
        FaultKind::WorkerLost => {
            "The work may have run. Send it again only if running twice does no harm; look at the \
             worker's own output for why it ended."
        }
        FaultKind::DeadlineExceeded => {
            "If `may_have_run` is false, nothing has run and it can be sent again. Otherwise give \
             it longer with --timeout, up to `calls.max_timeout`."
        }
        FaultKind::Cancelled => "Nothing; the caller did not want the answer any more.",
        FaultKind::AgentFailed => {
            "The detail is what the agent said. Its program or its input is wrong, not Parlour."
        }
        FaultKind::Unavailable => "Check `parlour status`, and try again when the host is ready.",
        FaultKind::StorageFull => {
            "Make room where the host keeps its data, then send again. If there are too many dead \
             letters, `parlour dead-letters` sends them back or gives them up."
        }
        FaultKind::Internal => "Report it with the host's log.",
        _ => "Read the detail.",
    }
}
