//! What one would write instead of a host: an axum handler that forwards a call to a worker over
//! WebSocket and awaits the reply. It speaks as much of `parlour.v1` as the same callers and the same
//! worker need, on one thread. It has no deadlines, limits, faults or metrics.

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt as _;
use bytes::{Bytes, BytesMut};
use clap::Parser;
use futures_util::{SinkExt as _, StreamExt as _};
use parlour_core::wire::{self, CallFrame, Done, Frame, HeaderFields, Welcome};
use parlour_core::{AgentId, AgentType, ByteString, CallId, Key, Payload, Reply};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};

/// Forwards REST calls to a worker.
#[derive(Debug, Parser)]
struct Args {
    /// Address to listen at; port 0 is a free one
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

/// Who serves what.
type Workers = Arc<Mutex<HashMap<AgentType, mpsc::Sender<Asked>>>>;

/// A call, and where its reply goes.
struct Asked {
    target: AgentId,
    payload: Payload,
    reply: oneshot::Sender<Reply>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> io::Result<()> {
    let args = Args::parse();
    let router = Router::new()
        .route("/v1/agents/{agent_type}/{key}/call", post(call))
        .route("/open_channel", get(open))
        .with_state(Workers::default());
    let listener = TcpListener::bind(args.listen).await?;
    writeln!(io::stderr(), "listening on http://{}", listener.local_addr()?)?;
    let listener = listener.tap_io(|stream| {
        // Without it small answers wait; the socket works all the same.
        let _ = stream.set_nodelay(true);
    });
    axum::serve(listener, router).await
}

async fn call(
    State(workers): State<Workers>,
    Path((agent_type, key)): Path<(String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, StatusCode> {
    let agent_type = AgentType::parse(agent_type).map_err(|_| StatusCode::BAD_REQUEST)?;
    let key = Key::parse(key).map_err(|_| StatusCode::BAD_REQUEST)?;
    let worker = lock(&workers).get(&agent_type).cloned().ok_or(StatusCode::NOT_FOUND)?;
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let payload = Payload {
        content_type: content_type.unwrap_or_default().into(),
        bytes: body,
        ..Payload::default()
    };
    let (reply, answer) = oneshot::channel();
    let asked = Asked { target: AgentId::new(agent_type, key), payload, reply };
    worker.send(asked).await.map_err(|_| StatusCode::BAD_GATEWAY)?;
    match answer.await {
        Ok(Ok(payload)) => {
            Ok(([(CONTENT_TYPE, payload.content_type.to_string())], payload.bytes).into_response())
        }
        _ => Err(StatusCode::BAD_GATEWAY),
    }
}

async fn open(State(workers): State<Workers>, upgrade: WebSocketUpgrade) -> Response {
    // The default of 128 KiB costs each connection as much, and time besides.
    let upgrade = upgrade.protocols([wire::SUBPROTOCOL]).read_buffer_size(4096);
    upgrade.on_upgrade(async move |socket| {
        // A worker that breaks the protocol, or goes, ends its own connection.
        let _ = serve(socket, workers).await;
    })
}

/// Hands calls to a worker, and its replies to those who wait.
async fn serve(socket: WebSocket, workers: Workers) -> Option<()> {
    let (mut output, mut input) = socket.split();
    let (calls, mut asked) = mpsc::channel(1024);
    let mut waiting: HashMap<CallId, oneshot::Sender<Reply>> = HashMap::new();
    let mut last_id = 0;
    let mut batch = Vec::new();
    loop {
        tokio::select! {
            message = input.next() => {
                let Message::Binary(mut message) = message?.ok()? else { continue };
                while !message.is_empty() {
                    let answer = match wire::decode(&mut message).ok()? {
                        Some(Frame::Reply(id, reply)) => {
                            if let Some(waiter) = waiting.remove(&id) {
                                // Its caller may have gone.
                                let _ = waiter.send(reply);
                            }
                            continue;
                        }
                        Some(Frame::Hello(_)) => Frame::from(welcome()),
                        Some(Frame::Register(register)) => {
                            lock(&workers).insert(register.agent_type, calls.clone());
                            let request = register.request;
                            Frame::Done(Done { request, recipients: 0, dropped: Vec::new() })
                        }
                        _ => continue,
                    };
                    output.send(message_of(&[answer])).await.ok()?;
                }
            }
            _ = asked.recv_many(&mut batch, 1024) => {
                let frames: Vec<Frame> = batch
                    .drain(..)
                    .map(|Asked { target, payload, reply }| {
                        last_id += 1;
                        let id = CallId(last_id);
                        waiting.insert(id, reply);
                        let header = HeaderFields::default();
                        Frame::from(CallFrame {
                            id,
                            target,
                            timeout: None,
                            progress: false,
                            resent: false,
                            attempt: None,
                            topic: None,
                            header,
                            payload,
                        })
                    })
                    .collect();
                output.send(message_of(&frames)).await.ok()?;
            }
        }
    }
}

fn welcome() -> Welcome {
    Welcome {
        version: 1,
        name: ByteString::from_static("axum"),
        max_payload: 1 << 20,
        heartbeat: Duration::from_secs(15),
        ..Welcome::default()
    }
}

/// All frames in one message, and so in one write.
fn message_of(frames: &[Frame]) -> Message {
    let mut bytes = BytesMut::new();
    frames.iter().for_each(|frame| wire::encode(frame, &mut bytes));
    Message::Binary(bytes.freeze())
}

fn lock(workers: &Workers) -> std::sync::MutexGuard<'_, HashMap<AgentType, mpsc::Sender<Asked>>> {
    workers.lock().unwrap_or_else(PoisonError::into_inner)
}
