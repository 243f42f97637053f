//! Who serves which agents and wants which topics, and how workers leave.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use parlour_core::wire::Frame;
use parlour_core::{
    AgentId, AgentType, Directory, Fault, FaultKind, RegisterError, Registration, Subscription,
    SubscriptionId, WorkerId,
};

use super::Exchange;
use crate::config::limits;
use crate::peer::{Outgoing, Peer};

impl Exchange {
    /// Records that `peer` serves an agent type.
    pub(crate) fn register(
        &self,
        peer: &Peer,
        agent_type: &AgentType,
        registration: &Registration,
    ) -> Result<(), Fault> {
        let max = self.config().limits.registrations;
        self.try_register(peer, |d| d.register(peer.id, peer, agent_type, registration, max))
    }

    /// Records that `peer` serves one agent.
    pub(crate) fn register_instance(&self, peer: &Peer, agent: &AgentId) -> Result<(), Fault> {
        let max = self.config().limits.registrations;
        self.try_register(peer, |d| d.register_instance(peer.id, peer, agent, max))
    }

    fn try_register(
        &self,
        peer: &Peer,
        edit: impl FnOnce(&mut Directory<Peer>) -> Result<(), RegisterError>,
    ) -> Result<(), Fault> {
        self.take_over(peer);
        let peers = self.0.peers.lock();
        // Under the lock that a drain takes too: nothing is registered after it.
        if peer.draining.load(Relaxed) {
            let fault =
                Fault::new(FaultKind::Conflict, "the worker is draining and gets no new work");
            return Err(fault.hint("end what it has, and connect anew"));
        }
        self.try_change_locked(&peers, peer, edit)
    }

    /// Forgets that `peer` serves an agent type.
    pub(crate) fn unregister(&self, peer: &Peer, agent_type: &AgentType) -> Result<(), Fault> {
        self.try_change(peer, |d| d.unregister(peer.id, agent_type))
    }

    /// Forgets that `peer` serves one agent.
    pub(crate) fn unregister_instance(&self, peer: &Peer, agent: &AgentId) -> Result<(), Fault> {
        self.try_change(peer, |d| d.unregister_instance(peer.id, agent))
    }

    /// Adds a subscription of `peer`.
    pub(crate) fn subscribe(
        &self,
        peer: &Peer,
        id: SubscriptionId,
        subscription: &Subscription,
        unique: bool,
    ) -> Result<(), Fault> {
        let max = self.config().limits.subscriptions;
        self.try_change(peer, |d| d.subscribe(peer.id, peer, id, subscription, unique, max))
    }

    /// Removes a subscription of `peer`.
    pub(crate) fn unsubscribe(&self, peer: &Peer, id: &SubscriptionId) -> Result<(), Fault> {
        self.try_change(peer, |d| d.unsubscribe(peer.id, id))
    }

    /// Gives `peer` no new work from here on.
    pub(crate) fn drain(&self, peer: &Peer) {
        let _peers = self.0.peers.lock();
        peer.draining.store(true, Relaxed);
        self.change(|directory| directory.drain(peer.id));
    }

    /// Gives the worker that is called `name`, or has that number, no new work, and asks it to leave.
    pub(crate) fn retire(&self, name: &str) -> Result<Peer, Fault> {
        let peer = self.worker(name)?;
        self.drain(&peer);
        // Once, however often it is asked for: what a peer cannot refuse is bounded by being told once.
        if !peer.asked_to_leave.swap(true, Relaxed) {
            peer.push(Outgoing::Frame(Box::new(Frame::Leave)));
        }
        Ok(peer)
    }

    /// The one worker of this name or number.
    fn worker(&self, name: &str) -> Result<Peer, Fault> {
        let directory = self.0.directory.load();
        let mut named = self.peers();
        let by_name = named.iter().any(|peer| peer.name() == name);
        match name.parse().map(WorkerId) {
            Ok(id) if !by_name => named.retain(|peer| peer.id == id),
            _ => named.retain(|peer| peer.name() == name),
        }
        let is_known = !named.is_empty();
        named.retain(|peer| directory.serves_any(peer.id) || peer.draining.load(Relaxed));
        let name = name.escape_debug();
        match &named[..] {
            [peer] => Ok(peer.clone()),
            [] if is_known => {
                let detail = format!("`{name}` serves no agents, so there is nothing to drain");
                let fault = Fault::new(FaultKind::Conflict, detail);
                Err(fault.hint("`parlour workers` shows which agent types each one serves"))
            }
            [] => {
                let detail = format!("no worker is called `{name}`, or has that number");
                let fault = Fault::new(FaultKind::NotFound, detail);
                Err(fault.hint("`parlour workers` lists names and numbers"))
            }
            several => {
                let ids: Vec<_> = several.iter().map(|peer| peer.id.0.to_string()).collect();
                let detail = format!("{} workers are called `{name}`", several.len());
                let hint = format!("say which by its number: {}", ids.join(", "));
                Err(Fault::new(FaultKind::Conflict, detail).hint(hint))
            }
        }
    }

    /// Changes what the directory says of `peer`, unless it has left: nobody would forget it again.
    fn try_change(
        &self,
        peer: &Peer,
        edit: impl FnOnce(&mut Directory<Peer>) -> Result<(), RegisterError>,
    ) -> Result<(), Fault> {
        self.try_change_locked(&self.0.peers.lock(), peer, edit)
    }

    fn try_change_locked(
        &self,
        peers: &BTreeMap<WorkerId, Peer>,
        peer: &Peer,
        edit: impl FnOnce(&mut Directory<Peer>) -> Result<(), RegisterError>,
    ) -> Result<(), Fault> {
        if !peers.contains_key(&peer.id) {
            let fault =
                Fault::new(FaultKind::Unavailable, "the client's connection has just closed");
            return Err(fault.hint("connect again, then repeat the request"));
        }
        let mut next = Directory::clone(&self.0.directory.load());
        edit(&mut next).map_err(|error| self.refusal(&error))?;
        self.replace(next);
        Ok(())
    }

    /// Replaces the directory by a changed copy. Whoever calls holds the lock on `peers`.
    pub(super) fn change(&self, edit: impl FnOnce(&mut Directory<Peer>)) {
        let mut next = Directory::clone(&self.0.directory.load());
        edit(&mut next);
        self.replace(next);
    }

    fn replace(&self, directory: Directory<Peer>) {
        self.0.directory.store(Arc::new(directory));
        self.0.changes.send_replace(());
    }

    fn refusal(&self, error: &RegisterError) -> Fault {
        let detail = error.to_string();
        match error {
            RegisterError::TypeTaken(_) | RegisterError::AgentTaken(_) => {
                Fault::new(FaultKind::Conflict, detail)
                    .hint("stop the worker that has it (`parlour workers`), or register shared")
            }
            RegisterError::SubscriptionTaken => Fault::new(FaultKind::Conflict, detail)
                .hint("remove the other subscription first, or keep it"),
            RegisterError::TooManyRegistrations => {
                let max = self.config().limits.registrations;
                let fault = Fault::new(FaultKind::Overloaded, detail)
                    .hint("serve one type with many keys, or connect more than once");
                self.0.metrics.limit_met(limits::registrations, Some(max), fault)
            }
            RegisterError::TooManySubscriptions => {
                let max = self.config().limits.subscriptions;
                let fault =
                    Fault::new(FaultKind::Overloaded, detail).hint("subscribe to a prefix instead");
                self.0.metrics.limit_met(limits::subscriptions, Some(max), fault)
            }
            _ => Fault::new(FaultKind::NotFound, detail),
        }
    }
}
