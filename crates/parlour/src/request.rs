use std::fmt;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, join_all};
use parlour_core::wire::{HeaderFields, MAX_TEXT};
use parlour_core::{AgentId, ByteString, MessageId, Payload, TopicId};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::handle::{Handle, after};
use crate::{Error, ErrorKind, IntoAgentId, IntoPayload, IntoTopicId, Json, PayloadExt};

/// A call that begins when it is awaited, and ends with the agent's reply: its [`Payload`], or, for
/// `CallRequest<Json<T>>`, a `T`.
pub type CallRequest<Reply = Payload> = Request<AgentId, Reply>;

/// Calls that begin when they are awaited, and end with an [`Answer`] of each agent.
pub type CallEachRequest<Reply = Payload> = Request<Vec<AgentId>, Reply>;

/// An event that is published when it is awaited; the host then says who got it.
pub type PublishRequest = Request<TopicId>;

/// A message on its way to be sent: [`CallRequest`], [`CallEachRequest`], [`PublishRequest`],
/// [`DurablePublishRequest`](crate::DurablePublishRequest) or [`SendRequest`](crate::SendRequest).
/// Nothing happens until it is awaited; what wants a future, such as `tokio::spawn`, takes its
/// [`into_future`](IntoFuture::into_future).
///
/// The deadline counts from then on, and covers waiting for a connection too. What is wrong with an
/// argument is said when it is awaited, before anything is sent.
///
/// # Cancel safety
///
/// Dropping the future of a call gives the call up, and the host and the agent are told. Dropping the
/// future of a publish or send takes the message back only as long as it was not written: one that is
/// to be kept may have been accepted. Sent again under the same idempotency key it is accepted once.
///
/// ```no_run
/// # async fn example(client: parlour::Client) -> Result<(), parlour::Error> {
/// # use std::time::Duration;
/// let sum = client.call("sum", parlour::Json([1, 2])).timeout(Duration::from_secs(2));
/// let sum = sum.data_type("Add").metadata("tenant", "acme").json::<i64>().await?;
/// # Ok(())
/// # }
/// ```
#[must_use = "nothing is sent until it is awaited"]
pub struct Request<To, Reply = Payload> {
    pub(crate) origin: Origin,
    pub(crate) parts: Result<(To, Payload), Error>,
    timeout: Duration,
    reply: PhantomData<fn() -> Reply>,
}

/// Who sends messages, and what they follow from.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    pub(crate) handle: Handle,
    pub(crate) header: HeaderFields,
    /// The deadline of the message that others follow from.
    pub(crate) latest: Option<Instant>,
}

impl Origin {
    /// Messages that follow from no other.
    pub(crate) fn new(handle: Handle) -> Self {
        Self { handle, header: HeaderFields::default(), latest: None }
    }

    pub(crate) fn call(self, agent: impl IntoAgentId, message: impl IntoPayload) -> CallRequest {
        self.request(agent.into_agent_id(), message)
    }

    pub(crate) fn call_each(
        self,
        agents: impl IntoIterator<Item: IntoAgentId>,
        message: impl IntoPayload,
    ) -> CallEachRequest {
        self.request(agents.into_iter().map(IntoAgentId::into_agent_id).collect(), message)
    }

    pub(crate) fn publish(
        self,
        topic: impl IntoTopicId,
        message: impl IntoPayload,
    ) -> PublishRequest {
        self.request(topic.into_topic_id(), message)
    }

    /// Gives the message an idempotency key, if it has none: under one it is accepted once, however
    /// often it has to be sent.
    pub(crate) fn with_key(mut self) -> Self {
        let own = || ByteString::from(format!("{:032x}", fastrand::u128(..)));
        self.header.idempotency_key.get_or_insert_with(own);
        self
    }

    /// Says of an error whether it is the deadline of the message that others follow from that passed.
    pub(crate) fn explain(&self, deadline: Instant) -> impl Fn(Error) -> Error + use<> {
        let is_callers = self.latest == Some(deadline);
        move |error| match error.kind() {
            ErrorKind::Timeout if is_callers => error.of_callers_deadline(),
            _ => error,
        }
    }

    pub(crate) fn request<To>(
        self,
        to: Result<To, Error>,
        message: impl IntoPayload,
    ) -> Request<To> {
        let timeout = self.handle.default_timeout();
        let parts = to.and_then(|to| Ok((to, message.into_payload()?)));
        Request { origin: self, parts, timeout, reply: PhantomData }
    }
}

impl<To, Reply> Request<To, Reply> {
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
        self.origin.header.hops = hops;
        self
    }

    /// W3C trace context, passed on as it is; at most 1,024 bytes.
    pub fn traceparent(self, traceparent: impl Into<ByteString>) -> Self {
        self.checked(|header, _| {
            header.traceparent = Some(short("trace context", traceparent.into())?);
            Ok(())
        })
    }

    /// A name for the work, so that doing it twice can be avoided; at most 1,024 bytes. What is sent for
    /// later or published durably is accepted once under one key, and gets one of its own if it has none.
    pub fn idempotency_key(self, key: impl Into<ByteString>) -> Self {
        self.checked(|header, _| {
            header.idempotency_key = Some(short("idempotency key", key.into())?);
            Ok(())
        })
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
            && let Err(error) = change(&mut self.origin.header, payload)
        {
            self.parts = Err(error);
        }
        self
    }

    pub(crate) fn deadline(&self) -> Instant {
        let deadline = after(self.timeout);
        self.origin.latest.map_or(deadline, |latest| latest.min(deadline))
    }
}

/// Refuses a text that no frame can carry.
pub(crate) fn short(what: &str, text: ByteString) -> Result<ByteString, Error> {
    if text.len() <= MAX_TEXT {
        return Ok(text);
    }
    let error = format!("the {what} is longer than {MAX_TEXT} bytes");
    Err(Error::new(ErrorKind::Invalid, error).with_hint("give a shorter one"))
}

impl<To> Request<To> {
    /// The same for another kind of target.
    pub(crate) fn to<Other>(self, other: impl FnOnce(To) -> Other) -> Request<Other> {
        let Self { origin, parts, timeout, reply } = self;
        Request { origin, parts: parts.map(|(to, payload)| (other(to), payload)), timeout, reply }
    }

    /// Has replies decoded from JSON.
    ///
    /// ```no_run
    /// # async fn example(client: parlour::Client) -> Result<(), parlour::Error> {
    /// let sum: i64 = client.call("sum", parlour::Json([1, 2])).json().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn json<T>(self) -> Request<To, Json<T>>
    where
        Request<To, Json<T>>: IntoFuture,
    {
        let Self { origin, parts, timeout, .. } = self;
        Request { origin, parts, timeout, reply: PhantomData }
    }
}

/// What a reply's payload can be taken as: itself, or a [`Json`] value.
pub trait FromReply: Sized + 'static {
    /// What the caller gets.
    type Value: Send + 'static;

    /// Decodes it. Fails with [`ErrorKind::Decode`](crate::ErrorKind::Decode).
    fn from_reply(payload: Payload) -> Result<Self::Value, Error>;
}

impl FromReply for Payload {
    type Value = Self;

    fn from_reply(payload: Payload) -> Result<Self, Error> {
        Ok(payload)
    }
}

impl<T: DeserializeOwned + Send + 'static> FromReply for Json<T> {
    type Value = T;

    fn from_reply(payload: Payload) -> Result<T, Error> {
        payload.json()
    }
}

impl<Reply: FromReply> IntoFuture for CallRequest<Reply> {
    type Output = Result<Reply::Value, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let deadline = self.deadline();
        Box::pin(async move {
            let explain = self.origin.explain(deadline);
            let Self { origin: Origin { handle, header, .. }, parts, .. } = self;
            let (target, payload) = parts?;
            let reply = handle.call(target, header, payload, deadline, None).await;
            Reply::from_reply(reply.map_err(explain)?)
        })
    }
}

/// How much of a call's progress may wait to be read.
const PROGRESS: usize = 256;

impl<Reply: FromReply> CallRequest<Reply> {
    /// Makes a call that is heard of before its end. Its deadline counts from here.
    ///
    /// ```no_run
    /// # async fn example(client: parlour::Client) -> Result<(), parlour::Error> {
    /// use parlour::PayloadExt;
    ///
    /// let mut writing = client.call("writer", "a poem").with_progress();
    /// while let Some(words) = writing.next().await {
    ///     print!("{}", words.to_text()?);
    /// }
    /// let whole = writing.reply().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_progress(self) -> Progress<Reply::Value> {
        let deadline = self.deadline();
        let (sender, updates) = mpsc::channel(PROGRESS);
        let call = Box::pin(async move {
            let explain = self.origin.explain(deadline);
            let Self { origin: Origin { handle, header, .. }, parts, .. } = self;
            let (target, payload) = parts?;
            let reply = handle.call(target, header, payload, deadline, Some(sender)).await;
            Reply::from_reply(reply.map_err(explain)?)
        });
        Progress { call, updates, ended: None }
    }
}

/// A call that goes on, from [`CallRequest::with_progress`].
///
/// It begins when it is first awaited. Dropping it gives the call up, and the host and the agent are
/// told. More than 256 updates that nobody reads end the call with a fault of kind `overloaded`.
#[must_use = "nothing is sent until it is awaited"]
pub struct Progress<Value = Payload> {
    call: BoxFuture<'static, Result<Value, Error>>,
    updates: mpsc::Receiver<Payload>,
    ended: Option<Result<Value, Error>>,
}

impl<Value> Progress<Value> {
    /// What the agent says next; `None` when the call has ended and all before that was read. Cancel
    /// safe.
    pub async fn next(&mut self) -> Option<Payload> {
        if self.ended.is_none() {
            tokio::select! {
                biased;
                ended = &mut self.call => self.ended = Some(ended),
                Some(update) = self.updates.recv() => return Some(update),
            }
        }
        // Its sender went with the call.
        self.updates.recv().await
    }

    /// How the call ends; what was not read before is left out. Dropping the future gives the call up.
    pub async fn reply(mut self) -> Result<Value, Error> {
        while self.next().await.is_some() {}
        self.ended.unwrap_or_else(|| Err(Error::closed()))
    }
}

impl<Value> fmt::Debug for Progress<Value> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress").finish_non_exhaustive()
    }
}

/// What came of one call of several; see [`Client::call_each`](crate::Client::call_each).
#[derive(Debug)]
#[non_exhaustive]
pub struct Answer<Value = Payload> {
    /// The agent that was called.
    pub agent: AgentId,
    /// Its reply, or why there is none.
    pub reply: Result<Value, Error>,
}

impl<Reply: FromReply> IntoFuture for CallEachRequest<Reply> {
    type Output = Result<Vec<Answer<Reply::Value>>, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let deadline = self.deadline();
        Box::pin(async move {
            let explain = &self.origin.explain(deadline);
            let Self { origin: Origin { handle, header, .. }, parts, .. } = self;
            let (agents, payload) = parts?;
            let calls = agents.into_iter().map(|agent| {
                let (handle, header, payload) = (handle.clone(), header.clone(), payload.clone());
                async move {
                    let reply = handle.call(agent.clone(), header, payload, deadline, None).await;
                    let reply = reply.map_err(explain).and_then(Reply::from_reply);
                    Answer { agent, reply }
                }
            });
            Ok(join_all(calls).await)
        })
    }
}

impl IntoFuture for PublishRequest {
    type Output = Result<Published, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let deadline = self.deadline();
        Box::pin(async move {
            let explain = self.origin.explain(deadline);
            let (topic, payload) = self.parts?;
            let Origin { handle, header, .. } = self.origin;
            let done = handle.publish(topic, header, payload, deadline).await.map_err(explain)?;
            Ok(Published {
                recipients: done.recipients,
                dropped: done.dropped.into_iter().map(|name| name.to_string()).collect(),
            })
        })
    }
}

impl<To: fmt::Debug, Reply> fmt::Debug for Request<To, Reply> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("parts", &self.parts)
            .field("header", &self.origin.header)
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
