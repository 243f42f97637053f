//! The one table from fault kinds to what HTTP and JSON-RPC have for them, and the JSON of an error.

use http::StatusCode;
use parlour_core::{Fault, FaultKind};
use serde::Serialize;

/// The HTTP status of a fault of this kind, as a number.
pub fn http_status(kind: FaultKind) -> u16 {
    match kind {
        FaultKind::Invalid => 400,
        FaultKind::Unauthenticated => 401,
        FaultKind::Forbidden => 403,
        FaultKind::UnknownAgent | FaultKind::NotFound => 404,
        FaultKind::Conflict => 409,
        FaultKind::Gone => 410,
        FaultKind::TooLarge => 413,
        FaultKind::Overloaded => 429,
        FaultKind::Cancelled => 499,
        FaultKind::AgentFailed | FaultKind::WorkerLost => 502,
        FaultKind::Unavailable | FaultKind::CircuitOpen => 503,
        FaultKind::DeadlineExceeded => 504,
        FaultKind::StorageFull => 507,
        // `Internal`, and whatever this table has not learnt yet.
        _ => 500,
    }
}

/// The HTTP status of a fault of this kind.
pub(crate) fn status(kind: FaultKind) -> StatusCode {
    StatusCode::from_u16(http_status(kind)).expect("the numbers above are statuses")
}

/// JSON-RPC 2.0 error codes (§5.1). Every fault of a known method has the same.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum RpcCode {
    ParseError = -32700,
    InvalidRequest = -32600,
    MethodNotFound = -32601,
    InvalidParams = -32602,
    Fault = -32000,
}

/// The JSON-RPC code of every fault.
pub const JSON_RPC_FAULT: i32 = RpcCode::Fault as i32;

/// A fault as RFC 9457 problem details; also the `data` of a JSON-RPC error.
#[derive(Debug, Serialize)]
pub(crate) struct Problem<'a> {
    r#type: &'static str,
    title: &'static str,
    status: u16,
    detail: &'a str,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'a str>,
    retryable: bool,
    may_have_run: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    config_key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    conversation: Option<&'a str>,
}

impl<'a> Problem<'a> {
    pub(crate) fn new(fault: &'a Fault, status: StatusCode, conversation: Option<&'a str>) -> Self {
        Self {
            r#type: "about:blank",
            title: fault.kind().title(),
            status: status.as_u16(),
            detail: fault.detail(),
            kind: fault.kind().name(),
            hint: fault.hint_text(),
            retryable: fault.is_retryable(),
            may_have_run: fault.may_have_run(),
            retry_after_ms: fault.retry_after_time().map(|wait| wait.as_millis() as u64),
            limit: fault.limit_value(),
            config_key: fault.config_key(),
            conversation,
        }
    }
}
