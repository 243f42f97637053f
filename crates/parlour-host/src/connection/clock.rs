//! When a channel's task has something to do.

use std::time::Duration;

use tokio::time::Instant;

use crate::config::timeouts;

/// How long a peer may take to answer a close.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);
/// A timer that is later than this was not the only thing to stand still.
const LATE: Duration = Duration::from_millis(500);

/// What a channel's task has to do at which time, beside the deadlines of calls.
pub(super) struct Clock {
    pub(super) heartbeat: Duration,
    pub(super) next_beat: Instant,
    /// When the peer counts as gone if nothing is heard of it until then.
    pub(super) silent: Instant,
    /// Until when the peer has to greet.
    pub(super) greets: Instant,
    /// Until when it has to answer a close.
    pub(super) closes: Option<Instant>,
    patience: Duration,
    /// Until when it has to give credit, while messages wait for that.
    pub(super) starves: Option<Instant>,
}

impl Clock {
    pub(super) fn new(timeouts: &timeouts::Section) -> Self {
        let now = Instant::now();
        Self {
            heartbeat: timeouts.heartbeat,
            next_beat: now + timeouts.heartbeat,
            silent: now + 2 * timeouts.heartbeat,
            greets: now + timeouts.handshake,
            closes: None,
            patience: timeouts.stalled_write,
            starves: None,
        }
    }

    pub(super) fn hear(&mut self, now: Instant) {
        self.silent = now + 2 * self.heartbeat;
    }

    /// After the host itself was stopped for a while, it reads what came meanwhile before it calls a
    /// peer dead.
    pub(super) fn forgive(&mut self, now: Instant) {
        if self.starves.map_or(self.silent, |at| at.min(self.silent)) + LATE < now {
            self.hear(now);
            self.starves = None;
        }
    }

    pub(super) fn starve(&mut self, now: Instant, is_starved: bool) {
        self.starves = is_starved.then(|| self.starves.unwrap_or(now + self.patience));
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closes.is_some()
    }

    pub(super) fn close(&mut self) {
        self.closes.get_or_insert_with(|| Instant::now() + CLOSE_PATIENCE);
    }

    /// When there is next something to do.
    pub(super) fn due(&self, greeted: bool, deadline: Option<std::time::Instant>) -> Instant {
        let others = [self.closes, self.starves].into_iter().flatten();
        let due = others.fold(self.next_beat.min(self.silent), Instant::min);
        let due = deadline.map_or(due, |at| due.min(at.into()));
        if greeted { due } else { due.min(self.greets) }
    }
}
