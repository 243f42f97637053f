use std::fmt;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use parlour_core::wire::HeaderFields;
use parlour_core::{AgentId, ByteString, MessageId, Payload, TopicId};
use serde::de::DeserializeOwned;

use crate::handle::{Handle, after};
use crate::{Error, IntoAgentId, PayloadExt};

/// A call that begins when it is awaited, and ends with the agent's reply.
pub type CallRequest = Request<AgentId>;

/// An event that is published when it is awaited; the host then says who got it.
pub type PublishRequest = Request<TopicId>;

/// A message on its way to be sent: [`CallRequest`] or [`PublishRequest`]. Nothing happens until it
/// is awaited.
///
/// The deadline counts from then on, and covers waiting for a connection too. What is wrong with an
/// argument is said when it is awaited, before anything is sent.
///
/// # Cancel safety
///
/// Dropping the future of a call gives the call up, and the host and the agent are told. Dropping the
/// future of a publish takes the event back only as long as it was not written.
#[must_use = "nothing is sent until it is awaited"]
pub struct Request<To> {
    handle: Handle,
    parts: Result<(To, Payload), Error>,
    header: HeaderFields,
    timeout: Duration,
    /// The deadline of the message that this one follows from.
    latest: Option<Instant>,
}

impl<To> Request<To> {
    pub(crate) fn new(
        handle: Handle,
        parts: Result<(To, Payload), Error>,
        header: HeaderFields,
        latest: Option<Instant>,
    ) -> Self {
        let timeout = handle.default_timeout();
        Self { handle, parts, header, timeout, latest }
    }

    /// How long to wait at most, in place of the client's default. Within a handler, never longer
    /// than what is left of the message that is handled.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The application's name for the type of the payload.
    pub fn data_type(self, data_type: impl Into<ByteString>) -> Self {
        self.payload(|payload| payload.data_type = data_type.into())
    }

    /// The media type of the payload.
    pub fn content_type(self, content_type: impl Into<ByteString>) -> Self {
        self.payload(|payload| payload.content_type = content_type.into())
    }

    /// A text to go beside the payload; see [`Metadata`](crate::Metadata) for the rules.
    pub fn metadata(self, name: impl Into<ByteString>, value: impl Into<ByteString>) -> Self {
        self.checked(|_, payload| Ok(payload.metadata.insert(name, value)?))
    }

    /// Puts the message into the conversation of that name, rather than to begin one.
    pub fn conversation(self, conversation: impl Into<ByteString>) -> Self {
        self.checked(|header, _| {
            header.conversation = Some(MessageId::parse(conversation)?);
            Ok(())
        })
    }

    /// The message that this one follows from.
    pub fn cause(self, cause: impl Into<ByteString>) -> Self {
        self.checked(|header, _| {
            header.cause = Some(MessageId::parse(cause)?);
            Ok(())
        })
    }

    /// The agent that sends it. The host passes it on only if this connection serves its type.
    pub fn sender(self, sender: impl IntoAgentId) -> Self {
        self.checked(|header, _| {
            header.sender = Some(sender.into_agent_id()?);
            Ok(())
        })
    }

    /// How many messages led to this one. The host refuses more than 16.
    pub fn hops(mut self, hops: u8) -> Self {
        self.header.hops = hops;
        self
    }

    /// W3C trace context, passed on as it is.
    pub fn traceparent(mut self, traceparent: impl Into<ByteString>) -> Self {
        self.header.traceparent = Some(traceparent.into());
        self
    }

    /// A name for the work, so that doing it twice can be avoided.
    pub fn idempotency_key(mut self, key: impl Into<ByteString>) -> Self {
        self.header.idempotency_key = Some(key.into());
        self
    }

    fn payload(mut self, change: impl FnOnce(&mut Payload)) -> Self {
        if let Ok((_, payload)) = &mut self.parts {
            change(payload);
        }
        self
    }

    /// Makes a change that can fail; the first failure is what awaiting says.
    fn checked(
        mut self,
        change: impl FnOnce(&mut HeaderFields, &mut Payload) -> Result<(), Error>,
    ) -> Self {
        if let Ok((_, payload)) = &mut self.parts
            && let Err(error) = change(&mut self.header, payload)
        {
            self.parts = Err(error);
        }
        self
    }

    fn deadline(&self) -> Instant {
        let deadline = after(self.timeout);
        self.latest.map_or(deadline, |latest| latest.min(deadline))
    }
}

impl CallRequest {
    /// Makes the call and decodes the reply's payload from JSON.
    pub async fn json<T: DeserializeOwned>(self) -> Result<T, Error> {
        self.await?.json()
    }
}

impl IntoFuture for CallRequest {
    type Output = Result<Payload, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let deadline = self.deadline();
        Box::pin(async move {
            let (target, payload) = self.parts?;
            self.handle.call(target, self.header, payload, deadline).await
        })
    }
}

impl IntoFuture for PublishRequest {
    type Output = Result<Published, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let deadline = self.deadline();
        Box::pin(async move {
            let (topic, payload) = self.parts?;
            let done = self.handle.publish(topic, self.header, payload, deadline).await?;
            Ok(Published {
                recipients: done.recipients,
                dropped: done.dropped.into_iter().map(|name| name.to_string()).collect(),
            })
        })
    }
}

impl<To: fmt::Debug> fmt::Debug for Request<To> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("parts", &self.parts)
            .field("header", &self.header)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// Who got an event.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Published {
    /// How many agents and subscriptions it went to.
    pub recipients: u64,
    /// Those that did not take it, because their queue was full.
    pub dropped: Vec<String>,
}
