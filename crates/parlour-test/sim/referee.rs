//! A caller that speaks the protocol itself, and so sees what a client library would hide: a second
//! reply, one to a call that was never made, one that comes too late.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use fastrand::Rng;
use futures_util::{SinkExt, StreamExt};
use parlour::{AgentId, Error, Payload, PayloadExt};
use parlour_core::CallId;
use parlour_core::wire::{self, CallFrame, Frame, HeaderFields, Hello};
use parlour_test::{Network, Pipe};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_websockets::{ClientBuilder, Message, WebSocketStream};

use super::Stage;
use super::agents::{COMMON, Work};
use super::book::Token;

/// The number under which its calls are booked.
const CALLER: u32 = 99;

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

async fn play(
    stage: Arc<Stage>,
    network: Network,
    mut rng: Rng,
    mut stopped: oneshot::Receiver<()>,
) {
    loop {
        let Some(mut socket) = open(&stage, &network).await else {
            tokio::select! {
                biased;
                _ = &mut stopped => return,
                () = sleep(Duration::from_millis(200)) => continue,
            }
        };
        let mut open = BTreeMap::new();
        let is_done = exchange(&stage, &mut rng, &mut stopped, &mut socket, &mut open).await;
        open.values().for_each(|&(token, _)| stage.book.lost(token));
        if is_done {
            let _ = socket.close().await;
            return;
        }
        stage.book.note("the referee's connection is gone");
    }
}

/// A channel, if the host is up.
async fn open(stage: &Stage, network: &Network) -> Option<WebSocketStream<Pipe>> {
    let pipe = stage.room.dial(network).await.ok()?;
    let protocol = http::HeaderValue::from_static(wire::SUBPROTOCOL);
    let builder = ClientBuilder::new().uri("ws://localhost/open_channel").ok()?;
    let builder = builder.add_header(http::header::SEC_WEBSOCKET_PROTOCOL, protocol).ok()?;
    let (mut socket, _) = builder.connect_on(pipe).await.ok()?;
    let hello = Hello { name: "referee".into(), versions: vec![1], ..Hello::default() };
    send(&mut socket, &Frame::Hello(hello)).await.then_some(socket)
}

async fn send(socket: &mut WebSocketStream<Pipe>, frame: &Frame) -> bool {
    let mut bytes = BytesMut::new();
    wire::encode(frame, &mut bytes);
    socket.send(Message::binary(bytes)).await.is_ok()
}

/// Calls, until the connection ends or all is said. Returns whether it was asked to stop.
async fn exchange(
    stage: &Stage,
    rng: &mut Rng,
    stopped: &mut oneshot::Receiver<()>,
    socket: &mut WebSocketStream<Pipe>,
    open: &mut BTreeMap<u64, (Token, Instant)>,
) -> bool {
    let (mut stops, mut next) = (false, Instant::now());
    // Its own names for calls, which are the same on every connection and as others use them.
    let mut names = 0;
    loop {
        if stops && open.is_empty() {
            return true;
        }
        let due = open.values().map(|&(_, deadline)| stage.book.latest(deadline)).min();
        let due = due.map_or(next, |due| due.min(next));
        tokio::select! {
            biased;
            message = socket.next() => {
                let Some(Ok(message)) = message else { return false };
                if !message.is_binary() {
                    continue;
                }
                let mut frames = Bytes::from(message.into_payload());
                while !frames.is_empty() {
                    match wire::decode(&mut frames) {
                        Ok(Some(Frame::Reply(id, reply))) => {
                            let Some((token, _)) = open.remove(&id.0) else {
                                let text = format!("a reply came to call {} of the referee", id.0);
                                stage.book.violation(format!("{text}, which has none open"));
                                continue;
                            };
                            match reply {
                                Ok(payload) => {
                                    stage.book.replied(token, payload.to_text().unwrap_or_default());
                                }
                                Err(fault) => stage.book.failed(token, &Error::from(fault)),
                            }
                        }
                        Ok(Some(Frame::Ping(number))) => {
                            send(socket, &Frame::Pong(number)).await;
                        }
                        Ok(_) => {}
                        Err(error) => stage.book.violation(format!("unreadable frame: {error}")),
                    }
                }
            }
            _ = &mut *stopped, if !stops => stops = true,
            () = sleep_until(due) => {
                let now = Instant::now();
                let late = open.iter().filter(|(_, (_, at))| stage.book.latest(*at) <= now);
                let late: Vec<_> = late.map(|(id, _)| *id).collect();
                for id in late {
                    if let Some((token, _)) = open.remove(&id) {
                        stage.book.overdue(token);
                    }
                }
                if next <= now && !stops {
                    next = now + Duration::from_millis(rng.u64(1..1500));
                    for _ in 0..rng.usize(1..4) {
                        names += 1;
                        let token = Token { caller: CALLER, number: stage.book.next_number() };
                        let (work, limit) = (Work::draw(rng), rng.u64(50..10_000));
                        let limit = Duration::from_millis(limit);
                        let target = format!("{COMMON}/{}", rng.u8(..4));
                        stage.book.calls(token, &format!("{target} to {work:?}"), limit);
                        open.insert(names, (token, Instant::now() + limit));
                        let frame = Frame::Call(CallFrame {
                            id: CallId(names),
                            target: AgentId::parse(&target).expect("a good name"),
                            timeout: Some(limit),
                            header: HeaderFields::default(),
                            payload: Payload::text(work.message(token)),
                        });
                        if !send(socket, &frame).await {
                            return false;
                        }
                    }
                } else if next <= now {
                    next = now + Duration::from_secs(1);
                }
            }
        }
    }
}
