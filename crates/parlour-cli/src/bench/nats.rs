//! Callers, workers and subscribers that speak NATS, as fast clients do: each caller has one inbox,
//! and the last token of the subject that a reply comes to is the number of its call.

use std::io;

use parlour_core::AgentType;

use super::digits::{self, DIGITS};
use super::fanout::{Batch, Take};
use super::input::Input;
use super::peer::Peer;
use super::tally::{Slots, Tally, Turns};

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
    expects: Expects,
    /// A request, and where in it its number stands: in the subject of its reply, and in its id.
    request: Vec<u8>,
    number_at: usize,
    id_at: Option<usize>,
}

/// What a good answer looks like.
#[derive(Debug)]
enum Expects {
    Echo {
        payload: usize,
    },
    /// A stream has it.
    Stored {
        stream: String,
    },
}

impl Caller {
    /// Calls `subject`; replies come to what [`inbox`] of `number` subscribes to.
    pub(super) fn new(subject: &str, number: usize, payload: &str, in_flight: usize) -> Self {
        let start = format!("PUB {subject} {}", inbox(number));
        let end = format!(" {}\r\n{payload}\r\n", payload.len());
        let number_at = start.len();
        let request = [start.as_bytes(), &[b'0'; DIGITS], end.as_bytes()].concat();
        let (slots, expects) = (Slots::new(in_flight), Expects::Echo { payload: payload.len() });
        Self { slots, expects, request, number_at, id_at: None }
    }

    /// Publishes to `subject`, which `stream` keeps, each message under an id of its own if there is
    /// something for ids to begin with.
    pub(super) fn stores(
        stream: &str,
        subject: &str,
        number: usize,
        payload: &str,
        ids: Option<&str>,
        in_flight: usize,
    ) -> Self {
        let expects = Expects::Stored { stream: format!(r#"{{"stream":"{stream}","#) };
        let Some(ids) = ids else {
            return Self { expects, ..Self::new(subject, number, payload, in_flight) };
        };
        let zeros = "0".repeat(DIGITS);
        let start = format!("HPUB {subject} {}", inbox(number));
        let headers = format!("NATS/1.0\r\nNats-Msg-Id: {ids}{zeros}\r\n\r\n");
        let (head, all) = (headers.len(), headers.len() + payload.len());
        let request = format!("{start}{zeros} {head} {all}\r\n{headers}{payload}\r\n");
        // Before the ends of two lines and the message behind them.
        let id_at = request.len() - payload.len() - 2 - 4 - DIGITS;
        Self {
            slots: Slots::new(in_flight),
            expects,
            request: request.into_bytes(),
            number_at: start.len(),
            id_at: Some(id_at),
        }
    }

    fn request(&self, id: u64, output: &mut Vec<u8>) {
        let start = output.len();
        output.extend_from_slice(&self.request);
        for at in [Some(self.number_at), self.id_at].into_iter().flatten() {
            digits::put(id, &mut output[start + at..start + at + DIGITS]);
        }
    }
}

impl Expects {
    fn are_met(&self, payload: &[u8]) -> bool {
        match self {
            Self::Echo { payload: length } => payload.len() == *length,
            Self::Stored { stream } => {
                // What was stored under its id before is no new message.
                payload.starts_with(stream.as_bytes()) && !payload.ends_with(b"true}")
            }
        }
    }
}

impl Peer for Caller {
    fn begin(&mut self, tally: &mut Tally, output: &mut Vec<u8>) {
        self.slots.begin(tally).for_each(|id| self.request(id, output));
    }

    fn hear(&mut self, input: &mut Input, tally: &mut Tally, out: &mut Vec<u8>) -> io::Result<()> {
        messages(input, out, |message, out| {
            let number = message.subject.last_chunk::<DIGITS>();
            let number = number.and_then(|digits| digits::read(digits));
            let Some(id) = number else {
                tally.stray(message.subject);
                return;
            };
            let is_well = !message.has_headers && self.expects.are_met(message.payload);
            let what = if is_well { Ok(()) } else { Err(message.payload) };
            if let Some(id) = self.slots.answer(id, what, tally) {
                self.request(id, out);
            }
        })
    }
}

/// Answers every request with its payload.
#[derive(Debug)]
pub(super) struct Worker;

impl Peer for Worker {
    fn hear(&mut self, input: &mut Input, tally: &mut Tally, out: &mut Vec<u8>) -> io::Result<()> {
        messages(input, out, |message, out| {
            let Some(reply_to) = message.reply_to else {
                tally.stray(message.subject);
                return;
            };
            out.extend_from_slice(b"PUB ");
            out.extend_from_slice(reply_to);
            out.push(b' ');
            put_length(message.payload.len(), out);
            out.extend_from_slice(b"\r\n");
            out.extend_from_slice(message.payload);
            out.extend_from_slice(b"\r\n");
        })
    }
}

/// What makes a stream that keeps what is published to `subjects` in a file.
pub(super) fn stream(stream: &str, subjects: &str) -> String {
    let config = format!(
        r#"{{"name":"{stream}","subjects":["{subjects}"],"storage":"file","retention":"limits","num_replicas":1}}"#
    );
    let length = config.len();
    format!("PUB $JS.API.STREAM.CREATE.{stream} {} {length}\r\n{config}\r\n", inbox(0) + "0")
}

/// The payload of the first message in `input`, once it is whole.
pub(super) fn first(input: &mut Input, output: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    let mut first = None;
    messages(input, output, |message, _| {
        first.get_or_insert_with(|| message.payload.to_vec());
    })?;
    Ok(first)
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
pub(super) fn events(input: &mut Input, out: &mut Vec<u8>, take: Take<'_>) -> io::Result<()> {
    messages(input, out, |message, _| take(message.payload))
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
    fn what_a_stream_keeps_is_counted_and_what_it_refuses_or_knows_is_an_error() {
        for ids in [None, Some("run-")] {
            let mut tally = Tally::new();
            let mut caller = Caller::stores("LOG", "log.1", 1, "hello", ids, 1);
            let mut request = Vec::new();
            caller.begin(&mut tally, &mut request);
            let request = String::from_utf8(request).unwrap();
            let (inbox, number) = (inbox(1), format!("{FIRST_ID:012}"));
            let expected = match ids {
                None => format!("PUB log.1 {inbox}{number} 5\r\nhello\r\n"),
                Some(ids) => {
                    let headers = format!("NATS/1.0\r\nNats-Msg-Id: {ids}{number}\r\n\r\n");
                    let (head, all) = (headers.len(), headers.len() + 5);
                    format!("HPUB log.1 {inbox}{number} {head} {all}\r\n{headers}hello\r\n")
                }
            };
            assert_eq!(request, expected);

            let answers = [
                r#"{"stream":"LOG", "seq":1}"#,
                r#"{"stream":"LOG", "seq":1,"duplicate": true}"#,
                r#"{"error":{"code":503},"stream":"LOG","seq":0}"#,
            ];
            let mut next = request;
            for (answer, id) in answers.iter().zip(FIRST_ID..) {
                let message = format!("MSG {inbox}{id:012} 1 {}\r\n{answer}\r\n", answer.len());
                let following = hear(&mut caller, message.as_bytes(), &mut tally);
                let number = (format!("{id:012}"), format!("{:012}", id + 1));
                assert_eq!(following, next.replace(&number.0, &number.1));
                next = following;
            }
            assert_eq!((tally.answered, tally.errors), (1, 2));
        }
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
