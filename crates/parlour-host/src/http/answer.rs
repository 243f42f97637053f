//! Responses, and the one way in which a fault becomes one.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use parlour_core::{Fault, FaultKind};
use serde::Serialize;

use super::phase::Answering;
use super::problem::{Problem, status};

/// The longest wait that is asked of a client, whatever an agent says.
const A_DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A fault on its way to an HTTP client.
#[derive(Debug)]
pub(crate) struct Refusal {
    fault: Fault,
    /// What only HTTP knows: 405, 408, 415, 431.
    status: Option<StatusCode>,
    conversation: Option<String>,
    /// Whether a token is asked for.
    challenge: bool,
    allow: Option<&'static str>,
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        Self { fault, status: None, conversation: None, challenge: false, allow: None }
    }
}

impl From<parlour_core::InvalidName> for Refusal {
    fn from(error: parlour_core::InvalidName) -> Self {
        bad_name(&error).into()
    }
}

/// The fault of a name that breaks its rule.
pub(crate) fn bad_name(error: &parlour_core::InvalidName) -> Fault {
    invalid(error.to_string()).hint(format!("use {}", error.rule()))
}

impl Refusal {
    /// A fault of kind `invalid` with a status of its own.
    pub(crate) fn invalid(status: StatusCode, detail: impl Into<Box<str>>) -> Self {
        Self { status: Some(status), ..invalid(detail).into() }
    }

    /// Answers with this status instead of the one of the fault's kind.
    pub(crate) fn status(self, status: StatusCode) -> Self {
        Self { status: Some(status), ..self }
    }

    pub(crate) fn hint(self, hint: impl Into<Box<str>>) -> Self {
        Self { fault: self.fault.hint(hint), ..self }
    }

    /// Asks for a token. (An agent's own `unauthenticated` does not.)
    pub(crate) fn challenge(self) -> Self {
        Self { challenge: true, ..self }
    }

    pub(crate) fn allow(self, methods: &'static str) -> Self {
        Self { allow: Some(methods), ..self }
    }

    pub(crate) fn conversation(self, conversation: &str) -> Self {
        Self { conversation: Some(conversation.into()), ..self }
    }
}

/// A fault of kind `invalid`.
pub(crate) fn invalid(detail: impl Into<Box<str>>) -> Fault {
    Fault::new(FaultKind::Invalid, detail)
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = self.status.unwrap_or_else(|| status(self.fault.kind()));
        let problem = Problem::new(&self.fault, status, self.conversation.as_deref());
        let mut response = json_as(status, "application/problem+json", &problem);
        let headers = response.headers_mut();
        if let Some(wait) = self.fault.retry_after_time() {
            // The header has whole seconds; `retry_after_ms` is exact.
            let seconds = wait.min(A_DAY).as_millis().div_ceil(1000) as u64;
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(methods) = self.allow {
            headers.insert(header::ALLOW, HeaderValue::from_static(methods));
        }
        if self.challenge {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// A JSON answer.
pub(crate) fn json(value: &impl Serialize) -> Response {
    json_as(StatusCode::OK, "application/json", value)
}

fn json_as(status: StatusCode, media_type: &'static str, value: &impl Serialize) -> Response {
    // Maps with keys other than texts could fail; none of ours has such.
    let text = serde_json::to_vec(value).unwrap_or_default();
    let mut response = Response::new(axum::body::Body::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    response
}

/// A response's content.
#[derive(Debug)]
pub(crate) enum Content {
    /// All of it, until it is taken.
    Whole(Bytes),
    /// Whatever the router's handlers answer with.
    Other(axum::body::Body),
}

impl Body for Content {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        match &mut *self {
            Self::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Other(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_empty(),
            Self::Other(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Other(body) => body.size_hint(),
        }
    }
}

/// A response's body, until whose end the request is under way.
pub(crate) struct Tracked {
    body: Content,
    answering: Answering,
    /// Of a stream that has to move: what it said and was not asked for yet.
    said: Option<Bytes>,
}

/// How much of a stream is given at a time, so that a slow peer is seen to take it.
const PART: usize = 16 * 1024;

impl Tracked {
    /// With `watch` the body has to move: over HTTP/1 the socket sees to that.
    pub(crate) fn new(
        response: http::Response<Content>,
        mut answering: Answering,
        watch: bool,
    ) -> http::Response<Self> {
        // A stream of events has no length.
        let length = response.body().size_hint().exact();
        if watch && length != Some(0) {
            answering.begin_sending();
        }
        let said = (watch && length.is_none()).then(Bytes::new);
        response.map(|body| Self { body, answering, said })
    }
}

impl Body for Tracked {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Self { body, answering, said } = &mut *self;
        let Some(said) = said else {
            let frame = Pin::new(body).poll_frame(cx);
            answering.moved();
            return frame;
        };
        if said.is_empty() {
            match Pin::new(body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => *said = frame.into_data().unwrap_or_default(),
                Poll::Ready(end) => return Poll::Ready(end),
                Poll::Pending => {
                    answering.rest();
                    return Poll::Pending;
                }
            }
        }
        answering.begin_sending();
        let part = said.split_to(said.len().min(PART));
        Poll::Ready(Some(Ok(Frame::data(part))))
    }

    fn is_end_stream(&self) -> bool {
        self.said.as_ref().is_none_or(Bytes::is_empty) && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What a handler answers with.
pub(crate) type Answer = Result<Response, Refusal>;
