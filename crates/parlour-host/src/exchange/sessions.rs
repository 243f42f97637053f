//! Sessions that can go on over another socket, by their secret names.

use std::sync::atomic::Ordering::Relaxed;

use bytestring::ByteString;

use super::Exchange;
use crate::config::limits;
use crate::peer::{Close, Outgoing, Peer};

impl Exchange {
    /// Names the session of `peer`, by which it can go on over another socket.
    pub(crate) fn name_session(&self, peer: &Peer) -> ByteString {
        // Whoever knows it can take the session over: it is as random as the system can make it.
        let name = ByteString::from(uuid::Uuid::new_v4().simple().to_string());
        self.0.sessions.lock().insert(name.clone(), peer.clone());
        name
    }

    /// The connection whose session has this name, if `peer` can go on with it: one of the same
    /// principal, which writes frames in the same way.
    pub(crate) fn session(&self, name: &str, peer: &Peer) -> Option<Peer> {
        let sessions = self.0.sessions.lock();
        let is_same =
            |known: &&Peer| known.principal == peer.principal && known.protocol == peer.protocol;
        sessions.get(name).filter(is_same).cloned()
    }

    /// Forgets a session: its connection is about to leave.
    pub(crate) fn end_session(&self, name: &str) {
        self.0.sessions.lock().remove(name);
    }

    /// Notes that a connection has lost its socket and waits for another, until the guard is dropped.
    /// `None` if as many wait as there may be connections: they hold none of these places.
    pub(crate) fn enter_grace(&self) -> Option<InGrace> {
        let waiting = self.0.in_grace.fetch_add(1, Relaxed);
        let in_grace = InGrace(self.clone());
        if waiting >= self.config().limits.connections {
            self.0.metrics.limit_hit(limits::connections);
            return None;
        }
        Some(in_grace)
    }

    /// Whether sessions wait for another socket.
    pub(crate) fn has_sessions_in_grace(&self) -> bool {
        self.0.in_grace.load(Relaxed) > 0
    }

    /// Ends sessions of the same worker that have no socket: it was started anew.
    pub(super) fn take_over(&self, peer: &Peer) {
        if !self.has_sessions_in_grace() {
            return;
        }
        let name = peer.name();
        let is_former = |other: &&Peer| {
            other.id != peer.id
                && !name.is_empty()
                && other.name() == name
                && other.principal == peer.principal
                && !other.connected.load(Relaxed)
        };
        let mut former: Vec<_> =
            self.0.sessions.lock().values().filter(is_former).cloned().collect();
        former.sort_unstable_by_key(|peer| peer.id);
        for other in former {
            let peers = self.0.peers.lock();
            self.change(|directory| directory.remove(other.id));
            drop(peers);
            let close = Close::new(Close::GOING_AWAY, "the worker was started anew");
            other.push(Outgoing::Close(Box::new(close)));
        }
    }
}

/// A connection that waits for another socket.
pub(crate) struct InGrace(Exchange);

impl Drop for InGrace {
    fn drop(&mut self) {
        self.0.0.in_grace.fetch_sub(1, Relaxed);
    }
}
