//! Forwards WebSocket messages blindly: the first four bytes of each are the slot of the connection
//! that is to have it, and arrive as the slot of the one that sent it. The last slot is everybody
//! else. One thread; what a round of reads brings for one connection leaves in one write.
//!
//! It knows no names, deadlines, limits or metrics, and never says no: this is what the sockets cost.
//!
//! With `--log` it forwards nothing: what a round of reads brings is appended to a file, and each
//! message is answered with its slot and number once `fdatasync` has returned. This is what sockets
//! and disk cost.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Parser;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};
use parlour_bench_peers::frame::{self, BINARY};

const LISTENER: Token = Token(usize::MAX);
const EVERYBODY: u32 = u32::MAX;
const CLOSE: u8 = 8;
const SLOT: usize = size_of::<u32>();
/// The slot and the number behind it.
const HEAD: usize = SLOT + size_of::<u64>();

/// Forwards WebSocket messages by the slot in front of them.
#[derive(Debug, Parser)]
struct Args {
    /// Address to listen at; port 0 is a free one
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// File to append messages to, instead of forwarding them
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
}

/// All connections, by slot. A slot is used again when its connection has ended.
struct Forwarder {
    poll: Poll,
    connections: Vec<Option<Connection>>,
    /// What a read brings; shared, so that an idle connection holds no buffer.
    buffer: Vec<u8>,
    /// The slots that have something to write.
    dirty: Vec<usize>,
    log: Option<Log>,
}

/// A file that messages are appended to.
struct Log {
    file: File,
    /// What came since it was last written.
    waiting: Vec<u8>,
    /// What is answered when that is on the disk, by slot.
    answers: Vec<(usize, [u8; HEAD])>,
}

struct Connection {
    stream: TcpStream,
    is_open: bool,
    /// The beginning of a message, or of the request that opens the WebSocket.
    kept: Vec<u8>,
    output: Vec<u8>,
    sent: usize,
    is_dirty: bool,
}

fn main() -> io::Result<()> {
    let args = Args::parse();
    let mut listener = TcpListener::bind(args.listen)?;
    let open = |path| OpenOptions::new().create(true).append(true).open(path);
    let log = args.log.map(open).transpose()?;
    let mut forwarder = Forwarder {
        poll: Poll::new()?,
        connections: Vec::new(),
        buffer: vec![0; 256 << 10],
        dirty: Vec::new(),
        log: log.map(|file| Log { file, waiting: Vec::new(), answers: Vec::new() }),
    };
    forwarder.poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    writeln!(io::stderr(), "listening on http://{}", listener.local_addr()?)?;
    let mut events = Events::with_capacity(1024);
    loop {
        match forwarder.poll.poll(&mut events, None) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result?,
        }
        for event in &events {
            match event.token() {
                LISTENER => forwarder.accept(&listener)?,
                Token(slot) => forwarder.serve(slot),
            }
        }
        forwarder.commit()?;
        forwarder.flush();
    }
}

impl Forwarder {
    fn accept(&mut self, listener: &TcpListener) -> io::Result<()> {
        loop {
            let mut stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            stream.set_nodelay(true)?;
            let free = self.connections.iter().position(Option::is_none);
            let slot = free.unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll.registry().register(&mut stream, Token(slot), interest)?;
            self.connections[slot] = Some(Connection {
                stream,
                is_open: false,
                kept: Vec::new(),
                output: Vec::new(),
                sent: 0,
                is_dirty: false,
            });
        }
    }

    fn serve(&mut self, slot: usize) {
        let mut buffer = std::mem::take(&mut self.buffer);
        if self.read(slot, &mut buffer).is_err() {
            self.connections[slot] = None;
        }
        self.buffer = buffer;
    }

    /// Reads until the socket has no more. An error ends the connection.
    fn read(&mut self, slot: usize, buffer: &mut Vec<u8>) -> io::Result<()> {
        loop {
            let Some(connection) = &mut self.connections[slot] else { return Ok(()) };
            connection.flush()?;
            let kept = connection.kept.len();
            // Room for as much again as is known to be missing something.
            buffer.resize(buffer.len().max(kept * 2), 0);
            buffer[..kept].copy_from_slice(&connection.kept);
            let read = match connection.stream.read(&mut buffer[kept..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let is_full = kept + read == buffer.len();
            let bytes = &mut buffer[..kept + read];
            let taken = self.take(slot, bytes)?;
            if let Some(connection) = &mut self.connections[slot] {
                connection.kept.clear();
                connection.kept.extend_from_slice(&bytes[taken..]);
            }
            if !is_full {
                return Ok(());
            }
        }
    }

    /// Takes what is whole, and returns how much that was.
    fn take(&mut self, from: usize, bytes: &mut [u8]) -> io::Result<usize> {
        let mut taken = 0;
        if let Some(connection) = &mut self.connections[from]
            && !connection.is_open
        {
            let Some(length) = request(bytes) else { return Ok(0) };
            connection.open(from, &bytes[..length])?;
            self.mark(from);
            taken = length;
        }
        while let Some(frame) = frame::next(&bytes[taken..])? {
            let end = taken + frame.payload.end;
            let message = &mut bytes[taken..end][frame.payload];
            frame::mask(message, frame.mask);
            match frame.opcode {
                BINARY => self.forward(from, message)?,
                CLOSE => return Err(io::ErrorKind::ConnectionAborted.into()),
                _ => {}
            }
            taken = end;
        }
        Ok(taken)
    }

    fn forward(&mut self, from: usize, message: &mut [u8]) -> io::Result<()> {
        let slot = message.first_chunk_mut::<SLOT>().ok_or(io::ErrorKind::InvalidData)?;
        let to = u32::from_be_bytes(*slot);
        *slot = (from as u32).to_be_bytes();
        if let Some(log) = &mut self.log {
            let head = message.first_chunk::<HEAD>().ok_or(io::ErrorKind::InvalidData)?;
            log.answers.push((from, *head));
            log.waiting.extend_from_slice(&(message.len() as u32).to_le_bytes());
            log.waiting.extend_from_slice(message);
            return Ok(());
        }
        if to == EVERYBODY {
            (0..self.connections.len())
                .filter(|&to| to != from)
                .for_each(|to| self.send(to, message));
        } else {
            self.send(to as usize, message);
        }
        Ok(())
    }

    /// Puts what came onto the disk, and then answers it.
    fn commit(&mut self) -> io::Result<()> {
        let Some(log) = &mut self.log else { return Ok(()) };
        if log.answers.is_empty() {
            return Ok(());
        }
        log.file.write_all(&log.waiting)?;
        log.file.sync_data()?;
        log.waiting.clear();
        for (slot, answer) in std::mem::take(&mut log.answers) {
            self.send(slot, &answer);
        }
        Ok(())
    }

    fn send(&mut self, to: usize, message: &[u8]) {
        if let Some(Some(connection)) = self.connections.get_mut(to) {
            frame::header(message.len(), &mut connection.output);
            connection.output.extend_from_slice(message);
            self.mark(to);
        }
    }

    fn mark(&mut self, slot: usize) {
        if let Some(Some(connection)) = self.connections.get_mut(slot)
            && !std::mem::replace(&mut connection.is_dirty, true)
        {
            self.dirty.push(slot);
        }
    }

    fn flush(&mut self) {
        while let Some(slot) = self.dirty.pop() {
            let Some(connection) = &mut self.connections[slot] else { continue };
            connection.is_dirty = false;
            if connection.flush().is_err() {
                self.connections[slot] = None;
            }
        }
    }
}

impl Connection {
    /// Answers the request for a WebSocket, with the slot that was given.
    fn open(&mut self, slot: usize, request: &[u8]) -> io::Result<()> {
        let request = std::str::from_utf8(request).map_err(io::Error::other)?;
        let headers: HashMap<String, &str> = request
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim()))
            .collect();
        let key = headers.get("sec-websocket-key").ok_or(io::ErrorKind::InvalidData)?;
        let mut digest = sha1_smol::Sha1::new();
        digest.update(key.as_bytes());
        digest.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
        let accept = STANDARD.encode(digest.digest().bytes());
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Accept: {accept}\r\nSlot: {slot}\r\n\r\n"
        );
        self.output.extend_from_slice(answer.as_bytes());
        self.is_open = true;
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.sent < self.output.len() {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(length) => self.sent += length,
                // Epoll tells when there is room.
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

/// The length of the request that `bytes` begin with, once all of it is there.
fn request(bytes: &[u8]) -> Option<usize> {
    Some(bytes.windows(4).position(|part| part == b"\r\n\r\n")? + 4)
}
