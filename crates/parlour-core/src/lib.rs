//! What a conversation between agents is made of: names, envelopes, and the state machines and wire
//! codec that move them.
//!
//! Nothing here opens a socket, reads a clock, spawns a task or draws a random number. Bytes, frames
//! and the current [`Instant`](std::time::Instant) come in as arguments; what should happen next
//! comes out as return values. That is what lets a whole room be driven by a plain loop in a test.

#[cfg(feature = "bugs")]
pub mod bugs;
mod directory;
pub mod durable;
mod envelope;
mod fault;
mod name;
mod places;
mod session;
mod window;
pub mod wire;

/// Whether the mistake of this name is to be made: never, but in tests that plant it.
#[doc(hidden)]
#[macro_export]
#[cfg(feature = "bugs")]
macro_rules! bug {
    ($name:literal) => {
        $crate::bugs::is_planted($name)
    };
}

/// Whether the mistake of this name is to be made: never, but in tests that plant it.
#[doc(hidden)]
#[macro_export]
#[cfg(not(feature = "bugs"))]
macro_rules! bug {
    ($name:literal) => {
        false
    };
}

pub use bytes::Bytes;
pub use bytestring::ByteString;
pub use directory::{
    Destinations, Directory, Listener, Recipients, RegisterError, Registration, Subscription,
    SubscriptionId, Target, TopicFilter, WorkerId,
};
pub use envelope::{
    Attempt, Call, Event, Header, MAX_HOPS, Metadata, MetadataError, Payload, Principal, Reply,
};
pub use fault::{Fault, FaultKind};
pub use name::{AgentId, AgentType, InvalidName, Key, MessageId, TopicId, TopicType};
pub use places::{Places, Standing, Way};
pub use session::{CallId, CallMap, Session, Settled};
pub use window::{Credit, Received, Sent, Windows, WrongCount};
