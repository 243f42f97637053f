//! What the workers of the simulation serve.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parlour::{Agent, AgentError, Cx, Payload, PayloadExt, State, TopicId, Worker, WorkerBuilder};
use parlour_test::Room;
use tokio::time::sleep;

use super::book::{Book, Token};

/// Served by every worker.
pub(crate) const COMMON: &str = "common";
/// Served by the first worker alone.
pub(crate) const FIRST: &str = "first";
/// The topics that agents of [`COMMON`] hear of.
pub(crate) const HEARD: &str = "news.*";

/// Numbers from which calls of agents count, so that they are not taken for a caller's.
const AGENTS: u32 = 100_000;

/// What an agent is asked to do.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    Echo,
    /// Answers after so many milliseconds.
    Sleep(u64),
    /// Answers with so many bytes.
    Grow(usize),
    /// Tells of its progress so many times, and then answers how often it did.
    Tell(u64),
    Fail,
    /// Never answers.
    Hang,
    /// Asks another agent, and answers when that has.
    Ask,
}

impl Work {
    pub(crate) fn draw(rng: &mut fastrand::Rng) -> Self {
        match rng.u8(..24) {
            0..8 => Self::Echo,
            8..13 => Self::Sleep(rng.u64(1..3000)),
            13..15 => Self::Grow(rng.usize(1..60_000)),
            15 => Self::Fail,
            16 => Self::Hang,
            17..21 => Self::Tell(rng.u64(..40)),
            _ => Self::Ask,
        }
    }

    /// Whether a caller of this asks for progress; now and then for that of what has none to tell.
    pub(crate) fn draw_asks(self, rng: &mut fastrand::Rng) -> bool {
        rng.u8(..8) < if matches!(self, Self::Tell(_)) { 6 } else { 1 }
    }

    /// The message that asks for it.
    pub(crate) fn message(self, token: Token) -> String {
        let (verb, number) = match self {
            Self::Echo => ("echo", 0),
            Self::Sleep(millis) => ("sleep", millis),
            Self::Grow(bytes) => ("grow", bytes as u64),
            Self::Tell(times) => ("tell", times),
            Self::Fail => ("fail", 0),
            Self::Hang => ("hang", 0),
            Self::Ask => ("ask", 0),
        };
        format!("{} {} {verb} {number}", token.caller, token.number)
    }

    pub(crate) fn parse(message: &str) -> Option<(Token, Self)> {
        let mut words = message.split(' ');
        let token =
            Token { caller: words.next()?.parse().ok()?, number: words.next()?.parse().ok()? };
        let (verb, number) = (words.next()?, words.next()?.parse::<u64>().ok()?);
        let work = match verb {
            "echo" => Self::Echo,
            "sleep" => Self::Sleep(number),
            "grow" => Self::Grow(number as usize),
            "tell" => Self::Tell(number),
            "fail" => Self::Fail,
            "hang" => Self::Hang,
            "ask" => Self::Ask,
            _ => return None,
        };
        Some((token, work))
    }
}

/// An agent in a process.
struct Actor {
    book: Book,
    process: u32,
    asked: Arc<AtomicU64>,
}

impl Actor {
    async fn call(&self, cx: Cx, message: Payload) -> Result<Payload, AgentError> {
        let Some((token, work)) = message.to_text().ok().and_then(Work::parse) else {
            self.book.violation(format!("{} got a message that nobody sent", cx.agent()));
            return Err("not understood".into());
        };
        let _running = self.book.runs(self.process, &cx.agent().to_string(), token);
        match work {
            Work::Echo => {}
            Work::Sleep(millis) => sleep(Duration::from_millis(millis)).await,
            Work::Grow(bytes) => {
                return Ok(Payload::text(format!("{token} {}", "x".repeat(bytes))));
            }
            Work::Tell(times) => {
                for number in 1..=times {
                    // Some one after the other, and some after a pause.
                    if number % 4 == 0 {
                        sleep(Duration::from_millis(30 * (number % 5))).await;
                    }
                    cx.progress(update_text(token, number)).await?;
                }
                return Ok(Payload::text(told_text(token, times)));
            }
            Work::Fail => return Err("as asked".into()),
            Work::Hang => std::future::pending().await,
            Work::Ask => self.ask(&cx).await?,
        }
        Ok(Payload::text(token.to_string()))
    }

    fn event(&self, cx: &Cx, topic: &TopicId, message: &Payload) {
        let text = message.to_text().unwrap_or_default();
        if !topic.topic_type.as_str().starts_with("news.") || cx.agent().key != topic.source {
            self.book.violation(format!("{} got the event {text} of {topic}", cx.agent()));
        }
        if let Some((publisher, number)) = event(text) {
            self.book.agent_hears(self.process, &cx.agent().to_string(), publisher, number);
        }
    }

    async fn ask(&self, cx: &Cx) -> Result<(), AgentError> {
        let number = self.asked.fetch_add(1, Ordering::Relaxed) + 1;
        let token = Token { caller: AGENTS + self.process, number };
        let message = Work::Echo.message(token);
        let (target, limit) = (format!("{FIRST}/asked"), Duration::from_secs(20));
        self.book.calls(token, &format!("{target} for {}", cx.agent()), limit);
        let unfinished = Unfinished { book: &self.book, token };
        let reply = cx.call(target, message).timeout(limit).await;
        std::mem::forget(unfinished);
        match reply {
            Ok(reply) => self.book.replied(token, reply.to_text().unwrap_or_default()),
            Err(error) => {
                self.book.failed(token, &error);
                return Err("the agent that was asked did not answer".into());
            }
        }
        Ok(())
    }
}

/// A call whose caller can be aborted.
struct Unfinished<'a> {
    book: &'a Book,
    token: Token,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        self.book.gives_up(self.token);
    }
}

/// What the agent says of a call for the `number`th time.
pub(crate) fn update_text(token: Token, number: u64) -> String {
    format!("{token} {number}")
}

/// The reply to a call of which the agent has spoken so many times.
pub(crate) fn told_text(token: Token, times: u64) -> String {
    format!("{token} told {times}")
}

/// The message of an event.
pub(crate) fn event_text(publisher: u32, number: u64) -> String {
    format!("{publisher} {number}")
}

/// Publisher and number of an event's message, whatever comes behind them.
pub(crate) fn event(text: &str) -> Option<(u32, u64)> {
    let mut words = text.split(' ');
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

/// A worker of slot `slot`, as process `process`.
pub(crate) fn worker(room: &Room, book: &Book, slot: usize, process: u32) -> WorkerBuilder {
    let asked = Arc::new(AtomicU64::new(0));
    let agent = || {
        let (book, asked) = (book.clone(), asked.clone());
        Agent::new(move |_key| Actor { book: book.clone(), process, asked: asked.clone() })
            .on_call(async |State(actor): State<Actor>, cx: Cx, message: Payload| {
                actor.call(cx, message).await
            })
            .on_event(
                async |State(actor): State<Actor>, cx: Cx, topic: TopicId, message: Payload| {
                    actor.event(&cx, &topic, &message);
                },
            )
    };
    let worker = Worker::builder(room.url())
        .name(format!("slot {slot}"))
        .drain_timeout(Duration::from_secs(10))
        .agent(COMMON, agent())
        .subscribe(HEARD, COMMON);
    if slot == 0 { worker.agent(FIRST, agent()) } else { worker }
}
