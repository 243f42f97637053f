//! One channel, from its opening to its end: the task that owns a worker's or caller's socket.

mod clock;
mod deliveries;
mod hear;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::pin::{Pin, pin};
use std::sync::atomic::Ordering::Relaxed;

use bytestring::ByteString;
use parlour_core::wire::{Frame, Hello, Welcome};
use parlour_core::{CallId, CallMap, Fault, FaultKind, Session};
use tokio::sync::{mpsc, oneshot};
use tokio::task::yield_now;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::config::limits;
use crate::durable::Durable;
use crate::exchange::{Exchange, Origin, Ticket};
use crate::link::{Link, Received, Resumption, Sendable};
use crate::peer::{Close, Dispatched, OVERHEAD, Outgoing, Peer, RETRY_AFTER, ReplyTo};
use clock::Clock;

/// A channel's task.
pub(crate) struct Connection<L> {
    exchange: Exchange,
    durable: Durable,
    peer: Peer,
    origin: Origin,
    inbox: mpsc::UnboundedReceiver<Outgoing>,
    /// What was taken from the inbox and waits for room on the link.
    outbox: VecDeque<Outgoing>,
    /// Calls that the peer was given, or will be.
    session: Session<ReplyTo>,
    /// Calls and other requests that the peer made and that have not ended, under its own names.
    made: CallMap<Option<Ticket>>,
    /// Dropped when the durable event that the peer published last has its place among those of its
    /// topic type.
    published: Option<oneshot::Receiver<()>>,
    /// Deliveries that it waits for, until it gives that up.
    waits: CallMap<Option<oneshot::Sender<()>>>,
    greeted: bool,
    /// The peer broke the protocol, and the channel is about to close.
    refused: bool,
    /// The name of the session, if it can go on over another socket.
    name: Option<ByteString>,
    /// That socket, once it is there.
    resumption: Option<Box<Resumption>>,
    /// The session that the peer wants to go on with, if that is not this one.
    hand_over: Option<Box<HandOver>>,
    /// Whether the exchange has forgotten the peer.
    left: bool,
    link: std::marker::PhantomData<fn(L)>,
}

/// A socket that another connection's session goes on over, and what was said on it.
#[derive(Debug)]
pub(crate) struct HandOver {
    pub(crate) to: Peer,
    pub(crate) hello: Hello,
    pub(crate) welcome: Welcome,
}

/// How the service of one socket ended.
enum End {
    /// The channel is over.
    Over(&'static str),
    /// The socket broke, and the session may go on over another.
    Dropped(&'static str),
    /// The socket is for another connection.
    HandOver(Box<HandOver>),
}

/// Messages taken from the inbox before the socket gets its turn.
const BATCH: usize = 256;

impl<L: Link> Connection<L> {
    /// A channel whose peer has a place in the exchange.
    pub(crate) fn new(
        exchange: Exchange,
        durable: Durable,
        peer: Peer,
        inbox: mpsc::UnboundedReceiver<Outgoing>,
    ) -> Self {
        let origin = Origin { principal: peer.principal.clone(), worker: Some(peer.id) };
        let session = Session::new(exchange.config().limits.worker_in_flight);
        Self {
            exchange,
            durable,
            peer,
            origin,
            inbox,
            outbox: VecDeque::new(),
            session,
            made: CallMap::default(),
            published: None,
            waits: CallMap::default(),
            greeted: !L::GREETS,
            refused: false,
            name: None,
            resumption: None,
            hand_over: None,
            left: false,
            link: std::marker::PhantomData,
        }
    }

    /// Waits until the peer's socket is there, while calls for it wait or end. Without one until
    /// `until`, the peer is forgotten.
    ///
    /// A 0.1.0 worker registers before it opens its socket.
    pub(crate) async fn attached(
        &mut self,
        attached: oneshot::Receiver<Box<L>>,
        until: Instant,
    ) -> Option<Box<L>> {
        let mut attached = pin!(attached);
        let link = loop {
            tokio::select! {
                biased;
                link = &mut attached => break link.ok(),
                goes_on = self.wait(until) => if !goes_on {
                    break None;
                },
            }
        };
        if link.is_none() {
            self.finish().await;
        }
        link
    }

    /// Serves the peer on `link`, and on those that follow it when it breaks, until one of the two
    /// closes it. What is left to do is to let the link [`linger`](Link::linger), or to hand it over
    /// to the session that it is for.
    pub(crate) async fn run(&mut self, link: &mut L) -> Option<Box<HandOver>> {
        let metrics = self.exchange.metrics().clone();
        loop {
            metrics.channels.inc();
            metrics.channels_opened.inc();
            self.peer.connected.store(true, Relaxed);
            let end = self.serve(link).await;
            self.peer.connected.store(false, Relaxed);
            metrics.channels.dec();
            match end {
                End::Over(end) => {
                    tracing::debug!(worker = self.peer.id.0, end, "channel ended");
                    break;
                }
                End::Dropped(end) => {
                    tracing::debug!(worker = self.peer.id.0, end, "channel dropped");
                    // A peer that is well, and was taken for dead, learns of it and comes back.
                    link.cut();
                    let Some(resumption) = self.in_grace().await else { break };
                    self.resume(link, *resumption);
                }
                End::HandOver(hand_over) => {
                    self.finish().await;
                    return Some(hand_over);
                }
            }
        }
        self.finish().await;
        None
    }

    /// Waits until the peer is back on another socket, while calls for it wait or end. `None` if it
    /// does not come in time, or cannot come.
    async fn in_grace(&mut self) -> Option<Box<Resumption>> {
        let is_closing = |item: &Outgoing| matches!(item, Outgoing::Close(_));
        if self.name.is_none() || self.refused || self.outbox.iter().any(is_closing) {
            return None;
        }
        let until = Instant::now() + self.exchange.config().timeouts.grace;
        let _in_grace = self.exchange.enter_grace()?;
        while self.resumption.is_none() {
            if !self.wait(until).await {
                return None;
            }
        }
        self.resumption.take()
    }

    /// A step of waiting for a socket: takes what comes for the peer, or ends calls whose time is up.
    /// Returns whether to wait on: not beyond `until`, nor when the channel is to close. Cancel safe.
    async fn wait(&mut self, until: Instant) -> bool {
        self.hand_on_settled();
        let due = self.session.poll_timeout().map_or(until, |at| until.min(at.into()));
        tokio::select! {
            biased;
            Some(item) = self.inbox.recv() => {
                let closes = matches!(item, Outgoing::Close(_));
                if !closes {
                    self.take(item);
                }
                !closes
            }
            () = sleep_until(due) => {
                let now = Instant::now();
                self.session.handle_timeout(now.into_std());
                now < until
            }
        }
    }

    /// Goes on over the peer's new socket.
    fn resume(&mut self, link: &mut L, resumption: Resumption) {
        self.exchange.metrics().sessions_resumed.inc();
        if let Err(close) = link.resume(resumption) {
            self.refuse(close);
        }
    }

    /// Moves messages both ways until the channel ends, or its socket does.
    async fn serve(&mut self, link: &mut L) -> End {
        let timeouts = &self.exchange.config().clone().timeouts;
        let mut clock = Clock::new(timeouts);
        let mut timer: Pin<Box<Sleep>> = Box::pin(sleep_until(clock.next_beat));
        let mut frames = Vec::new();
        // The close, once it has been written: it is the last that is.
        let mut closed: Option<Box<Close>> = None;
        let mut heard = false;
        loop {
            for _ in 0..BATCH {
                let Ok(item) = self.inbox.try_recv() else { break };
                self.take(item);
            }
            if let Some(resumption) = self.resumption.take() {
                // The peer noticed before the host did that the old socket is broken.
                self.resume(link, *resumption);
                clock = Clock::new(timeouts);
                if let Some(close) = &closed {
                    link.close(close);
                    clock.close();
                }
            }
            self.hand_on_settled();
            // Looked at each time round: a socket that always has more to read would never let the
            // timer have its turn.
            let now = Instant::now();
            if closed.is_none() {
                closed = self.fill(link, now);
                if closed.is_some() {
                    clock.close();
                }
            }
            // What this protocol could not carry has ended too.
            self.hand_on_settled();

            if std::mem::take(&mut heard) {
                clock.hear(now);
                link.has_moved();
            }
            let credit = link.credit().unwrap_or(u64::MAX);
            self.peer.credit.store(credit, Relaxed);
            clock.starve(now, !self.outbox.is_empty() && credit == 0);
            let due = clock.due(self.greeted, self.session.poll_timeout());
            if due <= now {
                if let Some(end) = self.tick(link, &mut clock) {
                    return end;
                }
                continue;
            }
            // One that fires early does no harm; it is moved only where it would fire late.
            if due < timer.deadline() {
                timer.as_mut().reset(due);
            }
            let reads = clock.is_closing() || self.peer.may_ask(credit > 0);
            // A peer that is not read cannot be heard; if it takes nothing, its socket says so.
            if !reads {
                clock.hear(now);
            }
            let wants_room = closed.is_none() && !self.outbox.is_empty();
            tokio::select! {
                biased;
                received = link.receive(reads, wants_room, &mut frames) => match received {
                    Received::Room => {}
                    Received::Closed => return End::Over("closed"),
                    Received::Dropped if clock.is_closing() => return End::Over("closed"),
                    Received::Dropped => return End::Dropped("its socket broke"),
                    Received::Stalled => {
                        self.exchange.metrics().stalled_writes.inc();
                        let end = "cut: it took no byte for too long";
                        return if clock.is_closing() { End::Over(end) } else { End::Dropped(end) };
                    }
                    received => {
                        heard = true;
                        let now = Instant::now();
                        let is_full = matches!(received, Received::Heard { more: true });
                        for frame in frames.drain(..) {
                            // Nothing is heard any more of a peer that broke the protocol.
                            if !self.refused
                                && closed.is_none()
                                && let Err(close) = self.handle(frame, now)
                            {
                                self.refuse(close);
                            }
                        }
                        if let Received::Refused(close) = received {
                            self.refuse(close);
                        }
                        if let Some(hand_over) = self.hand_over.take() {
                            return End::HandOver(hand_over);
                        }
                        if is_full {
                            // One that sends without end leaves the others their turn.
                            yield_now().await;
                        }
                    }
                },
                Some(item) = self.inbox.recv() => self.take(item),
                () = &mut timer => timer.as_mut().reset(clock.next_beat),
            }
            if self.refused {
                clock.close();
            }
        }
    }

    /// Does what the time asks for. Returns how the service of this socket ends, if it does.
    fn tick(&mut self, link: &mut L, clock: &mut Clock) -> Option<End> {
        let now = Instant::now();
        self.session.handle_timeout(now.into_std());
        if clock.closes.is_some_and(|at| now >= at) {
            return Some(End::Over("cut: it did not answer the close"));
        }
        clock.forgive(now);
        if clock.starves.is_some_and(|at| now >= at) {
            self.exchange.metrics().stalled_writes.inc();
            return Some(End::Over("cut: it acknowledged nothing for too long"));
        }
        if !self.greeted && now >= clock.greets {
            self.greeted = true;
            self.refuse(Close::new(Close::POLICY, "no HELLO within timeouts.handshake"));
        }
        if now >= clock.silent {
            self.exchange.metrics().missed_heartbeats.inc();
            let end = "cut: it was silent for two heartbeats";
            return Some(if clock.is_closing() { End::Over(end) } else { End::Dropped(end) });
        }
        if now >= clock.next_beat {
            clock.next_beat = now + clock.heartbeat;
            if !clock.is_closing() {
                self.send(link, Sendable::Ping);
            }
            // A ping waits behind a large message, and an answer behind another.
            if link.has_moved() {
                clock.hear(now);
            }
        }
        None
    }

    // What the exchange has for the peer.

    fn take(&mut self, item: Outgoing) {
        match item {
            Outgoing::Call(mut dispatched) => {
                let Some(reply_to) = dispatched.reply_to.take() else { return };
                let Dispatched { id, call, .. } = &*dispatched;
                let begun = self.session.begin(*id, call.deadline, reply_to);
                let item = Outgoing::Call(dispatched);
                match begun {
                    Ok(()) if parlour_core::bug!("out_of_order") => self.outbox.push_front(item),
                    Ok(()) => self.outbox.push_back(item),
                    Err(reply_to) => {
                        self.peer.released(item.weight());
                        reply_to.send(Err(self.too_busy()));
                    }
                }
                self.peer.in_flight.store(self.session.in_flight(), Relaxed);
            }
            Outgoing::Cancel(id) => {
                self.peer.released(item.weight());
                self.session.cancel(id);
            }
            Outgoing::GiveUp => {
                self.peer.released(item.weight());
                let detail = "the host shut down before the agent answered";
                self.session.end_all(&Fault::new(FaultKind::Unavailable, detail));
            }
            Outgoing::Resume(resumption) => {
                self.peer.released(OVERHEAD);
                self.resumption = Some(resumption);
            }
            item @ Outgoing::Reply(..) if parlour_core::bug!("progress_overtaken") => {
                self.outbox.push_front(item);
            }
            item => self.outbox.push_back(item),
        }
    }

    /// Queues something of the connection's own.
    fn push(&mut self, item: Outgoing) {
        self.peer.added(item.weight());
        self.outbox.push_back(item);
    }

    fn hand_on_settled(&mut self) {
        let mut any = false;
        while let Some(settled) = self.session.poll_settled() {
            any = true;
            if settled.cancel && !parlour_core::bug!("cancel_not_forwarded") {
                self.push(Outgoing::Withdraw(settled.id));
            }
            settled.reply_to.send(settled.reply);
        }
        if any {
            self.peer.in_flight.store(self.session.in_flight(), Relaxed);
        }
    }

    /// Moves what waits onto the link, as far as it has room. Returns the close if that was written.
    fn fill(&mut self, link: &mut L, now: Instant) -> Option<Box<Close>> {
        while (link.has_room() || (link.credit() == Some(0) && self.has_last_word()))
            && let Some(item) = self.outbox.pop_front()
        {
            self.peer.released(item.weight());
            match item {
                Outgoing::Call(dispatched) => self.send_call(link, &dispatched, now),
                Outgoing::Withdraw(id) => self.send(link, Sendable::Withdraw(id)),
                Outgoing::Reply(id, reply) => {
                    self.ended(id);
                    self.send(link, Sendable::Reply(id, &reply));
                }
                Outgoing::Answer(id, frame) => {
                    self.ended(id);
                    self.send(link, Sendable::Frame(&frame));
                }
                Outgoing::Event(event, to) => {
                    if let Err(fault) = link.send(Sendable::Event(&event, &to)) {
                        let count = to.agents.len() + to.listeners.len();
                        tracing::debug!(worker = self.peer.id.0, count, %fault, "event dropped");
                        self.exchange.metrics().events_dropped.inc_by(count as u64);
                    }
                }
                Outgoing::Frame(frame) => self.send(link, Sendable::Frame(&frame)),
                // A peer that has not been greeted yet hears it then.
                Outgoing::Drain if !self.greeted => {}
                Outgoing::Drain => self.send(link, Sendable::Drain),
                Outgoing::Close(close) => {
                    link.close(&close);
                    return Some(close);
                }
                Outgoing::Progress(id, payload) => {
                    self.send(link, Sendable::Progress(id, &payload));
                }
                // Taken by `take`, and so never here.
                Outgoing::Cancel(_) | Outgoing::GiveUp | Outgoing::Resume(_) => {}
            }
        }
        None
    }

    /// The peer may use the name of a request of its again.
    fn ended(&mut self, id: CallId) {
        if self.made.remove(&id).is_none() {
            self.waits.remove(&id);
        }
    }

    /// Whether what is next tells the peer why the channel ends: also one that gives no credit.
    fn has_last_word(&self) -> bool {
        self.refused || matches!(self.outbox.front(), Some(Outgoing::Close(_)))
    }

    fn send_call(&mut self, link: &mut L, dispatched: &Dispatched, now: Instant) {
        let Dispatched { id, call, .. } = dispatched;
        let remaining = Instant::from_std(call.deadline).duration_since(now);
        // One whose time is up is not begun; the session ends it.
        if !remaining.is_zero()
            && self.session.send(*id)
            && let Err(fault) = link.send(Sendable::Call(*id, call, remaining))
        {
            self.session.handle_reply(*id, Err(fault));
        }
    }

    /// Sends what has no other way to fail than that the protocol has no word for it.
    fn send(&self, link: &mut L, item: Sendable<'_>) {
        if let Err(fault) = link.send(item) {
            tracing::debug!(worker = self.peer.id.0, %fault, "not sent");
        }
    }

    /// Tells the peer why the channel ends, and ends it: nothing more is heard from it.
    fn refuse(&mut self, close: Close) {
        if std::mem::replace(&mut self.refused, true) {
            return;
        }
        // Behind the close they are not written: `finish` sends them to another worker.
        let calls = std::mem::take(&mut self.outbox).into_iter().filter(|item| {
            let is_call = matches!(item, Outgoing::Call(_));
            if !is_call {
                self.peer.released(item.weight());
            }
            is_call
        });
        let calls: Vec<_> = calls.collect();
        if L::GREETS {
            let fault = Fault::new(FaultKind::Invalid, close.reason.clone())
                .hint("docs/protocol.md describes parlour.v1");
            self.push(Outgoing::Frame(Box::new(Frame::Reply(CallId(0), Err(fault)))));
        }
        self.push(Outgoing::Close(Box::new(close)));
        self.outbox.extend(calls);
    }

    fn too_busy(&self) -> Fault {
        let limit = self.exchange.config().limits.worker_in_flight;
        let detail = "the worker has as many calls as it may have";
        let fault = Fault::new(FaultKind::Overloaded, detail)
            .hint("try again later, or start another worker for this agent type")
            .retry_after(RETRY_AFTER);
        self.exchange.metrics().limit_met(limits::worker_in_flight, Some(limit), fault)
    }

    /// Leaves the exchange and ends all that is in flight, both ways.
    async fn finish(&mut self) {
        self.leave();
        // What the worker never had goes to another.
        for item in std::mem::take(&mut self.outbox) {
            if let Outgoing::Call(dispatched) = item
                && let Some(reply_to) = self.session.take_unsent(dispatched.id)
            {
                self.exchange.move_on(&self.peer, dispatched, reply_to);
            }
        }
        if !parlour_core::bug!("reply_to_dropped") {
            self.session.handle_disconnect();
        }
        self.hand_on_settled();
        let mut made: Vec<_> = self.made.drain().collect();
        made.sort_unstable_by_key(|(id, _)| *id);
        made.iter().filter_map(|(_, ticket)| ticket.as_ref()).for_each(Ticket::cancel);
        self.inbox.close();
        // Ends once everything has come that was on its way when the inbox closed.
        while let Some(item) = self.inbox.recv().await {
            match item {
                Outgoing::Call(mut dispatched) => {
                    if let Some(reply_to) = dispatched.reply_to.take() {
                        self.exchange.move_on(&self.peer, dispatched, reply_to);
                    }
                }
                Outgoing::Cancel(id) => self.peer.cancel_moved(id),
                _ => {}
            }
        }
    }
}

impl<L> Connection<L> {
    fn leave(&mut self) {
        if std::mem::replace(&mut self.left, true) {
            return;
        }
        if let Some(name) = &self.name {
            self.exchange.end_session(name);
        }
        self.exchange.leave(self.peer.id);
    }
}

/// A task that panicked, or was aborted, leaves no peer behind that nobody serves.
impl<L> Drop for Connection<L> {
    fn drop(&mut self) {
        self.leave();
    }
}
