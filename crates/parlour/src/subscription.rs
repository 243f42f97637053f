use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use futures_util::Stream;
use parlour_core::{Event, TopicFilter};
use tokio::sync::mpsc;

use crate::Error;
use crate::handle::{Handle, LocalSubscription, Outcome, after};

/// How many events may wait to be taken.
const BUFFER: usize = 1024;

/// Events as they come, from [`Client::subscribe`](crate::Client::subscribe).
///
/// Holds up to 1,024 events that were not taken yet; those beyond are dropped, and
/// [`missed`](Self::missed) counts them. What is published while the client has no connection is
/// missed, without being counted, if it does not come back within the host's grace time. Dropping it
/// unsubscribes. It is also a [`Stream`].
///
/// ```no_run
/// # async fn example(client: parlour::Client) -> Result<(), parlour::Error> {
/// use parlour::PayloadExt;
///
/// let mut news = client.subscribe("news.*").await?;
/// while let Some(event) = news.next().await {
///     println!("{} says {}", event.topic, event.payload.to_text()?);
/// }
/// # Ok(())
/// # }
/// ```
pub struct Subscription {
    handle: Handle,
    number: u64,
    events: mpsc::Receiver<Event>,
    outcome: Arc<Outcome>,
}

impl Subscription {
    pub(crate) async fn new(handle: Handle, pattern: &str) -> Result<Self, Error> {
        let filter = TopicFilter::parse(pattern)?;
        let (sender, events) = mpsc::channel(BUFFER);
        let outcome = Arc::new(Outcome::default());
        let number = handle.next_number();
        let deadline = after(handle.default_timeout());
        // Made before it is confirmed, so that dropping this future unsubscribes too.
        let subscription =
            Self { handle: handle.clone(), number, events, outcome: Arc::clone(&outcome) };
        handle
            .subscribe(LocalSubscription { number, filter, events: sender, outcome }, deadline)
            .await?;
        Ok(subscription)
    }

    /// Waits for the next event. `None` once the client is closed, or the host refuses to go on with
    /// the subscription, as [`error`](Self::error) then says. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Why the host refused to go on with the subscription after the client had reconnected; `None`
    /// otherwise.
    ///
    /// A refusal that need not last, such as one of kind `overloaded`, is none: then the client asks
    /// again until the host agrees.
    pub fn error(&self) -> Option<&Error> {
        self.outcome.error.get()
    }

    /// How many events were dropped because nobody took those before.
    pub fn missed(&self) -> u64 {
        self.outcome.missed.load(Ordering::Relaxed)
    }
}

impl Stream for Subscription {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.events.poll_recv(cx)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.handle.unsubscribe(self.number);
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription")
            .field("number", &self.number)
            .field("waiting", &self.events.len())
            .field("missed", &self.missed())
            .field("error", &self.error())
            .finish_non_exhaustive()
    }
}
