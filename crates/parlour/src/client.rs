use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::driver::Driver;
use crate::handle::Handle;
use crate::handlers::Handlers;
use crate::request::Origin;
use crate::state::State;
use crate::transport::{Connect, Endpoint, Tcp};
use crate::{
    CallEachRequest, CallRequest, Error, IntoAgentId, IntoPayload, IntoTopicId, PublishRequest,
    SendRequest, Subscription, TypedAgent,
};

/// How long a request may take unless it is told otherwise.
pub(crate) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// Calls agents, publishes events and subscribes to topics, over one connection to a host.
///
/// Make one and clone it: clones share the connection, which ends when the last of them and of their
/// [`Subscription`]s is dropped. A connection that is lost is made anew, with waits of random length
/// up to 5 s in between; requests made meanwhile wait, within their deadline. Within the host's grace
/// time, 5 s unless it is set otherwise, nothing is lost: requests get their answers, and subscriptions
/// every event. After that, or at a host that was started anew, requests whose answer was outstanding
/// fail with [`ErrorKind::ConnectionLost`](crate::ErrorKind::ConnectionLost), and subscriptions go on
/// with what is published from then on.
///
/// A host that was started anew knows its workers once they have come back to it. A call that comes
/// before them fails with `unknown_agent`, which [is retryable](Error::is_retryable).
///
/// ```no_run
/// # async fn example() -> Result<(), parlour::Error> {
/// use parlour::{Client, PayloadExt};
///
/// let client = Client::connect("http://127.0.0.1:9000").await?;
/// let reply = client.call("upper", "hello").await?;
/// println!("{}", reply.to_text()?);
///
/// let mut news = client.subscribe("news.*").await?;
/// client.publish("news.tech/paper", "it works").await?;
/// println!("{:?}", news.next().await);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Client {
    handle: Handle,
}

impl Client {
    /// Connects to the host at `url`, such as `http://127.0.0.1:9000`.
    ///
    /// Fails at once if there is none; must be called within a tokio runtime.
    pub async fn connect(url: &str) -> Result<Self, Error> {
        Self::builder(url).connect().await
    }

    /// Begins a client that is not as most are.
    pub fn builder(url: &str) -> ClientBuilder {
        ClientBuilder {
            url: url.to_owned(),
            token: None,
            name: "client".to_owned(),
            default_timeout: DEFAULT_TIMEOUT,
        }
    }

    /// Calls an agent, named `type/key`; `type` alone means the key `default`.
    ///
    /// Await what this returns, perhaps after setting more on it, to get the reply's payload.
    pub fn call(&self, agent: impl IntoAgentId, message: impl IntoPayload) -> CallRequest {
        self.origin().call(agent, message)
    }

    /// Calls several agents at once with the same message.
    ///
    /// Await what this returns, perhaps after setting more on it, to get each one's reply or error on
    /// its own, in the order of the agents.
    ///
    /// ```no_run
    /// # async fn example(client: parlour::Client) -> Result<(), parlour::Error> {
    /// for answer in client.call_each(["critic/ada", "critic/alan"], "a poem").await? {
    ///     match answer.reply {
    ///         Ok(reply) => println!("{} answers {} bytes", answer.agent, reply.bytes.len()),
    ///         Err(error) => println!("{} does not answer: {error}", answer.agent),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn call_each(
        &self,
        agents: impl IntoIterator<Item: IntoAgentId>,
        message: impl IntoPayload,
    ) -> CallEachRequest {
        self.origin().call_each(agents, message)
    }

    /// An agent that takes one type of value and gives another, both as JSON.
    ///
    /// ```no_run
    /// # async fn example(client: parlour::Client) -> Result<(), parlour::Error> {
    /// let sum = client.typed::<Vec<i64>, i64>("sum")?;
    /// assert_eq!(sum.call(vec![1, 2]).await?, 3);
    /// # Ok(())
    /// # }
    /// ```
    pub fn typed<Message, Reply>(
        &self,
        agent: impl IntoAgentId,
    ) -> Result<TypedAgent<Message, Reply>, Error>
    where
        Message: Serialize,
        Reply: DeserializeOwned + Send + 'static,
    {
        TypedAgent::new(self.origin(), agent)
    }

    /// Publishes an event to a topic, named `type/source`; `type` alone means the source `default`.
    ///
    /// Await what this returns, perhaps after setting more on it, to learn who got the event. One that
    /// must not be lost is made [`durable`](PublishRequest::durable).
    ///
    /// ```no_run
    /// # async fn example(client: parlour::Client) -> Result<(), parlour::Error> {
    /// let published = client.publish("news.tech/paper", "it works").await?;
    /// if !published.dropped.is_empty() {
    ///     println!("these were too slow to get it: {:?}", published.dropped);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn publish(&self, topic: impl IntoTopicId, message: impl IntoPayload) -> PublishRequest {
        self.origin().publish(topic, message)
    }

    /// Sends an agent a message for later: the host keeps it until it is delivered, whatever becomes of
    /// the agent's workers, of this client and of the host itself.
    ///
    /// Await what this returns, perhaps after setting more on it, to learn that it was accepted; the
    /// [`Sent`](crate::Sent) tells what becomes of it. If the connection is lost before the host has
    /// said so, it is sent again, and accepted once. The same message under an
    /// [idempotency key](SendRequest::idempotency_key) of one's own gives the same delivery, also to a
    /// program that was started anew.
    ///
    /// ```no_run
    /// # async fn example(client: parlour::Client) -> Result<(), parlour::Error> {
    /// use std::time::Duration;
    ///
    /// let reminder = client.send("reminder/ada", "tea").delay(Duration::from_secs(180));
    /// let sent = reminder.ttl(Duration::from_secs(600)).idempotency_key("tea-7").await?;
    /// println!("{} goes on without this program", sent.id());
    /// # Ok(())
    /// # }
    /// ```
    pub fn send(&self, agent: impl IntoAgentId, message: impl IntoPayload) -> SendRequest {
        self.origin().send(agent, message)
    }

    fn origin(&self) -> Origin {
        Origin::new(self.handle.clone())
    }

    /// Subscribes to topics of the type `pattern`, or, if it ends in `*`, of all types that begin
    /// with the rest. Returns once the host has confirmed it.
    pub async fn subscribe(&self, pattern: &str) -> Result<Subscription, Error> {
        Subscription::new(self.handle.clone(), pattern).await
    }

    /// Says goodbye to the host and ends the connection, for all clones.
    ///
    /// What was asked before is still written, but answers are no longer awaited: whoever waits for
    /// one gets [`ErrorKind::Closed`](crate::ErrorKind::Closed).
    pub async fn close(&self) {
        self.handle.close().await;
    }
}

/// How a [`Client`] is to be.
///
/// ```no_run
/// # async fn example() -> Result<(), parlour::Error> {
/// use parlour::Client;
/// use std::time::Duration;
///
/// let client = Client::builder("http://127.0.0.1:9000")
///     .name("till")
///     .token("a secret")
///     .default_timeout(Duration::from_secs(5))
///     .connect()
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use = "it connects only when told to"]
pub struct ClientBuilder {
    url: String,
    token: Option<String>,
    name: String,
    default_timeout: Duration,
}

impl ClientBuilder {
    /// The bearer token that the host asks for.
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// What the client calls itself, for people who look at the host; `client` by default.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// How long a request may take unless it says otherwise; 30 s by default.
    pub fn default_timeout(mut self, timeout: Duration) -> Self {
        self.default_timeout = timeout;
        self
    }

    /// Connects. Fails at once if that does not work, and within 10 s if nothing answers.
    pub async fn connect(self) -> Result<Client, Error> {
        self.connect_with(Tcp).await
    }

    /// Connects over streams that `connector` makes.
    #[doc(hidden)]
    pub async fn connect_with<C: Connect>(self, connector: C) -> Result<Client, Error> {
        let endpoint = Endpoint::new(&self.url, self.token.as_deref(), &self.name)?;
        let (handle, commands, ids) = Handle::new(self.default_timeout);
        let driver = Driver {
            connector: Arc::new(connector),
            endpoint: Arc::new(endpoint),
            commands,
            state: State::new(ids, Vec::new(), Vec::new()),
            handlers: Handlers::none(),
            drain_time: Duration::ZERO,
            on_connected: None,
        };
        let link = driver.connect().await?;
        tokio::spawn(async move {
            // Ends well: a client begins with nothing that a host could refuse.
            let _ = driver.run(link, std::future::pending()).await;
        });
        Ok(Client { handle })
    }
}

impl std::fmt::Debug for ClientBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientBuilder")
            .field("url", &self.url)
            .field("name", &self.name)
            .field("default_timeout", &self.default_timeout)
            .finish_non_exhaustive()
    }
}
