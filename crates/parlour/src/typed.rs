use std::borrow::Borrow;
use std::fmt;
use std::marker::PhantomData;

use parlour_core::{AgentId, ByteString};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::request::Origin;
use crate::{CallRequest, Error, IntoAgentId, Json, SendRequest};

/// An agent somewhere in the room that takes one type of value and gives another, both as JSON. Made
/// by [`Client::typed`](crate::Client::typed) and [`Cx::typed`](crate::Cx::typed).
///
/// ```no_run
/// # async fn example(client: parlour::Client) -> Result<(), parlour::Error> {
/// let sum = client.typed::<Vec<i64>, i64>("sum")?;
/// assert_eq!(sum.call(vec![1, 2]).await?, 3);
/// # Ok(())
/// # }
/// ```
pub struct TypedAgent<Message, Reply> {
    origin: Origin,
    agent: AgentId,
    data_type: ByteString,
    types: PhantomData<fn(Message) -> Reply>,
}

impl<Message, Reply> TypedAgent<Message, Reply>
where
    Message: Serialize,
    Reply: DeserializeOwned + Send + 'static,
{
    pub(crate) fn new(origin: Origin, agent: impl IntoAgentId) -> Result<Self, Error> {
        let (agent, data_type) = (agent.into_agent_id()?, ByteString::new());
        Ok(Self { origin, agent, data_type, types: PhantomData })
    }

    /// The name that every message gets for its type, for agents that
    /// [tell several apart](crate::Agent::on_call_of).
    #[must_use]
    pub fn data_type(mut self, data_type: impl Into<ByteString>) -> Self {
        self.data_type = data_type.into();
        self
    }

    /// The agent that is called.
    pub fn agent(&self) -> &AgentId {
        &self.agent
    }

    /// Calls the agent. Await what this returns, perhaps after setting more on it, to get the decoded
    /// reply.
    pub fn call(&self, message: impl Borrow<Message>) -> CallRequest<Json<Reply>> {
        let request = self.origin.clone().call(&self.agent, Json(message.borrow()));
        request.data_type(self.data_type.clone()).json()
    }

    /// Sends the agent a message for later; see [`Client::send`](crate::Client::send). The reply that
    /// is waited for comes decoded.
    pub fn send(&self, message: impl Borrow<Message>) -> SendRequest<Json<Reply>> {
        let request = self.origin.clone().send(&self.agent, Json(message.borrow()));
        request.data_type(self.data_type.clone()).json()
    }
}

impl<Message, Reply> Clone for TypedAgent<Message, Reply> {
    fn clone(&self) -> Self {
        let Self { origin, agent, data_type, types } = self;
        Self {
            origin: origin.clone(),
            agent: agent.clone(),
            data_type: data_type.clone(),
            types: *types,
        }
    }
}

impl<Message, Reply> fmt::Debug for TypedAgent<Message, Reply> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TypedAgent")
            .field("agent", &self.agent)
            .field("data_type", &self.data_type)
            .finish_non_exhaustive()
    }
}
