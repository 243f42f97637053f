//! Where a connection stands between requests, and until when it may stay there.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// Where an HTTP/1 or HTTP/2 connection stands.
///
/// hyper's own header timeout runs while a connection idles too, so that it cannot be short for the
/// one and long for the other; and it knows nothing of HTTP/2.
#[derive(Debug)]
pub(crate) struct Phase {
    start: Instant,
    /// Milliseconds after `start` when the connection came to where it stands.
    since: AtomicU64,
    stage: AtomicU8,
    requests: AtomicUsize,
    idle: Duration,
    headers: Duration,
}

const IDLE: u8 = 0;
const READING_HEADERS: u8 = 1;

impl Phase {
    /// A connection that has just been opened.
    pub(crate) fn new(now: Instant, idle: Duration, headers: Duration) -> Self {
        let (since, stage, requests) = Default::default();
        Self { start: now, since, stage, requests, idle, headers }
    }

    /// Bytes came in.
    pub(crate) fn bytes_came(&self) {
        if self.requests.load(Relaxed) == 0 && self.stage.load(Relaxed) == IDLE {
            self.enter(READING_HEADERS, Instant::now());
        }
    }

    /// A request has been read up to the end of its headers.
    pub(crate) fn request_began(&self) {
        self.requests.fetch_add(1, Relaxed);
        self.stage.store(IDLE, Relaxed);
    }

    /// A request has been answered in full, or given up.
    pub(crate) fn request_ended(&self, now: Instant) {
        self.requests.fetch_sub(1, Relaxed);
        self.enter(IDLE, now);
    }

    fn enter(&self, stage: u8, now: Instant) {
        self.since.store((now - self.start).as_millis() as u64, Relaxed);
        self.stage.store(stage, Relaxed);
    }

    /// When it has stood where it stands for too long; never, while a request is under way.
    fn ends(&self) -> Option<Instant> {
        if self.requests.load(Relaxed) > 0 {
            return None;
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
            // Everything that changes the phase happens while the connection is polled, so that
            // looking here, after it, misses nothing.
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

    #[tokio::test(start_paused = true)]
    async fn headers_have_less_time_than_idling_and_requests_have_all_they_need() {
        let secs = Duration::from_secs;
        let start = Instant::now();
        let phase = Phase::new(start, secs(30), secs(5));
        let connection = async {
            tokio::time::sleep(secs(20)).await;
            phase.bytes_came();
            tokio::time::sleep(secs(4)).await;
            phase.request_began();
            tokio::time::sleep(secs(600)).await;
            phase.request_ended(Instant::now());
            tokio::time::sleep(secs(29)).await;
            phase.bytes_came();
            std::future::pending::<()>().await;
        };
        assert_eq!(phase.guard(connection).await, None);
        assert_eq!(start.elapsed().as_secs(), 20 + 4 + 600 + 29 + 5);
    }
}
