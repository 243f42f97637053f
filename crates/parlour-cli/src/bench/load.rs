//! The loop: all connections, callers and workers alike, in one thread.
//!
//! Whatever a read brings is taken at once and answered with one write. Nothing is handed from one
//! place to another, so that what is measured is the host.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::ops::Range;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

use super::input::Input;
use super::peer::Peer;
use super::setup::{Link, lost};
use super::tally::{Tally, now};
use crate::exit::Failure;

/// All connections.
pub(super) struct Load {
    poll: Poll,
    events: Events,
    connections: Vec<Connection>,
    /// The one that hears of every round.
    leader: Option<usize>,
    pace: Option<Pace>,
}

/// Wakes connections in turns, so many a second.
struct Pace {
    per_second: f64,
    began: Instant,
    woken: u64,
    places: Range<usize>,
    /// How often each is woken at once at the most.
    most: usize,
}

/// How often it is looked who is to be woken, where nothing else happens.
const TICK: Duration = Duration::from_millis(1);

struct Connection {
    stream: TcpStream,
    peer: Box<dyn Peer>,
    input: Input,
    output: Vec<u8>,
    sent: usize,
}

impl Load {
    pub(super) fn new() -> Result<Self, Failure> {
        let poll = Poll::new().map_err(lost)?;
        Ok(Self {
            poll,
            events: Events::with_capacity(1024),
            connections: Vec::new(),
            leader: None,
            pace: None,
        })
    }

    /// Takes over a connection that has been set up.
    pub(super) fn add(&mut self, link: Link, peer: impl Peer + 'static) -> Result<(), Failure> {
        link.stream.set_nonblocking(true).map_err(lost)?;
        self.push(TcpStream::from_std(link.stream), link.input, peer)
    }

    fn push(
        &mut self,
        mut stream: TcpStream,
        input: Input,
        peer: impl Peer + 'static,
    ) -> Result<(), Failure> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        let token = Token(self.connections.len());
        self.poll.registry().register(&mut stream, token, interest).map_err(lost)?;
        self.connections.push(Connection {
            stream,
            peer: Box::new(peer),
            input,
            output: Vec::new(),
            sent: 0,
        });
        Ok(())
    }

    /// Begins to open a connection, and lets `peer` set it up.
    pub(super) fn connect(
        &mut self,
        address: SocketAddr,
        buffer: usize,
        peer: impl Peer + 'static,
    ) -> Result<(), Failure> {
        let stream = TcpStream::connect(address).map_err(lost)?;
        stream.set_nodelay(true).map_err(lost)?;
        self.push(stream, Input::new(buffer), peer)
    }

    /// Where the next connection will be.
    pub(super) fn next_place(&self) -> usize {
        self.connections.len()
    }

    /// From now on wakes the connections at these places in turns, so many a second, and each `most`
    /// times at once.
    pub(super) fn pace(&mut self, places: Range<usize>, most: usize, per_second: f64) {
        self.pace = Some(Pace { per_second, began: now(), woken: 0, places, most });
    }

    /// Drops all connections.
    pub(super) fn disconnect(&mut self) {
        self.connections.clear();
    }

    /// Takes over the connection of the peer that is prompted after every round.
    pub(super) fn add_leader(
        &mut self,
        link: Link,
        peer: impl Peer + 'static,
    ) -> Result<(), Failure> {
        self.leader = Some(self.connections.len());
        self.add(link, peer)
    }

    /// Lets every peer say what it has to say of its own accord.
    pub(super) fn begin(&mut self, tally: &mut Tally) -> Result<(), Failure> {
        for connection in &mut self.connections {
            tally.now = now();
            connection.begin(tally).map_err(lost)?;
        }
        Ok(())
    }

    /// Serves the connections for this long, or until `is_done`. Returns how long it was.
    pub(super) fn run(
        &mut self,
        time: Duration,
        tally: &mut Tally,
        is_done: impl Fn(&Tally) -> bool,
    ) -> Result<Duration, Failure> {
        let start = now();
        let passed = |now: Instant| now.saturating_duration_since(start);
        while !is_done(tally) {
            let Some(left) = time.checked_sub(passed(now())).filter(|left| !left.is_zero()) else {
                break;
            };
            let left = if self.pace.is_some() { left.min(TICK) } else { left };
            match self.poll.poll(&mut self.events, Some(left)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => result.map_err(lost)?,
            }
            for event in &self.events {
                let connection = &mut self.connections[event.token().0];
                connection.flush().and_then(|()| connection.hear(tally)).map_err(lost)?;
            }
            if let Some(leader) = self.leader {
                let connection = &mut self.connections[leader];
                connection.peer.prompt(tally, &mut connection.output);
                connection.flush().map_err(lost)?;
            }
            if let Some(pace) = &mut self.pace {
                pace.wake(&mut tally.woken);
            }
            for place in std::mem::take(&mut tally.woken) {
                let connection = &mut self.connections[place];
                tally.now = now();
                connection.peer.prompt(tally, &mut connection.output);
                connection.flush().map_err(lost)?;
            }
        }
        Ok(passed(now()))
    }
}

impl Pace {
    fn wake(&mut self, woken: &mut Vec<usize>) {
        let due = now().saturating_duration_since(self.began).as_secs_f64() * self.per_second;
        let count = self.places.len() as u64;
        // No more than they may have in flight: who is behind by more has been late all along.
        for number in self.woken..(due as u64).min(self.woken + count * self.most as u64) {
            woken.push(self.places.start + (number % count) as usize);
        }
        self.woken = self.woken.max(due as u64);
    }
}

impl Connection {
    fn begin(&mut self, tally: &mut Tally) -> io::Result<()> {
        self.peer.begin(tally, &mut self.output);
        // What came behind the last step of the setup.
        self.peer.hear(&mut self.input, tally, &mut self.output)?;
        self.flush()
    }

    fn hear(&mut self, tally: &mut Tally) -> io::Result<()> {
        loop {
            match self.input.fill(&mut self.stream) {
                Ok(is_full) => {
                    tally.now = now();
                    self.peer.hear(&mut self.input, tally, &mut self.output)?;
                    self.flush()?;
                    if !is_full {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.sent < self.output.len() {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(length) => self.sent += length,
                // The loop comes back when there is room.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(())
    }
}
