//! The events that a partition's log owes.

use std::sync::Arc;

use bytes::Bytes;
use parlour_core::durable::{Accept, Handover, Owed, Position, Publish, Source};
use parlour_core::{Fault, FaultKind};

use super::super::follow::{Followed, Tail, published};
use super::super::tally;
use super::{Input, Lag, Owner};
use crate::backbone::BackboneError;
use crate::config::{self, limits};

impl Owner {
    /// Whether there is room for one more event.
    pub(super) fn admit_event(&self, publish: &Publish) -> Result<(), Fault> {
        if self.admit_key(publish.key)? {
            return Ok(());
        }
        let exchange = &self.durable.0.exchange;
        let too_wide = |key, limit| {
            let detail = format!("the event would be owed to {} subscribers", publish.owed.len());
            let fault =
                Fault::new(FaultKind::TooLarge, detail).hint("split the topic, or raise the limit");
            Err(exchange.metrics().limit_met(key, Some(limit), fault))
        };
        let limit = exchange.config().limits.fan_out;
        if publish.owed.len() > limit {
            return too_wide(limits::fan_out, limit);
        }
        // None of them may be left out.
        for it in &publish.owed {
            let agent_type = &it.agent.agent_type;
            let others = self.durable.0.tallies.beside(Some(self.id), agent_type);
            self.durable.admit(agent_type, tally::add(others, self.partition.tally(agent_type)))?;
        }
        let (key, limit) = (config::durable::owed, exchange.config().durable.owed);
        if publish.owed.len() > limit {
            return too_wide(key, limit);
        }
        let owed = self.partition.standing().owed;
        if owed + publish.owed.len() as u64 > limit as u64 {
            let detail = format!("{owed} deliveries of events like this one are not accepted yet");
            return Err(self.durable.overloaded(key, limit, detail, "try again later"));
        }
        Ok(())
    }

    /// Hands what is owed, and on the disk, to the partitions of those whom it is owed to.
    pub(super) async fn hand_over(&mut self) -> Result<(), BackboneError> {
        while let Some(Handover { number, message, owed }) = self.partition.poll_owed() {
            let message = self.load(message).await?;
            let room = self.durable.room_so_far();
            for (index, Owed { agent, subscription }) in owed {
                let named = subscription.as_deref().and_then(|name| room.subscriptions.get(name));
                let source = Source { partition: self.id, number, index };
                let inbox = self.durable.inbox(self.durable.partition_of(&agent));
                let mut accept = Accept::new(agent, (*message).clone());
                accept.strict = named.is_some_and(|it| it.strict)
                    && !parlour_core::bug!("subscription_order_ignored");
                accept.subscription = subscription;
                // An owner that is gone takes it when the host is started anew.
                let _ = inbox.queue.send(Input::Owed(source, Box::new(accept)));
                if parlour_core::bug!("handed_over_is_taken") {
                    self.partition.taken(number, index, self.now());
                }
            }
        }
        Ok(())
    }

    /// Tells those who listen of the events in a commit that is on the disk.
    pub(super) fn announce(
        &mut self,
        position: Position,
        commit: &Bytes,
    ) -> Result<(), BackboneError> {
        for Followed { place, event, time } in published(self.id, position, commit)? {
            self.durable.0.exchange.announce(event, place.to_string().into(), time);
        }
        self.durable.tail(self.id).send_modify(|tail| {
            *tail = Tail { position, behind: tail.position, commit: commit.clone() };
        });
        Ok(())
    }

    /// How far behind each durable subscription is that has something which has not ended.
    pub(super) fn lags(&self) -> Vec<Lag> {
        let lag = |(name, unsettled, oldest): (&Arc<str>, _, _)| Lag {
            name: name.clone(),
            unsettled,
            oldest,
        };
        self.partition.subscriptions().map(lag).collect()
    }
}
