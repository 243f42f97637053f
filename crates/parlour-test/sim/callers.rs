//! Callers that use the SDK, and what they ask for.

use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use parlour::{Client, PayloadExt};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::Stage;
use super::agents::{COMMON, FIRST, Work, event, event_text};
use super::book::{Book, Token};
use super::old::OLD;
use super::referee::RAW;

/// Topics that are published to, and what subscriptions ask for.
pub(crate) const TOPICS: [&str; 4] = ["news.x", "news.y", "log.x", "other"];
pub(crate) const FILTERS: [&str; 4] = ["news.*", "news.x", "log.*", "*"];

/// What a call is about.
pub(crate) struct Errand {
    pub(crate) token: Token,
    pub(crate) target: String,
    pub(crate) work: Work,
    /// Whether the caller asks for progress.
    pub(crate) asks: bool,
    pub(crate) limit: Duration,
    /// When the caller gives it up, if it does.
    pub(crate) patience: Option<Duration>,
}

impl Errand {
    /// One that is waited for.
    pub(crate) fn new(token: Token, target: String, work: Work, limit: Duration) -> Self {
        let asks = matches!(work, Work::Tell(_));
        Self { token, target, work, asks, limit, patience: None }
    }

    /// Notes that the call begins.
    pub(crate) fn begin(&self, book: &Book, door: &str) {
        let Self { token, target, work, asks, limit, .. } = self;
        let asks_for = if *asks { " with progress" } else { "" };
        book.calls(*token, &format!("{target} to {work:?}{asks_for}{door}"), *limit);
        if *asks {
            book.asks_for_progress(*token);
        }
    }

    /// Books a reply that says `text`.
    pub(crate) fn replied(&self, book: &Book, text: &str) {
        let Self { token, work, .. } = self;
        book.replied(*token, text);
        match work {
            Work::Fail | Work::Hang => {
                book.violation(format!("{token} has a reply to {work:?}"));
            }
            Work::Grow(bytes) if text.len() < *bytes => {
                book.violation(format!("{token} got {} bytes of {bytes}", text.len()));
            }
            _ => {}
        }
    }
}

/// Makes a call and books how it ends.
pub(crate) async fn call(book: Book, client: Client, errand: Errand) {
    errand.begin(&book, "");
    let Errand { token, work, limit, .. } = errand;
    let request = client.call(errand.target.as_str(), work.message(token)).timeout(limit);
    let request = async {
        if !errand.asks {
            return request.await;
        }
        let mut progress = request.with_progress();
        while let Some(update) = progress.next().await {
            book.progresses(token, update.to_text().unwrap_or_default());
        }
        progress.reply().await
    };
    let reply = match errand.patience {
        None => request.await,
        Some(patience) => match timeout(patience, request).await {
            Ok(reply) => reply,
            Err(_) => return book.gives_up(token),
        },
    };
    match reply {
        Ok(reply) => errand.replied(&book, reply.to_text().unwrap_or_default()),
        Err(error) => book.failed(token, &error),
    }
}

/// Makes the subscriptions of a run, and books what they hear.
pub(crate) async fn subscribe(stage: &Stage, rng: &mut Rng) {
    let mut number = 0;
    for caller in &stage.callers {
        for _ in 0..rng.usize(..=2) {
            number += 1;
            let filter = FILTERS[rng.usize(..FILTERS.len())];
            let mut subscription = match caller.client.subscribe(filter).await {
                Ok(subscription) => subscription,
                Err(error) => {
                    stage.book.violation(format!("cannot subscribe: {error}"));
                    continue;
                }
            };
            stage.book.note(format_args!("subscription {number} of {} to {filter}", caller.number));
            stage.book.subscribed(filter);
            let book = stage.book.clone();
            tokio::spawn(async move {
                while let Some(heard) = subscription.next().await {
                    let topic = heard.topic.topic_type.as_str();
                    if !matches(filter, topic) {
                        book.violation(format!("a subscription to {filter} got one of {topic}"));
                    }
                    match event(heard.payload.to_text().unwrap_or_default()) {
                        Some((publisher, at)) => book.hears(number, publisher, at, topic),
                        None => book.violation("an event came that nobody sent".to_owned()),
                    }
                }
                if let Some(error) = subscription.error() {
                    book.violation(format!("subscription {number} ended: {error}"));
                }
            });
        }
    }
}

/// Whether a subscription is for a topic.
pub(crate) fn matches(filter: &str, topic: &str) -> bool {
    match filter.strip_suffix('*') {
        Some(prefix) => topic.starts_with(prefix),
        None => topic == filter,
    }
}

/// One caller's work through a storm.
pub(crate) async fn work(stage: Arc<Stage>, index: usize, mut rng: Rng) {
    let caller = &stage.callers[index];
    let mut open = JoinSet::new();
    for _ in 0..rng.usize(5..30) {
        sleep(Duration::from_millis(rng.u64(..1200))).await;
        if rng.u8(..5) == 0 {
            publish(&stage, index, &mut rng).await;
            continue;
        }
        // One after the other to the same agent, without waiting in between.
        let target = match rng.u8(..9) {
            2 => format!("{OLD}/{}", rng.u8(..4)),
            1 => format!("{RAW}/{}", rng.u8(..4)),
            0 => format!("{FIRST}/{}", rng.u8(..2)),
            _ => format!("{COMMON}/{}", rng.u8(..4)),
        };
        for _ in 0..rng.usize(1..6) {
            let token = Token { caller: caller.number, number: stage.book.next_number() };
            let limit = Duration::from_millis(rng.u64(50..20_000));
            let patience = (rng.u8(..8) == 0).then(|| Duration::from_millis(rng.u64(..2000)));
            let (book, client) = (stage.book.clone(), caller.client.clone());
            let work = Work::draw(&mut rng);
            let asks = work.draw_asks(&mut rng);
            let target = target.clone();
            let errand = Errand { token, target, work, asks, limit, patience };
            open.spawn(call(book, client, errand));
        }
    }
    while open.join_next().await.is_some() {}
}

async fn publish(stage: &Stage, index: usize, rng: &mut Rng) {
    let caller = &stage.callers[index];
    let (number, topic) = (stage.book.next_number(), TOPICS[rng.usize(..TOPICS.len())]);
    stage.book.note(format_args!("{}-{number} is published on {topic}", caller.number));
    let target = format!("{topic}/{}", rng.u8(..3));
    let published = caller
        .client
        .publish(target, event_text(caller.number, number))
        .timeout(Duration::from_secs(5))
        .await;
    stage.book.note(format_args!(
        "{}-{number} went to {:?}",
        caller.number,
        published.map(|published| published.recipients).map_err(|error| error.kind())
    ));
}
