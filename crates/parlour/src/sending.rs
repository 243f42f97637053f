//! Messages that the host keeps until they are delivered, and what becomes of them.

use std::fmt;
use std::marker::PhantomData;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::BoxFuture;
use parlour_core::durable::{DeliveryId, Level, State, Timestamp};
use parlour_core::wire::{AcceptedFrame, DeliveryFrame};
use parlour_core::{AgentId, ByteString, Fault, FaultKind, MessageId, Payload};

use crate::handle::{Handle, after};
use crate::request::{FromReply, Origin, Request, short};
use crate::{Error, ErrorKind, IntoAgentId, IntoPayload};

/// A message for later: sent when it is awaited, which gives a [`Sent`] once the host has accepted it.
pub type SendRequest<Reply = Payload> = Request<Later, Reply>;

/// Whom a [`SendRequest`] is for, and when.
#[derive(Clone, Debug)]
pub struct Later {
    pub(crate) agent: AgentId,
    pub(crate) delay: Option<Duration>,
    pub(crate) deliver_at: Option<Timestamp>,
    pub(crate) ttl: Option<Duration>,
    pub(crate) max_attempts: Option<u32>,
}

impl Origin {
    pub(crate) fn send(self, agent: impl IntoAgentId, message: impl IntoPayload) -> SendRequest {
        let later = agent.into_agent_id().map(|agent| Later {
            agent,
            delay: None,
            deliver_at: None,
            ttl: None,
            max_attempts: None,
        });
        self.request(later, message)
    }
}

impl<Reply> SendRequest<Reply> {
    /// Has the message not delivered before so much time is over.
    pub fn delay(self, delay: Duration) -> Self {
        self.later(|later| later.delay = Some(delay))
    }

    /// Has the message not delivered before this time, in place of a [`delay`](Self::delay).
    pub fn deliver_at(self, time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let millis = since.as_millis().try_into().unwrap_or(u64::MAX);
        self.later(|later| later.deliver_at = Some(Timestamp(millis)))
    }

    /// Lets no attempt begin after so much time: the message then expires.
    pub fn ttl(self, ttl: Duration) -> Self {
        self.later(|later| later.ttl = Some(ttl))
    }

    /// How many attempts may fail before the message is a dead letter, in place of the host's
    /// setting; at least 1.
    pub fn max_attempts(self, most: u32) -> Self {
        self.later(|later| later.max_attempts = Some(most))
    }

    fn later(mut self, change: impl FnOnce(&mut Later)) -> Self {
        if let Ok((later, _)) = &mut self.parts {
            change(later);
        }
        self
    }
}

impl<Reply: FromReply> IntoFuture for SendRequest<Reply> {
    type Output = Result<Sent<Reply>, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let deadline = self.deadline();
        Box::pin(async move {
            let explain = self.origin.explain(deadline);
            let Self { origin, parts, .. } = self;
            let (later, payload) = parts?;
            let Origin { handle, header, .. } = origin.with_key();
            let accepted = handle.send(later, header, payload, deadline).await.map_err(explain)?;
            Ok(Sent::new(handle, accepted))
        })
    }
}

/// A message that the host has accepted, and will deliver: from
/// [`Client::send`](crate::Client::send) and [`Cx::send`](crate::Cx::send).
///
/// Dropping it changes nothing: the delivery goes on. So does whatever waits for it when its
/// connection is lost or the host is started anew, within its time.
///
/// ```no_run
/// # async fn example(client: parlour::Client) -> Result<(), parlour::Error> {
/// use parlour::{Level, PayloadExt};
/// use std::time::Duration;
///
/// let sent = client.send("printer", "a long text").await?;
/// println!("{} is {:?}", sent.id(), sent.ack());
/// let status = sent.reaches(Level::Received).timeout(Duration::from_secs(60)).await?;
/// println!("attempt {} has it", status.attempt);
/// let reply = sent.reply().timeout(Duration::from_secs(3600)).await?;
/// println!("{}", reply.to_text()?);
/// # Ok(())
/// # }
/// ```
pub struct Sent<Reply = Payload> {
    handle: Handle,
    id: DeliveryId,
    conversation: MessageId,
    ack: Ack,
    is_new: bool,
    reply: PhantomData<fn() -> Reply>,
}

/// What the acceptance of a message or an event promises.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum Ack {
    /// It is in the memory of the host, and is lost with it.
    Memory,
    /// It is on the disk of the host.
    Durable,
}

impl Ack {
    /// What a host calls it. One that is not known here promises at least that it is in memory.
    pub(crate) fn read(name: &str) -> Self {
        if name == "durable" { Self::Durable } else { Self::Memory }
    }
}

impl<Reply: FromReply> Sent<Reply> {
    fn new(handle: Handle, accepted: AcceptedFrame) -> Self {
        Self {
            handle,
            id: accepted.delivery,
            conversation: accepted.conversation,
            ack: Ack::read(&accepted.ack),
            is_new: !accepted.known,
            reply: PhantomData,
        }
    }

    /// Names the delivery for good, through every door of the host.
    pub fn id(&self) -> DeliveryId {
        self.id
    }

    /// Names the conversation of the message.
    pub fn conversation(&self) -> &MessageId {
        &self.conversation
    }

    /// What its acceptance promises.
    pub fn ack(&self) -> Ack {
        self.ack
    }

    /// Whether the message was not accepted before, under the same idempotency key.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Waits for the end: the reply of the agent, or why there will be none. That is the fault of the
    /// last attempt, `cancelled`, or `gone` for one that has expired, and has the kind
    /// [`ErrorKind::Fault`](crate::ErrorKind::Fault); [`ErrorKind::Timeout`](crate::ErrorKind::Timeout)
    /// says that it goes on, and can be waited for again.
    pub fn reply(&self) -> Wait<Reply::Value> {
        self.wait(0, Some(Level::Completed), |frame, _| match &frame.reply {
            Some(reply) => Reply::from_reply(reply.clone()),
            None => Err(ended(frame)),
        })
    }

    /// Waits until it has had a step of this level, such as [`Level::Received`]. One that it has passed
    /// counts as reached; if it ends without, that is the error.
    pub fn reaches(&self, level: Level) -> Wait<Status> {
        self.wait(0, Some(level), |frame, level| {
            let on_the_way = [Level::Dispatched, Level::Received, Level::Processing];
            let has_passed =
                frame.reply.is_some() && level.is_some_and(|level| on_the_way.contains(&level));
            let has_reached = level
                .is_some_and(|level| frame.levels.iter().any(|reached| reached == level.name()));
            if has_reached || has_passed { Status::read(frame) } else { Err(ended(frame)) }
        })
    }

    /// Waits for something newer than this [generation](Status::generation), or for its end.
    pub fn newer_than(&self, generation: u64) -> Wait<Status> {
        self.wait(generation, None, |frame, _| Status::read(frame))
    }

    /// Asks where it is now.
    pub async fn status(&self) -> Result<Status, Error> {
        let deadline = after(self.handle.default_timeout());
        let now = Some(Duration::ZERO);
        Status::read(&self.handle.wait(self.id, 0, None, now, deadline).await?)
    }

    /// Gives the delivery up, and says why in at most 1,024 bytes. An attempt that is under way is taken
    /// from its worker. Fails with a fault of kind `not_found` if it has ended.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the delivery may have been given up.
    pub async fn cancel(&self, reason: impl Into<ByteString>) -> Result<(), Error> {
        let reason = short("reason", reason.into())?;
        let deadline = after(self.handle.default_timeout());
        self.handle.cancel_delivery(self.id, reason, deadline).await
    }

    fn wait<T>(&self, newer_than: u64, level: Option<Level>, read: Read<T>) -> Wait<T> {
        let (handle, id) = (self.handle.clone(), self.id);
        Wait { timeout: handle.default_timeout(), handle, id, newer_than, level, read }
    }
}

impl<Reply> Clone for Sent<Reply> {
    fn clone(&self) -> Self {
        Self { handle: self.handle.clone(), conversation: self.conversation.clone(), ..*self }
    }
}

impl<Reply> fmt::Debug for Sent<Reply> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sent")
            .field("id", &self.id)
            .field("ack", &self.ack)
            .field("is_new", &self.is_new)
            .finish_non_exhaustive()
    }
}

/// Makes what is awaited of what the host said.
type Read<T> = fn(&DeliveryFrame, Option<Level>) -> Result<T, Error>;

/// What becomes of a [`Sent`] message: waits for it when it is awaited.
///
/// It goes on over another connection when its own is lost, also to a host that was started anew.
///
/// # Cancel safety
///
/// Dropping the future gives up the wait, and the host is told. The delivery goes on, and can be waited
/// for again.
#[must_use = "nothing is waited for until it is awaited"]
pub struct Wait<T> {
    handle: Handle,
    id: DeliveryId,
    newer_than: u64,
    level: Option<Level>,
    timeout: Duration,
    read: Read<T>,
}

impl<T> Wait<T> {
    /// How long to wait at most, in place of the client's default. Then it fails with
    /// [`ErrorKind::Timeout`](crate::ErrorKind::Timeout).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
}

impl<T: Send + 'static> IntoFuture for Wait<T> {
    type Output = Result<T, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { handle, id, newer_than, level, timeout, read } = self;
        let deadline = after(timeout);
        Box::pin(async move {
            loop {
                let frame = handle.wait(id, newer_than, level, None, deadline).await;
                let frame = frame.map_err(|error| match error.kind() {
                    ErrorKind::Timeout => goes_on(id),
                    _ => error,
                })?;
                let has_level = |level: Level| frame.levels.iter().any(|it| it == level.name());
                let is_news = frame.generation > newer_than && level.is_none_or(has_level);
                if is_news || state(&frame)?.is_settled() {
                    return read(&frame, level);
                }
            }
        })
    }
}

impl<T> fmt::Debug for Wait<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wait")
            .field("id", &self.id)
            .field("newer_than", &self.newer_than)
            .field("level", &self.level)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// Where a delivery is in its life.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Status {
    /// What it waits for, or how it has ended.
    pub state: State,
    /// Counts its steps.
    pub generation: u64,
    /// Counts its attempts.
    pub attempt: u32,
    /// The words of the last step, such as what the agent said of its progress.
    pub details: String,
    /// Why the last attempt has no answer.
    pub fault: Option<Fault>,
}

impl Status {
    fn read(frame: &DeliveryFrame) -> Result<Self, Error> {
        Ok(Self {
            state: state(frame)?,
            generation: frame.generation,
            attempt: frame.attempt,
            details: frame.details.to_string(),
            fault: frame.fault.clone(),
        })
    }
}

fn state(frame: &DeliveryFrame) -> Result<State, Error> {
    State::from_name(&frame.state).ok_or_else(|| {
        let text = format!("the host named a state that is not known here: {}", frame.state);
        Error::new(ErrorKind::Protocol, text)
    })
}

/// Why a delivery that has ended has nothing that was waited for.
fn ended(frame: &DeliveryFrame) -> Error {
    let (state, id) = (&frame.state, frame.delivery);
    let fault = match State::from_name(state) {
        Some(State::Cancelled) if frame.details.is_empty() => {
            Fault::new(FaultKind::Cancelled, format!("delivery {id} was cancelled"))
        }
        Some(State::Cancelled) => Fault::new(
            FaultKind::Cancelled,
            format!("delivery {id} was cancelled: {}", frame.details),
        ),
        _ => frame.fault.clone().unwrap_or_else(|| {
            Fault::new(FaultKind::Gone, format!("delivery {id} has ended, and is {state}"))
        }),
    };
    Error::of_end(fault.may_have_run_if(frame.attempt > 0))
}

fn goes_on(id: DeliveryId) -> Error {
    Error::new(
        ErrorKind::Timeout,
        format!("delivery {id} goes on; what was waited for did not come"),
    )
    .with_hint("wait again, for longer, or look at its status")
    .may_have_run_if(true)
}
