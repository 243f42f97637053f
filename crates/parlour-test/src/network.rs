use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep};

/// What a connection keeps of what the other end has not read, each way.
const CAPACITY: usize = 64 * 1024;

/// The way between one member of a room and its host. Clones are the same one.
///
/// It keeps TCP's promises: bytes come in order or not at all, and none is lost of a connection that
/// goes on. What is changed holds for the connections that are open, and for those to come.
#[derive(Clone)]
pub struct Network(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Rung when a partition ends.
    healed: Notify,
}

struct State {
    to_host: Conditions,
    from_host: Conditions,
    connections: BTreeMap<u64, Connection>,
    opened: u64,
    rng: fastrand::Rng,
}

#[derive(Clone, Debug)]
struct Conditions {
    delay: RangeInclusive<Duration>,
    bytes_per_second: Option<u64>,
    capacity: usize,
    blocked: bool,
}

/// One of the two directions of a [`Network`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "there are two directions")]
pub enum Direction {
    /// From the member to the host.
    ToHost,
    /// From the host to the member.
    FromHost,
}

struct Connection {
    to_host: Line,
    from_host: Line,
    member_gone: bool,
    host_gone: bool,
}

/// One direction of a connection.
struct Line {
    /// What is on its way, and when it arrives.
    segments: VecDeque<(Instant, Bytes)>,
    unread: usize,
    /// When the last of what was sent arrives.
    last: Instant,
    /// When the reader learns that nothing more comes.
    ended: Option<Instant>,
    /// When it learns that the connection is gone.
    reset: Option<Instant>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Network {
    /// A network without faults. Delays of random length are drawn by `seed`.
    pub fn new(seed: u64) -> Self {
        let good = Conditions {
            delay: Duration::ZERO..=Duration::ZERO,
            bytes_per_second: None,
            capacity: CAPACITY,
            blocked: false,
        };
        let state = State {
            to_host: good.clone(),
            from_host: good,
            connections: BTreeMap::new(),
            opened: 0,
            rng: fastrand::Rng::with_seed(seed),
        };
        Self(Arc::new(Shared { state: Mutex::new(state), healed: Notify::new() }))
    }

    /// From now on each byte takes so long, each way.
    pub fn delay(&self, delay: Duration) {
        self.delay_between(delay..=delay);
    }

    /// From now on bytes take a random time out of `delay`, each way; they stay in order.
    pub fn delay_between(&self, delay: RangeInclusive<Duration>) {
        self.change(|state| {
            state.to_host.delay = delay.clone();
            state.from_host.delay = delay;
        });
    }

    /// From now on no more than this comes through in `direction`, and a connection keeps no more
    /// than `capacity` bytes that were not read: what a slow reader, or a narrow line, looks like to
    /// whoever writes.
    pub fn narrow(&self, direction: Direction, bytes_per_second: u64, capacity: usize) {
        self.change(|state| {
            let conditions = state.conditions(direction);
            conditions.bytes_per_second = Some(bytes_per_second.max(1));
            conditions.capacity = capacity.max(1);
        });
    }

    /// From now on nothing comes through, though connections take bytes as long as they have room.
    /// New ones are not made. No end is told; what was on its way comes after [`heal`](Self::heal).
    pub fn partition(&self) {
        self.change(|state| {
            state.to_host.blocked = true;
            state.from_host.blocked = true;
        });
    }

    /// The same in one direction only.
    pub fn partition_one_way(&self, direction: Direction) {
        self.change(|state| state.conditions(direction).blocked = true);
    }

    /// Ends partitions, delays and narrowness.
    pub fn heal(&self) {
        self.change(|state| {
            for conditions in [&mut state.to_host, &mut state.from_host] {
                *conditions = Conditions {
                    delay: Duration::ZERO..=Duration::ZERO,
                    bytes_per_second: None,
                    capacity: CAPACITY,
                    blocked: false,
                };
            }
        });
        self.0.healed.notify_waiters();
    }

    /// Ends every connection there is. As the seed has it, what was on its way is lost, and whoever it
    /// was for learns of the end at once; or it still arrives, and the end right behind it.
    pub fn cut(&self) {
        let now = Instant::now();
        self.change(|state| {
            let State { to_host, from_host, connections, rng, .. } = state;
            for connection in connections.values_mut() {
                for (line, conditions) in
                    [(&mut connection.to_host, &to_host), (&mut connection.from_host, &from_host)]
                {
                    if conditions.blocked || rng.bool() {
                        line.segments.clear();
                    }
                    let last = line.segments.back().map_or(now, |(at, _)| now.max(*at));
                    line.reset.get_or_insert(last);
                }
            }
        });
    }

    /// How many connections were ever made.
    pub fn opened(&self) -> u64 {
        self.0.state.lock().opened
    }

    /// How many connections have not been closed by both ends.
    pub fn open(&self) -> usize {
        self.0.state.lock().connections.len()
    }

    /// Waits until bytes would come through both ways, and then as long as one takes.
    pub(crate) async fn reach(&self) {
        loop {
            let healed = self.0.healed.notified();
            let delay = {
                let mut state = self.0.state.lock();
                let blocked = state.to_host.blocked || state.from_host.blocked;
                (!blocked).then(|| state.draw(Direction::ToHost))
            };
            match delay {
                Some(delay) if delay.is_zero() => return,
                Some(delay) => return sleep(delay).await,
                None => healed.await,
            }
        }
    }

    /// A new connection: the member's end and the host's.
    pub(crate) fn connect(&self) -> (Pipe, Pipe) {
        let number = {
            let mut state = self.0.state.lock();
            // A member that comes anew has given up what it left behind.
            for connection in state.connections.values_mut().filter(|it| it.member_gone) {
                for line in [&mut connection.to_host, &mut connection.from_host] {
                    line.segments.clear();
                    line.reset = Some(Instant::now());
                }
            }
            state.opened += 1;
            let (number, now) = (state.opened, Instant::now());
            let line = || Line {
                segments: VecDeque::new(),
                unread: 0,
                last: now,
                ended: None,
                reset: None,
                reader: None,
                writer: None,
            };
            let connection = Connection {
                to_host: line(),
                from_host: line(),
                member_gone: false,
                host_gone: false,
            };
            state.connections.insert(number, connection);
            number
        };
        self.change(|_| {});
        let end = |out| Pipe { network: self.clone(), number, out, timer: None };
        (end(Direction::ToHost), end(Direction::FromHost))
    }

    /// Changes the state, and lets every end look at it anew.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let wakers = {
            let mut state = self.0.state.lock();
            change(&mut state);
            let lines = state.connections.values_mut();
            let lines = lines.flat_map(|it| [&mut it.to_host, &mut it.from_host]);
            lines.flat_map(|line| [line.reader.take(), line.writer.take()]).collect::<Vec<_>>()
        };
        // Waking can drop a task, and with it a pipe, which needs the lock.
        wakers.into_iter().flatten().for_each(Waker::wake);
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state.lock();
        f.debug_struct("Network")
            .field("to_host", &state.to_host)
            .field("from_host", &state.from_host)
            .field("connections", &state.connections.len())
            .finish_non_exhaustive()
    }
}

impl State {
    fn conditions(&mut self, direction: Direction) -> &mut Conditions {
        match direction {
            Direction::ToHost => &mut self.to_host,
            Direction::FromHost => &mut self.from_host,
        }
    }

    fn draw(&mut self, direction: Direction) -> Duration {
        let delay = self.conditions(direction).delay.clone();
        let (least, most) = (delay.start().as_micros() as u64, delay.end().as_micros() as u64);
        Duration::from_micros(if least < most { self.rng.u64(least..=most) } else { least })
    }
}

impl Connection {
    fn line(&mut self, direction: Direction) -> &mut Line {
        match direction {
            Direction::ToHost => &mut self.to_host,
            Direction::FromHost => &mut self.from_host,
        }
    }

    fn is_read(&self, direction: Direction) -> bool {
        match direction {
            Direction::ToHost => !self.host_gone,
            Direction::FromHost => !self.member_gone,
        }
    }
}

/// One end of a connection over a [`Network`].
pub struct Pipe {
    network: Network,
    number: u64,
    /// The direction that is written to.
    out: Direction,
    /// Fires when what is on its way arrives.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Pipe {
    fn incoming(&self) -> Direction {
        match self.out {
            Direction::ToHost => Direction::FromHost,
            Direction::FromHost => Direction::ToHost,
        }
    }

    /// Reads, or says when it is worth to try again.
    fn read(&self, cx: &Context<'_>, buf: &mut ReadBuf<'_>) -> Read {
        let mut state = self.network.0.state.lock();
        let incoming = self.incoming();
        let blocked = state.conditions(incoming).blocked;
        let Some(connection) = state.connections.get_mut(&self.number) else {
            return Read::Done(Err(io::ErrorKind::NotConnected.into()), None);
        };
        let line = connection.line(incoming);
        let now = Instant::now();
        if line.segments.is_empty() && line.reset.is_some_and(|at| at <= now) {
            return Read::Done(Err(io::ErrorKind::ConnectionReset.into()), None);
        }
        let end = line.reset.into_iter().chain(line.ended).min();
        let due = line.segments.front().map(|(at, _)| *at).or(end);
        match due.filter(|_| !blocked) {
            Some(due) if due <= now => {
                while let Some((at, segment)) = line.segments.front_mut()
                    && *at <= now
                    && buf.remaining() > 0
                {
                    let length = segment.len().min(buf.remaining());
                    buf.put_slice(&segment[..length]);
                    segment.advance(length);
                    line.unread -= length;
                    if segment.is_empty() {
                        line.segments.pop_front();
                    }
                }
                Read::Done(Ok(()), line.writer.take())
            }
            due => {
                line.reader = Some(cx.waker().clone());
                Read::Wait(due)
            }
        }
    }

    fn end_writing(&self) {
        self.network.change(|state| {
            let delay = state.draw(self.out);
            if let Some(connection) = state.connections.get_mut(&self.number) {
                let line = connection.line(self.out);
                line.ended.get_or_insert_with(|| (Instant::now() + delay).max(line.last));
            }
        });
    }
}

enum Read {
    Done(io::Result<()>, Option<Waker>),
    Wait(Option<Instant>),
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            match self.read(cx, buf) {
                Read::Done(read, writer) => {
                    self.timer = None;
                    writer.into_iter().for_each(Waker::wake);
                    return Poll::Ready(read);
                }
                Read::Wait(None) => {
                    self.timer = None;
                    return Poll::Pending;
                }
                Read::Wait(Some(due)) => {
                    let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(Duration::ZERO)));
                    timer.as_mut().reset(due);
                    if timer.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                }
            }
        }
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let (written, reader) = {
            let mut state = self.network.0.state.lock();
            let delay = state.draw(self.out);
            let Conditions { blocked, bytes_per_second, capacity, .. } =
                state.conditions(self.out).clone();
            let Some(connection) = state.connections.get_mut(&self.number) else {
                return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
            };
            if connection.line(self.incoming()).reset.is_some_and(|at| at <= Instant::now()) {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            if connection.line(self.out).reset.is_some() {
                // Nobody has told the writer yet that it arrives nowhere.
                return Poll::Ready(Ok(buf.len()));
            }
            if !connection.is_read(self.out) && !blocked {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            let line = connection.line(self.out);
            if line.ended.is_some() {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            let length = buf.len().min(capacity.saturating_sub(line.unread));
            if length == 0 && !buf.is_empty() {
                line.writer = Some(cx.waker().clone());
                return Poll::Pending;
            }
            let takes = bytes_per_second.map_or(Duration::ZERO, |bytes_per_second| {
                Duration::from_micros(length as u64 * 1_000_000 / bytes_per_second)
            });
            line.last = (Instant::now() + delay).max(line.last) + takes;
            line.segments.push_back((line.last, Bytes::copy_from_slice(&buf[..length])));
            line.unread += length;
            (length, line.reader.take())
        };
        reader.into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end_writing();
        Poll::Ready(Ok(()))
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.end_writing();
        self.network.change(|state| {
            let Some(connection) = state.connections.get_mut(&self.number) else { return };
            match self.out {
                Direction::ToHost => connection.member_gone = true,
                Direction::FromHost => connection.host_gone = true,
            }
            if connection.member_gone && connection.host_gone {
                state.connections.remove(&self.number);
            }
        });
    }
}

impl fmt::Debug for Pipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipe").field("number", &self.number).field("out", &self.out).finish()
    }
}
