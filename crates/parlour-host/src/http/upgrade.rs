//! `GET /open_channel`: the WebSocket handshake (RFC 6455 §4), and the clients of the 0.1.0 dialect.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderValue, StatusCode, Uri, Version, header};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use parlour_core::{Fault, FaultKind, Principal};
use percent_encoding::percent_decode_str;
use sha1_smol::Sha1;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_websockets::{Limits, ServerBuilder};

use super::answer::{Answer, Refusal, invalid};
use super::rest::origin;
use super::router::App;
use crate::channel::dialect::{self, Dialect};
use crate::channel::native::{self, Native};
use crate::channel::text::{self, Text};
use crate::config::limits;
use crate::connection::{Connection, HandOver};
use crate::durable::Durable;
use crate::exchange::Exchange;
use crate::io::{Place, Socket};
use crate::link::{Link as _, Protocol, WebSocketLink};
use crate::peer::{Outgoing, Peer};

/// A channel's frame may be this much longer than the largest payload.
const HEADER_ROOM: usize = 64 * 1024;

/// Opens a channel: `parlour.v1` if it is asked for, else the dialect.
pub(crate) async fn open_channel(State(app): State<App>, request: Request) -> Answer {
    if request.version() < Version::HTTP_11 {
        return Err(Refusal::invalid(StatusCode::UPGRADE_REQUIRED, "a WebSocket needs HTTP/1.1")
            .hint("connect with a WebSocket client over HTTP/1.1"));
    }
    let native = native_protocol(request.headers())?;
    let accept = accept_key(request.headers())?;
    let client_id = client_id(request.uri());
    if native.is_none() && client_id.is_none() {
        return Err(Refusal::from(invalid("the query parameter `client_id` is missing"))
            .hint("ask for subprotocol parlour.v1, or give a client_id"));
    }
    // Where sessions wait for their clients, what runs there may still end.
    let may_resume = native.is_some() && app.exchange.has_sessions_in_grace();
    if app.exchange.is_draining() && !may_resume {
        let fault = Fault::new(FaultKind::Unavailable, "the host is shutting down");
        return Err(fault.hint("connect again later").into());
    }
    let principal = origin(&request).principal;
    let claim = match client_id.filter(|_| native.is_none()) {
        Some(id) => {
            let attach = app.lobby.claim(&app, &id, &principal)?;
            Some((id, attach))
        }
        None => None,
    };

    let (exchange, lobby) = (app.exchange.clone(), app.lobby.clone());
    let durable = app.durable.clone();
    let upgrade = hyper::upgrade::on(request);
    app.tasks.spawn(async move {
        let Some(socket) = socket_of(upgrade).await else {
            if let Some((id, attach)) = claim {
                lobby.give_back(&id, attach);
            }
            return;
        };
        match claim {
            None if native == Some(text::NAME) => {
                let text = Text::new(exchange.config().limits.json_depth);
                serve(socket, text, text::NAME, exchange, durable, principal).await;
            }
            None => {
                let native = Native::default();
                serve(socket, native, native::NAME, exchange, durable, principal).await;
            }
            Some((_, attach)) => {
                let dialect = Dialect::new(exchange.config().limits.json_depth);
                // The task that waits for this socket is the connection's.
                let _ = attach.socket.send(Box::new(link(socket, dialect, &exchange)));
            }
        }
    });

    let mut response = switching(accept);
    if let Some(name) = native {
        let name = HeaderValue::from_static(name);
        response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, name);
    }
    Ok(response)
}

/// Serves a channel to its end, or hands its socket over to the session that goes on over it.
async fn serve<P: Protocol>(
    socket: Socket,
    protocol: P,
    name: &'static str,
    exchange: Exchange,
    durable: Durable,
    principal: Principal,
) {
    let (peer, inbox) = exchange.join(name, principal);
    let mut link = link(socket, protocol, &exchange);
    let mut connection = Connection::new(exchange, durable, peer, inbox);
    if let Some(hand_over) = connection.run(&mut link).await {
        let HandOver { to, hello, welcome } = *hand_over;
        // A session that has just ended drops the socket, and its client begins anew.
        to.push(Outgoing::Resume(Box::new(link.into_resumption(hello, welcome))));
        return;
    }
    // Boxed: an idle channel's task has no room for what comes after it.
    Box::pin(link.linger()).await;
}

/// The answer after which the connection is a WebSocket.
pub(crate) fn switching(accept: HeaderValue) -> Response {
    let mut response = Response::new(axum::body::Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    response
}

/// The socket of a connection that is HTTP no more.
pub(crate) async fn socket_of(upgrade: OnUpgrade) -> Option<Socket> {
    // Every connection of this server is of this type.
    let parts = upgrade.await.ok()?.downcast::<TokioIo<Socket>>().ok()?;
    let mut socket = parts.io.into_inner();
    socket.report_to(None);
    socket.put_back(parts.read_buf);
    Some(socket)
}

/// The WebSocket of a channel, within the host's limits.
pub(crate) fn link<P: Protocol>(
    socket: Socket,
    protocol: P,
    exchange: &Exchange,
) -> WebSocketLink<P> {
    let limit = exchange.config().limits.payload_bytes.0 + HEADER_ROOM;
    let limits = Limits::default().max_payload_len(Some(limit));
    WebSocketLink::new(ServerBuilder::new().limits(limits).serve(socket), protocol)
}

/// The first subprotocol asked for that is known; none if none is asked for.
fn native_protocol(headers: &HeaderMap) -> Result<Option<&'static str>, Refusal> {
    let mut asked = headers
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .peekable();
    if asked.peek().is_none() {
        return Ok(None);
    }
    let known = |name| [native::NAME, text::NAME].into_iter().find(|known| *known == name);
    match asked.find_map(known) {
        Some(name) => Ok(Some(name)),
        None => Err(Refusal::from(invalid("none of the subprotocols asked for is known")).hint(
            "ask for parlour.v1 or parlour.v1+json, or for none to speak the dialect of \
             autogen-http-runtime",
        )),
    }
}

/// The answer to the client's key, once the request is a handshake.
pub(crate) fn accept_key(headers: &HeaderMap) -> Result<HeaderValue, Refusal> {
    let has = |name, word: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|v| v.trim().eq_ignore_ascii_case(word))
    };
    if !has(header::CONNECTION, "upgrade") || !has(header::UPGRADE, "websocket") {
        return Err(Refusal::invalid(StatusCode::UPGRADE_REQUIRED, "this door is a WebSocket")
            .hint("connect with a WebSocket client over HTTP/1.1"));
    }
    if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        return Err(Refusal::invalid(
            StatusCode::UPGRADE_REQUIRED,
            "the WebSocket version is not 13",
        )
        .hint("send Sec-WebSocket-Version: 13"));
    }
    let key = headers.get(header::SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes);
    let Some(key) = key.filter(|key| key.len() == 24) else {
        return Err(invalid("Sec-WebSocket-Key is missing or not 16 bytes in base64").into());
    };
    let mut sha1 = Sha1::from(key);
    sha1.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    let accept = STANDARD.encode(sha1.digest().bytes());
    Ok(HeaderValue::try_from(accept).expect("base64 is a header value"))
}

fn client_id(uri: &Uri) -> Option<String> {
    let pairs = uri.query()?.split('&').filter_map(|pair| pair.split_once('='));
    let (_, value) = pairs.into_iter().find(|(name, _)| *name == "client_id")?;
    let value = percent_decode_str(value).decode_utf8().ok()?;
    (!value.is_empty() && value.len() <= 128).then(|| value.into_owned())
}

/// The clients of the dialect, by the id that each gave itself.
///
/// They register over `/rpc` before they open their socket, so that one is known before it connects;
/// its task then waits for the socket, and is forgotten if none comes.
#[derive(Clone, Default)]
pub(crate) struct Lobby(Arc<Mutex<HashMap<Box<str>, Client>>>);

struct Client {
    peer: Peer,
    /// Takes the socket, as long as none has come.
    attach: Option<Attach>,
}

/// Where a client's socket is waited for, and the place that it holds until it comes.
struct Attach {
    socket: oneshot::Sender<Box<WebSocketLink<Dialect>>>,
    _place: Place,
}

impl Lobby {
    /// The client of this id, made if it is new.
    pub(crate) fn enter(&self, app: &App, id: &str, who: &Principal) -> Result<Peer, Fault> {
        let mut clients = self.0.lock();
        self.enter_locked(&mut clients, app, id, who)
    }

    /// The client of this id, if it is known.
    pub(crate) fn find(&self, id: &str, who: &Principal) -> Option<Peer> {
        let clients = self.0.lock();
        clients.get(id).map(|client| client.peer.clone()).filter(|peer| peer.principal == *who)
    }

    /// The place where the client's socket is waited for; each has one socket.
    fn claim(&self, app: &App, id: &str, who: &Principal) -> Result<Attach, Fault> {
        let mut clients = self.0.lock();
        self.enter_locked(&mut clients, app, id, who)?;
        clients.get_mut(id).and_then(|client| client.attach.take()).ok_or_else(|| {
            Fault::new(FaultKind::Conflict, "a client of this id is connected")
                .hint("each client makes an id of its own")
        })
    }

    /// The socket did not come after all.
    fn give_back(&self, id: &str, attach: Attach) {
        if let Some(client) = self.0.lock().get_mut(id) {
            client.attach.get_or_insert(attach);
        }
    }

    /// Forgets the client, unless another has come under its id since it left.
    fn forget(&self, id: &str, peer: &Peer) {
        let mut clients = self.0.lock();
        if clients.get(id).is_some_and(|client| client.peer.id == peer.id) {
            clients.remove(id);
        }
    }

    fn enter_locked(
        &self,
        clients: &mut HashMap<Box<str>, Client>,
        app: &App,
        id: &str,
        who: &Principal,
    ) -> Result<Peer, Fault> {
        if let Some(client) = clients.get(id)
            && app.exchange.knows(&client.peer)
        {
            if client.peer.principal != *who {
                return Err(Fault::new(FaultKind::Forbidden, "this client id belongs to another"));
            }
            return Ok(client.peer.clone());
        }
        let Ok(permit) = app.places.clone().try_acquire_owned() else {
            let limit = app.exchange.config().limits.connections;
            let detail = "the host has as many clients as it may";
            let fault =
                Fault::new(FaultKind::Overloaded, detail).hint("close some, or raise the limit");
            let metrics = app.exchange.metrics();
            return Err(metrics.limit_met(limits::connections, Some(limit), fault));
        };
        let (peer, inbox) = app.exchange.join(dialect::NAME, who.clone());
        // Whoever knows a client's id can speak in its name, so that nobody is shown it.
        let mut hasher = DefaultHasher::new();
        id.hash(&mut hasher);
        peer.set_name(&format!("client-{:08x}", hasher.finish() as u32));
        let (socket, attached) = oneshot::channel();
        let attach = Attach { socket, _place: Place::new(permit, app.exchange.metrics()) };
        clients.insert(id.into(), Client { peer: peer.clone(), attach: Some(attach) });
        let known = peer.clone();
        let mut connection =
            Connection::new(app.exchange.clone(), app.durable.clone(), peer.clone(), inbox);
        let until = Instant::now() + app.exchange.config().timeouts.attach;
        let (lobby, id) = (self.clone(), Box::<str>::from(id));
        app.tasks.spawn(async move {
            if let Some(mut link) = connection.attached(attached, until).await {
                connection.run(&mut *link).await;
                lobby.forget(&id, &known);
                Box::pin(link.linger()).await;
            } else {
                lobby.forget(&id, &known);
            }
        });
        Ok(peer)
    }
}
