//! `POST /rpc`: JSON-RPC 2.0 with the methods of `autogen-http-runtime` 0.1.0.

use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body::Body as _;
use hyper::body::Incoming;
use parlour_core::{
    AgentType, Call, CallId, Event, Fault, FaultKind, MessageId, Principal, Registration,
    Subscription, SubscriptionId, Target, TopicFilter, TopicType,
};
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;
use tokio::time::Instant;

use super::answer::{Content, Refusal, invalid};
use super::body;
use super::problem::{Problem, RpcCode, status};
use super::router::App;
use crate::channel::dialect::{self, AgentIn, Message};
use crate::config::limits;
use crate::exchange::{Exchange, Origin, Waiting};
use crate::json::{self, Text};

/// One request, or several in an array.
pub(crate) async fn rpc(
    app: &App,
    principal: Principal,
    request: Request<Incoming>,
) -> Result<Response<Content>, Refusal> {
    let (mut parts, body) = request.into_parts();
    if !is_json(&parts.headers) {
        let detail = "the body of /rpc is JSON";
        return Err(Refusal::invalid(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail)
            .hint("send Content-Type: application/json"));
    }
    let client = parts.headers.get("x-client-id").and_then(|value| value.to_str().ok());
    let client = client.filter(|id| !id.is_empty() && id.len() <= 128).map(str::to_owned);
    let caller = Caller { app, client, principal };
    // The answer takes over the request's map: its memory serves a connection's every message.
    parts.headers.clear();
    let headers = parts.headers;
    let config = app.exchange.config();
    let limit = (limits::json_body_bytes, config.limits.json_body_bytes);
    let body = body::read(body, limit, &app.exchange).await?;

    let first = body.iter().find(|byte| !byte.is_ascii_whitespace());
    let answer = if first == Some(&b'[') {
        // Boxed, so that a single request's future has no room for a batch.
        Box::pin(caller.batch(&body)).await
    } else {
        caller.answer(&body, &body).await
    };
    let mut response = Response::new(Content::Whole(answer.unwrap_or_default().into()));
    *response.headers_mut() = headers;
    if response.body().is_end_stream() {
        *response.status_mut() = StatusCode::NO_CONTENT;
    } else {
        let media_type = HeaderValue::from_static("application/json");
        response.headers_mut().insert(header::CONTENT_TYPE, media_type);
    }
    Ok(response)
}

fn is_json(headers: &HeaderMap) -> bool {
    let media_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    media_type.is_some_and(|media_type| {
        media_type.get(..16).is_some_and(|m| m.eq_ignore_ascii_case("application/json"))
    })
}

/// Whoever sent the requests of one body.
struct Caller<'a> {
    app: &'a App,
    client: Option<String>,
    principal: Principal,
}

/// A request's envelope.
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow, default)]
    jsonrpc: Option<Text<'a>>,
    #[serde(borrow, default)]
    method: Option<Text<'a>>,
    #[serde(borrow, default)]
    params: Option<&'a RawValue>,
    /// Absent in a notification. The clients of 0.1.0 send `null` where they wait for an answer.
    #[serde(borrow, default, deserialize_with = "present")]
    id: Option<&'a RawValue>,
}

/// What most requests are, read in one pass.
#[derive(Deserialize)]
struct AgentCall<'a> {
    #[serde(borrow)]
    jsonrpc: Text<'a>,
    #[serde(borrow)]
    method: Text<'a>,
    #[serde(borrow)]
    params: Message<'a>,
    #[serde(borrow)]
    id: &'a RawValue,
}

impl AgentCall<'_> {
    fn is_well_formed(&self) -> bool {
        (&*self.jsonrpc, &*self.method) == ("2.0", "agent.call") && is_id(self.id.get())
    }
}

/// A call on its way to an agent.
struct Begun {
    id: MessageId,
    reply: Waiting,
}

impl Begun {
    /// Appends the reply to `out`.
    async fn end(begun: Result<Self, Failure>, out: &mut String) -> MethodResult {
        let Self { id, reply } = begun?;
        let answered = dialect::response(id.as_str(), &reply.await?, out);
        Ok(answered.map_err(|fault| fault.may_have_run_if(true))?)
    }
}

/// Tells `null` from absent.
fn present<'de, D>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// Why a method failed: the envelope's fault, or the method's.
struct Failure {
    code: RpcCode,
    fault: Fault,
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self { code: RpcCode::Fault, fault }
    }
}

impl Failure {
    fn params(error: impl std::fmt::Display) -> Self {
        let hint = "docs of autogen-http-runtime 0.1.0 have the parameters of each method";
        Self { code: RpcCode::InvalidParams, fault: invalid(error.to_string()).hint(hint) }
    }
}

/// What became of a method, which appends its result as JSON.
type MethodResult = Result<(), Failure>;

const OK: &str = r#"{"ok":true}"#;

impl Caller<'_> {
    /// The answers to an array of requests, which run at the same time; none if all of them are
    /// notifications.
    async fn batch(&self, body: &Bytes) -> Option<String> {
        let (config, metrics) = (self.exchange().config(), self.exchange().metrics());
        let requests = match json::parse::<Vec<&RawValue>>(body, config.limits.json_depth) {
            Ok(requests) => requests,
            Err(error) => return Some(failure(None, RpcCode::ParseError, &error.fault(metrics))),
        };
        if requests.is_empty() {
            let fault =
                invalid("a batch needs at least one request").hint("send the request itself");
            return Some(failure(None, RpcCode::InvalidRequest, &fault));
        }
        let max = config.limits.batch;
        if requests.len() > max {
            let detail = format!("the batch has {} requests, {max} are allowed", requests.len());
            let fault = invalid(detail).hint("split it, or raise the limit");
            let fault = metrics.limit_met(limits::batch, Some(max), fault);
            return Some(failure(None, RpcCode::InvalidRequest, &fault));
        }
        let answers = requests.iter().map(|request| self.answer(request.get().as_bytes(), body));
        let mut answers = join_all(answers).await;
        let max = config.limits.queue_bytes.0;
        let mut length = 0;
        for (answer, request) in answers.iter_mut().zip(&requests) {
            let Some(answer) = answer else { continue };
            length += answer.len();
            if length > max {
                let envelope = serde_json::from_str::<Envelope<'_>>(request.get()).ok();
                let id = envelope.and_then(|envelope| envelope.id).map(RawValue::get);
                let fault =
                    Fault::new(FaultKind::TooLarge, "the batch's answers are too large together")
                        .may_have_run_if(true)
                        .hint("send the requests in several batches");
                let fault = metrics.limit_met(limits::queue_bytes, Some(max), fault);
                *answer = failure(id.filter(|id| is_id(id)), RpcCode::Fault, &fault);
            }
        }
        let answers: Vec<String> = answers.into_iter().flatten().collect();
        (!answers.is_empty()).then(|| format!("[{}]", answers.join(",")))
    }

    /// The answer to one request; none to a notification. `body` is what `request` is a part of.
    async fn answer(&self, request: &[u8], body: &Bytes) -> Option<String> {
        let max_depth = self.exchange().config().limits.json_depth;
        // Whatever is not such a call, or wrong in any way, is read again part by part.
        let call = json::parse::<AgentCall<'_>>(request, max_depth);
        if let Some(call) = call.ok().filter(AgentCall::is_well_formed) {
            let (id, begun) = (call.id.get(), self.begin_call(call.params, body));
            let mut out = begin_answer();
            let result = Begun::end(begun, &mut out).await;
            return Some(end_answer(out, result, id));
        }
        let envelope = match json::parse::<Envelope<'_>>(request, max_depth) {
            Ok(envelope) => envelope,
            Err(error) => {
                let code = match &error {
                    json::JsonError::Syntax(e) if e.is_data() => RpcCode::InvalidRequest,
                    _ => RpcCode::ParseError,
                };
                let fault = error.fault(self.exchange().metrics());
                return Some(failure(None, code, &fault));
            }
        };
        let id = envelope.id.map(RawValue::get);
        if let Err(problem) = check(&envelope) {
            let fault = invalid(problem).hint("https://www.jsonrpc.org/specification has the form");
            return Some(failure(id.filter(|id| is_id(id)), RpcCode::InvalidRequest, &fault));
        }
        let method = envelope.method.as_deref().unwrap_or_default();
        let params = envelope.params.map_or("{}", RawValue::get);
        let params = if params == "null" { "{}" } else { params };
        let mut out = begin_answer();
        let result = self.run(method, params, body, &mut out).await;
        Some(end_answer(out, result, id?))
    }

    async fn run(
        &self,
        method: &str,
        params: &str,
        body: &Bytes,
        out: &mut String,
    ) -> MethodResult {
        if !params.starts_with('{') {
            return Err(Failure::params("`params` must be an object"));
        }
        // 0.1.0 asks it of every request.
        self.client()?;
        match method {
            "agent.call" => {
                let call = serde_json::from_str(params).map_err(Failure::params)?;
                return Begun::end(self.begin_call(call, body), out).await;
            }
            "agent.publish" => {
                self.publish(params, body)?;
                out.push_str("null");
            }
            "runtime.get_subscriptions" => out.push_str(&self.subscriptions()),
            _ => {
                match method {
                    "runtime.register_agent" => self.register_agent(params),
                    "runtime.register_agent_instance" => self.register_instance(params),
                    "runtime.add_subscription" => self.add_subscription(params),
                    "runtime.remove_subscription" => self.remove_subscription(params),
                    _ => Err(unknown(method)),
                }?;
                out.push_str(OK);
            }
        }
        Ok(())
    }

    /// Sends a call on its way.
    fn begin_call(&self, call: Message<'_>, body: &Bytes) -> Result<Begun, Failure> {
        let frame = call.into_call(CallId(0), body).map_err(Failure::params)?;
        let origin = self.origin()?;
        let (exchange, now) = (self.exchange(), Instant::now());
        let header = exchange.stamp(frame.header, &origin, now);
        let id = header.id.clone();
        let deadline = exchange.deadline(None, now).into_std();
        let (target, payload) = (frame.target, frame.payload);
        let call =
            Call { header, target, deadline, progress: false, attempt: None, topic: None, payload };
        Ok(Begun { id, reply: exchange.call(call, None) })
    }

    fn publish(&self, params: &str, body: &Bytes) -> MethodResult {
        let event: Message<'_> = serde_json::from_str(params).map_err(Failure::params)?;
        let frame = event.into_publish(body).map_err(Failure::params)?;
        let origin = self.origin()?;
        let now = Instant::now();
        let header = self.exchange().stamp(frame.header, &origin, now);
        let event = Event { header, topic: frame.topic, payload: frame.payload };
        self.exchange().publish(event, origin.worker, now)?;
        Ok(())
    }

    fn register_agent(&self, params: &str) -> MethodResult {
        #[derive(Deserialize)]
        struct Params<'a> {
            #[serde(rename = "type", borrow)]
            agent_type: Text<'a>,
        }
        let params: Params<'_> = serde_json::from_str(params).map_err(Failure::params)?;
        let agent_type = AgentType::parse(&*params.agent_type).map_err(Failure::params)?;
        let peer = self.enter()?;
        if self.exchange().directory().types_of(peer.id).any(|(known, _)| *known == agent_type) {
            let detail = format!("agent type {agent_type} already registered.");
            return Err(Fault::new(FaultKind::Conflict, detail).into());
        }
        // AutoGen's rule: a type has one worker.
        let registration = Registration { exclusive: true, ..Registration::default() };
        self.exchange().register(&peer, &agent_type, &registration)?;
        Ok(())
    }

    fn register_instance(&self, params: &str) -> MethodResult {
        #[derive(Deserialize)]
        struct Params<'a> {
            #[serde(borrow)]
            agent_id: AgentIn<'a>,
        }
        let params: Params<'_> = serde_json::from_str(params).map_err(Failure::params)?;
        let agent = params.agent_id.parse(&Bytes::new()).map_err(Failure::params)?;
        self.exchange().register_instance(&self.enter()?, &agent)?;
        Ok(())
    }

    fn add_subscription(&self, params: &str) -> MethodResult {
        #[derive(Deserialize)]
        struct Params<'a> {
            #[serde(borrow)]
            id: Text<'a>,
            #[serde(borrow, default)]
            type_subscription: Option<Exact<'a>>,
            #[serde(borrow, default)]
            type_prefix_subscription: Option<Prefix<'a>>,
        }
        #[derive(Deserialize)]
        struct Exact<'a> {
            #[serde(borrow)]
            topic_type: Text<'a>,
            #[serde(borrow)]
            agent_type: Text<'a>,
        }
        #[derive(Deserialize)]
        struct Prefix<'a> {
            #[serde(borrow)]
            topic_type_prefix: Text<'a>,
            #[serde(borrow)]
            agent_type: Text<'a>,
        }
        let params: Params<'_> = serde_json::from_str(params).map_err(Failure::params)?;
        let (filter, agent_type) =
            match (&params.type_subscription, &params.type_prefix_subscription) {
                (Some(exact), None) => {
                    let topic_type = TopicType::parse(&*exact.topic_type);
                    (topic_type.map(TopicFilter::Exact), &exact.agent_type)
                }
                (None, Some(prefix)) => {
                    (TopicFilter::prefix(&prefix.topic_type_prefix), &prefix.agent_type)
                }
                _ => {
                    let detail = "give type_subscription or type_prefix_subscription, and only one";
                    return Err(Failure::params(detail));
                }
            };
        let filter = filter.map_err(Failure::params)?;
        let agent_type = AgentType::parse(&**agent_type).map_err(Failure::params)?;
        if params.id.is_empty() || params.id.len() > 256 {
            return Err(Failure::params("a subscription's id has 1 to 256 bytes"));
        }
        let id = SubscriptionId::Named((&*params.id).into());
        let subscription = Subscription { filter, target: Target::Agent(agent_type.to_kept()) };
        self.exchange().subscribe(&self.enter()?, id, &subscription, true)?;
        Ok(())
    }

    fn remove_subscription(&self, params: &str) -> MethodResult {
        #[derive(Deserialize)]
        struct Params<'a> {
            #[serde(borrow)]
            id: Text<'a>,
        }
        let params: Params<'_> = serde_json::from_str(params).map_err(Failure::params)?;
        let id = SubscriptionId::Named((&*params.id).into());
        self.exchange().unsubscribe(&self.enter()?, &id)?;
        Ok(())
    }

    fn subscriptions(&self) -> String {
        let directory = self.exchange().directory();
        let all = directory.subscriptions().filter_map(|(id, _, subscription)| {
            let Target::Agent(agent_type) = &subscription.target else { return None };
            let agent_type = agent_type.as_str();
            let id = id.to_string();
            Some(match &subscription.filter {
                TopicFilter::Exact(topic) => json!({"id": id, "type_subscription": {
                    "topic_type": topic.as_str(), "agent_type": agent_type,
                }}),
                TopicFilter::Prefix(prefix) => json!({"id": id, "type_prefix_subscription": {
                    "topic_type_prefix": &**prefix, "agent_type": agent_type,
                }}),
            })
        });
        json!({"subscriptions": all.collect::<Vec<_>>()}).to_string()
    }

    fn exchange(&self) -> &Exchange {
        &self.app.exchange
    }

    fn client(&self) -> Result<&str, Fault> {
        self.client.as_deref().ok_or_else(|| {
            invalid("Missing client_id header")
                .hint("send the header x-client-id with an id of your own making")
        })
    }

    /// The client's place in the room, made if it is new.
    fn enter(&self) -> Result<crate::peer::Peer, Fault> {
        self.app.lobby.enter(self.app, self.client()?, &self.principal)
    }

    /// Whom calls and events come from: the client's connection, if it has one.
    fn origin(&self) -> Result<Origin, Fault> {
        let peer = self.app.lobby.find(self.client()?, &self.principal);
        Ok(Origin { principal: self.principal.clone(), worker: peer.map(|peer| peer.id) })
    }
}

fn check(envelope: &Envelope<'_>) -> Result<(), &'static str> {
    if envelope.jsonrpc.as_deref() != Some("2.0") {
        return Err("`jsonrpc` must be \"2.0\"");
    }
    if envelope.method.is_none() {
        return Err("`method` is missing");
    }
    if !envelope.id.map(RawValue::get).is_none_or(is_id) {
        return Err("`id` must be a short text, a number or null");
    }
    let params = envelope.params.map_or("{}", RawValue::get);
    if !params.starts_with(['{', '[', 'n']) {
        return Err("`params` must be an object");
    }
    Ok(())
}

fn is_id(id: &str) -> bool {
    id.len() <= 256 && !id.starts_with(['{', '[', 't', 'f'])
}

fn unknown(method: &str) -> Failure {
    let detail = format!("Unknown method {}", method.escape_debug());
    let hint = "agent.call, agent.publish, runtime.register_agent, \
                runtime.register_agent_instance, runtime.add_subscription, \
                runtime.remove_subscription, runtime.get_subscriptions";
    Failure { code: RpcCode::MethodNotFound, fault: invalid(detail).hint(hint) }
}

/// An answer up to its result, with room for a short one.
fn begin_answer() -> String {
    let mut out = String::with_capacity(512);
    out.push_str(r#"{"jsonrpc":"2.0","result":"#);
    out
}

/// The whole answer: `out` with its result and `id`, or the failure instead.
fn end_answer(mut out: String, result: MethodResult, id: &str) -> String {
    if let Err(Failure { code, fault }) = result {
        return failure(Some(id), code, &fault);
    }
    out.push_str(r#","id":"#);
    out.push_str(id);
    out.push('}');
    out
}

fn failure(id: Option<&str>, code: RpcCode, fault: &Fault) -> String {
    let data = Problem::new(fault, status(fault.kind()), None);
    let error = json!({"code": code as i32, "message": fault.detail(), "data": data});
    format!(r#"{{"jsonrpc":"2.0","error":{error},"id":{}}}"#, id.unwrap_or("null"))
}
