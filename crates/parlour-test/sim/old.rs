//! A caller and worker of the dialect of `autogen-http-runtime` 0.1.0. It has no sessions: what was open
//! ends with its socket, and it comes back as another client.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fastrand::Rng;
use futures_util::{SinkExt, StreamExt};
use parlour::{ErrorKind, FaultKind};
use parlour_test::{Network, Pipe};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_websockets::{ClientBuilder, Message, WebSocketStream};

use super::Stage;
use super::agents::{COMMON, FIRST, Work, event, event_text, told_text};
use super::book::{Running, Token};
use super::callers::{Errand, TOPICS};
use super::referee::RAW;
use super::web;

/// What it serves.
pub(crate) const OLD: &str = "old";
/// What its agents hear of.
const HEARD: &str = "news.";
/// The number under which its calls and events are booked.
const CALLER: u32 = 97;
/// From here on its clients are numbered, as processes are.
const PROCESSES: u32 = 800_000;

/// The running client.
pub(crate) struct Old {
    stays: Arc<AtomicBool>,
    stop: oneshot::Sender<()>,
    playing: JoinHandle<()>,
}

impl Old {
    pub(crate) fn start(stage: &Arc<Stage>, rng: Rng) -> Self {
        let (stop, stopped) = oneshot::channel();
        let stays = Arc::new(AtomicBool::new(false));
        let playing = tokio::spawn(play(stage.clone(), stays.clone(), rng, stopped));
        Self { stays, stop, playing }
    }

    /// From now on it leaves no socket.
    pub(crate) fn stay(&self) {
        self.stays.store(true, Ordering::Relaxed);
    }

    /// Lets its calls end, and then it.
    pub(crate) async fn stop(self) {
        let _ = self.stop.send(());
        let _ = self.playing.await;
    }
}

type Socket = WebSocketStream<Pipe>;

async fn play(
    stage: Arc<Stage>,
    stays: Arc<AtomicBool>,
    mut rng: Rng,
    mut stopped: oneshot::Receiver<()>,
) {
    let network = stage.room.network();
    // Sockets that it left and the host may take for alive.
    let mut left = Vec::new();
    for process in PROCESSES.. {
        let Some(socket) = open(&stage, &network, process).await else {
            let is_stopped = tokio::time::timeout(Duration::from_millis(500), &mut stopped).await;
            if is_stopped.is_ok() {
                return;
            }
            continue;
        };
        stage.book.note(format_args!("the old client comes as process {process}"));
        let mut client = Client::new(&stage, process);
        stage.is_old_up.store(true, Ordering::Relaxed);
        let end = client.exchange(socket, &mut rng, &stays, &mut stopped).await;
        stage.is_old_up.store(false, Ordering::Relaxed);
        match end {
            End::Stopped => return,
            End::Lost => stage.book.note("the old client's socket is gone"),
            End::Left(socket) => {
                stage.book.counts("sockets that the dialect left");
                match rng.u8(..3) {
                    0 => network.cut(),
                    1 => drop(socket),
                    _ => left.push(socket),
                }
            }
        }
        client.lost();
        sleep(Duration::from_millis(rng.u64(..2000))).await;
    }
}

/// Registers, as its library does before it opens its socket, and then does that.
async fn open(stage: &Stage, network: &Network, process: u32) -> Option<Socket> {
    let client = format!("client-{process}");
    let by_prefix = json!({"topic_type_prefix": HEARD, "agent_type": OLD});
    let subscription = json!({"id": client, "type_prefix_subscription": by_prefix});
    for (method, params) in [
        ("runtime.register_agent", json!({"type": OLD})),
        ("runtime.add_subscription", subscription),
    ] {
        let request = web::rpc(&client, method, "1", &params);
        let answer = web::send(&stage.room, network, request).await.ok()?.text().await.ok()?;
        let answer: Value = serde_json::from_str(&answer).unwrap_or_default();
        // The host can take the client that it was for alive.
        if answer["result"]["ok"] != true {
            return None;
        }
    }
    let pipe = stage.room.dial(network).await.ok()?;
    let url = format!("ws://localhost/open_channel?client_id={client}");
    let (socket, _) = ClientBuilder::new().uri(&url).ok()?.connect_on(pipe).await.ok()?;
    Some(socket)
}

/// How the service of a socket ended.
enum End {
    Stopped,
    /// The host ended it, or it broke.
    Lost,
    /// The client left it without a word.
    Left(Box<Socket>),
}

/// A client, as long as its socket is there.
struct Client {
    stage: Arc<Stage>,
    process: u32,
    /// Its calls that have not ended, by its names for them, and when they must have.
    open: BTreeMap<String, (Errand, Instant)>,
    /// Calls that it runs, by the host's names for them.
    runs: BTreeMap<String, Run>,
}

/// A call that runs.
struct Run {
    _running: Running,
    /// When it is answered, if it is.
    due: Option<Instant>,
    reply: Result<String, &'static str>,
}

impl Client {
    fn new(stage: &Arc<Stage>, process: u32) -> Self {
        Self { stage: stage.clone(), process, open: BTreeMap::new(), runs: BTreeMap::new() }
    }

    fn violation(&self, text: impl std::fmt::Display) {
        self.stage.book.violation(format!("old client: {text}"));
    }

    async fn exchange(
        &mut self,
        mut socket: Socket,
        rng: &mut Rng,
        stays: &AtomicBool,
        stopped: &mut oneshot::Receiver<()>,
    ) -> End {
        let leaves = Instant::now() + Duration::from_millis(rng.u64(500..30_000));
        let mut acts = Instant::now();
        let mut stops = false;
        loop {
            if stops && self.open.is_empty() {
                let _ = socket.close().await;
                return End::Stopped;
            }
            let overdue = self.open.values().map(|(_, at)| self.stage.book.latest(*at)).min();
            let answers = self.runs.values().filter_map(|run| run.due).min();
            let due = [overdue, answers].into_iter().flatten().fold(acts, Instant::min);
            let mut out = Vec::new();
            tokio::select! {
                biased;
                message = socket.next() => {
                    let Some(Ok(message)) = message else { return End::Lost };
                    if let Some(text) = message.as_text() {
                        self.take(&serde_json::from_str(text).unwrap_or_default());
                    }
                }
                _ = &mut *stopped, if !stops => stops = true,
                () = sleep_until(due) => {
                    let now = Instant::now();
                    self.miss(now);
                    self.answer(now, &mut out);
                    if acts <= now {
                        if leaves <= now && !stops && !stays.load(Ordering::Relaxed) {
                            return End::Left(Box::new(socket));
                        }
                        acts = now + Duration::from_millis(rng.u64(1..3000));
                        if !stops {
                            (0..rng.usize(1..3)).for_each(|_| self.act(rng, &mut out));
                        }
                    }
                }
            }
            for value in out {
                if socket.send(Message::text(value.to_string())).await.is_err() {
                    return End::Lost;
                }
            }
        }
    }

    /// The socket is gone, and with it what was open.
    fn lost(&mut self) {
        self.open.values().for_each(|(errand, _)| self.stage.book.lost(errand.token));
        self.open.clear();
        self.runs.clear();
    }

    /// Takes a message.
    fn take(&mut self, message: &Value) {
        let text = message["data"].as_str().unwrap_or_default();
        let id = message["request_id"].as_str().unwrap_or_default();
        match message["type"].as_str().unwrap_or_default() {
            "request" => self.run(id, &message["target"], text),
            "response" => {
                let Some((errand, _)) = self.open.remove(id) else {
                    return self.violation(format!("a reply came to call {id}, which is not open"));
                };
                match message["error"].as_str() {
                    None | Some("") => errand.replied(&self.stage.book, text),
                    // It has no words for more than that it failed.
                    Some(error) => {
                        let kind = ErrorKind::Fault(FaultKind::AgentFailed);
                        self.stage.book.faulted(errand.token, kind, true, error);
                    }
                }
            }
            "cloud_event" => {
                let topic = &message["topic"];
                if !topic["type"].as_str().is_some_and(|name| name.starts_with(HEARD)) {
                    self.violation(format!("it got the event {message}"));
                }
                let agent = format!("{OLD}/{}", topic["source"].as_str().unwrap_or_default());
                match event(text) {
                    Some((publisher, number)) => {
                        self.stage.book.agent_hears(self.process, &agent, publisher, number);
                    }
                    None => self.violation("an event came that nobody sent"),
                }
            }
            other => self.violation(format!("a message of type `{other}` came")),
        }
    }

    /// Books the calls whose reply should have come.
    fn miss(&mut self, now: Instant) {
        let book = &self.stage.book;
        self.open.retain(|_, (errand, at)| {
            let is_late = book.latest(*at) <= now;
            if is_late {
                book.overdue(errand.token);
            }
            !is_late
        });
    }

    /// A call, or an event.
    fn act(&mut self, rng: &mut Rng, out: &mut Vec<Value>) {
        let number = self.stage.book.next_number();
        if rng.u8(..5) == 0 {
            let (topic, source) = (TOPICS[rng.usize(..TOPICS.len())], rng.u8(..3).to_string());
            self.stage.book.note(format_args!("{CALLER}-{number} is published on {topic}"));
            out.push(json!({
                "type": "cloud_event",
                "topic": {"type": topic, "source": source},
                "id": format!("{CALLER}-{number}"),
                "data_type": "Text",
                "data_content_type": "text/plain",
                "data": event_text(CALLER, number),
            }));
            return;
        }
        let (token, work) = (Token { caller: CALLER, number }, Work::draw(rng));
        let target = match rng.u8(..8) {
            0 => format!("{FIRST}/{}", rng.u8(..2)),
            1 => format!("{RAW}/{}", rng.u8(..4)),
            2 => format!("{OLD}/{}", rng.u8(..4)),
            _ => format!("{COMMON}/{}", rng.u8(..4)),
        };
        let limit = self.stage.default_timeout;
        // It cannot ask for progress.
        let errand = Errand { asks: false, ..Errand::new(token, target, work, limit) };
        errand.begin(&self.stage.book, " in the dialect");
        out.push(json!({
            "type": "request",
            "request_id": token.to_string(),
            "target": web::agent(&errand.target),
            "source": null,
            "data_type": "Text",
            "data_content_type": "text/plain",
            "data": work.message(token),
        }));
        self.open.insert(token.to_string(), (errand, Instant::now() + limit));
    }

    /// Begins what it is asked.
    fn run(&mut self, id: &str, target: &Value, text: &str) {
        let Some((token, work)) = Work::parse(text) else {
            return self.violation("it got a message that nobody sent");
        };
        let agent = format!("{OLD}/{}", target["key"].as_str().unwrap_or_default());
        let _running = self.stage.book.runs(self.process, &agent, token);
        let (now, text) = (Instant::now(), token.to_string());
        let (due, reply) = match work {
            Work::Echo | Work::Ask => (Some(now), Ok(text)),
            Work::Sleep(millis) => (Some(now + Duration::from_millis(millis)), Ok(text)),
            Work::Grow(bytes) => (Some(now), Ok(format!("{text} {}", "x".repeat(bytes)))),
            // It has no words for progress.
            Work::Tell(_) => (Some(now), Ok(told_text(token, 0))),
            Work::Fail => (Some(now), Err("as asked")),
            Work::Hang => (None, Ok(text)),
        };
        if self.runs.insert(id.to_owned(), Run { _running, due, reply }).is_some() {
            self.violation(format!("a second request {id} came"));
        }
    }

    /// Answers what it has run.
    fn answer(&mut self, now: Instant, out: &mut Vec<Value>) {
        let done = self.runs.extract_if(.., |_, run| run.due.is_some_and(|due| due <= now));
        for (id, run) in done {
            let (error, data) = match run.reply {
                Ok(data) => ("", data),
                Err(error) => (error, String::new()),
            };
            out.push(json!({
                "type": "response",
                "request_id": id,
                "error": error,
                "data_type": "Text",
                "data_content_type": "text/plain",
                "data": data,
            }));
        }
    }
}
