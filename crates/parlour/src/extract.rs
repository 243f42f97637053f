use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use parlour_core::{Bytes, Fault, FaultKind, Payload, TopicId};
use serde::de::DeserializeOwned;

use crate::reply::chain;
use crate::{Cx, Error, Json, PayloadExt};

/// A message on its way to a handler, with the state of the agent that it is for.
///
/// A handler takes parts of it as arguments; see [`FromMessage`].
#[non_exhaustive]
pub struct Message<S> {
    /// Where the message comes from and what it follows from, and the way to send more.
    pub cx: Cx,
    /// The topic of an event; `None` for a call.
    pub topic: Option<TopicId>,
    /// The body.
    pub payload: Payload,
    /// What the agent's factory made for this key.
    pub state: Arc<S>,
}

impl<S> fmt::Debug for Message<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("cx", &self.cx)
            .field("topic", &self.topic)
            .field("payload", &self.payload)
            .finish_non_exhaustive()
    }
}

/// Something that a handler can take as an argument, made from the message that it handles.
///
/// | argument | what it is |
/// | --- | --- |
/// | [`Json<T>`](Json) | the body, decoded by serde whatever its content type says |
/// | [`String`] | the body as UTF-8 text |
/// | [`Bytes`] | the body as it is |
/// | [`Payload`] | the body with its types and metadata |
/// | [`TopicId`] | the topic of an event; `Option<TopicId>` in a handler that answers calls too |
/// | [`Cx`] | sender, conversation, deadline, and the way to call and publish because of this message |
/// | [`State<S>`](State) | what the agent's factory made for this key |
///
/// They may stand in any order, up to eight of them; tuples of them are arguments too.
///
/// Implement it for arguments of your own. A [`Fault`] refuses the message: of a call it reaches the
/// caller, of an event it is logged. Its kind is most often `invalid`.
///
/// ```
/// use parlour::{Agent, Fault, FaultKind, FromMessage, Message};
///
/// struct Tenant(String);
///
/// impl<S> FromMessage<S> for Tenant {
///     fn from_message(message: &Message<S>) -> Result<Self, Fault> {
///         let tenant = message.payload.metadata.get("tenant");
///         let tenant = tenant.ok_or_else(|| Fault::new(FaultKind::Invalid, "whose is it?"))?;
///         Ok(Self(tenant.to_owned()))
///     }
/// }
///
/// async fn upper(Tenant(tenant): Tenant, text: String) -> String {
///     format!("{tenant}: {}", text.to_uppercase())
/// }
/// let agent = Agent::stateless().on_call(upper);
/// ```
///
/// What is no part of a message does not compile:
///
/// ```compile_fail,E0277
/// # use parlour::Agent;
/// async fn next(number: u32) -> String {
///     (number + 1).to_string()
/// }
/// let agent = Agent::stateless().on_call(next); // a handler cannot take `u32`
/// ```
#[diagnostic::on_unimplemented(
    message = "a handler cannot take `{Self}` as an argument",
    label = "takes `{Self}`, which is no part of a message to an agent with state `{S}`",
    note = "take `Json<T>` where `T: Deserialize`, `String`, `Bytes`, `Payload`, `TopicId` (of events), \
            `Cx`, or `State<{S}>`; or implement `FromMessage<{S}>` for `{Self}`"
)]
pub trait FromMessage<S>: Sized {
    /// Makes it, or says why the message is refused.
    fn from_message(message: &Message<S>) -> Result<Self, Fault>;
}

/// What the agent's factory made for the key of the message: the memory of this one agent.
///
/// Several messages may be handled at once, unless the agent is
/// [`one_at_a_time`](crate::Agent::one_at_a_time), so what changes needs a lock or an atomic. Hold no
/// lock of `std` across an `.await`.
///
/// ```
/// use parlour::{Agent, State};
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// async fn count(count: State<AtomicU64>) -> String {
///     (count.fetch_add(1, Ordering::Relaxed) + 1).to_string()
/// }
/// let counter = Agent::new(|_key| AtomicU64::new(0)).on_call(count);
/// ```
///
/// The state has to be that of the agent:
///
/// ```compile_fail,E0277
/// # use parlour::{Agent, State};
/// # use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
/// async fn count(count: State<AtomicU32>) -> String {
///     count.load(Ordering::Relaxed).to_string()
/// }
/// let counter = Agent::new(|_key| AtomicU64::new(0)).on_call(count);
/// ```
#[derive(Debug)]
#[expect(clippy::exhaustive_structs, reason = "a wrapper that is taken apart")]
pub struct State<S>(pub Arc<S>);

impl<S> Clone for State<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S> Deref for State<S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.0
    }
}

impl<S> FromMessage<S> for State<S> {
    fn from_message(message: &Message<S>) -> Result<Self, Fault> {
        Ok(Self(Arc::clone(&message.state)))
    }
}

impl<S> FromMessage<S> for Cx {
    fn from_message(message: &Message<S>) -> Result<Self, Fault> {
        Ok(message.cx.clone())
    }
}

impl<S> FromMessage<S> for Payload {
    fn from_message(message: &Message<S>) -> Result<Self, Fault> {
        Ok(message.payload.clone())
    }
}

impl<S> FromMessage<S> for Bytes {
    fn from_message(message: &Message<S>) -> Result<Self, Fault> {
        Ok(message.payload.bytes.clone())
    }
}

impl<S> FromMessage<S> for String {
    fn from_message(message: &Message<S>) -> Result<Self, Fault> {
        message.payload.to_text().map(str::to_owned).map_err(|error| undecodable(&error))
    }
}

impl<S, T: DeserializeOwned> FromMessage<S> for Json<T> {
    fn from_message(message: &Message<S>) -> Result<Self, Fault> {
        message.payload.json().map(Json).map_err(|error| {
            undecodable(&error).hint("send JSON of the shape that this agent takes")
        })
    }
}

impl<S> FromMessage<S> for Option<TopicId> {
    fn from_message(message: &Message<S>) -> Result<Self, Fault> {
        Ok(message.topic.clone())
    }
}

impl<S> FromMessage<S> for TopicId {
    fn from_message(message: &Message<S>) -> Result<Self, Fault> {
        let topic = message.topic.clone();
        topic.ok_or_else(|| {
            Fault::new(FaultKind::Invalid, "this message is no event: it has no topic")
        })
    }
}

fn undecodable(error: &Error) -> Fault {
    Fault::new(FaultKind::Invalid, chain(error))
}

macro_rules! tuples {
    ($($part:ident)*) => {
        impl<S, $($part: FromMessage<S>),*> FromMessage<S> for ($($part,)*) {
            #[allow(unused_variables, reason = "nothing is taken from it for no parts")]
            fn from_message(message: &Message<S>) -> Result<Self, Fault> {
                Ok(($($part::from_message(message)?,)*))
            }
        }
    };
}

crate::handler::for_each_arity!(tuples);
