//! Callers and workers that speak `parlour.v1`. The codec writes what is said once; what is said over
//! and over is those bytes with another number in them.

use std::io;

use bytes::BytesMut;
use parlour_core::wire::{self, CallFrame, Frame, HeaderFields};
use parlour_core::{AgentId, CallId, Payload};

use super::input::Input;
use super::peer::Peer;
use super::tally::{FIRST_ID, Slots, Tally};
use super::websocket::{self, BINARY};

/// The kinds of frames that are read here.
mod kind {
    pub(super) const CALL: u8 = 8;
    pub(super) const REPLY: u8 = 9;
    pub(super) const FAULT: u8 = 10;
    pub(super) const PING: u8 = 14;
    pub(super) const DRAIN: u8 = 16;
}

/// The tag of the field that numbers calls; the codec puts it first.
const ID: u8 = 1 << 3;

/// Makes calls, each in a message of its own.
#[derive(Debug)]
pub(super) struct Caller {
    in_flight: usize,
    slots: Option<Slots>,
    payload: usize,
    /// A call, and where in it its number stands.
    call: Vec<u8>,
    number_at: usize,
}

impl Caller {
    pub(super) fn new(target: AgentId, payload: Payload, in_flight: usize) -> Self {
        let length = payload.bytes.len();
        let frame = Frame::Call(CallFrame {
            id: CallId(FIRST_ID),
            target,
            timeout: None,
            progress: false,
            resent: false,
            header: HeaderFields::default(),
            payload,
        });
        let frame = message(&frame);
        let call = {
            let mut call = Vec::new();
            websocket::message(BINARY, &frame, &mut call);
            call
        };
        // The frame's kind, the length of its header, the tag of the number.
        let length_of_length = frame[1..].iter().take_while(|&&byte| byte >= 0x80).count() + 1;
        let number_at = call.len() - frame.len() + 1 + length_of_length + 1;
        Self { in_flight, slots: None, payload: length, call, number_at }
    }

    fn call(&self, mut id: u64, output: &mut Vec<u8>) {
        let at = output.len() + self.number_at;
        output.extend_from_slice(&self.call);
        for (place, byte) in output[at..at + 5].iter_mut().enumerate() {
            *byte = id as u8 & 0x7f | if place < 4 { 0x80 } else { 0 };
            id >>= 7;
        }
    }
}

impl Peer for Caller {
    fn begin(&mut self, tally: &mut Tally, output: &mut Vec<u8>) {
        let slots = Slots::begin(self.in_flight, tally);
        slots.ids().for_each(|id| self.call(id, output));
        self.slots = Some(slots);
    }

    fn hear(
        &mut self,
        input: &mut Input,
        tally: &mut Tally,
        output: &mut Vec<u8>,
    ) -> io::Result<()> {
        websocket::messages(input, output, |message, output| {
            frames(message, |kind, header, payload| match kind {
                kind::REPLY | kind::FAULT => {
                    let Some((id, _)) = number(header) else { return Err(broken()) };
                    let is_well = kind == kind::REPLY && payload.len() == self.payload;
                    let what = if is_well { Ok(()) } else { Err(header) };
                    let Some(slots) = &mut self.slots else { return Err(broken()) };
                    if let Some(id) = slots.answer(id, what, tally) {
                        self.call(id, output);
                    }
                    Ok(())
                }
                _ => other(kind, header, output),
            })
        })
    }
}

/// Answers every call with its payload.
#[derive(Debug)]
pub(super) struct Worker {
    /// The header of a reply behind its number.
    content_type: Vec<u8>,
}

impl Worker {
    pub(super) fn new(payload: &Payload) -> Self {
        let payload = Payload { bytes: bytes::Bytes::new(), ..payload.clone() };
        let frame = message(&Frame::Reply(CallId(0), Ok(payload)));
        // The kind, a length of one byte, the tag of the number, the number; a payload's length.
        Self { content_type: frame[4..frame.len() - 1].to_vec() }
    }
}

impl Peer for Worker {
    fn hear(
        &mut self,
        input: &mut Input,
        _tally: &mut Tally,
        output: &mut Vec<u8>,
    ) -> io::Result<()> {
        websocket::messages(input, output, |message, output| {
            frames(message, |kind, header, payload| match kind {
                kind::CALL => {
                    let Some((_, id)) = number(header) else { return Err(broken()) };
                    let parts = [id, &self.content_type];
                    let header: usize = parts.iter().map(|part| part.len()).sum::<usize>() + 1;
                    let lengths = varint_length(header) + varint_length(payload.len());
                    websocket::header(BINARY, 1 + lengths + header + payload.len(), output);
                    output.push(kind::REPLY);
                    put_varint(header, output);
                    output.push(ID);
                    parts.iter().for_each(|part| output.extend_from_slice(part));
                    put_varint(payload.len(), output);
                    output.extend_from_slice(payload);
                    Ok(())
                }
                _ => other(kind, header, output),
            })
        })
    }
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
            let Some((number, _)) = number(header) else { return Err(broken()) };
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

/// The number in a header, and the bytes that write it.
fn number(header: &[u8]) -> Option<(u64, &[u8])> {
    let number = header.strip_prefix(&[ID])?;
    let (value, rest) = varint(number)?;
    Some((value, &number[..number.len() - rest.len()]))
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

    fn hear(peer: &mut impl Peer, frame: &Frame, tally: &mut Tally) -> Vec<u8> {
        let payload = message(frame);
        let mut bytes = vec![0x80 | BINARY, 126];
        bytes.extend_from_slice(&(payload.len() as u16).to_be_bytes());
        bytes.extend_from_slice(&payload);
        let (mut input, mut output) = (Input::new(32 << 10), Vec::new());
        input.fill(&bytes[..]).unwrap();
        peer.hear(&mut input, tally, &mut output).unwrap();
        output
    }

    #[test]
    fn what_is_patched_is_what_the_codec_would_write() {
        for length in [0, 1, 100, 200, 20_000] {
            let payload = Payload::text("x".repeat(length));
            let target = AgentId::parse("bench/1").unwrap();
            let mut tally = Tally::new();
            let mut caller = Caller::new(target.clone(), payload.clone(), 2);
            let mut worker = Worker::new(&payload);

            let mut calls = Vec::new();
            caller.begin(&mut tally, &mut calls);
            for id in [FIRST_ID, FIRST_ID + 1] {
                let call = wire::decode(&mut unframe(&mut calls)).unwrap().unwrap();
                let Frame::Call(call) = call else { panic!("{call:?}") };
                assert_eq!((call.id, &call.target), (CallId(id), &target));

                let call = Frame::Call(CallFrame { id: CallId(300), ..call });
                let mut reply = hear(&mut worker, &call, &mut tally);
                let reply = wire::decode(&mut unframe(&mut reply)).unwrap().unwrap();
                assert_eq!(reply, Frame::Reply(CallId(300), Ok(payload.clone())));
            }
            assert!(calls.is_empty());

            let reply = Frame::Reply(CallId(FIRST_ID + 1), Ok(payload));
            let mut next = hear(&mut caller, &reply, &mut tally);
            let next = wire::decode(&mut unframe(&mut next)).unwrap();
            assert!(matches!(next, Some(Frame::Call(call)) if call.id == CallId(FIRST_ID + 3)));
            assert_eq!((tally.answered, tally.errors, tally.open), (1, 0, 2));
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
