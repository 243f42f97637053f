//! Server-sent events: what is published (`GET /v1/topics/{type}/events`), and what a call's agent has
//! to say before it answers.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::extract::{Query, Request, State};
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::poll;
use http::{HeaderMap, HeaderValue, header};
use http_body::{Body, Frame};
use parlour_core::{
    Call, Event, MessageId, Payload, Reply, Subscription, SubscriptionId, Target, TopicFilter,
};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::answer::{Answer, Refusal};
use super::problem::{Problem, status};
use super::rest::{CONVERSATION, origin};
use super::router::{App, Segments};
use crate::exchange::{Exchange, Waiting};
use crate::peer::{Bounds, Outgoing, Peer, ProgressOf, progress};

/// The name under which such listeners are listed.
const NAME: &str = "sse";
const MEDIA_TYPE: &str = "text/event-stream";
pub(super) const HEARTBEAT: &[u8] = b": heartbeat\n\n";
/// How many messages of a call's progress may wait for a client that reads slowly.
const PROGRESS: usize = 256;

#[derive(Debug, Deserialize)]
pub(crate) struct Filter {
    /// Only events of this source.
    source: Option<String>,
}

/// Follows a topic type, or with a trailing `*` all types that begin with the rest.
pub(crate) async fn events(
    State(app): State<App>,
    Segments(pattern): Segments<String>,
    Query(filter): Query<Filter>,
    request: Request,
) -> Answer {
    let topics = TopicFilter::parse(&pattern)?;
    let exchange = app.exchange.clone();
    let (peer, inbox) = exchange.join(NAME, origin(&request).principal);
    let heartbeat = exchange.config().timeouts.heartbeat;
    let stream = Stream::new(exchange, peer, inbox, filter.source, heartbeat);
    let id = SubscriptionId::Numbered(stream.peer.id, 0);
    let subscription = Subscription { filter: topics, target: Target::Listener(0) };
    app.exchange.subscribe(&stream.peer, id, &subscription, false)?;
    stream.peer.connected.store(true, std::sync::atomic::Ordering::Relaxed);

    Ok(streaming(stream))
}

pub(super) fn streaming(
    body: impl Body<Data = Bytes, Error = Infallible> + Send + 'static,
) -> Response {
    let mut response = Response::new(axum::body::Body::new(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// Whether a request asks for events in place of one answer.
pub(crate) fn is_wanted(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let mut types = values
        .flat_map(|value| value.split(','))
        .map(|range| range.split(';').next().unwrap_or_default().trim());
    types.any(|range| range.eq_ignore_ascii_case(MEDIA_TYPE))
}

/// Makes `call`, and answers with its progress as it comes, and then with how it ended.
///
/// One that has ended already is answered like any other: a call that cannot begin has a status.
pub(crate) async fn call(exchange: &Exchange, call: Call) -> Answer {
    let conversation = call.header.conversation.clone();
    let bounds = Bounds { messages: PROGRESS, bytes: exchange.config().limits.queue_bytes.0 };
    let (progress_to, progress) = progress(bounds);
    let mut waiting = exchange.call(call, Some(progress_to));
    let ended = match poll!(&mut waiting) {
        Poll::Ready(Err(fault)) => {
            return Err(Refusal::from(fault).conversation(conversation.as_str()));
        }
        Poll::Ready(Ok(payload)) => Some(Ok(payload)),
        Poll::Pending => None,
    };
    let mut response = streaming(CallStream {
        waiting,
        progress,
        ended,
        is_over: false,
        heartbeat: heartbeat(exchange.config().timeouts.heartbeat),
        greeting: Some(": called\n\n"),
        conversation: conversation.clone(),
    });
    if let Ok(conversation) = HeaderValue::from_bytes(conversation.as_str().as_bytes()) {
        response.headers_mut().insert(CONVERSATION, conversation);
    }
    Ok(response)
}

/// A response's body that gives its call up when it is dropped.
struct CallStream {
    waiting: Waiting,
    progress: ProgressOf,
    /// How the call ended, if that was known at once.
    ended: Option<Reply>,
    /// Whether that is written.
    is_over: bool,
    heartbeat: Interval,
    /// What is sent before anything else.
    greeting: Option<&'static str>,
    conversation: MessageId,
}

impl Body for CallStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = |text: Bytes| Poll::Ready(Some(Ok(Frame::data(text))));
        if let Some(greeting) = self.greeting.take() {
            return frame(Bytes::from_static(greeting.as_bytes()));
        }
        match self.progress.poll_recv(cx) {
            Poll::Ready(Some(payload)) => {
                return frame(write_named("progress", &Content::from(&payload)));
            }
            Poll::Ready(None) if self.is_over => return Poll::Ready(None),
            // The sender went with the call's end.
            Poll::Ready(None) => {
                let ended = match self.ended.take() {
                    Some(ended) => ended,
                    None => ready!(Pin::new(&mut self.waiting).poll(cx)),
                };
                self.is_over = true;
                return frame(self.write_end(&ended));
            }
            Poll::Pending => {}
        }
        ready!(self.heartbeat.poll_tick(cx));
        frame(Bytes::from_static(HEARTBEAT))
    }
}

impl CallStream {
    fn write_end(&self, ended: &Reply) -> Bytes {
        match ended {
            Ok(payload) => write_named("reply", &Content::from(payload)),
            Err(fault) => {
                let conversation = Some(self.conversation.as_str());
                write_named("fault", &Problem::new(fault, status(fault.kind()), conversation))
            }
        }
    }
}

fn heartbeat(period: Duration) -> Interval {
    let mut heartbeat = interval(period);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    heartbeat.reset();
    heartbeat
}

/// A response's body that ends its subscription when it is dropped.
struct Stream {
    exchange: Exchange,
    peer: Peer,
    inbox: mpsc::UnboundedReceiver<Outgoing>,
    source: Option<String>,
    heartbeat: Interval,
    /// What is sent before anything else.
    greeting: Option<&'static str>,
}

impl Stream {
    fn new(
        exchange: Exchange,
        peer: Peer,
        inbox: mpsc::UnboundedReceiver<Outgoing>,
        source: Option<String>,
        heartbeat: Duration,
    ) -> Self {
        let (heartbeat, greeting) = (self::heartbeat(heartbeat), Some(": subscribed\n\n"));
        Self { exchange, peer, inbox, source, heartbeat, greeting }
    }
}

impl Body for Stream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let frame = |text: Bytes| Poll::Ready(Some(Ok(Frame::data(text))));
        if let Some(greeting) = self.greeting.take() {
            return frame(Bytes::from_static(greeting.as_bytes()));
        }
        while let Poll::Ready(item) = self.inbox.poll_recv(cx) {
            let Some(item) = item else { return Poll::Ready(None) };
            self.peer.released(item.weight());
            match item {
                Outgoing::Event(shared, _) => {
                    let event = shared.event();
                    if self.source.as_ref().is_none_or(|s| s == event.topic.source.as_str()) {
                        return frame(shared.sse().clone());
                    }
                }
                // The host is going away, and the client will come back to it or to another.
                Outgoing::Drain | Outgoing::Close(_) => return Poll::Ready(None),
                _ => {}
            }
        }
        ready!(self.heartbeat.poll_tick(cx));
        frame(Bytes::from_static(HEARTBEAT))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.exchange.leave(self.peer.id);
    }
}

#[derive(Serialize)]
struct Data<'a> {
    id: &'a str,
    conversation: &'a str,
    topic: Topic<'a>,
    sender: Option<String>,
    #[serde(flatten)]
    content: Content<'a>,
    /// Milliseconds since the Unix epoch.
    time: u64,
}

#[derive(Serialize)]
struct Topic<'a> {
    r#type: &'a str,
    source: &'a str,
}

/// A payload in JSON: as text if it is text.
#[derive(Serialize)]
pub(super) struct Content<'a> {
    data_type: &'a str,
    content_type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_base64: Option<String>,
}

impl<'a> From<&'a Payload> for Content<'a> {
    fn from(payload: &'a Payload) -> Self {
        let data = std::str::from_utf8(&payload.bytes).ok();
        let data_base64 = data.is_none().then(|| STANDARD.encode(&payload.bytes));
        let (data_type, content_type) = (&*payload.data_type, &*payload.content_type);
        Self { data_type, content_type, data, data_base64 }
    }
}

/// The lines of an event that was published at `time`.
pub(crate) fn write(event: &Event, time: Duration) -> Bytes {
    let topic = &event.topic;
    let value = Data {
        id: event.header.id.as_str(),
        conversation: event.header.conversation.as_str(),
        topic: Topic { r#type: topic.topic_type.as_str(), source: topic.source.as_str() },
        sender: event.header.sender.as_ref().map(ToString::to_string),
        content: Content::from(&event.payload),
        time: time.as_millis() as u64,
    };
    // JSON has no line breaks of its own, and an id has no control characters.
    format!("id: {}\ndata: {}\n\n", event.header.id, json(&value)).into()
}

pub(super) fn write_named(name: &str, value: &impl Serialize) -> Bytes {
    format!("event: {name}\ndata: {}\n\n", json(value)).into()
}

fn json(value: &impl Serialize) -> String {
    // Maps with keys other than texts could fail; none of ours has such.
    serde_json::to_string(value).unwrap_or_default()
}
