//! Callers, workers and subscribers that speak NATS, as fast clients do: each caller has one inbox,
//! and the last token of the subject that a reply comes to is the number of its call.

use std::io;

use parlour_core::AgentType;

use super::digits::{self, DIGITS};
use super::fanout::Batch;
use super::input::Input;
use super::peer::Peer;
use super::tally::{Slots, Tally};

/// What a client says about itself. With headers, a call that nobody serves is answered at once.
pub(super) const CONNECT: &str = concat!(
    r#"CONNECT {"verbose":false,"pedantic":false,"headers":true,"no_responders":true,"#,
    r#""protocol":1,"lang":"rust","version":"0.1.0","name":"bench"}"#,
    "\r\n"
);

/// A message as the server writes it.
#[derive(Debug, PartialEq)]
struct Message<'a> {
    subject: &'a [u8],
    reply_to: Option<&'a [u8]>,
    payload: &'a [u8],
    /// Only the server sends these here: the status that nobody serves the subject.
    has_headers: bool,
}

/// Makes calls.
#[derive(Debug)]
pub(super) struct Caller {
    slots: Slots,
    payload: usize,
    /// A request, and where in it its number stands.
    request: Vec<u8>,
    number_at: usize,
}

impl Caller {
    /// Calls `subject`; replies come to what [`inbox`] of `number` subscribes to.
    pub(super) fn new(subject: &str, number: usize, payload: &str, in_flight: usize) -> Self {
        let start = format!("PUB {subject} {}", inbox(number));
        let end = format!(" {}\r\n{payload}\r\n", payload.len());
        let number_at = start.len();
        let request = [start.as_bytes(), &[b'0'; DIGITS], end.as_bytes()].concat();
        Self { slots: Slots::new(in_flight), payload: payload.len(), request, number_at }
    }

    fn request(&self, id: u64, output: &mut Vec<u8>) {
        let at = output.len() + self.number_at;
        output.extend_from_slice(&self.request);
        digits::put(id, &mut output[at..at + DIGITS]);
    }
}

impl Peer for Caller {
    fn begin(&mut self, tally: &mut Tally, output: &mut Vec<u8>) {
        self.slots.begin(tally).for_each(|id| self.request(id, output));
    }

    fn hear(
        &mut self,
        input: &mut Input,
        tally: &mut Tally,
        output: &mut Vec<u8>,
    ) -> io::Result<()> {
        messages(input, output, |message, output| {
            let number = message.subject.last_chunk::<DIGITS>();
            let number = number.and_then(|digits| digits::read(digits));
            let Some(id) = number else {
                tally.stray(message.subject);
                return;
            };
            let is_well = !message.has_headers && message.payload.len() == self.payload;
            let what = if is_well { Ok(()) } else { Err(message.payload) };
            if let Some(id) = self.slots.answer(id, what, tally) {
                self.request(id, output);
            }
        })
    }
}

/// Answers every request with its payload.
#[derive(Debug)]
pub(super) struct Worker;

impl Peer for Worker {
    fn hear(
        &mut self,
        input: &mut Input,
        tally: &mut Tally,
        output: &mut Vec<u8>,
    ) -> io::Result<()> {
        messages(input, output, |message, output| {
            let Some(reply_to) = message.reply_to else {
                tally.stray(message.subject);
                return;
            };
            output.extend_from_slice(b"PUB ");
            output.extend_from_slice(reply_to);
            output.push(b' ');
            put_length(message.payload.len(), output);
            output.extend_from_slice(b"\r\n");
            output.extend_from_slice(message.payload);
            output.extend_from_slice(b"\r\n");
        })
    }
}

/// The beginning of the subjects that the replies of a caller come to.
fn inbox(number: usize) -> String {
    format!("_INBOX.{number}.")
}

/// What subscribes a caller to its replies.
pub(super) fn caller_subscription(number: usize) -> String {
    subscription(&format!("{}*", inbox(number)))
}

/// What subscribes a worker to the calls of an agent type.
pub(super) fn worker_subscription(agent_type: &AgentType) -> String {
    subscription(&format!("{}.*", agent_type.as_str()))
}

pub(super) fn subscription(subject: &str) -> String {
    format!("SUB {subject} 1\r\n")
}

/// As many publishes as `batch`.
pub(super) fn publishes(subject: &str, payload: &[u8], batch: usize) -> Batch {
    let mut all = Batch::default();
    for _ in 0..batch {
        let line = format!("PUB {subject} {}\r\n", payload.len());
        all.bytes.extend_from_slice(line.as_bytes());
        all.numbers_at.push(all.bytes.len());
        all.bytes.extend_from_slice(payload);
        all.bytes.extend_from_slice(b"\r\n");
    }
    all
}

/// Gives the payload of every message to `take`.
pub(super) fn events(
    input: &mut Input,
    output: &mut Vec<u8>,
    take: &mut dyn FnMut(&[u8]),
) -> io::Result<()> {
    messages(input, output, |message, _| take(message.payload))
}

/// Gives each message that is whole in `input` to `take`. Pings are answered into `output`.
fn messages(
    input: &mut Input,
    output: &mut Vec<u8>,
    mut take: impl FnMut(Message<'_>, &mut Vec<u8>),
) -> io::Result<()> {
    loop {
        let bytes = input.waiting();
        let Some(end) = memchr::memchr(b'\n', bytes) else { return Ok(()) };
        let line = bytes[..end].strip_suffix(b"\r").ok_or_else(|| broken(&bytes[..end]))?;
        let taken = match line.first() {
            Some(b'M' | b'H') => {
                let Some((message, length)) = message(line, &bytes[end + 1..])? else {
                    return Ok(());
                };
                take(message, output);
                end + 1 + length
            }
            _ if line == b"PING" => {
                output.extend_from_slice(b"PONG\r\n");
                end + 1
            }
            _ if line == b"PONG" || line.starts_with(b"INFO ") => end + 1,
            _ => return Err(broken(line)),
        };
        input.take(taken);
    }
}

/// The message that `line` announces and `rest` begins with, once all of it is there, and how much of
/// `rest` it is.
fn message<'a>(line: &'a [u8], rest: &'a [u8]) -> io::Result<Option<(Message<'a>, usize)>> {
    let broken = || broken(line);
    let mut fields = line.split(|&byte| byte == b' ');
    let has_headers = match fields.next() {
        Some(b"MSG") => false,
        Some(b"HMSG") => true,
        _ => return Err(broken()),
    };
    let subject = fields.next().ok_or_else(broken)?;
    let _subscription = fields.next().ok_or_else(broken)?;
    let mut last = fields.next_back().ok_or_else(broken)?;
    let length = digits::read(last).ok_or_else(broken)? as usize;
    let head = match has_headers {
        true => {
            last = fields.next_back().ok_or_else(broken)?;
            digits::read(last).ok_or_else(broken)? as usize
        }
        false => 0,
    };
    let reply_to = fields.next();
    let Some(payload) = rest.get(..length.saturating_add(2)) else { return Ok(None) };
    if !payload.ends_with(b"\r\n") || head > length {
        return Err(broken());
    }
    // Of a status there is nothing but its headers to show.
    let payload = if has_headers { &payload[..head] } else { &payload[..length] };
    Ok(Some((Message { subject, reply_to, payload, has_headers }, length + 2)))
}

fn put_length(length: usize, output: &mut Vec<u8>) {
    let mut place = [0; DIGITS];
    digits::put(length as u64, &mut place);
    let zeros = place.iter().take_while(|&&digit| digit == b'0').count();
    output.extend_from_slice(&place[zeros.min(DIGITS - 1)..]);
}

fn broken(line: &[u8]) -> io::Error {
    let line = String::from_utf8_lossy(&line[..line.len().min(200)]);
    io::Error::new(io::ErrorKind::InvalidData, format!("the server sent `{line}`"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::tally::FIRST_ID;

    fn hear(peer: &mut impl Peer, bytes: &[u8], tally: &mut Tally) -> String {
        let (mut input, mut output) = (Input::new(64), Vec::new());
        let mut rest = bytes;
        // In pieces, as a socket may bring them.
        while !rest.is_empty() {
            input.fill(std::io::Read::take(&mut rest, 7)).unwrap();
            peer.hear(&mut input, tally, &mut output).unwrap();
        }
        assert!(input.waiting().is_empty());
        String::from_utf8(output).unwrap()
    }

    #[test]
    fn a_request_comes_back_as_a_reply_and_the_next_follows() {
        let mut tally = Tally::new();
        let mut caller = Caller::new("bench.3", 3, "hello", 1);
        let mut request = Vec::new();
        caller.begin(&mut tally, &mut request);
        let inbox = format!("_INBOX.3.{FIRST_ID:012}");
        let request = String::from_utf8(request).unwrap();
        assert_eq!(request, format!("PUB bench.3 {inbox} 5\r\nhello\r\n"));

        let delivered = format!("PING\r\nMSG bench.3 1 {inbox} 5\r\nhello\r\n");
        let reply = hear(&mut Worker, delivered.as_bytes(), &mut tally);
        assert_eq!(reply, format!("PONG\r\nPUB {inbox} 5\r\nhello\r\n"));

        let delivered = format!("MSG {inbox} 1 5\r\nhello\r\n");
        let next = hear(&mut caller, delivered.as_bytes(), &mut tally);
        assert_eq!(next, request.replace(&inbox, &format!("_INBOX.3.{:012}", FIRST_ID + 1)));
        assert_eq!((tally.answered, tally.errors, tally.strays), (1, 0, 0));
    }

    #[test]
    fn a_call_that_nobody_serves_is_an_error() {
        let mut tally = Tally::new();
        let mut caller = Caller::new("bench.3", 3, "hello", 1);
        caller.begin(&mut tally, &mut Vec::new());
        let status = "NATS/1.0 503\r\n\r\n";
        let bytes = format!("HMSG _INBOX.3.{FIRST_ID:012} 1 16 16\r\n{status}\r\n");
        hear(&mut caller, bytes.as_bytes(), &mut tally);
        assert_eq!((tally.answered, tally.errors), (0, 1));
        assert_eq!(tally.first_error.as_deref(), Some(status));
    }

    #[test]
    fn what_is_no_message_ends_the_run() {
        for line in ["-ERR 'Slow Consumer'\r\n", "MSG a 1 x\r\n", "MSG a 1 1\r\nabcd\r\n", "x\n"] {
            let mut input = Input::new(64);
            input.fill(line.as_bytes()).unwrap();
            assert!(Worker.hear(&mut input, &mut Tally::new(), &mut Vec::new()).is_err(), "{line}");
        }
    }

    #[test]
    fn publishes_are_prepared_with_their_numbers_in_the_payload() {
        let batch = publishes("news", b"12345678rest", 2);
        let text = "PUB news 12\r\n12345678rest\r\n";
        assert_eq!(batch.bytes, text.repeat(2).as_bytes());
        for at in batch.numbers_at {
            assert!(batch.bytes[at..].starts_with(b"12345678"));
        }
    }

    #[test]
    fn a_length_has_no_zeros_in_front() {
        for length in [0, 7, 100, 1 << 20] {
            let mut output = Vec::new();
            put_length(length, &mut output);
            assert_eq!(output, length.to_string().as_bytes());
        }
    }
}
