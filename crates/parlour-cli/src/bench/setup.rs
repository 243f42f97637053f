//! Opens connections, one step after the other, before anything is measured.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

use bytes::BytesMut;
use http::Uri;
use parlour_core::wire::{self, Frame, Hello, Register, Subscribe};
use parlour_core::{AgentType, CallId, Registration, TopicFilter, TopicType};

use super::http::{header, response};
use super::input::Input;
use super::websocket::{self, BINARY};
use super::{digits, native, nats, web};
use crate::exit::{Code, Failure};

/// No single step takes longer.
const PATIENCE: Duration = Duration::from_secs(20);

/// The host that is loaded.
#[derive(Clone, Debug)]
pub(super) struct Host {
    pub(super) authority: String,
    pub(super) address: SocketAddr,
}

impl Host {
    pub(super) fn parse(url: &str) -> Result<Self, Failure> {
        let wrong = || {
            Failure::new(Code::Usage, format!("`{url}` is not the address of a host"))
                .hint("an address looks like http://127.0.0.1:9000")
        };
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        if !matches!(uri.scheme_str(), Some("http" | "nats")) || !matches!(uri.path(), "" | "/") {
            return Err(wrong());
        }
        let authority = uri.authority().ok_or_else(wrong)?;
        let authority = format!("{}:{}", authority.host(), authority.port_u16().unwrap_or(80));
        let address = authority.to_socket_addrs().ok().and_then(|mut found| found.next());
        Ok(Self { address: address.ok_or_else(wrong)?, authority })
    }

    pub(super) fn connect(&self, buffer: usize) -> Result<Link, Failure> {
        let open = || {
            let stream = TcpStream::connect_timeout(&self.address, PATIENCE)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(stream)
        };
        let stream = open().map_err(|error: io::Error| {
            Failure::new(
                Code::CannotConnect,
                format!("cannot connect to http://{}: {error}", self.authority),
            )
            .hint("start a host with `parlour serve`, or name one with --url or PARLOUR_URL")
        })?;
        Ok(Link { stream, input: Input::new(buffer) })
    }

    /// A connection that speaks `parlour.v1` and has been welcomed.
    pub(super) fn native(&self, name: &str, buffer: usize) -> Result<Link, Failure> {
        let mut link = self.connect(buffer)?;
        link.upgrade(&self.authority, "/open_channel", Some(wire::SUBPROTOCOL))?;
        let hello =
            Hello { name: name.into(), versions: wire::VERSIONS.to_vec(), ..Hello::default() };
        link.ask(&[Frame::from(hello)], |answer| match answer {
            Frame::Welcome(_) => Ok(()),
            other => Err(refused("parlour.v1", &format!("{other:?}"))),
        })?;
        Ok(link)
    }

    /// A connection to a NATS server, with what it subscribes to.
    pub(super) fn nats(&self, subscriptions: &str, buffer: usize) -> Result<Link, Failure> {
        let mut link = self.connect(buffer)?;
        let hello = format!("{}{subscriptions}PING\r\n", nats::CONNECT);
        link.stream.write_all(hello.as_bytes()).map_err(lost)?;
        // What it says of itself, and then that it has taken all of this.
        loop {
            let waiting = link.input.waiting();
            if let Some(end) = waiting.iter().position(|&byte| byte == b'\n') {
                let line = String::from_utf8_lossy(&waiting[..end]).trim_end().to_owned();
                link.input.take(end + 1);
                match &*line {
                    "PONG" => return Ok(link),
                    line if line.starts_with("INFO ") => {}
                    line => return Err(refused("a connection", line)),
                }
            } else {
                link.input.fill(&link.stream).map_err(lost)?;
            }
        }
    }

    /// The number that the metrics of a host have under this name.
    pub(super) fn metric(&self, name: &str) -> Result<u64, Failure> {
        let (_, text) = self.get("/metrics")?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let number = line.and_then(|number| number.trim().parse().ok());
        number.ok_or_else(|| refused(&format!("the metric {name}"), &text))
    }

    /// Asks for a document: its status, and head and body as text.
    pub(super) fn get(&self, path: &str) -> Result<(u16, String), Failure> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", self.authority);
        self.connect(64 << 10)?.exchange(request.as_bytes())
    }

    /// Makes a stream on a NATS server, which keeps what is published to `subjects`.
    pub(super) fn nats_stream(&self, stream: &str, subjects: &str) -> Result<(), Failure> {
        let mut link = self.nats(&nats::caller_subscription(0), 4096)?;
        let request = nats::stream(stream, subjects);
        link.stream.write_all(request.as_bytes()).map_err(lost)?;
        loop {
            let mut pongs = Vec::new();
            let answer = nats::first(&mut link.input, &mut pongs).map_err(lost)?;
            link.stream.write_all(&pongs).map_err(lost)?;
            match answer.as_deref().map(String::from_utf8_lossy) {
                Some(answer) if answer.contains(r#""error":"#) => {
                    return Err(refused("a stream", &answer));
                }
                // Of a server without JetStream comes a status, without a payload.
                Some(answer) if answer.contains(r#""config":"#) => return Ok(()),
                Some(answer) => return Err(refused("a stream", &answer)),
                None => {
                    link.input.fill(&link.stream).map_err(lost)?;
                }
            }
        }
    }

    /// A connection to the blind forwarder, and the slot it was given.
    pub(super) fn raw(&self, buffer: usize) -> Result<(Link, u32), Failure> {
        let mut link = self.connect(buffer)?;
        let answer = link.upgrade(&self.authority, "/", None)?;
        let slot = answer.lines().find_map(|line| header(line.as_bytes(), b"slot"));
        let slot = slot.and_then(digits::read).and_then(|slot| slot.try_into().ok());
        Ok((link, slot.ok_or_else(|| refused("a slot", &answer))?))
    }

    /// A worker's connection in the dialect of `autogen-http-runtime` 0.1.0, registered over
    /// `control` as its clients do: first the type, then the socket.
    pub(super) fn dialect_worker(
        &self,
        control: &mut Link,
        client_id: &str,
        agent_type: &AgentType,
        buffer: usize,
    ) -> Result<Link, Failure> {
        let agent_type = agent_type.as_str();
        let body = format!(
            r#"{{"jsonrpc":"2.0","method":"runtime.register_agent","params":{{"type":"{agent_type}"}},"id":"1"}}"#
        );
        let headers = format!("Content-Type: application/json\r\nx-client-id: {client_id}\r\n");
        let (status, answer) =
            control.exchange(&web::post(&self.authority, "/rpc", &headers, &body))?;
        if status != 200 || !answer.contains(r#""ok":true"#) {
            return Err(refused("a registration", &answer));
        }
        self.dialect(client_id, buffer)
    }

    /// A connection in that dialect.
    pub(super) fn dialect(&self, client_id: &str, buffer: usize) -> Result<Link, Failure> {
        let mut link = self.connect(buffer)?;
        link.upgrade(&self.authority, &format!("/open_channel?client_id={client_id}"), None)?;
        Ok(link)
    }
}

/// A connection that is being set up; its calls block.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) stream: TcpStream,
    /// What came behind the last step, too.
    pub(super) input: Input,
}

impl Link {
    /// Serves these agent types on this connection.
    pub(super) fn register<'a>(
        &mut self,
        agent_types: impl IntoIterator<Item = &'a AgentType>,
    ) -> Result<(), Failure> {
        let frames = agent_types.into_iter().zip(1..).map(|(agent_type, number)| {
            Frame::Register(Register {
                request: CallId(number),
                agent_type: agent_type.clone(),
                key: None,
                registration: Registration::default(),
            })
        });
        self.ask(&frames.collect::<Vec<_>>(), |answer| match answer {
            Frame::Done(_) => Ok(()),
            other => Err(refused("a registration", &format!("{other:?}"))),
        })
    }

    /// Has events of this topic type come on this connection.
    pub(super) fn subscribe(&mut self, topic_type: &TopicType) -> Result<(), Failure> {
        let subscribe = Subscribe {
            request: CallId(1),
            subscription: 1,
            filter: TopicFilter::Exact(topic_type.clone()),
            agent_type: None,
        };
        self.ask(&[Frame::Subscribe(subscribe)], |answer| match answer {
            Frame::Done(_) => Ok(()),
            other => Err(refused("a subscription", &format!("{other:?}"))),
        })
    }

    /// Sends frames of `parlour.v1`, and gives as many answers to `take`.
    fn ask(
        &mut self,
        frames: &[Frame],
        take: impl Fn(Frame) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut bytes = Vec::new();
        let message: Vec<u8> = frames.iter().flat_map(native::message).collect();
        websocket::message(BINARY, &message, &mut bytes);
        self.stream.write_all(&bytes).map_err(lost)?;
        let mut wanted = frames.len();
        // A bound on what is skipped, such as pings.
        for _ in 0..frames.len() + 100 {
            let mut frames = BytesMut::new();
            let mut pongs = Vec::new();
            websocket::messages(&mut self.input, &mut pongs, |message, _| {
                frames.extend_from_slice(message);
                Ok(())
            })
            .map_err(lost)?;
            self.stream.write_all(&pongs).map_err(lost)?;
            let mut frames = frames.freeze();
            while !frames.is_empty() {
                match wire::decode(&mut frames) {
                    Ok(Some(Frame::Ping(_)) | None) => {}
                    Ok(Some(frame)) => {
                        take(frame)?;
                        wanted = wanted.saturating_sub(1);
                    }
                    Err(error) => return Err(refused("parlour.v1", &error.to_string())),
                }
            }
            if wanted == 0 {
                return Ok(());
            }
            self.input.fill(&self.stream).map_err(lost)?;
        }
        Err(refused("parlour.v1", "a hundred messages and no answer"))
    }

    /// Makes it a WebSocket. Returns the head of the answer.
    fn upgrade(
        &mut self,
        authority: &str,
        path: &str,
        subprotocol: Option<&str>,
    ) -> Result<String, Failure> {
        let request = upgrade(authority, path, subprotocol);
        let (status, answer) = self.exchange(request.as_bytes())?;
        let agreed =
            answer.lines().find_map(|line| header(line.as_bytes(), b"sec-websocket-protocol"));
        if status != 101 || agreed != subprotocol.map(str::as_bytes) {
            return Err(refused("a WebSocket", &answer));
        }
        Ok(answer)
    }

    /// Sends a request and reads the answer: its status, and head and body as text.
    fn exchange(&mut self, request: &[u8]) -> Result<(u16, String), Failure> {
        self.stream.write_all(request).map_err(lost)?;
        loop {
            if let Some(response) = response(self.input.waiting()).map_err(lost)? {
                let head = String::from_utf8_lossy(response.head);
                let answer = format!("{head}{}", String::from_utf8_lossy(&response.body));
                let (status, taken) = (response.status, response.taken);
                self.input.take(taken);
                return Ok((status, answer));
            }
            self.input.fill(&self.stream).map_err(lost)?;
        }
    }
}

/// The request that makes a connection a WebSocket.
pub(super) fn upgrade(authority: &str, path: &str, subprotocol: Option<&str>) -> String {
    let protocol =
        subprotocol.map(|name| format!("Sec-WebSocket-Protocol: {name}\r\n")).unwrap_or_default();
    format!(
        "GET {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: cGFybG91ciBiZW5jaC4uLg==\r\n{protocol}\r\n"
    )
}

/// The failure of a connection that had been opened.
#[expect(clippy::needless_pass_by_value, reason = "its place is in `map_err`")]
pub(super) fn lost(error: io::Error) -> Failure {
    use io::ErrorKind::{TimedOut, WouldBlock};
    match error.kind() {
        TimedOut | WouldBlock => {
            Failure::new(Code::Timeout, "the host did not answer while connections were opened")
        }
        _ => Failure::new(Code::Failed, error.to_string()),
    }
}

fn refused(what: &str, answer: &str) -> Failure {
    Failure::new(Code::Failed, format!("the host refused {what}: {}", answer.trim_end()))
}
