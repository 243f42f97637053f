//! The port: connections from the first byte to the last, and the shutdown.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::Router;
use axum::response::IntoResponse;
use bytes::{BufMut as _, Bytes, BytesMut};
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::AsyncReadExt;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tower::Service as _;

use super::answer::{Content, Tracked};
use super::phase::Phase;
use super::router::App;
use super::rpc;
use crate::config::limits;
use crate::io::{Io, Place, Socket};
use crate::peer::Peer;

/// Where connections come from. Nothing in the host binds a port by itself.
pub trait Listener: Send {
    /// Waits for the next connection.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no connection.
    fn accept(&mut self) -> impl Future<Output = io::Result<Box<dyn Io>>> + Send;
}

impl Listener for tokio::net::TcpListener {
    async fn accept(&mut self) -> io::Result<Box<dyn Io>> {
        let (stream, _) = Self::accept(self).await?;
        // A small frame must not wait for the acknowledgement of the one before.
        // One that does without these is served all the same.
        let _ = stream.set_nodelay(true);
        #[cfg(target_os = "linux")]
        let _ = socket2::SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT);
        Ok(Box::new(stream))
    }
}

/// How an HTTP/2 connection begins (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How much the kernel keeps of what was not sent yet. What waits beyond that waits here, where it is
/// seen to move, or not to.
#[cfg(target_os = "linux")]
const UNSENT: u32 = 128 * 1024;
/// How long `accept` rests after it failed, such as for want of descriptors.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// How often a shutdown looks whether it is done.
const POLL: Duration = Duration::from_millis(10);
/// How long peers may take for what is written last.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Serves `listener` until `shutdown`, then lets what is in flight end.
pub(crate) async fn serve(
    app: App,
    router: Router,
    mut listener: impl Listener,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let closing = CancellationToken::new();
    app.durable.start(&closing)?;
    let mut ending = pin!(end(&app, shutdown));
    let doors = Arc::new(Doors { app: app.clone(), router });
    loop {
        let io = tokio::select! {
            biased;
            () = &mut ending => break,
            accepted = listener.accept() => accepted,
        };
        let io = match io {
            Ok(io) => io,
            // Only this one connection has failed: its peer left before it was taken.
            Err(error) if is_of_peer(&error) => continue,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_REST).await;
                continue;
            }
        };
        let Ok(permit) = app.places.clone().try_acquire_owned() else {
            // Nothing is read from it and nothing written: the socket closes.
            app.exchange.metrics().limit_hit(limits::connections);
            continue;
        };
        let (doors, closing) = (doors.clone(), closing.clone());
        let place = Place::new(permit, app.exchange.metrics());
        let mut socket = Socket::new(io, app.exchange.config().timeouts.stalled_write);
        // It goes with the socket, which may become a channel's.
        socket.holds(place);
        app.tasks.spawn(async move { Box::pin(connection(doors, socket, closing)).await });
    }

    drop(listener);
    closing.cancel();
    app.exchange.close();
    // Whoever has not taken its last bytes by then loses them.
    app.tasks.end(LAST_WORDS).await;
    Ok(())
}

fn is_of_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Waits for `shutdown`, and then until all calls have ended or their time is up.
async fn end(app: &App, shutdown: impl Future<Output = ()>) {
    shutdown.await;
    app.exchange.begin_drain();
    let in_flight = || app.exchange.metrics().calls_in_flight.get();
    tracing::info!(calls = in_flight(), "draining");
    let ended = async {
        while in_flight() > 0 {
            sleep(POLL).await;
        }
    };
    if timeout(app.exchange.config().server.drain_timeout, ended).await.is_err() {
        tracing::warn!(calls = in_flight(), "not everything ended within server.drain_timeout");
        app.exchange.give_up();
    }
    // The last replies and faults reach their callers' sockets.
    let written = async {
        let waits = |peer: &Peer| peer.connected.load(Relaxed) && peer.waiting().0 > 0;
        while in_flight() > 0 || app.exchange.peers().iter().any(waits) {
            sleep(POLL).await;
        }
    };
    let _ = timeout(LAST_WORDS, written).await;
}

/// What every request passes through.
struct Doors {
    app: App,
    router: Router,
}

impl Doors {
    async fn answer(&self, request: Request<Incoming>) -> http::Response<Content> {
        match self.app.guard.admit(&request) {
            Err(refusal) => refusal.into_response().map(Content::Other),
            // The door with the most to do beside routing is spared the router.
            Ok(principal) if request.uri().path() == "/rpc" && request.method() == "POST" => {
                match rpc::rpc(&self.app, principal, request).await {
                    Ok(response) => response,
                    Err(refusal) => refusal.into_response().map(Content::Other),
                }
            }
            Ok(principal) => {
                let mut request = request.map(axum::body::Body::new);
                request.extensions_mut().insert(principal);
                match self.router.clone().call(request).await {
                    Ok(response) => response.map(Content::Other),
                    Err(never) => match never {},
                }
            }
        }
    }
}

/// Serves one connection, whichever version of HTTP it speaks.
async fn connection(doors: Arc<Doors>, mut socket: Socket, closing: CancellationToken) {
    let (config, tasks) = (doors.app.exchange.config().clone(), doors.app.tasks.clone());
    let sniffed = timeout(config.timeouts.first_byte, sniff(&mut socket)).await;
    let Ok(Ok(Some(is_http2))) = sniffed else { return };
    let phase = Arc::new(Phase::new(Instant::now(), &config.timeouts));
    if !is_http2 {
        phase.bytes_came();
        socket.report_to(Some(phase.clone()));
    }

    let began = phase.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let answering = began.request_began();
        let doors = doors.clone();
        async move {
            let response = doors.answer(request).await;
            Ok::<_, Infallible>(Tracked::new(response, answering, is_http2))
        }
    });

    let io = TokioIo::new(socket);
    if is_http2 {
        let limits = &config.limits;
        let mut builder = http2::Builder::new(tasks);
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.http2_streams as u32)
            .max_header_list_size(limits.header_bytes.0 as u32)
            .initial_stream_window_size(64 * 1024)
            .initial_connection_window_size(1024 * 1024)
            .keep_alive_interval(config.timeouts.heartbeat)
            .keep_alive_timeout(config.timeouts.heartbeat);
        let serving = pin!(builder.serve_connection(io, service));
        let serving = until_closing(serving, |it| it.graceful_shutdown(), &closing);
        phase.guard(serving).await;
    } else {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(None)
            // A few too many are answered like any mistake; more than that, by hyper and briefly.
            .max_headers(config.limits.headers + 16)
            .max_buf_size(config.limits.header_bytes.0.max(8192));
        let serving = pin!(builder.serve_connection(io, service).with_upgrades());
        let serving = until_closing(serving, |it| it.graceful_shutdown(), &closing);
        phase.guard(serving).await;
    }
}

/// Drives a connection to its end, and tells it once when the host begins to close.
async fn until_closing<C: Future>(
    mut serving: Pin<&mut C>,
    shut_down: impl FnOnce(Pin<&mut C>),
    closing: &CancellationToken,
) {
    tokio::select! {
        biased;
        _ = serving.as_mut() => return,
        () = closing.cancelled() => shut_down(serving.as_mut()),
    }
    serving.await;
}

/// Reads until it is clear whether the connection speaks HTTP/2, and gives those bytes back.
///
/// Returns `None` if the peer closed without a word.
async fn sniff(socket: &mut Socket) -> io::Result<Option<bool>> {
    let mut seen = BytesMut::with_capacity(PREFACE.len());
    let is_http2 = loop {
        let have = seen.len();
        if socket.read_buf(&mut (&mut seen).limit(PREFACE.len() - have)).await? == 0 {
            return Ok(None);
        }
        if !PREFACE.starts_with(&seen) {
            break false;
        }
        if seen.len() == PREFACE.len() {
            break true;
        }
    };
    socket.put_back(Bytes::from(seen));
    Ok(Some(is_http2))
}
