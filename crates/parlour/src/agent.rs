use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use parlour_core::{Fault, FaultKind, Payload, TopicId};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Cx, IntoPayload, Json, PayloadExt};

/// Something that answers calls and receives events.
///
/// One value serves one key: a worker makes it when the first message for the key comes, and keeps
/// it, so its fields are the agent's memory; of very many keys, only those that were used latest (see
/// [`max_agents`](crate::WorkerBuilder::max_agents)). Several messages run at once, each in a task of
/// its own, so what changes needs a lock or an atomic.
///
/// A handler is dropped in the middle when its caller gives up, its deadline passes, or the
/// connection is lost. A panic is caught and reported like an error.
///
/// Async closures and functions over raw messages are agents; [`typed`] makes one over JSON, and
/// [`on_event`] one that only receives events.
///
/// ```
/// use parlour::{Agent, AgentError, Cx, Payload};
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// #[derive(Default)]
/// struct Counter(AtomicU64);
///
/// impl Agent for Counter {
///     async fn call(&self, _cx: Cx, _message: Payload) -> Result<Payload, AgentError> {
///         let count = self.0.fetch_add(1, Ordering::Relaxed) + 1;
///         Ok(Payload::text(count.to_string()))
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an agent",
    note = "an agent is an async closure or function of `(Cx, Payload)`, with these types written \
            out, that returns `Result<_, AgentError>`; what `typed` or `on_event` makes; or a type \
            that implements `Agent`"
)]
pub trait Agent: Send + Sync + 'static {
    /// Answers a call. An error reaches the caller as the fault that [`AgentError`] describes.
    ///
    /// Refuses with a fault of kind `invalid` unless it is implemented.
    fn call(
        &self,
        cx: Cx,
        message: Payload,
    ) -> impl Future<Output = Result<Payload, AgentError>> + Send {
        let _ = message;
        async move {
            let detail = format!("{} receives events and answers no calls", cx.agent());
            Err(Fault::new(FaultKind::Invalid, detail).into())
        }
    }

    /// Receives an event. An error is logged, and reaches nobody.
    ///
    /// Ignores it unless it is implemented.
    fn event(
        &self,
        cx: Cx,
        topic: TopicId,
        message: Payload,
    ) -> impl Future<Output = Result<(), AgentError>> + Send {
        let _ = (cx, topic, message);
        async { Ok(()) }
    }
}

impl<F, Fut, R> Agent for F
where
    F: Fn(Cx, Payload) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<R, AgentError>> + Send,
    R: IntoPayload + Send,
{
    async fn call(&self, cx: Cx, message: Payload) -> Result<Payload, AgentError> {
        Ok(self(cx, message).await?.into_payload()?)
    }
}

/// An agent over JSON: the message is decoded for `handler`, and what it returns is encoded.
///
/// A message that does not decode is answered with a fault of kind `invalid`, which says why.
///
/// ```
/// # use parlour::{typed, Cx};
/// let sum = typed(|_cx: Cx, numbers: Vec<i64>| async move { Ok(numbers.iter().sum::<i64>()) });
/// ```
pub fn typed<F, Request, Fut, Response>(handler: F) -> Typed<F, Request>
where
    F: Fn(Cx, Request) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Response, AgentError>> + Send,
    Request: DeserializeOwned + Send + 'static,
    Response: Serialize + Send,
{
    Typed { handler, request: PhantomData }
}

/// An agent over JSON; made by [`typed`].
pub struct Typed<F, Request> {
    handler: F,
    request: PhantomData<fn(Request)>,
}

impl<F, Request, Fut, Response> Agent for Typed<F, Request>
where
    F: Fn(Cx, Request) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Response, AgentError>> + Send,
    Request: DeserializeOwned + Send + 'static,
    Response: Serialize + Send,
{
    async fn call(&self, cx: Cx, message: Payload) -> Result<Payload, AgentError> {
        let request = message.json::<Request>().map_err(|error| {
            Fault::new(FaultKind::Invalid, chain(&error))
                .hint("send JSON of the shape that this agent takes")
        })?;
        Ok(Json((self.handler)(cx, request).await?).into_payload()?)
    }
}

impl<F, Request> fmt::Debug for Typed<F, Request> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Typed").finish_non_exhaustive()
    }
}

/// An agent that receives events and answers no calls.
///
/// ```
/// # use parlour::{on_event, Cx, Payload, TopicId};
/// let listener = on_event(|_cx: Cx, topic: TopicId, message: Payload| async move {
///     println!("{topic}: {} bytes", message.bytes.len());
///     Ok(())
/// });
/// ```
pub fn on_event<F, Fut>(handler: F) -> OnEvent<F>
where
    F: Fn(Cx, TopicId, Payload) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), AgentError>> + Send,
{
    OnEvent(handler)
}

/// An agent that receives events; made by [`on_event`].
pub struct OnEvent<F>(F);

impl<F, Fut> Agent for OnEvent<F>
where
    F: Fn(Cx, TopicId, Payload) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), AgentError>> + Send,
{
    async fn event(&self, cx: Cx, topic: TopicId, message: Payload) -> Result<(), AgentError> {
        (self.0)(cx, topic, message).await
    }
}

impl<F> fmt::Debug for OnEvent<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnEvent").finish_non_exhaustive()
    }
}

/// Why a handler has no answer. `?` makes one of any error, and so do texts.
///
/// A [`Fault`] reaches the caller as it is; everything else as a fault of kind `agent_failed` with
/// the error's text and those of its sources.
#[derive(Debug)]
pub struct AgentError(Box<dyn std::error::Error + Send + Sync>);

impl AgentError {
    pub(crate) fn into_fault(self) -> Fault {
        match self.0.downcast::<Fault>() {
            Ok(fault) => *fault,
            Err(error) => Fault::new(FaultKind::AgentFailed, chain(&*error)),
        }
    }
}

// `AgentError` is no `Error` itself, or this would overlap with `From<T> for T`.
impl<E: Into<Box<dyn std::error::Error + Send + Sync>>> From<E> for AgentError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl fmt::Display for AgentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The text of an error and of its sources, without those that an error repeats by itself.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = error.source();
    }
    text
}

/// An [`Agent`] of any type.
pub(crate) trait ErasedAgent: Send + Sync {
    fn call(
        self: Arc<Self>,
        cx: Cx,
        message: Payload,
    ) -> BoxFuture<'static, Result<Payload, AgentError>>;

    fn event(
        self: Arc<Self>,
        cx: Cx,
        topic: TopicId,
        message: Payload,
    ) -> BoxFuture<'static, Result<(), AgentError>>;
}

impl<A: Agent> ErasedAgent for A {
    fn call(
        self: Arc<Self>,
        cx: Cx,
        message: Payload,
    ) -> BoxFuture<'static, Result<Payload, AgentError>> {
        Box::pin(async move { Agent::call(&*self, cx, message).await })
    }

    fn event(
        self: Arc<Self>,
        cx: Cx,
        topic: TopicId,
        message: Payload,
    ) -> BoxFuture<'static, Result<(), AgentError>> {
        Box::pin(async move { Agent::event(&*self, cx, topic, message).await })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the ledger is closed")]
    struct Closed(#[source] std::fmt::Error);

    #[test]
    fn any_error_fails_the_agent_with_its_text_and_a_fault_stays_itself() {
        let fault = |error: AgentError| {
            let fault = error.into_fault();
            (fault.kind(), fault.to_string())
        };
        assert_eq!(fault("no paper".into()), (FaultKind::AgentFailed, "no paper".into()));
        assert_eq!(fault(String::from("no ink").into()).1, "no ink");
        let source = std::fmt::Error;
        assert_eq!(fault(Closed(source).into()).1, format!("the ledger is closed: {source}"));
        let invalid = Fault::new(FaultKind::Invalid, "not a number");
        assert_eq!(fault(invalid.into()), (FaultKind::Invalid, "not a number".into()));
    }
}
