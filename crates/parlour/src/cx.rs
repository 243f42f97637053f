use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parlour_core::durable::DeliveryId;
use parlour_core::wire::HeaderFields;
use parlour_core::{AgentId, Attempt, CallId, Header, MessageId, Principal};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::handle::{Handle, now};
use crate::request::Origin;
use crate::{
    CallEachRequest, CallRequest, Error, IntoAgentId, IntoPayload, IntoTopicId, PublishRequest,
    SendRequest, TypedAgent,
};

/// The message that a handler has at hand, and the way to send more because of it. Cheap to clone.
///
/// ```
/// use parlour::{Agent, AgentError, Cx, Payload};
///
/// async fn ask_twice(cx: Cx, question: String) -> Result<Payload, AgentError> {
///     cx.publish("asked", question.as_str()).await?;
///     match cx.call("oracle/first", question.as_str()).await {
///         Ok(answer) => Ok(answer),
///         Err(error) if !error.may_have_run() => Ok(cx.call("oracle/second", question).await?),
///         Err(error) => Err(error.into()),
///     }
/// }
/// let agent = Agent::stateless().on_call(ask_twice);
/// ```
#[derive(Clone)]
pub struct Cx(Arc<Inner>);

struct Inner {
    handle: Handle,
    agent: AgentId,
    header: Header,
    deadline: Option<Instant>,
    /// The call whose caller wants to hear of its progress.
    progress: Option<CallId>,
    attempt: Option<Attempt>,
}

impl Cx {
    pub(crate) fn new(
        handle: Handle,
        agent: AgentId,
        header: Header,
        deadline: Option<Instant>,
        progress: Option<CallId>,
        attempt: Option<Attempt>,
    ) -> Self {
        Self(Arc::new(Inner { handle, agent, header, deadline, progress, attempt }))
    }

    /// The agent that handles the message.
    pub fn agent(&self) -> &AgentId {
        &self.0.agent
    }

    /// Names the message.
    pub fn message_id(&self) -> &MessageId {
        &self.0.header.id
    }

    /// Names the conversation: the id of the message that began it.
    pub fn conversation(&self) -> &MessageId {
        &self.0.header.conversation
    }

    /// The message that this one answers or follows from.
    pub fn cause(&self) -> Option<&MessageId> {
        self.0.header.cause.as_ref()
    }

    /// The agent that sent it, as far as the host could tell.
    pub fn sender(&self) -> Option<&AgentId> {
        self.0.header.sender.as_ref()
    }

    /// Who connected to send it, as the host established it.
    pub fn principal(&self) -> &Principal {
        &self.0.header.principal
    }

    /// W3C trace context, as the sender gave it.
    pub fn traceparent(&self) -> Option<&str> {
        self.0.header.traceparent.as_deref()
    }

    /// The sender's name for the work, so that doing it twice can be avoided; see
    /// [`Request::idempotency_key`](crate::Request::idempotency_key).
    pub fn idempotency_key(&self) -> Option<&str> {
        self.0.header.idempotency_key.as_deref()
    }

    /// How many messages of the conversation led to this one, one after the other.
    pub fn hops(&self) -> u8 {
        self.0.header.hops
    }

    /// Which attempt to deliver the message this is, from 1 on. Only a durable message has more than
    /// one.
    pub fn attempt(&self) -> u32 {
        self.0.attempt.map_or(1, |attempt| attempt.number)
    }

    /// Names a durable message: the same in each attempt, and different for each message.
    pub fn delivery(&self) -> Option<DeliveryId> {
        self.0.attempt.map(|attempt| attempt.delivery)
    }

    /// When the caller stops waiting; an event has no deadline.
    pub fn deadline(&self) -> Option<Instant> {
        self.0.deadline
    }

    /// How long the caller still waits; an event has no deadline.
    ///
    /// ```
    /// # use parlour::{Agent, Cx};
    /// # use std::time::Duration;
    /// async fn think(cx: Cx) -> &'static str {
    ///     let is_hurried = cx.time_left().is_some_and(|left| left < Duration::from_secs(1));
    ///     if is_hurried { "42" } else { "that depends" }
    /// }
    /// # let _ = Agent::stateless().on_call(think);
    /// ```
    pub fn time_left(&self) -> Option<Duration> {
        self.0.deadline.map(|deadline| deadline.saturating_duration_since(now()))
    }

    /// Calls an agent, as part of this conversation.
    ///
    /// The call names this agent as its sender and this message as its cause, and never waits longer
    /// than this message's own caller does.
    pub fn call(&self, agent: impl IntoAgentId, message: impl IntoPayload) -> CallRequest {
        self.follow_up().call(agent, message)
    }

    /// Calls several agents at once with the same message, as part of this conversation; see
    /// [`Client::call_each`](crate::Client::call_each).
    ///
    /// ```
    /// # use parlour::{Agent, AgentError, Cx};
    /// async fn vote(cx: Cx, motion: String) -> Result<String, AgentError> {
    ///     let answers = cx.call_each(["member/ada", "member/alan"], motion).await?;
    ///     let ayes = answers.iter().filter(|answer| answer.reply.is_ok()).count();
    ///     Ok(format!("{ayes} of {}", answers.len()))
    /// }
    /// # let _ = Agent::stateless().on_call(vote);
    /// ```
    pub fn call_each(
        &self,
        agents: impl IntoIterator<Item: IntoAgentId>,
        message: impl IntoPayload,
    ) -> CallEachRequest {
        self.follow_up().call_each(agents, message)
    }

    /// An agent that takes one type of value and gives another, both as JSON, and that is called as
    /// part of this conversation.
    ///
    /// ```
    /// # use parlour::{Agent, AgentError, Cx, Json};
    /// async fn mean(cx: Cx, Json(numbers): Json<Vec<f64>>) -> Result<Json<f64>, AgentError> {
    ///     let sum = cx.typed::<Vec<f64>, f64>("sum")?.call(&numbers).await?;
    ///     Ok(Json(sum / numbers.len() as f64))
    /// }
    /// # let _ = Agent::stateless().on_call(mean);
    /// ```
    pub fn typed<Message, Reply>(
        &self,
        agent: impl IntoAgentId,
    ) -> Result<TypedAgent<Message, Reply>, Error>
    where
        Message: Serialize,
        Reply: DeserializeOwned + Send + 'static,
    {
        TypedAgent::new(self.follow_up(), agent)
    }

    /// Publishes an event, as part of this conversation, with the same promises as
    /// [`call`](Self::call).
    ///
    /// ```
    /// # use parlour::{Agent, AgentError, Cx};
    /// async fn pay(cx: Cx, order: String) -> Result<(), AgentError> {
    ///     cx.publish("order.paid/till", order).await?;
    ///     Ok(())
    /// }
    /// # let _ = Agent::stateless().on_call(pay);
    /// ```
    ///
    /// An event that must not be lost is made [`durable`](PublishRequest::durable). A handler that may
    /// run again should name it after its own message, so that it is accepted once:
    ///
    /// ```
    /// # use parlour::{Agent, AgentError, Cx};
    /// async fn pay(cx: Cx, order: String) -> Result<(), AgentError> {
    ///     let key = format!("paid by {}", cx.message_id());
    ///     cx.publish("order.paid/till", order).durable().idempotency_key(key).await?;
    ///     Ok(())
    /// }
    /// # let _ = Agent::stateless().on_call(pay);
    /// ```
    pub fn publish(&self, topic: impl IntoTopicId, message: impl IntoPayload) -> PublishRequest {
        self.follow_up().publish(topic, message)
    }

    /// Sends an agent a message for later, as part of this conversation; see
    /// [`Client::send`](crate::Client::send). To be accepted it has as long as this message's own caller
    /// waits; to be delivered, as long as it takes.
    ///
    /// A handler that may run again should name it after its own message, so that it is accepted once:
    ///
    /// ```
    /// # use parlour::{Agent, AgentError, Cx};
    /// async fn pay(cx: Cx, order: String) -> Result<(), AgentError> {
    ///     let key = format!("receipt for {}", cx.message_id());
    ///     cx.send("mailer", order).idempotency_key(key).await?;
    ///     Ok(())
    /// }
    /// # let _ = Agent::stateless().on_call(pay);
    /// ```
    pub fn send(&self, agent: impl IntoAgentId, message: impl IntoPayload) -> SendRequest {
        self.follow_up().send(agent, message)
    }

    /// Whether the caller wants to hear of the call before it ends.
    pub fn wants_progress(&self) -> bool {
        self.0.progress.is_some()
    }

    /// Tells the caller something before the reply: a part of it, such as the next words of a text, or
    /// how far the work is. It comes before the reply, and in order. Does nothing for a caller that did
    /// not ask, nor at an event.
    ///
    /// Waits while much is to be written, within the call's deadline. A caller that does not read what it
    /// asked for loses the call, and this handler is dropped.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the caller was told or was not.
    ///
    /// ```
    /// use parlour::{AgentError, Cx};
    ///
    /// async fn count(cx: Cx) -> Result<&'static str, AgentError> {
    ///     for number in ["one", "two", "three"] {
    ///         cx.progress(number).await?;
    ///     }
    ///     Ok("done")
    /// }
    /// ```
    pub async fn progress(&self, message: impl IntoPayload) -> Result<(), Error> {
        let (Some(call), Some(deadline)) = (self.0.progress, self.0.deadline) else {
            return Ok(());
        };
        self.0.handle.progress(call, message.into_payload()?, deadline).await
    }

    fn follow_up(&self) -> Origin {
        let header = HeaderFields {
            conversation: Some(self.conversation().clone()),
            cause: Some(self.message_id().clone()),
            sender: Some(self.agent().clone()),
            traceparent: self.0.header.traceparent.clone(),
            hops: self.hops().saturating_add(1),
            ..HeaderFields::default()
        };
        Origin { header, latest: self.0.deadline, ..Origin::new(self.0.handle.clone()) }
    }
}

impl fmt::Debug for Cx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cx")
            .field("agent", &self.0.agent)
            .field("header", &self.0.header)
            .field("deadline", &self.0.deadline)
            .finish_non_exhaustive()
    }
}
