//! A whole host in memory, on a paused clock, and clients that speak to it byte by byte.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use parlour_core::wire::{self, CallFrame, Frame, HeaderFields, Hello, Register, Welcome};
use parlour_core::{AgentId, AgentType, CallId, Payload, Registration};
use parlour_host::backbone::Backbone;
use parlour_host::{Config, Host, Io, Listener};
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_websockets::{ClientBuilder, Message, WebSocketStream};

/// A host that is reached through [`Room::connect`] alone.
pub(crate) struct Room {
    connections: mpsc::UnboundedSender<io::Result<Box<dyn Io>>>,
    host: JoinHandle<io::Result<()>>,
}

struct InMemory(mpsc::UnboundedReceiver<io::Result<Box<dyn Io>>>);

impl Listener for InMemory {
    async fn accept(&mut self) -> io::Result<Box<dyn Io>> {
        match self.0.recv().await {
            Some(accepted) => accepted,
            None => std::future::pending().await,
        }
    }
}

/// A stream whose reader finds a reset behind the last byte.
struct Brittle(DuplexStream);

impl AsyncRead for Brittle {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.0).poll_read(cx, buf))?;
        let is_over = buf.filled().len() == before;
        Poll::Ready(if is_over { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) })
    }
}

impl AsyncWrite for Brittle {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

fn config(settings: &[(&str, &str)]) -> Config {
    let mut config = Config::default();
    for (key, value) in settings {
        config.set(key, value).unwrap();
    }
    config
}

impl Room {
    /// A host with these settings changed.
    pub(crate) fn open(settings: &[(&str, &str)]) -> Self {
        Self::open_until(settings, std::future::pending())
    }

    /// The same, which shuts down when `shutdown` completes.
    pub(crate) fn open_until(
        settings: &[(&str, &str)],
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        Self::serve(Host::new(config(settings)), shutdown)
    }

    /// A host with these settings changed, whose durable messages are kept by `backbone`.
    pub(crate) fn keep(settings: &[(&str, &str)], backbone: Arc<dyn Backbone>) -> Self {
        Self::serve(Host::new(config(settings)).keep(backbone), std::future::pending())
    }

    fn serve(host: Host, shutdown: impl Future<Output = ()> + Send + 'static) -> Self {
        let (connections, incoming) = mpsc::unbounded_channel();
        let host = tokio::spawn(host.serve(InMemory(incoming), shutdown));
        Self { connections, host }
    }

    /// Waits until the host has shut down.
    pub(crate) async fn has_ended(self) {
        self.host.await.unwrap().unwrap();
    }

    /// A connection with room for 64 KiB each way.
    pub(crate) fn connect(&self) -> DuplexStream {
        let (client, host) = duplex(64 * 1024);
        self.connections.send(Ok(Box::new(host))).unwrap();
        client
    }

    /// The same, but where one that closes ends in order, this one is reset.
    fn connect_brittle(&self) -> DuplexStream {
        let (client, host) = duplex(64 * 1024);
        self.connections.send(Ok(Box::new(Brittle(host)))).unwrap();
        client
    }

    /// The next connection fails in this way before the host has taken it.
    pub(crate) fn fail_to_connect(&self, error: io::ErrorKind) {
        self.connections.send(Err(error.into())).unwrap();
    }

    /// What the host counts under this name.
    pub(crate) async fn metric(&self, name: &str) -> u64 {
        let request = "GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
        let answer = self.request(request).await;
        let line = answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {answer}")).parse().unwrap()
    }

    /// The whole answer to one request.
    pub(crate) async fn request(&self, request: &str) -> String {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let _ = timeout(Duration::from_secs(3600), stream.read_to_string(&mut answer)).await;
        answer
    }

    /// `POST` of `body` with more header lines.
    pub(crate) async fn post(&self, path: &str, headers: &str, body: &str) -> String {
        self.send("POST", path, headers, body).await
    }

    /// The same with another method.
    pub(crate) async fn send(&self, method: &str, path: &str, headers: &str, body: &str) -> String {
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
             content-length: {length}\r\n{headers}\r\n{body}"
        );
        self.request(&request).await
    }

    /// A channel of `parlour.v1` that has been greeted.
    pub(crate) async fn channel(&self) -> Channel {
        let hello = Hello { name: "test".into(), versions: vec![1], ..Hello::default() };
        self.greeted(hello).await.0
    }

    /// A channel that begins with `hello`, and how the host answers.
    pub(crate) async fn greeted(&self, hello: Hello) -> (Channel, Welcome) {
        let mut channel = self.begun(hello).await;
        match channel.next().await {
            Some(Frame::Welcome(welcome)) => (channel, *welcome),
            other => panic!("not greeted: {other:?}"),
        }
    }

    /// A channel that begins with `hello`.
    pub(crate) async fn begun(&self, hello: Hello) -> Channel {
        self.begun_on(self.connect(), hello).await
    }

    /// A channel that is reset when it is dropped: what it wrote before arrives.
    pub(crate) async fn begun_brittle(&self, hello: Hello) -> Channel {
        self.begun_on(self.connect_brittle(), hello).await
    }

    async fn begun_on(&self, stream: DuplexStream, hello: Hello) -> Channel {
        let builder = ClientBuilder::new().uri("ws://localhost/open_channel").unwrap();
        let builder = builder
            .add_header("sec-websocket-protocol".parse().unwrap(), "parlour.v1".parse().unwrap())
            .unwrap();
        let (socket, _) = builder.connect_on(stream).await.unwrap();
        let mut channel = Channel { socket, received: Bytes::new() };
        channel.send(Frame::from(hello)).await;
        channel
    }

    /// The channel of a 0.1.0 client, which has registered before.
    pub(crate) async fn dialect(&self, client: &str) -> WebSocketStream<DuplexStream> {
        let uri = format!("ws://localhost/open_channel?client_id={client}");
        let builder = ClientBuilder::new().uri(&uri).unwrap();
        builder.connect_on(self.connect()).await.unwrap().0
    }

    /// A channel that serves `agent_type`.
    pub(crate) async fn worker(&self, agent_type: &'static str) -> Channel {
        let mut channel = self.channel().await;
        channel.register(agent_type).await;
        channel
    }
}

/// One side of a `parlour.v1` channel.
pub(crate) struct Channel {
    socket: WebSocketStream<DuplexStream>,
    received: Bytes,
}

impl Channel {
    /// Serves `agent_type` from here on.
    pub(crate) async fn register(&mut self, agent_type: &'static str) {
        let register = Register {
            request: CallId(1),
            agent_type: AgentType::parse(agent_type).unwrap(),
            key: None,
            registration: Registration::default(),
        };
        self.send(Frame::Register(register)).await;
        assert!(matches!(self.next().await, Some(Frame::Done(_))));
    }

    /// Sends one frame.
    pub(crate) async fn send(&mut self, frame: Frame) {
        let mut bytes = BytesMut::new();
        wire::encode(&frame, &mut bytes);
        self.send_raw(bytes.freeze()).await;
    }

    /// Sends one message of these bytes.
    pub(crate) async fn send_raw(&mut self, message: Bytes) {
        self.socket.send(Message::binary(message)).await.unwrap();
    }

    /// Calls `agent` with `text`, under the name `id`.
    pub(crate) async fn call(&mut self, id: u64, agent: &str, text: &str, limit: Option<Duration>) {
        let payload = Payload::text(text);
        let frame = CallFrame { timeout: limit, payload, ..call_frame(id, agent) };
        self.send(Frame::from(frame)).await;
    }

    /// Calls `agent`, and asks for its progress or does not.
    pub(crate) async fn call_with_progress(&mut self, id: u64, agent: &str, progress: bool) {
        self.send(Frame::from(CallFrame { progress, ..call_frame(id, agent) })).await;
    }

    /// The next frame but for pings and acknowledgements; none once the channel is closed.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        loop {
            while self.received.is_empty() {
                let message = self.socket.next().await?.ok()?;
                if message.is_close() {
                    return None;
                }
                self.received = Bytes::from(message.into_payload());
            }
            match wire::decode(&mut self.received).unwrap() {
                Some(Frame::Ping(number)) => self.send(Frame::Pong(number)).await,
                Some(Frame::Ack(_)) | None => {}
                Some(frame) => return Some(frame),
            }
        }
    }

    /// The next frame, which must be a call.
    pub(crate) async fn next_call(&mut self) -> CallFrame {
        match self.next().await {
            Some(Frame::Call(call)) => *call,
            other => panic!("not a call: {other:?}"),
        }
    }

    /// The next frame, which must be a reply.
    pub(crate) async fn next_reply(&mut self) -> (u64, parlour_core::Reply) {
        match self.next().await {
            Some(Frame::Reply(id, reply)) => (id.0, reply),
            other => panic!("not a reply: {other:?}"),
        }
    }

    /// Says goodbye, as a client does that will not be back.
    pub(crate) async fn say_goodbye(mut self) {
        self.socket.close().await.unwrap();
        while self.next().await.is_some() {}
    }

    /// Reads nothing and answers nothing from here on, but stays open.
    pub(crate) fn fall_silent(self) -> WebSocketStream<DuplexStream> {
        self.socket
    }
}

fn call_frame(id: u64, agent: &str) -> CallFrame {
    CallFrame {
        id: CallId(id),
        target: AgentId::parse(agent).unwrap(),
        timeout: None,
        progress: false,
        resent: false,
        attempt: None,
        topic: None,
        header: HeaderFields::default(),
        payload: Payload::default(),
    }
}

/// How many seconds `stream` stays open, when nobody says anything more.
pub(crate) async fn seconds_open(mut stream: DuplexStream) -> u64 {
    let start = Instant::now();
    let mut sink = Vec::new();
    timeout(Duration::from_secs(3600), stream.read_to_end(&mut sink)).await.unwrap().unwrap_or(0);
    start.elapsed().as_secs()
}
