//! Server-sent events: what is published (`GET /v1/topics/{type}/events`), and what a call's agent has
//! to say before it answers.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::poll;
use futures_util::stream::unfold;
use http::{HeaderMap, HeaderValue, header};
use http_body::{Body, Frame};
use parlour_core::{
    Call, Event, MessageId, Payload, Reply, Subscription, SubscriptionId, Target, TopicFilter,
};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::answer::{Answer, Refusal, invalid};
use super::deliveries::LAST_EVENT_ID;
use super::problem::{Problem, status};
use super::rest::{CONVERSATION, origin, text};
use super::router::{App, Fields, Segments};
use crate::durable::{EventPlace, Follow, Followed};
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
    Fields(filter): Fields<Filter>,
    request: Request,
) -> Answer {
    let topics = TopicFilter::parse(&pattern)?;
    let exchange = app.exchange.clone();
    let after = text(request.headers(), &LAST_EVENT_ID)?.filter(|id| !id.is_empty());
    let log = match &topics {
        TopicFilter::Exact(topic_type) => {
            let after = after.map(|id| EventPlace::parse(&id)).transpose()?;
            let follow = app.durable.follow(topic_type, after).await?;
            Some(from_log(follow, filter.source.clone()))
        }
        TopicFilter::Prefix(_) if after.is_some() => {
            return Err(invalid("topics that begin alike have no order among each other")
                .hint("follow each topic type by itself to go on where you were")
                .into());
        }
        TopicFilter::Prefix(_) => None,
    };
    let (peer, inbox) = exchange.join(NAME, origin(&request).principal);
    let heartbeat = exchange.config().timeouts.heartbeat;
    let stream = Stream {
        exchange,
        peer,
        inbox,
        log,
        source: filter.source,
        heartbeat: self::heartbeat(heartbeat),
        greeting: Some(": subscribed\n\n"),
    };
    let id = SubscriptionId::Numbered(stream.peer.id, 0);
    let subscription = Subscription { filter: topics, target: Target::Listener(0) };
    app.exchange.subscribe(&stream.peer, id, &subscription, false)?;
    stream.peer.connected.store(true, std::sync::atomic::Ordering::Relaxed);

    Ok(streaming(stream))
}

/// The durable events of a topic, as they are sent. It ends when one is gone, and says so.
fn from_log(follow: Follow, source: Option<String>) -> Log {
    Box::pin(unfold(Some(follow), move |follow| {
        let source = source.clone();
        async move {
            let mut follow = follow?;
            loop {
                match follow.next().await {
                    Ok(Followed { place, event, time }) => {
                        if source.as_ref().is_none_or(|it| it == event.topic.source.as_str()) {
                            let text = write(&event, time, Some(&place.to_string()));
                            return Some((text, Some(follow)));
                        }
                    }
                    Err(fault) => {
                        let problem = Problem::new(&fault, status(fault.kind()), None);
                        return Some((write_named("fault", &problem), None));
                    }
                }
            }
        }
    }))
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
    /// What is in memory alone; of durable events what is announced, if there is no log to follow.
    inbox: mpsc::UnboundedReceiver<Outgoing>,
    /// Durable events, if one log has them all.
    log: Option<Log>,
    source: Option<String>,
    heartbeat: Interval,
    /// What is sent before anything else.
    greeting: Option<&'static str>,
}

type Log = Pin<Box<dyn futures_util::Stream<Item = Bytes> + Send>>;

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
                    if shared.is_durable() && self.log.is_some() {
                        continue;
                    }
                    if self.source.as_ref().is_none_or(|s| s == event.topic.source.as_str()) {
                        return frame(shared.sse().clone());
                    }
                }
                // The host is going away, and the client will come back to it or to another.
                Outgoing::Drain | Outgoing::Close(_) => return Poll::Ready(None),
                _ => {}
            }
        }
        if let Some(log) = &mut self.log
            && let Poll::Ready(text) = log.as_mut().poll_next(cx)
        {
            return text.map_or(Poll::Ready(None), frame);
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

/// The lines of an event that was published at `time`. What has a place in a log can be gone on behind.
pub(crate) fn write(event: &Event, time: Duration, place: Option<&str>) -> Bytes {
    let topic = &event.topic;
    let value = Data {
        id: event.header.id.as_str(),
        conversation: event.header.conversation.as_str(),
        topic: Topic { r#type: topic.topic_type.as_str(), source: topic.source.as_str() },
        sender: event.header.sender.as_ref().map(ToString::to_string),
        content: Content::from(&event.payload),
        time: time.as_millis() as u64,
    };
    // JSON has no line breaks of its own.
    let data = json(&value);
    match place {
        Some(place) => format!("id: {place}\ndata: {data}\n\n").into(),
        None => format!("data: {data}\n\n").into(),
    }
}

pub(super) fn write_named(name: &str, value: &impl Serialize) -> Bytes {
    format!("event: {name}\ndata: {}\n\n", json(value)).into()
}

fn json(value: &impl Serialize) -> String {
    // Maps with keys other than texts could fail; none of ours has such.
    serde_json::to_string(value).unwrap_or_default()
}
