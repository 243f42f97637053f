//! Callers and workers that speak `parlour.v1`. The codec writes what is said once; what is said over
//! and over is those bytes with another number in them.

use std::io;
use std::ops::Range;

use bytes::BytesMut;
use parlour_core::wire::{self, CallFrame, Done, Frame, HeaderFields, PublishFrame, SendFrame};
use parlour_core::{AgentId, AgentType, CallId, InvalidName, Key, Payload, TopicId};

use super::digits::{self, DIGITS};
use super::fanout::{Batch, Take};
use super::input::Input;
use super::life::Lives;
use super::peer::{Finder, Peer};
use super::tally::{FIRST_ID, Slots, Tally, Turns};
use super::web::MARK;
use super::websocket::{self, BINARY};

/// The kinds of frames that are read here.
mod kind {
    pub(super) const WELCOME: u8 = 2;
    pub(super) const DONE: u8 = 7;
    pub(super) const CALL: u8 = 8;
    pub(super) const REPLY: u8 = 9;
    pub(super) const FAULT: u8 = 10;
    pub(super) const EVENT: u8 = 12;
    pub(super) const PING: u8 = 14;
    pub(super) const DRAIN: u8 = 16;
    pub(super) const ACCEPTED: u8 = 22;
}

/// The tag of the field that numbers calls; the codec puts it first.
const ID: u8 = 1 << 3;

/// As many bytes of frames as are put into one message, where several are.
const MESSAGE: usize = 64 << 10;

/// Stands where the key of an agent is to be, which has as many digits.
const ANY_KEY: &str = "?????";

/// Makes calls, publishes events that are acknowledged, or sends messages that are kept.
#[derive(Debug)]
pub(super) struct Caller {
    turns: Box<dyn Turns>,
    expects: Expects,
    request: Request,
}

/// What a caller asks for over and over.
#[derive(Debug)]
struct Request {
    frame: Vec<u8>,
    /// Where in the frame the number of a request stands.
    number_at: usize,
    /// Where the key of an agent stands, and which keys there are.
    key_at: Option<usize>,
    keys: Range<usize>,
    /// Where the number stands again, as text.
    mark_at: Option<usize>,
    packer: Packer,
}

/// What a good answer looks like.
#[derive(Debug)]
enum Expects {
    Reply {
        payload: usize,
    },
    /// The header behind the number.
    Done {
        header: Vec<u8>,
    },
    /// What is on the disk.
    Durable {
        ack: Finder,
    },
}

impl Caller {
    /// Calls the agents of these keys, in turns.
    pub(super) fn calls(
        agent_type: &AgentType,
        keys: Range<usize>,
        payload: &Payload,
        in_flight: usize,
    ) -> Result<Self, InvalidName> {
        let frame = message(&Frame::from(CallFrame {
            id: CallId(FIRST_ID),
            target: AgentId::new(agent_type.clone(), Key::parse(ANY_KEY)?),
            timeout: None,
            progress: false,
            resent: false,
            attempt: None,
            topic: None,
            header: HeaderFields::default(),
            payload: payload.clone(),
        }));
        let expects = Expects::Reply { payload: payload.bytes.len() };
        let turns = Box::new(Slots::new(in_flight));
        Ok(Self { turns, expects, request: Request::new(&frame).to(keys) })
    }

    /// Publishes events to a topic that so many subscribe to.
    pub(super) fn publishes(
        topic: TopicId,
        payload: Payload,
        in_flight: usize,
        recipients: u64,
    ) -> Self {
        let frame = message(&Frame::from(PublishFrame {
            request: Some(CallId(FIRST_ID)),
            ack: None,
            topic,
            header: HeaderFields::default(),
            payload,
        }));
        let done = Done { request: CallId(0), recipients, dropped: Vec::new() };
        let done = message(&Frame::Done(done));
        // The kind, a length of one byte, the tag of the number, the number; a payload's length.
        let header = done[4..done.len() - 1].to_vec();
        let turns = Box::new(Slots::new(in_flight));
        Self { turns, expects: Expects::Done { header }, request: Request::new(&frame) }
    }

    /// Sends messages to the agents of these keys, in turns, each under an idempotency key of its own if
    /// there is something for those to begin with. The number of each also stands where the [`MARK`] is
    /// in the payload.
    pub(super) fn sends(
        agent_type: &AgentType,
        keys: Range<usize>,
        payload: Payload,
        idempotency_keys: Option<&str>,
        turns: Box<dyn Turns>,
    ) -> Result<Self, InvalidName> {
        let idempotency_key = idempotency_keys.map(|keys| format!("{keys}{MARK}").into());
        let frame = message(&Frame::from(SendFrame {
            request: CallId(FIRST_ID),
            target: AgentId::new(agent_type.clone(), Key::parse(ANY_KEY)?),
            delay: None,
            deliver_at: None,
            ttl: None,
            max_attempts: None,
            header: HeaderFields { idempotency_key, ..HeaderFields::default() },
            payload,
        }));
        let expects = Expects::Durable { ack: Finder::new(&b"\x07durable"[..]) };
        let mark_at = position(&frame, MARK);
        Ok(Self { turns, expects, request: Request { mark_at, ..Request::new(&frame).to(keys) } })
    }

    /// Whether what is written at once goes into one message, rather than each request into its own.
    pub(super) fn coalesce(mut self, coalesce: bool) -> Self {
        self.request.packer.coalesce = coalesce;
        self
    }
}

impl Request {
    fn new(frame: &[u8]) -> Self {
        // The frame's kind, the length of its header, the tag of the number.
        let length_of_length = frame[1..].iter().take_while(|&&byte| byte >= 0x80).count() + 1;
        let number_at = 1 + length_of_length + 1;
        let (frame, packer) = (frame.to_vec(), Packer::default());
        Self { frame, number_at, key_at: None, keys: 0..1, mark_at: None, packer }
    }

    /// One to the agents of these keys, in turns.
    fn to(self, keys: Range<usize>) -> Self {
        Self { key_at: position(&self.frame, ANY_KEY), keys, ..self }
    }

    fn put(&mut self, id: u64, output: &mut Vec<u8>) {
        let out = self.packer.room(self.frame.len(), output);
        let start = out.len();
        out.extend_from_slice(&self.frame);
        let frame = &mut out[start..];
        let number = &mut frame[self.number_at..self.number_at + 5];
        for (place, byte) in number.iter_mut().enumerate() {
            *byte = (id >> (7 * place)) as u8 & 0x7f | if place < 4 { 0x80 } else { 0 };
        }
        if let Some(at) = self.key_at {
            let key = self.keys.start + id as usize % self.keys.len();
            digits::put(key as u64, &mut frame[at..at + ANY_KEY.len()]);
        }
        if let Some(at) = self.mark_at {
            digits::put(id, &mut frame[at..at + DIGITS]);
        }
    }
}

fn position(frame: &[u8], text: &str) -> Option<usize> {
    frame.windows(text.len()).position(|part| part == text.as_bytes())
}

impl Expects {
    /// Whether a frame answers a request well, given what follows the number in its header.
    fn are_met(&mut self, kind: u8, header: &[u8], payload: &[u8]) -> bool {
        match self {
            Self::Reply { payload: length } => kind == kind::REPLY && payload.len() == *length,
            Self::Done { header: expected } => kind == kind::DONE && header == expected,
            Self::Durable { ack } => kind == kind::ACCEPTED && ack.after(header).is_some(),
        }
    }
}

impl Peer for Caller {
    fn begin(&mut self, tally: &mut Tally, out: &mut Vec<u8>) {
        self.turns.begin(tally).for_each(|id| self.request.put(id, out));
        self.request.packer.finish(out);
    }

    fn prompt(&mut self, tally: &mut Tally, out: &mut Vec<u8>) {
        self.turns.woken(tally, &mut |id| self.request.put(id, out));
        self.request.packer.finish(out);
    }

    fn hear(&mut self, input: &mut Input, tally: &mut Tally, out: &mut Vec<u8>) -> io::Result<()> {
        websocket::messages(input, out, |message, out| {
            frames(message, |kind, header, payload| match kind {
                kind::REPLY | kind::FAULT | kind::DONE | kind::ACCEPTED => {
                    let Some((id, _, rest)) = number(header) else { return Err(broken()) };
                    let is_well = self.expects.are_met(kind, rest, payload);
                    let what = if is_well { Ok(()) } else { Err(header) };
                    if let Some(id) = self.turns.answer(id, what, tally) {
                        self.request.put(id, out);
                    }
                    Ok(())
                }
                _ => other(kind, header, out),
            })
        })?;
        self.request.packer.finish(out);
        Ok(())
    }
}

/// Puts frames into messages: each into its own, or as many as there are into one.
#[derive(Debug, Default)]
struct Packer {
    coalesce: bool,
    /// Frames of a message that has not been written yet.
    frames: Vec<u8>,
}

impl Packer {
    /// Where a frame of `length` bytes is to be appended.
    fn room<'a>(&'a mut self, length: usize, output: &'a mut Vec<u8>) -> &'a mut Vec<u8> {
        if !self.coalesce {
            websocket::header(BINARY, length, output);
            return output;
        }
        if self.frames.len() + length > MESSAGE {
            self.finish(output);
        }
        &mut self.frames
    }

    /// Writes what has not been written yet.
    fn finish(&mut self, output: &mut Vec<u8>) {
        if !self.frames.is_empty() {
            websocket::message(BINARY, &self.frames, output);
            self.frames.clear();
        }
    }
}

/// Answers every call with its payload.
#[derive(Debug)]
pub(super) struct Worker {
    /// The header of a reply behind its number.
    content_type: Vec<u8>,
    packer: Packer,
    /// Is given the calls of a worker that answers each with nothing.
    lives: Option<Lives>,
}

impl Worker {
    /// Answers like `payload`; with `coalesce`, what is written at once goes into one message.
    pub(super) fn new(payload: &Payload, coalesce: bool) -> Self {
        let payload = Payload { bytes: bytes::Bytes::new(), ..payload.clone() };
        let frame = message(&Frame::Reply(CallId(0), Ok(payload)));
        // The kind, a length of one byte, the tag of the number, the number; a payload's length.
        let content_type = frame[4..frame.len() - 1].to_vec();
        Self { content_type, packer: Packer { coalesce, ..Packer::default() }, lives: None }
    }

    /// One that tells `lives` of every message, and answers with nothing.
    pub(super) fn of(lives: Lives) -> Self {
        Self { lives: Some(lives), ..Self::new(&Payload::default(), true) }
    }
}

impl Peer for Worker {
    fn hear(&mut self, input: &mut Input, tally: &mut Tally, out: &mut Vec<u8>) -> io::Result<()> {
        websocket::messages(input, out, |message, out| {
            frames(message, |kind, header, payload| match kind {
                kind::CALL => {
                    let Some((_, id, _)) = number(header) else { return Err(broken()) };
                    let mut payload = payload;
                    if let Some(lives) = &self.lives {
                        lives.delivered(payload, tally);
                        payload = &[];
                    }
                    let parts = [id, &self.content_type];
                    let header: usize = parts.iter().map(|part| part.len()).sum::<usize>() + 1;
                    let lengths = varint_length(header) + varint_length(payload.len());
                    let out = self.packer.room(1 + lengths + header + payload.len(), out);
                    out.push(kind::REPLY);
                    put_varint(header, out);
                    out.push(ID);
                    parts.iter().for_each(|part| out.extend_from_slice(part));
                    put_varint(payload.len(), out);
                    out.extend_from_slice(payload);
                    Ok(())
                }
                _ => other(kind, header, out),
            })
        })?;
        self.packer.finish(out);
        Ok(())
    }
}

/// As many publishes, which nobody acknowledges, as `batch`. They go into a message each or, with
/// `coalesce`, together.
pub(super) fn publishes(topic: TopicId, payload: Payload, batch: usize, coalesce: bool) -> Batch {
    let length = payload.bytes.len();
    let header = HeaderFields::default();
    let publish = PublishFrame { request: None, ack: None, topic, header, payload };
    let frame = message(&Frame::from(publish));
    let most = if coalesce { (MESSAGE / frame.len()).max(1) } else { 1 };
    let mut all = Batch::default();
    let mut left = batch;
    while left > 0 {
        let count = left.min(most);
        websocket::header(BINARY, frame.len() * count, &mut all.bytes);
        for _ in 0..count {
            all.bytes.extend_from_slice(&frame);
            all.numbers_at.push(all.bytes.len() - length);
        }
        left -= count;
    }
    all
}

/// Gives the payload of every event to `take`.
pub(super) fn events(input: &mut Input, out: &mut Vec<u8>, take: Take<'_>) -> io::Result<()> {
    websocket::messages(input, out, |message, out| {
        frames(message, |kind, header, payload| match kind {
            kind::EVENT => {
                take(payload);
                Ok(())
            }
            _ => other(kind, header, out),
        })
    })
}

/// Whether the host has welcomed a client.
pub(super) fn welcomed(input: &mut Input, output: &mut Vec<u8>) -> io::Result<bool> {
    awaited(kind::WELCOME, input, output)
}

/// Whether the host has done what it was asked to.
pub(super) fn done(input: &mut Input, output: &mut Vec<u8>) -> io::Result<bool> {
    awaited(kind::DONE, input, output)
}

fn awaited(awaited: u8, input: &mut Input, output: &mut Vec<u8>) -> io::Result<bool> {
    let mut has_come = false;
    websocket::messages(input, output, |message, output| {
        frames(message, |kind, header, _payload| {
            has_come |= kind == awaited;
            other(kind, header, output)
        })
    })?;
    Ok(has_come)
}

/// One frame as a message to write.
pub(super) fn message(frame: &Frame) -> BytesMut {
    let mut bytes = BytesMut::new();
    wire::encode(frame, &mut bytes);
    bytes
}

/// What either end does with a frame that is not about calls.
fn other(kind: u8, header: &[u8], output: &mut Vec<u8>) -> io::Result<()> {
    match kind {
        kind::PING => {
            let Some((number, ..)) = number(header) else { return Err(broken()) };
            websocket::message(BINARY, &message(&Frame::Pong(number)), output);
            Ok(())
        }
        kind::DRAIN => Err(io::Error::other("the host is shutting down")),
        kind::CALL..=kind::FAULT => Err(broken()),
        // Such as withdrawn calls, which are answered all the same.
        _ => Ok(()),
    }
}

/// Gives the kind, header and payload of each frame of a message to `take`.
fn frames(
    mut message: &[u8],
    mut take: impl FnMut(u8, &[u8], &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    while let Some((&kind, rest)) = message.split_first() {
        let frame = block(rest).and_then(|(header, rest)| Some((header, block(rest)?)));
        let Some((header, (payload, rest))) = frame else { return Err(broken()) };
        take(kind, header, payload)?;
        message = rest;
    }
    Ok(())
}

/// The number in a header, the bytes that write it, and what follows them.
fn number(header: &[u8]) -> Option<(u64, &[u8], &[u8])> {
    let number = header.strip_prefix(&[ID])?;
    let (value, rest) = varint(number)?;
    Some((value, &number[..number.len() - rest.len()], rest))
}

fn block(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = varint(bytes)?;
    rest.split_at_checked(usize::try_from(length).ok()?)
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (place, &byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Some((value, &bytes[place + 1..]));
        }
    }
    None
}

fn put_varint(mut value: usize, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn varint_length(value: usize) -> usize {
    (usize::BITS - (value | 1).leading_zeros()).div_ceil(7) as usize
}

fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the host sent a frame of parlour.v1 out of order")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use parlour_core::durable::DeliveryId;
    use parlour_core::wire::AcceptedFrame;
    use parlour_core::{MessageId, TopicType};

    use super::*;

    /// Takes the first message off bytes that a client wrote with a mask of zeros.
    fn unframe(output: &mut Vec<u8>) -> Bytes {
        let (head, length) = match output[1] & 0x7f {
            126 => (8, usize::from(u16::from_be_bytes([output[2], output[3]]))),
            length => (6, usize::from(length)),
        };
        let message: Vec<u8> = output.drain(..head + length).skip(head).collect();
        Bytes::from(message)
    }

    fn hear(peer: &mut impl Peer, frames: &[Frame], tally: &mut Tally) -> Vec<u8> {
        let payload: Vec<u8> = frames.iter().flat_map(message).collect();
        let mut bytes = vec![0x80 | BINARY, 126];
        bytes.extend_from_slice(&(payload.len() as u16).to_be_bytes());
        bytes.extend_from_slice(&payload);
        let (mut input, mut output) = (Input::new(32 << 10), Vec::new());
        input.fill(&bytes[..]).unwrap();
        peer.hear(&mut input, tally, &mut output).unwrap();
        output
    }

    #[test]
    fn a_message_that_is_not_on_the_disk_is_an_error_and_each_has_a_key_of_its_own() {
        let (agent_type, payload) = (AgentType::parse("bench").unwrap(), Payload::text("hello"));
        let mut tally = Tally::new();
        let turns = Box::new(Slots::new(1));
        let mut sender = Caller::sends(&agent_type, 1..2, payload, Some("run-"), turns).unwrap();
        let mut output = Vec::new();
        sender.begin(&mut tally, &mut output);
        for (ack, id) in ["durable", "memory", "durable"].into_iter().zip(FIRST_ID..) {
            let sent = wire::decode(&mut unframe(&mut output)).unwrap().unwrap();
            let Frame::Send(sent) = sent else { panic!("{sent:?}") };
            assert_eq!(sent.header.idempotency_key.unwrap(), format!("run-{id:012}"));
            let accepted = Frame::from(AcceptedFrame {
                request: sent.request,
                delivery: DeliveryId::parse("3-9f2c11aa-1").unwrap(),
                conversation: MessageId::parse("talk").unwrap(),
                ack: ack.into(),
                generation: 1,
                known: false,
            });
            output = hear(&mut sender, &[accepted], &mut tally);
        }
        assert_eq!((tally.answered, tally.errors), (2, 1));
    }

    #[test]
    fn what_is_patched_is_what_the_codec_would_write() {
        for length in [0, 1, 100, 200, 20_000] {
            let payload = Payload::text("x".repeat(length));
            let agent_type = AgentType::parse("bench").unwrap();
            let mut tally = Tally::new();
            let mut caller = Caller::calls(&agent_type, 7..9, &payload, 2).unwrap();
            let mut worker = Worker::new(&payload, false);

            let mut calls = Vec::new();
            caller.begin(&mut tally, &mut calls);
            for (id, key) in [(FIRST_ID, "00007"), (FIRST_ID + 1, "00008")] {
                let call = wire::decode(&mut unframe(&mut calls)).unwrap().unwrap();
                let Frame::Call(call) = call else { panic!("{call:?}") };
                assert_eq!((call.id, call.target.key.as_str()), (CallId(id), key));

                let call = Frame::from(CallFrame { id: CallId(300), ..*call });
                let mut reply = hear(&mut worker, &[call], &mut tally);
                let reply = wire::decode(&mut unframe(&mut reply)).unwrap().unwrap();
                assert_eq!(reply, Frame::Reply(CallId(300), Ok(payload.clone())));
            }
            assert!(calls.is_empty());

            let reply = Frame::Reply(CallId(FIRST_ID + 1), Ok(payload));
            let mut next = hear(&mut caller, &[reply], &mut tally);
            let next = wire::decode(&mut unframe(&mut next)).unwrap();
            assert!(matches!(next, Some(Frame::Call(call)) if call.id == CallId(FIRST_ID + 3)));
            assert_eq!((tally.answered, tally.errors, tally.open), (1, 0, 2));
        }
    }

    #[test]
    fn several_frames_go_into_one_message_where_that_is_asked_for() {
        let payload = Payload::text("hello");
        let agent_type = AgentType::parse("bench").unwrap();
        let mut tally = Tally::new();
        let caller = Caller::calls(&agent_type, 0..1, &payload, 3).unwrap();
        let mut calls = Vec::new();
        caller.coalesce(true).begin(&mut tally, &mut calls);
        let mut message = unframe(&mut calls);
        assert!(calls.is_empty());
        let mut frames = Vec::new();
        while !message.is_empty() {
            frames.push(wire::decode(&mut message).unwrap().unwrap());
        }
        assert_eq!(frames.len(), 3);

        let mut replies = hear(&mut Worker::new(&payload, true), &frames, &mut tally);
        let mut message = unframe(&mut replies);
        assert!(replies.is_empty());
        for id in FIRST_ID..FIRST_ID + 3 {
            let reply = wire::decode(&mut message).unwrap().unwrap();
            assert_eq!(reply, Frame::Reply(CallId(id), Ok(payload.clone())));
        }
    }

    #[test]
    fn an_event_is_well_only_if_it_went_to_all() {
        let mut tally = Tally::new();
        let topic = TopicId::new(TopicType::parse("news").unwrap(), Key::parse("tech").unwrap());
        let mut publisher = Caller::publishes(topic.clone(), Payload::text("hello"), 3, 2);
        let mut events = Vec::new();
        publisher.begin(&mut tally, &mut events);
        let event = wire::decode(&mut unframe(&mut events)).unwrap();
        let Some(Frame::Publish(event)) = event else { panic!("{event:?}") };
        assert_eq!((event.request, event.topic), (Some(CallId(FIRST_ID)), topic));

        let done = |place, recipients, dropped: &[&str]| {
            let dropped = dropped.iter().map(|&name| name.into()).collect();
            Frame::Done(Done { request: CallId(FIRST_ID + place), recipients, dropped })
        };
        let answers = [done(0, 2, &[]), done(1, 1, &[]), done(2, 2, &["a/b"])];
        hear(&mut publisher, &answers, &mut tally);
        assert_eq!((tally.answered, tally.errors), (1, 2));
    }

    #[test]
    fn a_batch_of_publishes_is_as_the_codec_would_write_it() {
        let topic = TopicId::new(TopicType::parse("news").unwrap(), Key::parse("tech").unwrap());
        for coalesce in [false, true] {
            let mut batch = publishes(topic.clone(), Payload::text("12345678"), 3, coalesce);
            for &at in &batch.numbers_at {
                batch.bytes[at..at + 8].copy_from_slice(b"abcdefgh");
            }
            let mut events = 0;
            while !batch.bytes.is_empty() {
                let mut message = unframe(&mut batch.bytes);
                while !message.is_empty() {
                    let frame = wire::decode(&mut message).unwrap();
                    let Some(Frame::Publish(event)) = frame else { panic!("{frame:?}") };
                    assert_eq!((event.request, &event.payload.bytes[..]), (None, &b"abcdefgh"[..]));
                    events += 1;
                }
            }
            assert_eq!(events, 3);
        }
    }

    #[test]
    fn the_length_of_a_varint_is_known_before_it_is_written() {
        for value in [0, 1, 127, 128, 16_383, 16_384, 1 << 21, 1 << 28] {
            let mut out = Vec::new();
            put_varint(value, &mut out);
            assert_eq!(varint_length(value), out.len(), "{value}");
        }
    }
}
