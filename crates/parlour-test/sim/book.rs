//! What happened in a run, and what of it must not have.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use parlour::{Error, ErrorKind, FaultKind};
use tokio::time::Instant;

use super::Report;
use super::agents::update_text;

/// How late the end of a call may be: timers count in milliseconds.
const SLACK: Duration = Duration::from_millis(20);
/// Violations that are kept of a run.
const KEPT: usize = 20;

/// Names a call: who made it, and which of its calls it is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Token {
    pub(crate) caller: u32,
    pub(crate) number: u64,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.caller, self.number)
    }
}

/// Clones are the same one.
#[derive(Clone)]
pub(crate) struct Book(Arc<Mutex<Inner>>);

struct Inner {
    print: bool,
    began: Instant,
    numbers: u64,
    hash: u64,
    violations: Vec<String>,
    calls: BTreeMap<Token, Call>,
    /// The last call that an agent took from a caller, and the process it ran in.
    latest: BTreeMap<(String, u32), (u64, u32)>,
    /// All faults have ended.
    is_calm: bool,
    /// Calls that run now: for each agent the processes, with their tokens.
    running: BTreeMap<String, Vec<(u32, Token)>>,
    /// Leaps of the clock.
    leaps: Vec<(Instant, Instant)>,
    /// How often something happened that a run is to show.
    counts: BTreeMap<&'static str, u64>,
    filters: Vec<&'static str>,
    /// The last event that a subscription had of a publisher.
    events: BTreeMap<(u32, u32), u64>,
    /// How many events came, by publisher and number.
    deliveries: BTreeMap<(u32, u64), usize>,
    /// The agents that had an event.
    agent_events: BTreeMap<(u32, u64), BTreeSet<String>>,
    /// The last event that an agent in a process had of a publisher.
    agent_latest: BTreeMap<(String, u32, u32), u64>,
}

#[derive(Debug, Default)]
struct Call {
    deadline: Option<Instant>,
    /// Its caller asked for progress, and heard it so many times.
    asks: bool,
    updates: u64,
    ended: bool,
    succeeded: bool,
    runs: Vec<u32>,
    /// When the agent's handler ended.
    run_ended: Option<Instant>,
    /// It ran elsewhere after a later one. A worker that was cut off comes late to what has ended;
    /// so this is wrong only of a call that ends well.
    overtaken: Option<String>,
    /// The caller was told that it cannot have run.
    cannot_have_run: bool,
}

impl Book {
    pub(crate) fn new(print: bool) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            print,
            began: Instant::now(),
            numbers: 0,
            // FNV-1a's, as is the rest of it.
            hash: 0xcbf2_9ce4_8422_2325,
            violations: Vec::new(),
            calls: BTreeMap::new(),
            latest: BTreeMap::new(),
            is_calm: false,
            running: BTreeMap::new(),
            leaps: Vec::new(),
            counts: BTreeMap::new(),
            filters: Vec::new(),
            events: BTreeMap::new(),
            deliveries: BTreeMap::new(),
            agent_events: BTreeMap::new(),
            agent_latest: BTreeMap::new(),
        })))
    }

    pub(crate) fn report(&self) -> Report {
        let inner = self.0.lock();
        let (mut counts, violations) = (inner.counts.clone(), inner.violations.clone());
        counts.insert("calls", inner.calls.len() as u64);
        Report { hash: inner.hash, counts, violations }
    }

    /// Notes a step.
    pub(crate) fn note(&self, line: impl fmt::Display) {
        self.0.lock().note(&line.to_string());
    }

    /// Counts that something happened.
    pub(crate) fn counts(&self, what: &'static str) {
        self.counts_many(what, 1);
    }

    pub(crate) fn counts_many(&self, what: &'static str, times: u64) {
        *self.0.lock().counts.entry(what).or_default() += times;
    }

    /// Notes that something did not hold.
    pub(crate) fn violation(&self, text: String) {
        self.0.lock().violation(text);
    }

    /// When a call with this deadline must have ended.
    pub(crate) fn latest(&self, deadline: Instant) -> Instant {
        self.0.lock().latest(deadline)
    }

    /// A number for a call or event, higher than all before.
    pub(crate) fn next_number(&self) -> u64 {
        let mut inner = self.0.lock();
        inner.numbers += 1;
        inner.numbers
    }

    /// From now on there are no faults.
    pub(crate) fn calms(&self) {
        let mut inner = self.0.lock();
        inner.is_calm = true;
        inner.note("the calm begins");
    }

    /// The clock leapt.
    pub(crate) fn leapt(&self, from: Instant, to: Instant) {
        self.0.lock().leaps.push((from, to));
    }

    // Callers.

    /// A caller makes a call that is to end within `limit`.
    pub(crate) fn calls(&self, token: Token, what: &str, limit: Duration) {
        let mut inner = self.0.lock();
        inner.note(&format!("{token} calls {what} within {limit:?}"));
        let deadline = Some(Instant::now() + limit);
        inner.calls.insert(token, Call { deadline, ..Call::default() });
    }

    /// The caller of this call wants to hear of its progress.
    pub(crate) fn asks_for_progress(&self, token: Token) {
        self.0.lock().calls.entry(token).or_default().asks = true;
    }

    /// A caller hears of a call's progress.
    pub(crate) fn progresses(&self, token: Token, text: &str) {
        let mut inner = self.0.lock();
        inner.note(&format!("{token} hears {text}"));
        *inner.counts.entry("updates of progress").or_default() += 1;
        let call = inner.calls.entry(token).or_default();
        call.updates += 1;
        let (asks, ended, number) = (call.asks, call.ended, call.updates);
        if !asks {
            inner.violation(format!("{token} heard of progress, and had not asked"));
        }
        if ended {
            inner.violation(format!("{token} heard of progress after its end"));
        }
        if text != update_text(token, number) {
            inner.violation(format!("{token} heard `{text}` as update {number}"));
        }
    }

    /// A call has until `deadline` to end.
    pub(crate) fn extends(&self, token: Token, deadline: Instant) {
        self.0.lock().calls.entry(token).or_default().deadline = Some(deadline);
    }

    /// A caller gives a call up.
    pub(crate) fn gives_up(&self, token: Token) {
        let mut inner = self.0.lock();
        inner.note(&format!("{token} is given up"));
        let call = inner.calls.entry(token).or_default();
        call.ended = true;
    }

    /// A call ended with a reply that says `text`.
    pub(crate) fn replied(&self, token: Token, text: &str) {
        let mut inner = self.0.lock();
        inner.note(&format!("{token} ends with {} bytes", text.len()));
        inner.ends(token);
        let call = inner.calls.entry(token).or_default();
        call.succeeded = true;
        let (ran, overtaken) = (call.runs.len(), call.overtaken.take());
        let (asks, updates) = (call.asks, call.updates);
        overtaken.into_iter().for_each(|text| inner.violation(text));
        if ran != 1 {
            inner.violation(format!("{token} has a reply and ran {ran} times"));
        }
        if text.split(' ').next() != Some(&token.to_string()) {
            let text: String = text.chars().take(40).collect();
            inner.violation(format!("{token} got the reply of another call: {text}"));
        }
        let told = text.split_once(" told ").and_then(|(_, times)| times.parse().ok());
        if asks && updates != told.unwrap_or(0) {
            inner.violation(format!("{token} heard {updates} updates of {told:?}"));
        }
    }

    /// A call ended with an error.
    pub(crate) fn failed(&self, token: Token, error: &Error) {
        self.faulted(token, error.kind(), error.may_have_run(), &error.to_string());
    }

    /// A call ended with an error of this kind.
    pub(crate) fn faulted(&self, token: Token, kind: ErrorKind, may_have_run: bool, text: &str) {
        let mut inner = self.0.lock();
        inner.note(&format!("{token} ends with {kind:?}, may have run: {may_have_run}: {text}"));
        inner.ends(token);
        let is_expected = match kind {
            ErrorKind::Connect | ErrorKind::ConnectionLost | ErrorKind::Timeout => true,
            ErrorKind::Fault(kind) => matches!(
                kind,
                FaultKind::WorkerLost
                    | FaultKind::Overloaded
                    | FaultKind::UnknownAgent
                    | FaultKind::Unavailable
                    | FaultKind::Cancelled
                    | FaultKind::DeadlineExceeded
                    | FaultKind::AgentFailed
            ),
            _ => false,
        };
        if !is_expected {
            inner.violation(format!("{token} ended with {kind:?}: {text}"));
        }
        inner.calls.entry(token).or_default().cannot_have_run = !may_have_run;
    }

    /// A call had to end well, and either did or did not.
    pub(crate) fn must_have_succeeded(&self, token: Token) {
        let mut inner = self.0.lock();
        if !inner.calls.get(&token).is_some_and(|call| call.succeeded) {
            inner.violation(format!("{token} failed, though nothing was wrong"));
        }
    }

    /// The reply to a call has not come, though its deadline has passed.
    pub(crate) fn overdue(&self, token: Token) {
        let mut inner = self.0.lock();
        inner.calls.entry(token).or_default().ended = true;
        inner.violation(format!("{token} has no reply, though its deadline has passed"));
    }

    /// The connection of a raw caller ended, and with it what was said on it.
    pub(crate) fn lost(&self, token: Token) {
        let mut inner = self.0.lock();
        inner.note(&format!("{token} is lost with its connection"));
        inner.calls.entry(token).or_default().ended = true;
    }

    // Agents.

    /// A process begins to run a call. What this returns is dropped when it ends.
    pub(crate) fn runs(&self, process: u32, agent: &str, token: Token) -> Running {
        let mut inner = self.0.lock();
        inner.note(&format!("{token} runs in process {process} for {agent}"));
        let call = inner.calls.entry(token).or_default();
        call.runs.push(process);
        call.run_ended = None;
        if call.runs.len() > 1 {
            let runs = call.runs.clone();
            inner.violation(format!("{token} runs more than once: in processes {runs:?}"));
        }
        let latest = inner.latest.entry((agent.to_owned(), token.caller)).or_default();
        let (before, there) = std::mem::replace(latest, (token.number, process));
        if before > token.number {
            let text = format!(
                "{agent} ran {token} in process {process} after number {before} in {there}"
            );
            if process == there {
                inner.violation(text);
            } else {
                inner.calls.entry(token).or_default().overtaken = Some(text);
            }
        }
        let running = inner.running.entry(agent.to_owned()).or_default();
        running.push((process, token));
        let elsewhere = running.iter().find(|(other, _)| *other != process).copied();
        // In a storm a process can still run what has ended for its caller.
        if let Some((other, before)) = elsewhere.filter(|_| inner.is_calm) {
            inner.violation(format!(
                "{agent} runs {token} in process {process}, and {before} in {other}"
            ));
        }
        Running { book: self.clone(), process, agent: agent.to_owned(), token }
    }

    /// When the handler of a call ended, if it has begun and ended.
    pub(crate) fn run_ended(&self, token: Token) -> Option<Instant> {
        let inner = self.0.lock();
        inner.calls.get(&token).and_then(|call| call.run_ended)
    }

    // Events.

    /// There is a subscription to `filter`.
    pub(crate) fn subscribed(&self, filter: &'static str) {
        self.0.lock().filters.push(filter);
    }

    /// How many subscriptions there are.
    pub(crate) fn subscriptions(&self) -> usize {
        self.0.lock().filters.len()
    }

    /// How many subscriptions are for `topic`.
    pub(crate) fn listeners(&self, topic: &str) -> usize {
        let inner = self.0.lock();
        inner.filters.iter().filter(|filter| super::callers::matches(filter, topic)).count()
    }

    /// A subscription has the event of this publisher and number.
    pub(crate) fn hears(&self, subscription: u32, publisher: u32, number: u64, topic: &str) {
        let mut inner = self.0.lock();
        inner.note(&format!("subscription {subscription} hears {publisher}-{number} on {topic}"));
        let latest = inner.events.entry((subscription, publisher)).or_default();
        let before = std::mem::replace(latest, number);
        if before >= number {
            inner.violation(format!(
                "subscription {subscription} heard {publisher}-{number} after {publisher}-{before}"
            ));
        }
        *inner.deliveries.entry((publisher, number)).or_default() += 1;
    }

    /// An agent has the event of this publisher and number.
    pub(crate) fn agent_hears(&self, process: u32, agent: &str, publisher: u32, number: u64) {
        let mut inner = self.0.lock();
        inner.note(&format!("{agent} in process {process} hears {publisher}-{number}"));
        let heard = inner.agent_events.entry((publisher, number)).or_default();
        if !heard.insert(agent.to_owned()) {
            inner.violation(format!("{agent} heard {publisher}-{number} twice"));
        }
        let latest = inner.agent_latest.entry((agent.to_owned(), process, publisher)).or_default();
        let before = std::mem::replace(latest, number);
        if before > number {
            inner.violation(format!(
                "{agent} in process {process} heard {publisher}-{number} after {publisher}-{before}"
            ));
        }
    }

    /// How many subscriptions and how many agents had an event.
    pub(crate) fn heard(&self, publisher: u32, number: u64) -> (usize, usize) {
        let inner = self.0.lock();
        let event = (publisher, number);
        let agents = inner.agent_events.get(&event).map_or(0, BTreeSet::len);
        (inner.deliveries.get(&event).copied().unwrap_or(0), agents)
    }

    /// What can only be said at the end.
    pub(crate) fn close(&self) {
        let mut inner = self.0.lock();
        let mut texts = Vec::new();
        for (token, call) in &inner.calls {
            if !call.ended && call.deadline.is_some() {
                texts.push(format!("{token} never ended"));
            }
            if call.cannot_have_run && !call.runs.is_empty() {
                texts.push(format!("{token} ran, though its caller was told that it cannot have"));
            }
        }
        for (agent, running) in &inner.running {
            if !running.is_empty() {
                texts.push(format!("{agent} still runs {running:?}"));
            }
        }
        texts.into_iter().for_each(|text| inner.violation(text));
    }
}

impl Inner {
    fn note(&mut self, line: &str) {
        let millis = self.began.elapsed().as_millis();
        let line = format!("{:>4}.{:03} {line}", millis / 1000, millis % 1000);
        for byte in line.bytes() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        if self.print {
            #[expect(clippy::print_stdout, reason = "whoever asked for the log reads it there")]
            {
                println!("{line}");
            }
        }
    }

    fn violation(&mut self, text: String) {
        self.note(&format!("VIOLATION: {text}"));
        if self.violations.len() < KEPT {
            self.violations.push(text);
        }
    }

    /// When a call with this deadline must have ended. A leap over the deadline makes everyone late.
    fn latest(&self, deadline: Instant) -> Instant {
        let leaps = self.leaps.iter().filter(|(from, to)| *from <= deadline && deadline <= *to);
        leaps.map(|(_, to)| *to).max().unwrap_or(deadline) + SLACK
    }

    fn ends(&mut self, token: Token) {
        let now = Instant::now();
        let call = self.calls.entry(token).or_default();
        let (was_ended, deadline) = (std::mem::replace(&mut call.ended, true), call.deadline);
        if was_ended {
            self.violation(format!("{token} ended twice"));
        }
        if let Some(deadline) = deadline
            && now > self.latest(deadline)
        {
            let late = now - deadline;
            self.violation(format!("{token} ended {late:?} after its deadline"));
        }
    }
}

/// A call while its handler runs.
pub(crate) struct Running {
    book: Book,
    process: u32,
    agent: String,
    token: Token,
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut inner = self.book.0.lock();
        let (process, token) = (self.process, self.token);
        inner.note(&format!("{token} has run in process {process}"));
        if let Some(running) = inner.running.get_mut(&self.agent) {
            running.retain(|it| *it != (process, token));
        }
        inner.calls.entry(token).or_default().run_ended = Some(Instant::now());
    }
}
