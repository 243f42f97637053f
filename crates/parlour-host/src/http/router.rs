//! Which path is which door.

use std::sync::Arc;

use axum::Router;
use axum::extract::{FromRequestParts, Path, Query, Request};
use axum::response::IntoResponse;
use axum::routing::{MethodRouter, get, post};
use http::StatusCode;
use http::request::Parts;
use parlour_core::{Fault, FaultKind};
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;

use super::answer::{Refusal, invalid};
use super::guard::Guard;
use super::tasks::Tasks;
use super::upgrade::Lobby;
use super::{
    agents, dead_letters, deliveries, operators, rest, settings, sse, subscriptions, upgrade,
};
use crate::durable::Durable;
use crate::exchange::Exchange;

/// What the handlers share.
#[derive(Clone)]
pub(crate) struct App {
    pub(crate) exchange: Exchange,
    pub(crate) durable: Durable,
    pub(crate) guard: Arc<Guard>,
    /// Clients of the 0.1.0 dialect, by the id they gave themselves.
    pub(crate) lobby: Lobby,
    pub(crate) tasks: Tasks,
    /// As many connections as there may be.
    pub(crate) places: Arc<Semaphore>,
}

/// The variable segments of a path, decoded.
pub(crate) struct Segments<T>(pub(crate) T);

impl<T: DeserializeOwned + Send> FromRequestParts<App> for Segments<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        match Path::from_request_parts(parts, app).await {
            Ok(Path(segments)) => Ok(Self(segments)),
            Err(_) => Err(Refusal::from(invalid("the path is not UTF-8 once it is decoded"))
                .hint("percent-encode the UTF-8 bytes of keys and sources")),
        }
    }
}

/// The fields of a query.
pub(crate) struct Fields<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequestParts<App> for Fields<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        match Query::from_request_parts(parts, app).await {
            Ok(Query(fields)) => Ok(Self(fields)),
            Err(error) => Err(Refusal::from(invalid(format!(
                "the query is not understood: {}",
                error.body_text()
            )))
            .hint("give each field once, as the list of doors in the README has it")),
        }
    }
}

/// All doors.
pub(crate) fn router(app: App) -> Router {
    Router::new()
        .route("/open_channel", only(get(upgrade::open_channel), "GET"))
        // Its POST does not come here: the server hands it on by itself.
        .route("/rpc", only(MethodRouter::new(), "POST"))
        .route("/v1/agents", only(get(agents::all), "GET"))
        .route("/v1/agents/{type}", only(get(agents::one), "GET"))
        // Four segments are about a type, five and more about one of its agents.
        .route(
            "/v1/agents/{type}/settings",
            only(
                get(settings::one).patch(settings::change).delete(settings::reset),
                "GET, PATCH, DELETE",
            ),
        )
        .route("/v1/agents/{type}/pause", only(post(settings::pause), "POST"))
        .route("/v1/agents/{type}/resume", only(post(settings::resume), "POST"))
        .route("/v1/agents/{type}/purge", only(post(settings::purge), "POST"))
        .route("/v1/agents/{type}/{key}/call", only(post(rest::call), "POST"))
        .route("/v1/agents/{type}/{key}/deliveries", only(post(deliveries::accept), "POST"))
        .route("/v1/deliveries", only(get(deliveries::all), "GET"))
        .route("/v1/deliveries/{id}", only(get(deliveries::one), "GET"))
        .route("/v1/deliveries/{id}/events", only(get(deliveries::events), "GET"))
        .route("/v1/deliveries/{id}/reply", only(get(deliveries::reply), "GET"))
        .route("/v1/deliveries/{id}/cancel", only(post(deliveries::cancel), "POST"))
        .route("/v1/dead-letters", only(get(dead_letters::all), "GET"))
        .route("/v1/dead-letters/redrive", only(post(dead_letters::redrive_many), "POST"))
        .route("/v1/dead-letters/discard", only(post(dead_letters::discard_many), "POST"))
        .route("/v1/dead-letters/{id}", only(get(dead_letters::one), "GET"))
        .route("/v1/dead-letters/{id}/redrive", only(post(dead_letters::redrive), "POST"))
        .route("/v1/dead-letters/{id}/discard", only(post(dead_letters::discard), "POST"))
        .route(
            "/v1/topics/{type}/events",
            only(get(sse::events).post(rest::publish_to_events), "GET, POST"),
        )
        .route("/v1/topics/{type}/{source}", only(post(rest::publish), "POST"))
        .route("/v1/workers", only(get(rest::workers), "GET"))
        .route("/v1/workers/{worker}/drain", only(post(rest::drain), "POST"))
        .route("/v1/settings", only(get(settings::all), "GET"))
        .route("/v1/subscriptions", only(get(rest::subscriptions), "GET"))
        .route(
            "/v1/subscriptions/{name}",
            only(
                get(subscriptions::one).put(subscriptions::put).delete(subscriptions::delete),
                "GET, PUT, DELETE",
            ),
        )
        .route("/livez", only(get(operators::livez), "GET"))
        .route("/readyz", only(get(operators::readyz), "GET"))
        .route("/healthz", only(get(operators::healthz), "GET"))
        .route("/version", only(get(operators::version), "GET"))
        .route("/metrics", only(get(operators::metrics), "GET"))
        .fallback(nothing_here)
        .with_state(app)
}

/// Answers every other method with the ones that are there.
fn only(methods: MethodRouter<App>, allow: &'static str) -> MethodRouter<App> {
    methods.fallback(move |request: Request| async move {
        let detail = format!("{} is not a method of {}", request.method(), request.uri().path());
        Refusal::invalid(StatusCode::METHOD_NOT_ALLOWED, detail)
            .hint(format!("use {allow}"))
            .allow(allow)
            .into_response()
    })
}

async fn nothing_here(request: Request) -> Refusal {
    let detail = format!("there is nothing at {}", request.uri().path().escape_debug());
    Fault::new(FaultKind::NotFound, detail)
        .hint(
            "the doors: /v1/agents, /v1/agents/{type}/{key}/call, /v1/topics/{type}/{source}, /rpc, \
             /open_channel, /healthz",
        )
        .into()
}
