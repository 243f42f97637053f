//! Callers without a session: calls and events over REST and JSON-RPC, each on a connection of its own,
//! and a listener to server-sent events. Their network is without faults; the host's are enough to
//! lose what they asked for.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fastrand::Rng;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use parlour::{ErrorKind, FaultKind};
use parlour_test::{Network, Room};
use serde_json::{Value, json};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::Stage;
use super::agents::{COMMON, FIRST, Work, event, event_text};
use super::book::{Book, Token};
use super::callers::{Errand, FILTERS, TOPICS, matches};
use super::old::OLD;
use super::referee::RAW;

/// From here on the callers are numbered: one for each call, as connections have no order among them.
const CALLERS: u32 = 200_000;
/// The number under which events over REST are booked.
const PUBLISHER: u32 = 98;
/// The number of the listener's subscription.
const SUBSCRIPTION: u32 = 1000;

/// Which door a call goes through.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Door {
    Rest,
    /// It has no way to state a deadline, nor to hear of progress.
    Rpc,
}

impl Door {
    fn draw(rng: &mut Rng) -> Self {
        if rng.u8(..3) == 0 { Self::Rpc } else { Self::Rest }
    }
}

/// An answer, as far as it has come. Dropped before its end, it ends the connection.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    body: Incoming,
    _connection: JoinSet<()>,
}

/// Why there is no answer.
pub(crate) enum Unanswered {
    /// No connection was made.
    Refused,
    /// It ended.
    Lost,
}

/// Sends a request on a new connection, and returns once the head of its answer has come.
pub(crate) async fn send(
    room: &Room,
    network: &Network,
    request: Request<Full<Bytes>>,
) -> Result<Answer, Unanswered> {
    let pipe = room.dial(network).await.map_err(|_| Unanswered::Refused)?;
    let lost = |_| Unanswered::Lost;
    let (mut sender, connection) = http1::handshake(TokioIo::new(pipe)).await.map_err(lost)?;
    let mut task = JoinSet::new();
    task.spawn(async move {
        // What it ended by is seen by whoever waits for the answer.
        let _ = connection.await;
    });
    let (parts, body) =
        sender.send_request(request).await.map(Response::into_parts).map_err(lost)?;
    Ok(Answer { status: parts.status, body, _connection: task })
}

impl Answer {
    /// The whole body as text.
    pub(crate) async fn text(self) -> Result<String, Unanswered> {
        let Self { body, _connection, .. } = self;
        let body = body.collect().await.map_err(|_| Unanswered::Lost)?;
        Ok(String::from_utf8_lossy(&body.to_bytes()).into_owned())
    }

    /// The whole body as JSON.
    async fn json(self) -> Result<Value, Unanswered> {
        Ok(serde_json::from_str(&self.text().await?).unwrap_or_default())
    }
}

/// The fields of server-sent events, one after the other.
struct Events {
    answer: Answer,
    rest: String,
}

impl Events {
    fn new(answer: Answer) -> Self {
        Self { answer, rest: String::new() }
    }

    /// The name of the next event, and its data; none once the stream has ended, or its connection.
    async fn next(&mut self) -> Option<(String, Value)> {
        loop {
            while let Some((block, rest)) = self.rest.split_once("\n\n") {
                let fields = block.lines().filter_map(|line| line.split_once(": "));
                let fields: BTreeMap<_, _> =
                    fields.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
                self.rest = rest.to_owned();
                if let Some(data) = fields.get("data") {
                    let name = fields.get("event").cloned().unwrap_or_default();
                    return Some((name, serde_json::from_str(data).unwrap_or_default()));
                }
            }
            let frame = self.answer.body.frame().await?.ok()?;
            if let Some(data) = frame.data_ref() {
                self.rest.push_str(&String::from_utf8_lossy(data));
            }
        }
    }
}

fn post(path: &str) -> http::request::Builder {
    Request::post(path).header("host", "localhost")
}

/// A request of JSON-RPC by the client of this id.
pub(crate) fn rpc(client: &str, method: &str, id: &str, params: &Value) -> Request<Full<Bytes>> {
    let body = json!({"jsonrpc": "2.0", "method": method, "id": id, "params": params});
    let request = post("/rpc").header("content-type", "application/json");
    let request = request.header("x-client-id", client);
    request.body(Full::from(body.to_string())).expect("a request")
}

/// An agent as the dialect has it.
pub(crate) fn agent(target: &str) -> Value {
    let (agent_type, key) = target.split_once('/').unwrap_or_default();
    json!({"type": agent_type, "key": key})
}

/// Calls over REST and JSON-RPC, of which each is booked under a caller of its own.
pub(crate) struct Web {
    room: Room,
    book: Book,
    network: Network,
}

impl Web {
    pub(crate) fn new(stage: &Stage) -> Self {
        let (room, book) = (stage.room.clone(), stage.book.clone());
        let network = room.network();
        Self { room, book, network }
    }

    /// The name of a new call.
    pub(crate) fn token(&self) -> Token {
        let number = self.book.next_number();
        Token { caller: CALLERS + number as u32, number }
    }

    /// Makes a call and books how it ends.
    pub(crate) async fn call(&self, door: Door, errand: &Errand) {
        errand.begin(&self.book, if door == Door::Rest { " over REST" } else { " over JSON-RPC" });
        let begun = Instant::now();
        let asked = async {
            match door {
                Door::Rest => self.ask(errand).await,
                Door::Rpc => self.ask_rpc(errand).await,
            }
        };
        let mut asked = pin!(asked);
        let patience = errand.patience.map(|patience| begun + patience);
        let latest = || self.book.latest(begun + errand.limit);
        let ended = loop {
            match timeout_at(patience.unwrap_or_else(latest), &mut asked).await {
                // The clock leapt over it.
                Err(_) if patience.is_none() && Instant::now() < latest() => {}
                ended => break ended,
            }
        };
        let Errand { token, .. } = *errand;
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(Unanswered::Refused)) => {
                self.book.faulted(token, ErrorKind::Connect, false, "no connection");
            }
            Ok(Err(Unanswered::Lost)) => {
                self.book.faulted(token, ErrorKind::ConnectionLost, true, "the connection ended");
            }
            Err(_) if patience.is_some() => self.book.gives_up(token),
            Err(_) => self.book.overdue(token),
        }
    }

    async fn ask(&self, errand: &Errand) -> Result<(), Unanswered> {
        let Errand { token, target, work, asks, limit, .. } = errand;
        let request = post(&format!("/v1/agents/{target}/call"))
            .header("parlour-deadline-ms", limit.as_millis() as u64)
            .header("accept", if *asks { "text/event-stream" } else { "*/*" })
            .body(Full::from(work.message(*token)))
            .expect("a request");
        let answer = send(&self.room, &self.network, request).await?;
        if answer.status != StatusCode::OK {
            let problem = answer.json().await?;
            self.faulted(*token, &problem);
        } else if *asks {
            let mut events = Events::new(answer);
            let mut has_ended = false;
            while let Some((name, data)) = events.next().await {
                let text = data["data"].as_str().unwrap_or_default();
                has_ended |= name != "progress";
                match &*name {
                    "progress" => self.book.progresses(*token, text),
                    "reply" => errand.replied(&self.book, text),
                    "fault" => self.faulted(*token, &data),
                    _ => self.book.violation(format!("{token} got an event {name}")),
                }
            }
            return if has_ended { Ok(()) } else { Err(Unanswered::Lost) };
        } else {
            errand.replied(&self.book, &answer.text().await?);
        }
        Ok(())
    }

    async fn ask_rpc(&self, errand: &Errand) -> Result<(), Unanswered> {
        let Errand { token, target, work, .. } = errand;
        let name = token.to_string();
        let params = json!({
            "target": agent(target),
            "source": null,
            "data_type": "Text",
            "data_content_type": "text/plain",
            "data": work.message(*token),
        });
        let request = rpc("somebody", "agent.call", &name, &params);
        let answer = send(&self.room, &self.network, request).await?.json().await?;
        if answer["id"] != *name {
            self.book.violation(format!("{token} got the answer {answer}"));
        }
        match answer["result"]["data"].as_str() {
            Some(text) => errand.replied(&self.book, text),
            None => self.faulted(*token, &answer["error"]["data"]),
        }
        Ok(())
    }

    /// Books a fault, from its problem details.
    fn faulted(&self, token: Token, problem: &Value) {
        let kind = problem["kind"].as_str().and_then(FaultKind::from_name);
        let kind = kind.map_or(ErrorKind::Protocol, ErrorKind::Fault);
        let may_have_run = problem["may_have_run"].as_bool().unwrap_or(true);
        // Not the rest, such as the name of the conversation: it differs from run to run.
        let detail = problem["detail"].as_str().unwrap_or_default();
        self.book.faulted(token, kind, may_have_run, detail);
    }

    /// Publishes an event, and returns what the host says of it.
    pub(crate) async fn publish(&self, topic: &str, publisher: u32, number: u64) -> Option<Value> {
        self.book.note(format_args!("{publisher}-{number} is published on {topic} over REST"));
        let request = post(&format!("/v1/topics/{topic}"))
            .body(Full::from(event_text(publisher, number)))
            .expect("a request");
        let answer = send(&self.room, &self.network, request).await.ok()?;
        let is_published = answer.status == StatusCode::OK;
        answer.json().await.ok().filter(|_| is_published)
    }
}

/// Calls and events through a storm.
pub(crate) async fn work(stage: Arc<Stage>, mut rng: Rng) {
    let web = Arc::new(Web::new(&stage));
    let mut open = JoinSet::new();
    for _ in 0..rng.usize(5..30) {
        sleep(Duration::from_millis(rng.u64(..1200))).await;
        if rng.u8(..6) == 0 {
            let topic = format!("{}/{}", TOPICS[rng.usize(..TOPICS.len())], rng.u8(..3));
            let number = stage.book.next_number();
            // The next must not overtake it.
            let published = web.publish(&topic, PUBLISHER, number);
            if timeout(Duration::from_secs(60), published).await.is_err() {
                stage.book.violation(format!("{PUBLISHER}-{number} was never published"));
            }
            continue;
        }
        for _ in 0..rng.usize(1..4) {
            let (door, work) = (Door::draw(&mut rng), Work::draw(&mut rng));
            let target = match rng.u8(..8) {
                0 => format!("{FIRST}/{}", rng.u8(..2)),
                1 => format!("{RAW}/{}", rng.u8(..4)),
                2 => format!("{OLD}/{}", rng.u8(..4)),
                _ => format!("{COMMON}/{}", rng.u8(..4)),
            };
            let (limit, asks) = match door {
                Door::Rest => {
                    (Duration::from_millis(rng.u64(50..10_000)), work.draw_asks(&mut rng))
                }
                Door::Rpc => (stage.default_timeout, false),
            };
            let patience = (rng.u8(..8) == 0).then(|| Duration::from_millis(rng.u64(..2000)));
            let errand = Errand { token: web.token(), target, work, asks, limit, patience };
            let web = web.clone();
            open.spawn(async move { web.call(door, &errand).await });
        }
    }
    while open.join_next().await.is_some() {}
}

/// Follows topics over server-sent events until it is stopped.
pub(crate) struct Listener(JoinHandle<()>);

impl Listener {
    pub(crate) fn start(stage: &Stage, rng: &mut Rng) -> Self {
        let filter = FILTERS[rng.usize(..FILTERS.len())];
        stage.book.subscribed(filter);
        let (room, book) = (stage.room.clone(), stage.book.clone());
        Self(tokio::spawn(async move {
            let network = room.network();
            loop {
                let request = Request::get(format!("/v1/topics/{filter}/events"))
                    .header("host", "localhost")
                    .body(Full::default())
                    .expect("a request");
                if let Ok(answer) = send(&room, &network, request).await {
                    listen(&book, filter, answer).await;
                }
                sleep(Duration::from_millis(200)).await;
            }
        }))
    }

    pub(crate) async fn stop(self) {
        self.0.abort();
        // It ended by being aborted.
        let _ = self.0.await;
    }
}

async fn listen(book: &Book, filter: &str, answer: Answer) {
    book.note(format_args!("the listener follows {filter}: {}", answer.status));
    let mut events = Events::new(answer);
    while let Some((_, data)) = events.next().await {
        let topic = data["topic"]["type"].as_str().unwrap_or_default();
        if !matches(filter, topic) {
            book.violation(format!("the listener to {filter} got one of {topic}"));
        }
        match event(data["data"].as_str().unwrap_or_default()) {
            Some((publisher, at)) => book.hears(SUBSCRIPTION, publisher, at, topic),
            None => book.violation("the listener got an event that nobody sent".to_owned()),
        }
    }
}
