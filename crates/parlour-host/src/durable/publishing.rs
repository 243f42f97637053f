//! An event as a door was given it, until it is published.

use std::collections::HashSet;
use std::sync::Arc;

use parlour_core::durable::{Message, MessageKind, Owed, Publish, Published};
use parlour_core::{AgentId, Fault, FaultKind, Header, Payload, TopicId};
use tokio::sync::oneshot;

use super::owner::{Input, Lag};
use super::sending::{Receipt, key_of};
use super::{Durable, PartitionId};

/// What is to be owed to all who have subscribed.
#[derive(Debug)]
pub(crate) struct Publishing {
    pub(crate) topic: TopicId,
    pub(crate) header: Header,
    pub(crate) payload: Payload,
}

/// Why an acknowledgement cannot be what a door's `field` asks for.
pub(crate) fn no_ack(field: &str, asked: &str) -> Fault {
    let detail = format!("{field} cannot be `{}`", asked.escape_debug());
    Fault::new(FaultKind::Invalid, detail).hint("ask for `memory` or `durable`")
}

impl Durable {
    /// Takes an event. When it returns, the event is as safe as [`ack`](Self::ack) says, and owed to
    /// every agent that has subscribed and to every durable subscription.
    pub(crate) async fn publish(&self, publishing: Publishing) -> Result<Published, Fault> {
        self.are_open().await;
        let (answer, answered) = oneshot::channel();
        self.begin_publish(publishing, Receipt::Waiter(answer));
        self.answer(answered).await?
    }

    /// Takes an event, in the order in which it is called, at a host that [has read its
    /// logs](Self::is_open). Once the event is as safe as [`ack`](Self::ack) says, or is refused, `tell`
    /// is called, which must not take long.
    pub(crate) fn publish_and_tell(
        &self,
        publishing: Publishing,
        tell: impl FnOnce(Result<Published, Fault>) + Send + 'static,
    ) {
        self.begin_publish(publishing, self.teller(tell));
    }

    /// Hands an event to the owner of its topic type's partition.
    fn begin_publish(&self, publishing: Publishing, receipt: Receipt<Published>) {
        let partitions = self.0.backbone.partitions();
        let partition = PartitionId::of_topic(&publishing.topic.topic_type, partitions);
        let entered = self.read_event(publishing).and_then(|publish| {
            let inbox = self.enter(partition, publish.message.weight())?;
            Ok((inbox, |receipt| Input::Publish(Box::new(publish), receipt)))
        });
        receipt.hand_in(entered);
    }

    fn read_event(&self, publishing: Publishing) -> Result<Publish, Fault> {
        let Publishing { topic, header, payload } = publishing;
        let exchange = &self.0.exchange;
        exchange.admit_message(&header, &payload)?;
        let owed = self.owed(&topic);
        let target = [topic.topic_type.as_str(), topic.source.as_str()];
        let key = key_of(&header, "topics", target, &payload);
        let window = exchange.config().durable.idempotency_window;
        let key = key.map(|(key, body)| (key, body, window));
        let message = Message { kind: MessageKind::Event(topic), header, payload };
        Ok(Publish { message, owed, key })
    }

    /// Whom an event is owed to: each durable subscription, and each agent that has subscribed and is
    /// in none of those.
    fn owed(&self, topic: &TopicId) -> Vec<Owed> {
        let room = self.room_so_far();
        let named = room.subscribed(&topic.topic_type).map(|(name, it)| Owed {
            agent: AgentId::new(it.agent_type.clone(), topic.source.clone()),
            subscription: Some(Arc::from(&**name)),
        });
        let mut owed: Vec<_> = named.collect();
        let mut agents: HashSet<_> = owed.iter().map(|it| it.agent.clone()).collect();
        for agent in self.0.exchange.directory().subscribed(topic) {
            if agents.insert(agent.clone()) {
                owed.push(Owed { agent, subscription: None });
            }
        }
        owed
    }

    /// How far behind the durable subscriptions are that have something which has not ended.
    pub(crate) async fn lags(&self) -> Result<Vec<Lag>, Fault> {
        let mut all: Vec<Lag> = Vec::new();
        for inbox in &*self.0.inboxes {
            for lag in self.ask(inbox, Input::Lags).await? {
                match all.iter_mut().find(|known| known.name == lag.name) {
                    Some(known) => {
                        known.unsettled += lag.unsettled;
                        known.oldest = known.oldest.min(lag.oldest);
                    }
                    None => all.push(lag),
                }
            }
        }
        Ok(all)
    }
}
