use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use http::{HeaderValue, Uri, header};
use parlour_core::wire::{self, Frame, Hello, Welcome};
use parlour_core::{ByteString, CallId, Fault, FaultKind};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_websockets::{ClientBuilder, Message, WebSocketStream, upgrade};

use crate::{Error, ErrorKind};

/// How large a message may be until the host has said how large payloads get: the socket's default.
const MIN_MESSAGE_LIMIT: usize = 64 * 1024 * 1024;
/// Room for the headers of a frame, and for small frames beside it.
const MESSAGE_SLACK: usize = 1024 * 1024;

/// Where a host is, and what is said to be let in.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    /// As it was given, for people.
    url: String,
    /// Of the worker channel.
    channel: Uri,
    host: String,
    port: u16,
    authorization: Option<HeaderValue>,
    hello: Hello,
}

impl Endpoint {
    pub(crate) fn new(url: &str, token: Option<&str>, name: &str) -> Result<Self, Error> {
        let invalid = |why: &str| {
            Error::new(
                ErrorKind::Invalid,
                format!("`{}` is not a host's URL: {why}", url.escape_debug()),
            )
            .with_hint("give a URL such as http://127.0.0.1:9000")
        };
        let uri =
            Uri::try_from(url).map_err(|error| invalid("it does not parse").with_source(error))?;
        match uri.scheme_str() {
            Some("http" | "ws") => {}
            Some("https" | "wss") => {
                return Err(invalid("TLS is not supported").with_hint(
                    "use http:// to a host on this machine, or through a tunnel or proxy that adds TLS",
                ));
            }
            _ => return Err(invalid("it must begin with http:// or ws://")),
        }
        let authority = uri.authority().ok_or_else(|| invalid("it names no machine"))?;
        if authority.as_str().contains('@') {
            return Err(invalid("credentials do not belong into a URL")
                .with_hint("pass the token on its own"));
        }
        if authority.host().is_empty() {
            return Err(invalid("it names no machine"));
        }
        if uri.query().is_some() {
            return Err(invalid("it has a query"));
        }
        let path = format!("{}/open_channel", uri.path().trim_end_matches('/'));
        let channel = Uri::builder().scheme("ws").authority(authority.clone()).path_and_query(path);
        let channel = channel
            .build()
            .map_err(|error| invalid("its path does not parse").with_source(error))?;
        let authorization = token.map(bearer).transpose()?;
        let hello = Hello {
            name: ByteString::from(name),
            versions: wire::VERSIONS.to_vec(),
            ..Hello::default()
        };
        Ok(Self {
            url: url.to_owned(),
            // `[::1]` is how a URL writes an address that a socket takes without brackets.
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(80),
            channel,
            authorization,
            hello,
        })
    }

    /// What a connection begins with.
    pub(crate) fn hello(&self) -> Hello {
        self.hello.clone()
    }

    /// Makes a connection of a stream of bytes: upgrades it, and shakes hands.
    pub(crate) async fn open<C: Connect>(
        &self,
        connector: &C,
        hello: Hello,
    ) -> Result<Link<C::Io>, Error> {
        let io = connector.connect(&self.host, self.port).await.map_err(|error| {
            self.unreachable(format!("cannot connect to {}", self.url)).with_source(error)
        })?;
        let read = Arc::new(AtomicU64::new(0));
        let mut socket = self.upgrade(Counted { io, read: Arc::clone(&read) }).await?;
        let mut greeting = BytesMut::new();
        wire::encode(&Frame::from(hello), &mut greeting);
        socket.send(Message::binary(greeting)).await.map_err(|error| self.hung_up(error))?;
        loop {
            let message = match socket.next().await {
                Some(message) => message.map_err(|error| self.hung_up(error))?,
                None => return Err(self.hung_up(io::Error::from(io::ErrorKind::UnexpectedEof))),
            };
            if let Some((_, reason)) = message.as_close() {
                let reason = if reason.is_empty() { "no reason given" } else { reason };
                return Err(
                    self.unreachable(format!("{} refused the connection: {reason}", self.url))
                );
            }
            if !message.is_binary() {
                continue;
            }
            let mut frames = Bytes::from(message.into_payload());
            while !frames.is_empty() {
                match wire::decode(&mut frames).map_err(protocol)? {
                    None => {}
                    Some(Frame::Welcome(welcome)) if wire::VERSIONS.contains(&welcome.version) => {
                        let largest = usize::try_from(welcome.max_payload).unwrap_or(usize::MAX);
                        let limit = largest.saturating_add(MESSAGE_SLACK).max(MIN_MESSAGE_LIMIT);
                        socket.limits_mut().set_max_payload_len(Some(limit));
                        return Ok(Link { socket, read, welcome: *welcome, rest: frames });
                    }
                    Some(Frame::Reply(CallId(0), Err(fault))) => return Err(fault.into()),
                    Some(_) => {
                        return Err(Error::new(
                            ErrorKind::Protocol,
                            format!("{} did not begin with a welcome", self.url),
                        ));
                    }
                }
            }
        }
    }

    async fn upgrade<Io>(&self, io: Io) -> Result<WebSocketStream<Io>, Error>
    where
        Io: AsyncRead + AsyncWrite + Unpin,
    {
        let protocol = HeaderValue::from_static(wire::SUBPROTOCOL);
        let mut request = ClientBuilder::from_uri(self.channel.clone())
            .add_header(header::SEC_WEBSOCKET_PROTOCOL, protocol.clone())
            .map_err(|error| self.hung_up(error))?;
        if let Some(authorization) = &self.authorization {
            request = request
                .add_header(header::AUTHORIZATION, authorization.clone())
                .map_err(|error| self.hung_up(error))?;
        }
        let (socket, response) = match request.connect_on(io).await {
            Ok(upgraded) => upgraded,
            Err(tokio_websockets::Error::Upgrade(upgrade::Error::DidNotSwitchProtocols(
                status,
            ))) => {
                return Err(self.refused(status));
            }
            Err(error) => return Err(self.hung_up(error)),
        };
        if response.headers().get(header::SEC_WEBSOCKET_PROTOCOL) != Some(&protocol) {
            return Err(self.unreachable(format!("{} does not speak parlour.v1", self.url)));
        }
        Ok(socket)
    }

    fn refused(&self, status: u16) -> Error {
        let url = &self.url;
        match status {
            401 => Fault::new(FaultKind::Unauthenticated, format!("{url} wants another token"))
                .hint("pass the token that the host was started with")
                .into(),
            403 => {
                Fault::new(FaultKind::Forbidden, format!("{url} does not allow this connection"))
                    .hint("the host's server.allowed_hosts lists the names it can be reached by")
                    .into()
            }
            503 => {
                let text = format!("{url} takes no connections now: HTTP status 503");
                Error::new(ErrorKind::Connect, text)
                    .with_hint("the host shuts down, or has as many as it takes: try again later")
            }
            _ => self.unreachable(format!("{url} answered with HTTP status {status}")),
        }
    }

    fn hung_up(&self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        self.unreachable(format!("no Parlour host answered at {}", self.url)).with_source(error)
    }

    pub(crate) fn unreachable(&self, message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Connect, message)
            .with_hint("start a host with `parlour serve`, or correct the URL")
    }

    /// The URL as it was given.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }
}

fn bearer(token: &str) -> Result<HeaderValue, Error> {
    let mut value = HeaderValue::try_from(format!("Bearer {token}")).map_err(|error| {
        Error::new(ErrorKind::Invalid, "the token has characters that no header may have")
            .with_source(error)
    })?;
    value.set_sensitive(true);
    Ok(value)
}

pub(crate) fn protocol(error: wire::DecodeError) -> Error {
    Error::new(ErrorKind::Protocol, "the host sent a frame that cannot be read").with_source(error)
}

/// A connection after its handshake.
#[derive(Debug)]
pub(crate) struct Link<Io> {
    pub(crate) socket: WebSocketStream<Counted<Io>>,
    /// How many bytes the host has sent.
    pub(crate) read: Arc<AtomicU64>,
    pub(crate) welcome: Welcome,
    /// Frames that came in the same message as the welcome.
    pub(crate) rest: Bytes,
}

/// A stream that counts what is read from it.
#[derive(Debug)]
pub(crate) struct Counted<Io> {
    io: Io,
    read: Arc<AtomicU64>,
}

impl<Io: AsyncRead + Unpin> AsyncRead for Counted<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        self.read.fetch_add((buf.filled().len() - before) as u64, Relaxed);
        read
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Counted<Io> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Makes streams of bytes to a host: plain TCP, or what a test puts in its place.
pub trait Connect: Send + Sync + 'static {
    /// One such stream.
    type Io: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Makes one.
    fn connect(&self, host: &str, port: u16) -> impl Future<Output = io::Result<Self::Io>> + Send;
}

/// Plain TCP.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tcp;

impl Connect for Tcp {
    type Io = TcpStream;

    async fn connect(&self, host: &str, port: u16) -> io::Result<TcpStream> {
        let stream = TcpStream::connect((host, port)).await?;
        // Frames are coalesced here already; waiting for more would only delay them.
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_a_machine_and_lead_to_the_channel() {
        let channel = |url| {
            let endpoint = Endpoint::new(url, None, "test").unwrap();
            (endpoint.channel.to_string(), endpoint.host, endpoint.port)
        };
        assert_eq!(
            channel("http://127.0.0.1:9000"),
            ("ws://127.0.0.1:9000/open_channel".into(), "127.0.0.1".into(), 9000)
        );
        assert_eq!(
            channel("ws://[::1]/room/"),
            ("ws://[::1]/room/open_channel".into(), "::1".into(), 80)
        );
    }

    #[test]
    fn other_urls_are_refused_with_a_hint() {
        for url in ["", "127.0.0.1:9000", "https://a", "ftp://a", "http://u:p@a", "http://a?b", "/"]
        {
            let error = Endpoint::new(url, None, "test").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{url}");
            assert!(error.hint().is_some(), "{url}");
        }
    }

    #[test]
    fn a_token_never_shows() {
        let endpoint = Endpoint::new("http://a", Some("secret"), "test").unwrap();
        assert!(!format!("{endpoint:?}").contains("secret"));
        assert!(Endpoint::new("http://a", Some("a\nb"), "test").is_err());
    }
}
