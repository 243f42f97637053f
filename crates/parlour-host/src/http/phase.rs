//! Where a connection stands between requests, and until when it may stay there.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::config::timeouts;

/// Where an HTTP/1 or HTTP/2 connection stands.
///
/// hyper's own header timeout runs while a connection idles too, so that it cannot be short for the
/// one and long for the other; and it knows nothing of HTTP/2.
#[derive(Debug)]
pub(crate) struct Phase {
    start: Instant,
    stage: AtomicU8,
    /// Milliseconds after `start` when the connection came to where it stands; not yet noted while
    /// `entered` is set. A request that comes and is begun at once costs no look at the clock.
    since: AtomicU64,
    entered: AtomicBool,
    requests: AtomicUsize,
    /// Answers whose bodies are on their way, and when the last of them moved on.
    sending: AtomicUsize,
    moved: AtomicU64,
    idle: Duration,
    headers: Duration,
    stalled: Duration,
}

/// A request that is under way.
#[derive(Debug)]
pub(crate) struct Answering {
    phase: Arc<Phase>,
    sending: bool,
}

impl Answering {
    /// The answer's body is on its way from here on, and has to move.
    pub(crate) fn begin_sending(&mut self) {
        if !std::mem::replace(&mut self.sending, true) {
            self.phase.sending.fetch_add(1, Relaxed);
        }
        self.moved();
    }

    /// All that there is of it was taken, and more may come at any time.
    pub(crate) fn rest(&mut self) {
        if std::mem::take(&mut self.sending) {
            self.phase.sending.fetch_sub(1, Relaxed);
        }
    }

    /// A part of it was taken.
    pub(crate) fn moved(&self) {
        if !self.sending {
            return;
        }
        self.phase.moved.store(self.phase.millis(Instant::now()), Relaxed);
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.phase.requests.fetch_sub(1, Relaxed);
        self.phase.sending.fetch_sub(usize::from(self.sending), Relaxed);
        self.phase.enter(IDLE);
    }
}

const IDLE: u8 = 0;
const READING_HEADERS: u8 = 1;

impl Phase {
    /// A connection that has just been opened.
    pub(crate) fn new(now: Instant, timeouts: &timeouts::Section) -> Self {
        let (stage, since, entered, requests, sending, moved) = Default::default();
        let (idle, headers) = (timeouts.idle, timeouts.headers);
        let stalled = timeouts.stalled_write;
        Self { start: now, stage, since, entered, requests, sending, moved, idle, headers, stalled }
    }

    /// Bytes came in.
    pub(crate) fn bytes_came(&self) {
        if self.requests.load(Relaxed) == 0 && self.stage.load(Relaxed) == IDLE {
            self.enter(READING_HEADERS);
        }
    }

    /// A request has been read up to the end of its headers. It is under way until what this
    /// returns is dropped: answered in full, or given up.
    pub(crate) fn request_began(self: &Arc<Self>) -> Answering {
        self.requests.fetch_add(1, Relaxed);
        self.stage.store(IDLE, Relaxed);
        Answering { phase: self.clone(), sending: false }
    }

    fn enter(&self, stage: u8) {
        self.stage.store(stage, Relaxed);
        self.entered.store(true, Relaxed);
    }

    fn millis(&self, now: Instant) -> u64 {
        (now - self.start).as_millis() as u64
    }

    /// When it has stood where it stands for too long; never, while an agent works on a request.
    fn ends(&self) -> Option<Instant> {
        // The window of an HTTP/2 peer can hold an answer back while its socket takes all there is.
        if self.sending.load(Relaxed) > 0 {
            return Some(
                self.start + Duration::from_millis(self.moved.load(Relaxed)) + self.stalled,
            );
        }
        if self.requests.load(Relaxed) > 0 {
            return None;
        }
        if self.entered.swap(false, Relaxed) {
            self.since.store(self.millis(Instant::now()), Relaxed);
        }
        let allowed = if self.stage.load(Relaxed) == IDLE { self.idle } else { self.headers };
        Some(self.start + Duration::from_millis(self.since.load(Relaxed)) + allowed)
    }

    /// Drives `connection` to its end, or until it has stood in one place for too long.
    ///
    /// Returns `None` in the latter case.
    pub(crate) async fn guard<F: Future>(&self, connection: F) -> Option<F::Output> {
        let mut connection = pin!(connection);
        let mut timer = pin!(sleep_until(self.start + self.headers.min(self.idle)));
        std::future::poll_fn(move |cx: &mut Context<'_>| {
            if let Poll::Ready(output) = connection.as_mut().poll(cx) {
                return Poll::Ready(Some(output));
            }
            // Over HTTP/1 all that changes the phase happens while the connection is polled. Over
            // HTTP/2 a request may end in a task of its own; the connection is then polled to write
            // its last frame, and by its pings.
            let Some(ends) = self.ends() else { return Poll::Pending };
            let mut timer: Pin<&mut _> = timer.as_mut();
            if ends < timer.deadline() {
                timer.as_mut().reset(ends);
            }
            while timer.as_mut().poll(cx).is_ready() {
                if ends <= timer.deadline() {
                    return Poll::Ready(None);
                }
                timer.as_mut().reset(ends);
            }
            Poll::Pending
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;

    #[tokio::test(start_paused = true)]
    async fn headers_have_less_time_than_idling_and_requests_have_all_they_need() {
        let secs = Duration::from_secs;
        let start = Instant::now();
        let phase = Arc::new(Phase::new(start, &Config::default().timeouts));
        let connection = async {
            tokio::time::sleep(secs(20)).await;
            phase.bytes_came();
            tokio::time::sleep(secs(4)).await;
            let answering = phase.request_began();
            tokio::time::sleep(secs(600)).await;
            drop(answering);
            tokio::time::sleep(secs(29)).await;
            phase.bytes_came();
            std::future::pending::<()>().await;
        };
        assert_eq!(phase.guard(connection).await, None);
        assert_eq!(start.elapsed().as_secs(), 20 + 4 + 600 + 29 + 5);
    }
}
