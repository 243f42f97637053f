//! What operators and their tools ask for.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde_json::json;

use super::answer::{Answer, json as json_answer};
use super::router::App;
use crate::channel::{dialect, native, text};

/// `GET /livez`: 200 as long as the process serves.
pub(crate) async fn livez() -> &'static str {
    "ok\n"
}

/// `GET /readyz`: 200 while new work is taken, 503 until the logs were read, from the begin of a
/// shutdown, and when the store has failed.
pub(crate) async fn readyz(State(app): State<App>) -> Response {
    if app.exchange.is_draining() {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining\n").into_response();
    }
    if let Err(fault) = app.durable.ready() {
        return (StatusCode::SERVICE_UNAVAILABLE, format!("{fault}\n")).into_response();
    }
    "ok\n".into_response()
}

/// `GET /healthz`: the same, with what it is made of.
pub(crate) async fn healthz(State(app): State<App>) -> Response {
    let draining = app.exchange.is_draining();
    let metrics = app.exchange.metrics();
    let mut response = json_answer(&json!({
        "status": if draining { "draining" } else { "ok" },
        "name": app.exchange.config().server.name,
        "version": env!("CARGO_PKG_VERSION"),
        "storage": app.durable.ack().name(),
        "channels": metrics.channels.get(),
        "calls_in_flight": metrics.calls_in_flight.get(),
    }));
    if draining {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}

/// `GET /version`
pub(crate) async fn version() -> Answer {
    Ok(json_answer(&json!({
        "name": "parlour",
        "version": env!("CARGO_PKG_VERSION"),
        "protocols": [native::NAME, text::NAME, dialect::NAME],
    })))
}

/// `GET /metrics`
pub(crate) async fn metrics(State(app): State<App>) -> Response {
    let mut response = app.exchange.metrics().render().into_response();
    let media_type =
        HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, media_type);
    response
}
