//! Events that the host keeps until all who subscribed have had them.

use futures_util::future::BoxFuture;
use parlour_core::wire::PublishedFrame;
use parlour_core::{MessageId, TopicId};

use crate::request::{Origin, PublishRequest, Request};
use crate::{Ack, Error};

/// An event that is to be kept: published when it is awaited, which gives an [`AcceptedEvent`] once the
/// host has it.
pub type DurablePublishRequest = Request<Durably>;

/// Where a [`DurablePublishRequest`] goes.
#[derive(Clone, Debug)]
pub struct Durably(TopicId);

impl PublishRequest {
    /// Has the host keep the event until all have had it to whom it is owed when it is accepted: the
    /// agents that have subscribed, and the durable subscriptions, whose agents may come later. Each
    /// gets it at least once, as a delivery of its own, which is retried.
    ///
    /// If the connection is lost before the host has said that it is accepted, it is published again,
    /// under one [idempotency key](Request::idempotency_key), and so accepted once.
    ///
    /// ```no_run
    /// # async fn example(client: parlour::Client) -> Result<(), parlour::Error> {
    /// let paid = client.publish("order.paid/till-3", "order 7").durable();
    /// let event = paid.idempotency_key("order 7 is paid").await?;
    /// println!("{} is {:?}, and owed to {}", event.id, event.ack, event.recipients);
    /// # Ok(())
    /// # }
    /// ```
    pub fn durable(self) -> DurablePublishRequest {
        self.to(Durably)
    }
}

impl IntoFuture for DurablePublishRequest {
    type Output = Result<AcceptedEvent, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let deadline = self.deadline();
        Box::pin(async move {
            let explain = self.origin.explain(deadline);
            let (Durably(topic), payload) = self.parts?;
            let Origin { handle, header, .. } = self.origin.with_key();
            let published = handle.publish_durably(topic, header, payload, deadline).await;
            Ok(AcceptedEvent::new(published.map_err(explain)?))
        })
    }
}

/// An event that the host has accepted, and keeps until all have had it: from
/// [`durable`](PublishRequest::durable).
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct AcceptedEvent {
    /// Names the event: its message id, wherever it is delivered.
    pub id: MessageId,
    /// Names its conversation.
    pub conversation: MessageId,
    /// What its acceptance promises.
    pub ack: Ack,
    /// To how many it is owed. None is no error: nobody has subscribed.
    pub recipients: u64,
    /// Whether it was not accepted before, under the same idempotency key.
    pub is_new: bool,
}

impl AcceptedEvent {
    fn new(published: PublishedFrame) -> Self {
        let PublishedFrame { id, conversation, ack, recipients, known, .. } = published;
        Self { id, conversation, ack: Ack::read(&ack), recipients, is_new: !known }
    }
}
