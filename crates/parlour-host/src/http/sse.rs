//! `GET /v1/topics/{type}/events`: events as they are published, as server-sent events.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::extract::{Query, Request, State};
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderValue, header};
use http_body::{Body, Frame};
use parlour_core::{Event, Subscription, SubscriptionId, Target, TopicFilter};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::answer::Answer;
use super::rest::origin;
use super::router::{App, Segments};
use crate::exchange::Exchange;
use crate::peer::{Outgoing, Peer};

/// The name under which such listeners are listed.
const NAME: &str = "sse";

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

    let mut response = Response::new(axum::body::Body::new(stream));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
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
        let mut heartbeat = interval(heartbeat);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        heartbeat.reset();
        Self { exchange, peer, inbox, source, heartbeat, greeting: Some(": subscribed\n\n") }
    }
}

impl Body for Stream {
    type Data = Bytes;
    type Error = std::convert::Infallible;

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
        frame(Bytes::from_static(b": heartbeat\n\n"))
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
    data_type: &'a str,
    content_type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_base64: Option<String>,
    /// Milliseconds since the Unix epoch.
    time: u64,
}

#[derive(Serialize)]
struct Topic<'a> {
    r#type: &'a str,
    source: &'a str,
}

/// The lines of an event that was published at `time`.
pub(crate) fn write(event: &Event, time: Duration) -> Bytes {
    let data = std::str::from_utf8(&event.payload.bytes).ok();
    let data_base64 = data.is_none().then(|| STANDARD.encode(&event.payload.bytes));
    let topic = &event.topic;
    let value = Data {
        id: event.header.id.as_str(),
        conversation: event.header.conversation.as_str(),
        topic: Topic { r#type: topic.topic_type.as_str(), source: topic.source.as_str() },
        sender: event.header.sender.as_ref().map(ToString::to_string),
        data_type: &event.payload.data_type,
        content_type: &event.payload.content_type,
        data,
        data_base64,
        time: time.as_millis() as u64,
    };
    // JSON has no line breaks of its own, and an id has no control characters.
    let json = serde_json::to_string(&value).unwrap_or_default();
    format!("id: {}\ndata: {json}\n\n", event.header.id).into()
}
