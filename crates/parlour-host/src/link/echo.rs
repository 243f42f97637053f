//! A door that echoes messages, for `scripts/autobahn`. It is a channel in all but its protocol: the
//! same server, handshake, connection and link.
//!
//! Each message counts as a ping of the channel, and goes back in place of the pong.

use std::collections::VecDeque;

use axum::extract::{Request, State};
use axum::routing::get;
use bytes::Bytes;
use bytestring::ByteString;
use parlour_core::wire::Frame;
use parlour_core::{Fault, Principal};
use tokio::net::TcpListener;
use tokio_websockets::Message;

use super::{Link, Outbox, Protocol, Received, Resumption, Sendable, WebSocketLink};
use crate::connection::Connection;
use crate::http::answer::Answer;
use crate::http::router::{App, router};
use crate::http::server::serve;
use crate::http::upgrade::{accept_key, link, socket_of, switching};
use crate::peer::Close;
use crate::{Config, Host};

#[derive(Default)]
struct Echo {
    /// Messages to send back, and whether they are text.
    messages: VecDeque<(bool, Bytes)>,
    /// Those among them that were not decoded: they have no byte, or their turn comes.
    undecoded: usize,
    /// Whether what goes back is not what came: a client that does not notice checks nothing.
    damages: bool,
}

impl Protocol for Echo {
    const GREETS: bool = false;

    fn begin(&mut self, is_text: bool) -> Result<(), &'static str> {
        self.messages.push_back((is_text, Bytes::new()));
        self.undecoded += 1;
        Ok(())
    }

    fn decode(&mut self, message: &mut Bytes) -> Result<Option<Frame>, Close> {
        self.messages.back_mut().unwrap().1 = std::mem::take(message);
        self.undecoded -= 1;
        Ok(Some(Frame::Ping(0)))
    }

    fn encode(&mut self, item: Sendable<'_>, out: &mut Outbox) -> Result<(), Fault> {
        match item {
            Sendable::Frame(Frame::Pong(_)) => {
                let (is_text, mut message) = self.messages.pop_front().unwrap();
                if self.damages {
                    message = message.iter().map(|byte| byte ^ 1).collect();
                }
                if is_text {
                    out.texts.push(ByteString::try_from(message).unwrap());
                } else {
                    out.batch.extend_from_slice(&message);
                }
            }
            Sendable::Ping => out.ping = true,
            _ => unreachable!("nobody calls the echo"),
        }
        Ok(())
    }
}

/// Where the link's way with messages differs from an echo's: it puts frames together into one
/// message, and neither takes nor makes a message without any.
struct EchoLink(WebSocketLink<Echo>);

impl Link for EchoLink {
    const GREETS: bool = Echo::GREETS;

    async fn receive(&mut self, read: bool, wants_room: bool, frames: &mut Vec<Frame>) -> Received {
        let received = self.0.receive(read, wants_room, frames).await;
        let next = usize::from(!self.0.undecoded.is_empty());
        let empty = std::mem::replace(&mut self.0.protocol.undecoded, next) - next;
        frames.extend((0..empty).map(|_| Frame::Ping(0)));
        received
    }

    fn send(&mut self, item: Sendable<'_>) -> Result<(), Fault> {
        let next = self.0.protocol.messages.front();
        if matches!(item, Sendable::Frame(_)) && next.is_some_and(|it| *it == (false, Bytes::new()))
        {
            self.0.protocol.messages.pop_front();
            self.0.give(Message::binary(""));
            return Ok(());
        }
        self.0.send(item)?;
        self.0.seal();
        Ok(())
    }

    fn cut(&mut self) {
        self.0.cut();
    }

    fn resume(&mut self, resumption: Resumption) -> Result<(), Close> {
        self.0.resume(resumption)
    }

    fn has_room(&self) -> bool {
        self.0.has_room()
    }

    fn has_moved(&mut self) -> bool {
        self.0.has_moved()
    }

    fn credit(&self) -> Option<u64> {
        self.0.credit()
    }

    fn close(&mut self, close: &Close) {
        self.0.close(close);
    }

    async fn linger(self) {
        self.0.linger().await;
    }
}

async fn echo(app: App, damages: bool, request: Request) -> Answer {
    let accept = accept_key(request.headers())?;
    let upgrade = hyper::upgrade::on(request);
    let (exchange, durable) = (app.exchange, app.durable);
    app.tasks.spawn(async move {
        let Some(socket) = socket_of(upgrade).await else { return };
        let (peer, inbox) = exchange.join("echo", Principal::ANONYMOUS);
        let echo = Echo { damages, ..Echo::default() };
        let mut link = EchoLink(link(socket, echo, &exchange));
        Connection::new(exchange, durable, peer, inbox).run(&mut link).await;
        Box::pin(link.linger()).await;
    });
    Ok(switching(accept))
}

#[tokio::test]
#[ignore = "serves scripts/autobahn until its standard input ends"]
#[expect(clippy::print_stdout, reason = "whoever starts it learns the port")]
async fn what_comes_goes_back() {
    let mut config = Config::default();
    // The largest message of the suite.
    config.set("limits.payload_bytes", "16MiB").unwrap();
    let app = Host::new(config).app;
    let router = router(app.clone())
        .route(
            "/echo",
            get(|State(app), request| echo(app, false, request)).with_state(app.clone()),
        )
        .route(
            "/damage",
            get(|State(app), request| echo(app, true, request)).with_state(app.clone()),
        );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("listening on {}", listener.local_addr().unwrap());
    let input_ends = async {
        let read = || std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        tokio::task::spawn_blocking(read).await.unwrap().unwrap();
    };
    serve(app, router, listener, input_ends).await.unwrap();
}
