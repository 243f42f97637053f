//! A caller and worker that speaks the protocol itself, and so sees what a client library would hide:
//! a second reply, one to a call that was never made, one that comes too late, more frames than there
//! is credit for.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use fastrand::Rng;
use futures_util::{SinkExt, StreamExt};
use parlour::{AgentId, AgentType, Error, Payload, PayloadExt};
use parlour_core::wire::{self, CallFrame, Frame, HeaderFields, Hello, Register, Welcome};
use parlour_core::{ByteString, CallId, Credit, Fault, FaultKind, Registration};
use parlour_test::{Network, Pipe};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_websockets::{ClientBuilder, Message, WebSocketStream};

use super::Stage;
use super::agents::{COMMON, Work, told_text, update_text};
use super::book::{Running, Token};
use super::callers::Errand;
use super::old::OLD;

/// What it serves.
pub(crate) const RAW: &str = "raw";
/// The number under which its calls are booked.
const CALLER: u32 = 99;
/// From here on its sessions are numbered, as processes are.
const PROCESSES: u32 = 900_000;
/// How long it may keep back an ACK, and with it whatever it has no credit left for.
const LAZY: Duration = Duration::from_millis(100);

/// The running caller.
pub(crate) struct Referee {
    stop: oneshot::Sender<()>,
    playing: JoinHandle<()>,
}

impl Referee {
    pub(crate) fn start(stage: &Arc<Stage>, rng: Rng) -> Self {
        let (stop, stopped) = oneshot::channel();
        let network = stage.room.network();
        let playing = tokio::spawn(play(stage.clone(), network, rng, stopped));
        Self { stop, playing }
    }

    /// Lets its calls end, and then it.
    pub(crate) async fn stop(self) {
        let _ = self.stop.send(());
        let _ = self.playing.await;
    }
}

type Socket = WebSocketStream<Pipe>;

/// How the service of a socket ended.
enum End {
    /// It was asked to stop, and nothing is open.
    Stopped,
    /// The host ended it, or it broke.
    Lost,
    /// The referee left it without a word.
    Left,
}

async fn play(
    stage: Arc<Stage>,
    network: Network,
    mut rng: Rng,
    mut stopped: oneshot::Receiver<()>,
) {
    let mut stops = false;
    let mut process = PROCESSES;
    let mut session = Session::new(&stage, process, credit(&mut rng));
    // Sockets that it left and the host may take for alive.
    let mut left = Vec::new();
    loop {
        let Some((mut socket, welcome)) = open(&stage, &network, &session).await else {
            tokio::select! {
                biased;
                _ = &mut stopped, if !stops => stops = true,
                () = sleep(Duration::from_millis(200)) => {}
            }
            // It does not come back for a session that only it remembers.
            if stops && session.open.is_empty() {
                return;
            }
            continue;
        };
        if welcome.resumed {
            stage.book.counts("sessions resumed by the referee");
            session.resumed(welcome.received);
        } else {
            if session.name.is_some() {
                stage.book.counts("sessions that the host no longer knew");
            }
            session.lost();
            process += 1;
            session = Session::new(&stage, process, session.offered);
            session.began(welcome);
        }
        match session.exchange(&mut rng, &mut stopped, &mut stops, &mut socket).await {
            End::Stopped => {
                let _ = socket.close().await;
                return;
            }
            End::Lost => stage.book.note("the referee's socket is gone"),
            End::Left => {
                let away = Duration::from_millis(match rng.u8(..8) {
                    0 => rng.u64(..12_000),
                    _ => rng.u64(..1500),
                });
                stage.book.note(format_args!("the referee leaves its socket for {away:?}"));
                match rng.u8(..3) {
                    0 => network.cut(),
                    1 => drop(socket),
                    _ => left.push(socket),
                }
                sleep(away).await;
            }
        }
    }
}

fn credit(rng: &mut Rng) -> Credit {
    Credit { messages: rng.u64(4..64), bytes: rng.u64(1000..100_000) }
}

/// A channel, if the host is up, and how the host greets.
async fn open(stage: &Stage, network: &Network, session: &Session) -> Option<(Socket, Welcome)> {
    let pipe = stage.room.dial(network).await.ok()?;
    let protocol = http::HeaderValue::from_static(wire::SUBPROTOCOL);
    let builder = ClientBuilder::new().uri("ws://localhost/open_channel").ok()?;
    let builder = builder.add_header(http::header::SEC_WEBSOCKET_PROTOCOL, protocol).ok()?;
    let (mut socket, _) = builder.connect_on(pipe).await.ok()?;
    let hello = Hello {
        name: "referee".into(),
        versions: vec![1],
        features: vec![wire::RESUME.into()],
        session: session.name.clone(),
        received: session.received,
        credit: session.offered,
    };
    if !send(&mut socket, &Frame::from(hello)).await {
        return None;
    }
    let first = timeout(Duration::from_secs(30), socket.next()).await.ok()??.ok()?;
    let mut bytes = Bytes::from(first.into_payload());
    let Ok(Some(Frame::Welcome(welcome))) = wire::decode(&mut bytes) else {
        // A host that goes away says so instead.
        return None;
    };
    if !bytes.is_empty() {
        stage.book.violation("WELCOME came with other frames in its message".to_owned());
    }
    Some((socket, *welcome))
}

async fn send(socket: &mut Socket, frame: &Frame) -> bool {
    let mut bytes = BytesMut::new();
    wire::encode(frame, &mut bytes);
    socket.send(Message::binary(bytes)).await.is_ok()
}

/// A session, over all its sockets.
struct Session {
    stage: Arc<Stage>,
    process: u32,
    name: Option<ByteString>,
    /// What it offers the host, and what both agreed upon.
    offered: Credit,
    credit: Credit,
    /// Frames of the host: that came, and that the host was told of. Bytes of those it was not.
    received: u64,
    told: u64,
    untold: u64,
    /// Its own frames: that were sent, and of these the ones that the host has not acknowledged.
    sent: u64,
    kept: VecDeque<Frame>,
    /// What waits for credit.
    waiting: VecDeque<Frame>,
    /// Its calls that have not ended, by its names for them, and when they must have.
    open: BTreeMap<u64, (Token, Instant)>,
    names: u64,
    /// Calls that it runs, and when they are answered with what.
    runs: BTreeMap<u64, (Running, Option<Instant>, Payload)>,
}

impl Session {
    fn new(stage: &Arc<Stage>, process: u32, offered: Credit) -> Self {
        Self {
            stage: stage.clone(),
            process,
            name: None,
            offered,
            credit: Credit::default(),
            received: 0,
            told: 0,
            untold: 0,
            sent: 0,
            kept: VecDeque::new(),
            waiting: VecDeque::new(),
            open: BTreeMap::new(),
            names: 0,
            runs: BTreeMap::new(),
        }
    }

    /// The host has begun it.
    fn began(&mut self, welcome: Welcome) {
        self.name = welcome.session;
        self.credit = welcome.credit;
        let Credit { messages, bytes } = self.credit;
        if messages > self.offered.messages || bytes > self.offered.bytes {
            self.violation(format!("{:?} of {:?}", self.credit, self.offered));
        }
        let request = self.name_call();
        self.push(Frame::Register(Register {
            request,
            agent_type: AgentType::parse(RAW).expect("a good name"),
            key: None,
            registration: Registration::default(),
        }));
    }

    /// It goes on over another socket. The host has `received` of its frames, and lacks the others.
    fn resumed(&mut self, received: u64) {
        self.stage.book.note("the referee goes on");
        self.acknowledged(received);
        self.told = self.received;
        self.untold = 0;
        let now = Instant::now();
        for (token, deadline) in self.open.values_mut() {
            // The host could not tell while it was away.
            *deadline = (*deadline).max(now + 2 * LAZY);
            self.stage.book.extends(*token, *deadline);
        }
        let again: Vec<_> = self.kept.drain(..).collect();
        self.sent -= again.len() as u64;
        for mut frame in again.into_iter().rev() {
            if let Frame::Call(call) = &mut frame {
                call.resent = true;
            }
            self.waiting.push_front(frame);
        }
    }

    /// The host has forgotten it.
    fn lost(&mut self) {
        self.open.values().for_each(|&(token, _)| self.stage.book.lost(token));
        self.open.clear();
    }

    fn name_call(&mut self) -> CallId {
        self.names += 1;
        CallId(self.names)
    }

    fn push(&mut self, frame: Frame) {
        self.waiting.push_back(frame);
    }

    fn violation(&self, text: impl Into<String>) {
        self.stage.book.violation(format!("referee: {}", text.into()));
    }

    /// The host has `received` frames of this session.
    fn acknowledged(&mut self, received: u64) {
        let before = self.sent - self.kept.len() as u64;
        if received < before || received > self.sent {
            let sent = self.sent;
            self.violation(format!("{received} frames acknowledged of {before} to {sent}"));
            return;
        }
        self.kept.drain(..(received - before) as usize);
    }

    /// Serves one socket.
    async fn exchange(
        &mut self,
        rng: &mut Rng,
        stopped: &mut oneshot::Receiver<()>,
        stops: &mut bool,
        socket: &mut Socket,
    ) -> End {
        let leaves = Instant::now() + Duration::from_millis(rng.u64(500..30_000));
        let (mut calls, mut tells) = (Instant::now(), None);
        loop {
            if *stops && self.open.is_empty() && self.waiting.is_empty() {
                return End::Stopped;
            }
            if !self.write(socket).await {
                return End::Lost;
            }
            let most = self.credit.messages / 2;
            if self.received - self.told >= most || self.untold > self.credit.bytes / 2 {
                tells = Some(Instant::now());
            } else if self.received > self.told {
                tells = tells.or_else(|| Some(Instant::now() + LAZY));
            }
            let overdue = self.open.values().map(|&(_, at)| self.stage.book.latest(at)).min();
            let answers = self.runs.values().filter_map(|(_, at, _)| *at).min();
            let due = [overdue, answers, tells].into_iter().flatten().min();
            let due = due.map_or(calls, |due| due.min(calls));
            tokio::select! {
                biased;
                message = socket.next() => {
                    let Some(Ok(message)) = message else { return End::Lost };
                    if message.is_binary() {
                        self.take(message.into_payload().into(), socket).await;
                    }
                }
                _ = &mut *stopped, if !*stops => *stops = true,
                () = sleep_until(due) => {
                    let now = Instant::now();
                    if tells.is_some_and(|at| at <= now) {
                        tells = None;
                        (self.told, self.untold) = (self.received, 0);
                        if !send(socket, &Frame::Ack(self.received)).await {
                            return End::Lost;
                        }
                    }
                    self.miss(now);
                    self.answer(now);
                    if calls <= now && *stops {
                        calls = now + Duration::from_secs(1);
                    } else if calls <= now {
                        if leaves <= now {
                            // What is on its way when a socket breaks may arrive or not.
                            (0..rng.usize(..3)).for_each(|_| self.call(rng));
                            let is_written = self.write(socket).await;
                            return if is_written { End::Left } else { End::Lost };
                        }
                        calls = now + Duration::from_millis(rng.u64(1..1500));
                        (0..rng.usize(1..4)).for_each(|_| self.call(rng));
                    }
                }
            }
        }
    }

    /// Writes what waits, as far as there is credit. Returns whether the socket is well.
    async fn write(&mut self, socket: &mut Socket) -> bool {
        while (self.kept.len() as u64) < self.credit.messages
            && let Some(mut frame) = self.waiting.pop_front()
        {
            // The host counts from when the frame comes, which may be long after it was pushed.
            if let Frame::Call(call) = &mut frame
                && let Some(&(_, until)) = self.open.get(&call.id.0)
            {
                let left = (until - 2 * LAZY).duration_since(Instant::now());
                call.timeout = Some(left.max(Duration::from_millis(1)));
            }
            self.sent += 1;
            self.kept.push_back(frame.clone());
            if !send(socket, &frame).await {
                return false;
            }
        }
        true
    }

    /// Takes the frames of a message.
    async fn take(&mut self, mut frames: Bytes, socket: &mut Socket) {
        while !frames.is_empty() {
            let mut bytes = match wire::split_frame(&mut frames) {
                Ok(bytes) => bytes,
                Err(error) => return self.violation(format!("unreadable frame: {error}")),
            };
            if wire::is_counted(&bytes) {
                let untold = self.received - self.told;
                if untold >= self.credit.messages
                    // What is sent again is a little longer.
                    || self.untold > self.credit.bytes + 8 * untold
                {
                    let (bytes, credit) = (self.untold, self.credit);
                    self.violation(format!("a frame beyond {untold}, {bytes} bytes: {credit:?}"));
                }
                self.received += 1;
                self.untold += bytes.len() as u64;
            }
            match wire::decode(&mut bytes) {
                Ok(Some(Frame::Reply(id, reply))) => {
                    let Some((token, _)) = self.open.remove(&id.0) else {
                        self.violation(format!("a reply came to call {}, which is not open", id.0));
                        continue;
                    };
                    match reply {
                        Ok(payload) => {
                            self.stage.book.replied(token, payload.to_text().unwrap_or_default());
                        }
                        Err(fault) => self.stage.book.failed(token, &Error::from(fault)),
                    }
                }
                Ok(Some(Frame::Progress(id, payload))) => match self.open.get(&id.0) {
                    Some(&(token, _)) => {
                        let text = payload.to_text().unwrap_or_default();
                        self.stage.book.progresses(token, text);
                    }
                    None => self.violation(format!("progress of call {}, which is not open", id.0)),
                },
                Ok(Some(Frame::Call(call))) => self.run(&call),
                Ok(Some(Frame::Cancel(id))) => drop(self.runs.remove(&id.0)),
                Ok(Some(Frame::Ack(received))) => self.acknowledged(received),
                Ok(Some(Frame::Ping(number))) => {
                    send(socket, &Frame::Pong(number)).await;
                }
                Ok(_) => {}
                Err(error) => self.violation(format!("unreadable frame: {error}")),
            }
        }
    }

    /// Books the calls whose reply should have come.
    fn miss(&mut self, now: Instant) {
        let late = self.open.iter().filter(|(_, (_, at))| self.stage.book.latest(*at) <= now);
        let late: Vec<_> = late.map(|(id, _)| *id).collect();
        for id in late {
            if let Some((token, _)) = self.open.remove(&id) {
                self.stage.book.overdue(token);
            }
        }
    }

    fn call(&mut self, rng: &mut Rng) {
        let token = Token { caller: CALLER, number: self.stage.book.next_number() };
        let (work, limit) = (Work::draw(rng), Duration::from_millis(rng.u64(50..10_000)));
        let target = match rng.u8(..8) {
            0 => format!("{RAW}/{}", rng.u8(..4)),
            1 => format!("{OLD}/{}", rng.u8(..4)),
            _ => format!("{COMMON}/{}", rng.u8(..4)),
        };
        let until = limit + 2 * LAZY;
        let errand =
            Errand { asks: work.draw_asks(rng), ..Errand::new(token, target, work, until) };
        errand.begin(&self.stage.book, "");
        let id = self.name_call();
        self.open.insert(id.0, (token, Instant::now() + until));
        self.push(Frame::from(CallFrame {
            id,
            target: AgentId::parse(&errand.target).expect("a good name"),
            timeout: Some(limit),
            progress: errand.asks,
            resent: false,
            attempt: None,
            topic: None,
            header: HeaderFields::default(),
            payload: Payload::text(work.message(token)),
        }));
    }

    /// Begins what it is asked.
    fn run(&mut self, call: &CallFrame) {
        let Some((token, work)) = call.payload.to_text().ok().and_then(Work::parse) else {
            return self.violation("it got a message that nobody sent");
        };
        let running = self.stage.book.runs(self.process, &call.target.to_string(), token);
        let (now, text) = (Instant::now(), token.to_string());
        let (at, text) = match work {
            Work::Echo | Work::Ask => (Some(now), text),
            Work::Sleep(millis) => (Some(now + Duration::from_millis(millis)), text),
            Work::Grow(bytes) => (Some(now), format!("{text} {}", "x".repeat(bytes))),
            Work::Fail | Work::Hang | Work::Tell(_) => (None, text),
        };
        match work {
            Work::Fail => {
                let fault = Fault::new(FaultKind::AgentFailed, "as asked");
                self.push(Frame::Reply(call.id, Err(fault)));
            }
            Work::Tell(times) => self.tell(call.id, token, times),
            _ => drop(self.runs.insert(call.id.0, (running, at, Payload::text(text)))),
        }
    }

    /// Tells of a call's progress, asked or not, and once more when it has answered.
    fn tell(&mut self, id: CallId, token: Token, times: u64) {
        let update = |number| Frame::Progress(id, Payload::text(update_text(token, number)));
        (1..=times).for_each(|number| self.push(update(number)));
        self.push(Frame::Reply(id, Ok(Payload::text(told_text(token, times)))));
        self.push(update(times + 1));
    }

    /// Answers what it has run.
    fn answer(&mut self, now: Instant) {
        let done = self.runs.iter().filter(|(_, (_, at, _))| at.is_some_and(|at| at <= now));
        let done: Vec<_> = done.map(|(id, _)| *id).collect();
        for id in done {
            if let Some((_, _, payload)) = self.runs.remove(&id) {
                self.push(Frame::Reply(CallId(id), Ok(payload)));
            }
        }
    }
}
