//! Callers, workers and subscribers of the blind forwarder in `bench/peers`: a message is the slot of
//! the connection that is to have it, the number of the call, and the payload.

use std::io;

use super::fanout::{Batch, NUMBER, Take};
use super::input::Input;
use super::peer::Peer;
use super::tally::{Slots, Tally, Turns};
use super::websocket::{self, BINARY};

/// A slot is a number of this many bytes. It arrives as that of the connection that sent the message.
const SLOT: usize = size_of::<u32>();
const EVERYBODY: u32 = u32::MAX;

/// Makes calls to the connections in some slots.
#[derive(Debug)]
pub(super) struct Caller {
    slots: Slots,
    /// The connections that are called, in turns.
    workers: Vec<u32>,
    /// A call, and where in it the slot and the number stand.
    call: Vec<u8>,
    slot_at: usize,
    /// How long an answer is.
    length: usize,
}

impl Caller {
    /// Sends messages to a forwarder that writes them into a file instead.
    pub(super) fn writer(payload: &str, in_flight: usize) -> Self {
        Self { length: SLOT + NUMBER, ..Self::new(vec![0], payload, in_flight) }
    }

    pub(super) fn new(workers: Vec<u32>, payload: &str, in_flight: usize) -> Self {
        let length = SLOT + NUMBER + payload.len();
        let mut call = Vec::new();
        websocket::header(BINARY, length, &mut call);
        let slot_at = call.len();
        call.extend_from_slice(&[0; SLOT + NUMBER]);
        call.extend_from_slice(payload.as_bytes());
        Self { slots: Slots::new(in_flight), workers, call, slot_at, length }
    }

    fn call(&self, id: u64, output: &mut Vec<u8>) {
        let at = output.len() + self.slot_at;
        output.extend_from_slice(&self.call);
        let worker = self.workers[id as usize % self.workers.len()];
        output[at..at + SLOT].copy_from_slice(&worker.to_be_bytes());
        output[at + SLOT..at + SLOT + NUMBER].copy_from_slice(&id.to_be_bytes());
    }
}

impl Peer for Caller {
    fn begin(&mut self, tally: &mut Tally, output: &mut Vec<u8>) {
        self.slots.begin(tally).for_each(|id| self.call(id, output));
    }

    fn hear(&mut self, input: &mut Input, tally: &mut Tally, out: &mut Vec<u8>) -> io::Result<()> {
        websocket::messages(input, out, |message, out| {
            let number = message.get(SLOT..).and_then(<[u8]>::first_chunk::<NUMBER>);
            let Some(number) = number else {
                tally.stray(message);
                return Ok(());
            };
            let what = if message.len() == self.length { Ok(()) } else { Err(message) };
            if let Some(id) = self.slots.answer(u64::from_be_bytes(*number), what, tally) {
                self.call(id, out);
            }
            Ok(())
        })
    }
}

/// Sends every message back to where it came from.
#[derive(Debug)]
pub(super) struct Worker;

impl Peer for Worker {
    fn hear(&mut self, input: &mut Input, _tally: &mut Tally, out: &mut Vec<u8>) -> io::Result<()> {
        websocket::messages(input, out, |message, out| {
            websocket::message(BINARY, message, out);
            Ok(())
        })
    }
}

/// As many messages to everybody as `batch`.
pub(super) fn publishes(payload: &[u8], batch: usize) -> Batch {
    let mut all = Batch::default();
    for _ in 0..batch {
        websocket::header(BINARY, SLOT + payload.len(), &mut all.bytes);
        all.bytes.extend_from_slice(&EVERYBODY.to_be_bytes());
        all.numbers_at.push(all.bytes.len());
        all.bytes.extend_from_slice(payload);
    }
    all
}

/// Gives the payload of every message to `take`.
pub(super) fn events(input: &mut Input, out: &mut Vec<u8>, take: Take<'_>) -> io::Result<()> {
    websocket::messages(input, out, |message, _| {
        take(message.get(SLOT..).unwrap_or_default());
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::tally::FIRST_ID;

    /// Takes the mask off what a client wrote, and puts the slot it came from in place of the other.
    fn forward(written: &[u8], from: u32, peer: &mut impl Peer, tally: &mut Tally) -> Vec<u8> {
        let mut bytes = written[..2].to_vec();
        bytes[1] &= 0x7f;
        bytes.extend_from_slice(&from.to_be_bytes());
        bytes.extend_from_slice(&written[6 + SLOT..]);
        let (mut input, mut output) = (Input::new(1024), Vec::new());
        input.fill(&bytes[..]).unwrap();
        peer.hear(&mut input, tally, &mut output).unwrap();
        output
    }

    #[test]
    fn a_call_comes_back_and_the_next_follows() {
        let mut tally = Tally::new();
        let mut caller = Caller::new(vec![7], "hello", 1);
        let mut call = Vec::new();
        caller.begin(&mut tally, &mut call);
        assert_eq!(call[6..10], 7_u32.to_be_bytes());

        let reply = forward(&call, 3, &mut Worker, &mut tally);
        assert_eq!(reply[6..10], 3_u32.to_be_bytes());
        let next = forward(&reply, 7, &mut caller, &mut tally);
        assert_eq!(next[10..18], (FIRST_ID + 1).to_be_bytes());
        assert_eq!(next[18..], *b"hello");
        assert_eq!((tally.answered, tally.errors, tally.strays), (1, 0, 0));
    }
}
