use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;

use crate::durable::{DeliveryId, Timestamp};
use crate::{
    AgentId, AgentType, Attempt, CallId, Credit, Fault, Key, MessageId, Payload, Principal,
    Registration, Reply, TopicFilter, TopicId,
};

/// What a client (a worker, a caller, or both at once) and a host say to each other.
///
/// The number in `id` or `request` names a call or request among those of the side that sent it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Frame {
    /// Client, first of all: who it is and what it speaks.
    Hello(Box<Hello>),
    /// Host, in answer: what both will speak.
    Welcome(Box<Welcome>),
    /// Client: it serves an agent type, or one agent.
    Register(Register),
    /// Client: it no longer serves that.
    Unregister {
        /// Answered by [`Frame::Done`] or [`Frame::Reply`] with a fault.
        request: CallId,
        /// The agent type.
        agent_type: AgentType,
        /// The one agent, if not the whole type.
        key: Option<Key>,
    },
    /// Client: it wants events.
    Subscribe(Subscribe),
    /// Client: it no longer wants those.
    Unsubscribe {
        /// Answered by [`Frame::Done`] or [`Frame::Reply`] with a fault.
        request: CallId,
        /// The number the client gave the subscription.
        subscription: u64,
    },
    /// Host: a request other than a call has been carried out.
    Done(Done),
    /// Either: a call to one agent.
    Call(Box<CallFrame>),
    /// Either: how a call ended. Host: also why another request was refused.
    Reply(CallId, Reply),
    /// Client: an event for whoever subscribes.
    Publish(Box<PublishFrame>),
    /// Host: an event for agents or subscriptions of this client.
    Event(Box<EventFrame>),
    /// Either: nobody waits for this call any more.
    Cancel(CallId),
    /// Either: asks for a [`Frame::Pong`] with the same number.
    Ping(u64),
    /// Either: the answer.
    Pong(u64),
    /// Client: send no new work. Host: it is going away; what runs may end, nothing new is taken.
    Drain,
    /// Either: how many frames of the session it has received.
    Ack(u64),
    /// What the agent has to say of a call before it ends, for a caller that asked for it.
    Progress(CallId, Payload),
    /// Host: this client gets no new work; it should end what it has, and leave.
    Leave,
    /// Client: the agent has a durable call.
    Received(CallId),
    /// Client: how a durable call ended, with the name of the attempt.
    Outcome(Box<Outcome>),
    /// Host: what the client said ends an attempt that it does not have any more; it counts for nothing.
    Stale(CallId, Attempt),
    /// Client: a message to one agent that is to be kept until it was delivered.
    Send(Box<SendFrame>),
    /// Host: that message is kept.
    Accepted(Box<AcceptedFrame>),
    /// Host: that event is kept, and owed to whoever subscribes.
    Published(Box<PublishedFrame>),
    /// Client: it wants to know what becomes of a delivery.
    Wait(Box<WaitFrame>),
    /// Host: what is known of it.
    Delivery(Box<DeliveryFrame>),
    /// Client: nobody wants this delivery any more.
    CancelDelivery {
        /// Answered by [`Frame::Done`] or [`Frame::Reply`] with a fault.
        request: CallId,
        /// Which one.
        delivery: DeliveryId,
        /// Why, for people.
        reason: ByteString,
    },
}

/// The large ones are boxed, so that a frame is cheap to hand on.
macro_rules! boxed {
    ($($kind:ident($frame:ident)),*) => {
        $(impl From<$frame> for Frame {
            fn from(frame: $frame) -> Self {
                Self::$kind(Box::new(frame))
            }
        })*
    };
}

boxed!(Hello(Hello), Welcome(Welcome), Call(CallFrame), Publish(PublishFrame), Event(EventFrame));
boxed!(Outcome(Outcome), Send(SendFrame), Accepted(AcceptedFrame), Wait(WaitFrame));
boxed!(Delivery(DeliveryFrame), Published(PublishedFrame));

/// What a client begins with.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a frame; its fields are the protocol's")]
pub struct Hello {
    /// What the client calls itself, for people.
    pub name: ByteString,
    /// The versions it speaks.
    pub versions: Vec<u64>,
    /// The optional parts that it can use.
    pub features: Vec<ByteString>,
    /// The session that it wants to go on with, by the name that a host gave it.
    pub session: Option<ByteString>,
    /// How many frames of that session it has received.
    pub received: u64,
    /// How much it wants to be unacknowledged at the most; 0 leaves it to the host.
    pub credit: Credit,
}

/// What the host answers.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a frame; its fields are the protocol's")]
pub struct Welcome {
    /// The version that both speak from here on.
    pub version: u64,
    /// The optional parts that both use.
    pub features: Vec<ByteString>,
    /// What the host calls itself, for people.
    pub name: ByteString,
    /// The largest payload it takes, in bytes.
    pub max_payload: u64,
    /// How often it pings; a peer that misses two is dead.
    pub heartbeat: Duration,
    /// The name of the session, by which it can go on over another socket.
    pub session: Option<ByteString>,
    /// Whether it is the session that the client asked for.
    pub resumed: bool,
    /// How many frames of the session the host has received.
    pub received: u64,
    /// How much may be unacknowledged each way.
    pub credit: Credit,
    /// For how long the session waits for another socket when one breaks.
    pub grace: Duration,
}

/// A registration.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a frame; its fields are the protocol's")]
pub struct Register {
    /// Answered by [`Frame::Done`] or [`Frame::Reply`] with a fault.
    pub request: CallId,
    /// The agent type served.
    pub agent_type: AgentType,
    /// The one agent, if not the whole type.
    pub key: Option<Key>,
    /// How it is served.
    pub registration: Registration,
}

/// A subscription.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a frame; its fields are the protocol's")]
pub struct Subscribe {
    /// Answered by [`Frame::Done`] or [`Frame::Reply`] with a fault.
    pub request: CallId,
    /// The client's number for it, under which events come and it can be ended.
    pub subscription: u64,
    /// Which topics.
    pub filter: TopicFilter,
    /// The agent type that receives them; without, the connection itself.
    pub agent_type: Option<AgentType>,
}

/// A request that has been carried out.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a frame; its fields are the protocol's")]
pub struct Done {
    /// Which one.
    pub request: CallId,
    /// Of a publish: how many agents and subscriptions the event went to.
    pub recipients: u64,
    /// Of a publish: those that did not take it, because their queue was full.
    pub dropped: Vec<ByteString>,
}

/// A call. A host fills in what a client leaves out, and puts its own word for what only it knows.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a frame; its fields are the protocol's")]
pub struct CallFrame {
    /// Names the call on this connection.
    pub id: CallId,
    /// The agent asked.
    pub target: AgentId,
    /// How long the caller waits, counted from when the frame arrives.
    pub timeout: Option<Duration>,
    /// Whether the caller wants to hear of its progress.
    pub progress: bool,
    /// Whether it was sent before, over a socket that broke.
    pub resent: bool,
    /// Of a durable call: which attempt this is.
    pub attempt: Option<Attempt>,
    /// Of a durable event: what it is about. An empty reply acknowledges it.
    pub topic: Option<TopicId>,
    /// What every message carries.
    pub header: HeaderFields,
    /// What is asked.
    pub payload: Payload,
}

/// An event on its way to the host.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a frame; its fields are the protocol's")]
pub struct PublishFrame {
    /// If present, the host acknowledges with [`Frame::Done`] or [`Frame::Published`].
    pub request: Option<CallId>,
    /// How safe it is to be before that: `memory`, which is meant if it is absent, or `durable`. Only
    /// with a request.
    pub ack: Option<ByteString>,
    /// What it is about.
    pub topic: TopicId,
    /// What every message carries.
    pub header: HeaderFields,
    /// What happened.
    pub payload: Payload,
}

/// An event on its way to a client.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a frame; its fields are the protocol's")]
pub struct EventFrame {
    /// Agent types of the client that receive it, each with the topic's source as key.
    pub agents: Vec<AgentType>,
    /// Subscriptions of the client that receive it.
    pub subscriptions: Vec<u64>,
    /// What it is about.
    pub topic: TopicId,
    /// What every message carries.
    pub header: HeaderFields,
    /// What happened.
    pub payload: Payload,
}

/// How an attempt of a durable call ended. Without the attempt it is a [`Frame::Reply`].
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a frame; its fields are the protocol's")]
pub struct Outcome {
    /// Names the call on this connection.
    pub id: CallId,
    /// Which attempt it was.
    pub attempt: Attempt,
    /// How it ended.
    pub reply: Reply,
}

/// A message that is to be kept until it was delivered.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a frame; its fields are the protocol's")]
pub struct SendFrame {
    /// Answered by [`Frame::Accepted`] or [`Frame::Reply`] with a fault.
    pub request: CallId,
    /// Whom it is for.
    pub target: AgentId,
    /// How long from now on it is not delivered.
    pub delay: Option<Duration>,
    /// Until when it is not delivered.
    pub deliver_at: Option<Timestamp>,
    /// After which time from now on no attempt begins any more.
    pub ttl: Option<Duration>,
    /// How many attempts may fail.
    pub max_attempts: Option<u32>,
    /// What every message carries.
    pub header: HeaderFields,
    /// What is said.
    pub payload: Payload,
}

/// The acknowledgement of a [`SendFrame`].
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a frame; its fields are the protocol's")]
pub struct AcceptedFrame {
    /// Which request it answers.
    pub request: CallId,
    /// The name of the delivery.
    pub delivery: DeliveryId,
    /// The conversation of its message.
    pub conversation: MessageId,
    /// What the acknowledgement promises: `memory` or `durable`.
    pub ack: ByteString,
    /// The generation in which it was accepted.
    pub generation: u64,
    /// Whether it had been accepted before, under the same idempotency key.
    pub known: bool,
}

/// The acknowledgement of a [`PublishFrame`] that asked for an event to be kept.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a frame; its fields are the protocol's")]
pub struct PublishedFrame {
    /// Which request it answers.
    pub request: CallId,
    /// The name of the event.
    pub id: MessageId,
    /// Its conversation.
    pub conversation: MessageId,
    /// What the acknowledgement promises: `memory` or `durable`.
    pub ack: ByteString,
    /// To how many it is owed.
    pub recipients: u64,
    /// Whether it had been published before, under the same idempotency key.
    pub known: bool,
}

/// The wish to know what becomes of a delivery.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a frame; its fields are the protocol's")]
pub struct WaitFrame {
    /// Answered by [`Frame::Delivery`] or [`Frame::Reply`] with a fault.
    pub request: CallId,
    /// Which one.
    pub delivery: DeliveryId,
    /// Only what is newer is of interest.
    pub generation: u64,
    /// The level of the step that is waited for, unless any will do.
    pub level: Option<ByteString>,
    /// For how long, until the answer is what is known then. 0 asks for that at once.
    pub timeout: Option<Duration>,
}

/// What is known of a delivery.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a frame; its fields are the protocol's")]
pub struct DeliveryFrame {
    /// Which request it answers.
    pub request: CallId,
    /// Which one.
    pub delivery: DeliveryId,
    /// Where it is in its life.
    pub state: ByteString,
    /// Counts its steps.
    pub generation: u64,
    /// Counts its attempts.
    pub attempt: u32,
    /// The levels of the steps that are newer than what was asked for, each once.
    pub levels: Vec<ByteString>,
    /// The words of the last step.
    pub details: ByteString,
    /// Why the last attempt has no answer.
    pub fault: Option<Fault>,
    /// The answer, of one that is `completed`.
    pub reply: Option<Payload>,
}

/// The part of an [`EventFrame`] that is the same for all recipients, written once.
#[derive(Clone, Debug)]
pub struct SharedEvent {
    pub(super) header: Bytes,
    pub(super) payload: Bytes,
}

/// [`crate::Header`] as far as a frame has it.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "part of frames; its fields are the protocol's")]
pub struct HeaderFields {
    /// Names the message.
    pub id: Option<MessageId>,
    /// Names the conversation.
    pub conversation: Option<MessageId>,
    /// The message that this one follows from.
    pub cause: Option<MessageId>,
    /// Who connected. Ignored if a client says it.
    pub principal: Option<Principal>,
    /// The agent that sends it.
    pub sender: Option<AgentId>,
    /// W3C trace context.
    pub traceparent: Option<ByteString>,
    /// How many messages led to this one.
    pub hops: u8,
    /// The sender's name for the work.
    pub idempotency_key: Option<ByteString>,
}
