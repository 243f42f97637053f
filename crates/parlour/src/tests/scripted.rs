use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use http::{HeaderValue, header};
use parlour_core::wire::{self, CallFrame, Done, EventFrame, Frame, HeaderFields, Hello, Welcome};
use parlour_core::{AgentId, CallId, MessageId, Payload};
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio_websockets::{CloseCode, Message, ServerBuilder, WebSocketStream};

use crate::transport::Connect;

pub(super) const URL: &str = "http://room.test";
pub(super) const HEARTBEAT: Duration = Duration::from_secs(15);
pub(super) const MAX_PAYLOAD: u64 = 100_000;

/// Connects to whatever waits at the other end of the channel.
pub(super) struct Dialer(mpsc::UnboundedSender<DuplexStream>);

/// Where connections of the code under test arrive.
pub(super) struct Host(mpsc::UnboundedReceiver<DuplexStream>);

pub(super) fn host() -> (Dialer, Host) {
    let (dialer, host) = mpsc::unbounded_channel();
    (Dialer(dialer), Host(host))
}

impl Connect for Dialer {
    type Io = DuplexStream;

    async fn connect(&self, _host: &str, _port: u16) -> io::Result<DuplexStream> {
        let (near, far) = tokio::io::duplex(1024 * 1024);
        self.0.send(far).map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
        Ok(near)
    }
}

impl Host {
    /// Takes the next connection as a stream of bytes.
    pub(super) async fn accept_raw(&mut self) -> DuplexStream {
        self.0.recv().await.expect("the dialer lives")
    }

    /// Takes the next connection up to its hello. Passes over those that were given up meanwhile.
    pub(super) async fn accept_hello(&mut self) -> (Peer, Hello, http::Request<()>) {
        loop {
            let stream = self.accept_raw().await;
            let protocol = HeaderValue::from_static(wire::SUBPROTOCOL);
            let server = ServerBuilder::new().add_header(header::SEC_WEBSOCKET_PROTOCOL, protocol);
            let Ok((request, socket)) = server.unwrap().accept(stream).await else { continue };
            let mut peer = Peer { socket, frames: VecDeque::new() };
            match peer.message().await {
                Ok(frames) => match &frames[..] {
                    [Frame::Hello(hello)] => return (peer, Hello::clone(hello), request),
                    other => panic!("not a hello: {other:?}"),
                },
                Err(_) => continue,
            }
        }
    }

    /// Takes the next connection, and welcomes it.
    pub(super) async fn accept(&mut self) -> Peer {
        let (mut peer, ..) = self.accept_hello().await;
        peer.send(&[welcome()]).await;
        peer
    }
}

pub(super) fn welcome() -> Frame {
    Frame::from(Welcome {
        version: 1,
        name: "scripted".into(),
        max_payload: MAX_PAYLOAD,
        heartbeat: HEARTBEAT,
        ..Welcome::default()
    })
}

/// One connection of the code under test.
pub(super) struct Peer {
    socket: WebSocketStream<DuplexStream>,
    frames: VecDeque<Frame>,
}

impl Peer {
    /// Sends frames in one message.
    pub(super) async fn send(&mut self, frames: &[Frame]) {
        let mut message = BytesMut::new();
        frames.iter().for_each(|frame| wire::encode(frame, &mut message));
        self.socket.send(Message::binary(message)).await.unwrap();
    }

    /// Closes the connection in an orderly way.
    pub(super) async fn say_goodbye(mut self) {
        self.socket.close().await.unwrap();
        while let Some(Ok(_)) = self.socket.next().await {}
    }

    /// Waits for the next frame.
    pub(super) async fn next(&mut self) -> Frame {
        while self.frames.is_empty() {
            let frames = self.message().await.expect("another message");
            self.frames.extend(frames);
        }
        self.frames.pop_front().unwrap()
    }

    /// Waits for the next message: its frames, or the code it closes with.
    pub(super) async fn message(&mut self) -> Result<Vec<Frame>, Option<CloseCode>> {
        let Some(Ok(message)) = self.socket.next().await else { return Err(None) };
        if let Some((code, _)) = message.as_close() {
            // Polling on is what answers the goodbye.
            while let Some(Ok(_)) = self.socket.next().await {}
            return Err(Some(code));
        }
        let mut bytes = Bytes::from(message.into_payload());
        let mut frames = Vec::new();
        while !bytes.is_empty() {
            frames.extend(wire::decode(&mut bytes).unwrap());
        }
        Ok(frames)
    }

    pub(super) async fn next_call(&mut self) -> CallFrame {
        match self.next().await {
            Frame::Call(call) => *call,
            other => panic!("not a call: {other:?}"),
        }
    }

    /// Waits for the next frame, which is a request, and confirms it.
    pub(super) async fn confirm(&mut self) -> Frame {
        let frame = self.next().await;
        let request = match &frame {
            Frame::Register(register) => register.request,
            Frame::Subscribe(subscribe) => subscribe.request,
            Frame::Publish(publish) => publish.request.unwrap(),
            other => panic!("not a request: {other:?}"),
        };
        self.send(&[Frame::Done(Done { request, recipients: 0, dropped: Vec::new() })]).await;
        frame
    }

    /// Calls `agent` under `id`, which names the message `m{id}` of the conversation `c`.
    pub(super) async fn call(&mut self, id: u64, agent: &str, text: &str) {
        self.send(&[call(id, agent, text)]).await;
    }

    /// Waits for the reply to the call of this number.
    pub(super) async fn reply(&mut self, id: u64) -> parlour_core::Reply {
        match self.next().await {
            Frame::Reply(CallId(at), reply) if at == id => reply,
            other => panic!("not the reply to {id}: {other:?}"),
        }
    }
}

pub(super) fn call(id: u64, agent: &str, text: &str) -> Frame {
    Frame::from(CallFrame {
        id: CallId(id),
        target: AgentId::parse(agent).unwrap(),
        timeout: Some(Duration::from_secs(10)),
        progress: false,
        resent: false,
        attempt: None,
        topic: None,
        header: header_fields(id),
        payload: Payload::text(text),
    })
}

pub(super) fn event(agents: &[&str], subscriptions: &[u64], text: &str) -> Frame {
    use parlour_core::{AgentType, Key, TopicId, TopicType};
    Frame::from(EventFrame {
        agents: agents.iter().map(|&name| AgentType::parse(name).unwrap()).collect(),
        subscriptions: subscriptions.to_vec(),
        topic: TopicId::new(TopicType::parse("news.tech").unwrap(), Key::parse("paper").unwrap()),
        header: header_fields(7),
        payload: Payload::text(text),
    })
}

fn header_fields(id: u64) -> HeaderFields {
    HeaderFields {
        id: Some(MessageId::parse(format!("m{id}")).unwrap()),
        conversation: Some(MessageId::parse("c").unwrap()),
        hops: 3,
        traceparent: Some("00-trace".into()),
        ..HeaderFields::default()
    }
}
