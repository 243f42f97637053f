//! What of a session's frames one side has sent and the other has not acknowledged: credit, and what
//! is sent again after a socket broke. The method is that of XMPP's stream management (XEP-0198).
//!
//! Both sides count the frames of a session, but for those that belong to a socket
//! ([`wire::is_counted`]). Each is given how many the other has received, in an ACK or when the
//! session goes on over a new socket.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use thiserror::Error;

use crate::wire::{self, DecodeError, Frame};

/// How many frames, and bytes of frames, may be unacknowledged.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "two numbers of the protocol")]
pub struct Credit {
    /// Frames.
    pub messages: u64,
    /// Bytes of these frames.
    pub bytes: u64,
}

/// The frames that one side sent, until the other side has acknowledged them.
#[derive(Debug, Default)]
pub struct Sent {
    credit: Credit,
    kept: VecDeque<Batch>,
    /// Frames of the session that were sent, and those of them that were acknowledged.
    sent: u64,
    acknowledged: u64,
    /// Frames in batches that are kept no more.
    forgotten: u64,
    /// Bytes in `kept`.
    bytes: u64,
    /// What was added since the last batch.
    open: Open,
}

/// Counted frames that are not part of a batch yet.
#[derive(Clone, Copy, Debug, Default)]
struct Open {
    frames: u64,
    bytes: u64,
}

/// Frames that were written together.
#[derive(Debug)]
struct Batch {
    bytes: Bytes,
    /// How many counted frames are in it.
    frames: u64,
}

/// The other side acknowledged frames that were never sent, or has forgotten some.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[error("{received} frames acknowledged; between {acknowledged} and {sent} would be right")]
pub struct WrongCount {
    received: u64,
    acknowledged: u64,
    sent: u64,
}

impl Sent {
    /// Nothing sent yet, to a side that gives this much credit.
    pub fn new(credit: Credit) -> Self {
        Self { credit, ..Self::default() }
    }

    /// Whether another frame may be sent. One that is larger than all credit goes out alone.
    pub fn has_credit(&self) -> bool {
        self.unacknowledged() + self.open.frames < self.credit.messages
            && self.bytes + self.open.bytes < self.credit.bytes
    }

    /// How many more frames may be sent before some are acknowledged; none where the bytes are used up.
    pub fn credit(&self) -> u64 {
        let used = self.unacknowledged() + self.open.frames;
        if self.has_credit() { self.credit.messages - used } else { 0 }
    }

    /// How many frames were sent and not acknowledged.
    pub fn unacknowledged(&self) -> u64 {
        self.sent - self.acknowledged
    }

    /// Counts a frame of the batch to come.
    pub fn add(&mut self, frame: &[u8]) {
        if wire::is_counted(frame) {
            self.open.frames += 1;
            self.open.bytes += frame.len() as u64;
        }
    }

    /// Keeps `batch`, which goes out now and has all frames that were added since the last one.
    pub fn push(&mut self, batch: Bytes) {
        let Open { frames, .. } = std::mem::take(&mut self.open);
        if frames > 0 {
            self.sent += frames;
            self.bytes += batch.len() as u64;
            self.kept.push_back(Batch { bytes: batch, frames });
        }
    }

    /// Forgets what the other side has: it has received `received` frames since the session began.
    pub fn acknowledge(&mut self, received: u64) -> Result<(), WrongCount> {
        let Self { acknowledged, sent, .. } = *self;
        if received < acknowledged || received > sent {
            return Err(WrongCount { received, acknowledged, sent });
        }
        self.acknowledged = received;
        while let Some(batch) = self.kept.front() {
            if self.forgotten + batch.frames > received {
                break;
            }
            self.forgotten += batch.frames;
            self.bytes -= batch.bytes.len() as u64;
            self.kept.pop_front();
        }
        Ok(())
    }

    /// What to send over a new socket: all that the other side, which has received `received` frames,
    /// lacks. Calls among it are marked as resent. It stays kept.
    pub fn resend(&mut self, received: u64) -> Result<Vec<Bytes>, WrongCount> {
        if crate::bug!("resume_without_resending") {
            self.acknowledge(self.sent)?;
        } else if !crate::bug!("resume_without_deduplication") {
            self.acknowledge(received)?;
        }
        // Of the first batch it may have a part.
        let mut skip = self.acknowledged - self.forgotten;
        for batch in &mut self.kept {
            // These bytes are this side's own.
            if let Ok((bytes, frames)) = again(&batch.bytes, skip) {
                self.bytes = self.bytes + bytes.len() as u64 - batch.bytes.len() as u64;
                self.forgotten += batch.frames - frames;
                *batch = Batch { bytes, frames };
            }
            skip = 0;
        }
        Ok(self.kept.iter().map(|batch| batch.bytes.clone()).collect())
    }
}

/// The counted frames of `batch` but the first `skip`, as they are sent again, and how many they are.
fn again(batch: &Bytes, mut skip: u64) -> Result<(Bytes, u64), DecodeError> {
    let (mut rest, mut out, mut frames) = (batch.clone(), BytesMut::new(), 0);
    while !rest.is_empty() {
        let frame = wire::split_frame(&mut rest)?;
        if !wire::is_counted(&frame) {
            continue;
        }
        if skip > 0 {
            skip -= 1;
            continue;
        }
        wire::resend(frame, &mut out)?;
        frames += 1;
    }
    Ok((out.freeze(), frames))
}

/// The frames that one side received, and what of them it has acknowledged.
#[derive(Debug, Default)]
pub struct Received {
    credit: Credit,
    frames: u64,
    acknowledged: u64,
    /// Bytes of the frames that were not acknowledged.
    bytes: u64,
}

impl Received {
    /// Nothing received yet, from a side that was given this much credit.
    pub fn new(credit: Credit) -> Self {
        Self { credit, ..Self::default() }
    }

    /// Takes the next frame off `message` (see [`wire::decode`]), and counts it.
    pub fn decode(&mut self, message: &mut Bytes) -> Result<Option<Frame>, DecodeError> {
        let (is_counted, length) = (wire::is_counted(message), message.len());
        let frame = wire::decode(message)?;
        if is_counted {
            self.frames += 1;
            self.bytes += (length - message.len()) as u64;
        }
        Ok(frame)
    }

    /// How many frames came since the session began.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Whether so much came that an ACK is due: a quarter of the credit.
    pub fn is_due(&self) -> bool {
        let frames = self.frames - self.acknowledged;
        frames > 0 && (frames >= self.credit.messages / 4 || self.bytes >= self.credit.bytes / 4)
    }

    /// The number for an ACK, if there is anything to acknowledge.
    pub fn acknowledge(&mut self) -> Option<u64> {
        let is_new = self.frames > self.acknowledged && !crate::bug!("credit_never_returned");
        self.acknowledged = self.frames;
        self.bytes = 0;
        is_new.then_some(self.frames)
    }
}

/// One side of a session that goes on over another socket: what it sent, and what it received.
#[derive(Debug)]
pub struct Windows {
    sent: Sent,
    received: Received,
}

impl Windows {
    /// Of a session that begins, with this much credit each way.
    pub fn new(credit: Credit) -> Self {
        Self { sent: Sent::new(credit), received: Received::new(credit) }
    }

    /// Takes the next frame off `message` (see [`wire::decode`]), and counts it.
    pub fn decode(&mut self, message: &mut Bytes) -> Result<Option<Frame>, DecodeError> {
        self.received.decode(message)
    }

    /// How many frames came since the session began.
    pub fn received(&self) -> u64 {
        self.received.frames()
    }

    /// Takes the other side's count of the frames that it received.
    pub fn handle_ack(&mut self, received: u64) -> Result<(), WrongCount> {
        self.sent.acknowledge(received)
    }

    /// How many more frames may be sent; see [`Sent::credit`].
    pub fn credit(&self) -> u64 {
        self.sent.credit()
    }

    /// How much may be unacknowledged each way, which stays as it was when the session began.
    pub fn whole_credit(&self) -> Credit {
        self.sent.credit
    }

    /// Counts a frame of the batch that is being made.
    pub fn add(&mut self, frame: &[u8]) {
        self.sent.add(frame);
    }

    /// Keeps the batch, which is about to be written.
    pub fn push(&mut self, batch: Bytes) {
        self.sent.push(batch);
    }

    /// Appends an ACK to `out` if there is something to acknowledge, and so much came that it is due, or
    /// `at_once`.
    pub fn acknowledge(&mut self, at_once: bool, out: &mut BytesMut) {
        if (at_once || self.received.is_due())
            && let Some(received) = self.received.acknowledge()
        {
            wire::encode(&Frame::Ack(received), out);
        }
    }

    /// What the other side, which has received `received` frames, lacks. Greetings over the new socket
    /// acknowledge what came over the old one.
    pub fn resume(&mut self, received: u64) -> Result<Vec<Bytes>, WrongCount> {
        let again = self.sent.resend(received)?;
        let _ = self.received.acknowledge();
        Ok(again)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::{CallFrame, Frame, HeaderFields};
    use crate::{AgentId, CallId, Payload};

    const WIDE: Credit = Credit { messages: 1000, bytes: 1 << 20 };

    fn call(id: u64) -> Frame {
        let (target, header) = (AgentId::parse("a/k").unwrap(), HeaderFields::default());
        let payload = Payload::text("hello");
        Frame::from(CallFrame {
            id: CallId(id),
            target,
            timeout: None,
            progress: false,
            resent: false,
            attempt: None,
            topic: None,
            header,
            payload,
        })
    }

    /// Sends `frames` as one batch, which is returned.
    fn send(sent: &mut Sent, frames: &[Frame]) -> Bytes {
        let mut batch = BytesMut::new();
        for frame in frames {
            let begin = batch.len();
            wire::encode(frame, &mut batch);
            sent.add(&batch[begin..]);
        }
        let batch = batch.freeze();
        sent.push(batch.clone());
        batch
    }

    fn ids(batches: Vec<Bytes>) -> Vec<u64> {
        let mut ids = Vec::new();
        for mut batch in batches {
            while !batch.is_empty() {
                match wire::decode(&mut batch).unwrap() {
                    Some(Frame::Call(call)) => {
                        assert!(call.resent);
                        ids.push(call.id.0);
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        ids
    }

    #[test]
    fn what_was_not_received_is_sent_again_in_order_and_marked() {
        let mut sent = Sent::new(WIDE);
        send(&mut sent, &[call(1), Frame::Ping(1), call(2)]);
        send(&mut sent, &[Frame::Ping(2)]);
        send(&mut sent, &[call(3)]);
        assert_eq!(ids(sent.resend(1).unwrap()), [2, 3]);
        assert_eq!(ids(sent.resend(1).unwrap()), [2, 3], "it stays kept");
        sent.acknowledge(3).unwrap();
        assert_eq!((sent.unacknowledged(), sent.bytes, sent.kept.len()), (0, 0, 0));
    }

    #[test]
    fn counts_that_cannot_be_are_refused() {
        let mut sent = Sent::new(WIDE);
        send(&mut sent, &[call(1), call(2)]);
        assert!(sent.acknowledge(3).is_err());
        sent.acknowledge(2).unwrap();
        assert!(sent.resend(1).is_err(), "what was acknowledged is gone");
    }

    #[test]
    fn credit_is_in_messages_and_in_bytes() {
        let mut sent = Sent::new(Credit { messages: 2, ..WIDE });
        let one = send(&mut sent, &[call(1)]);
        assert!(sent.has_credit());
        sent.add(&one);
        assert!(!sent.has_credit(), "before it is written");
        assert_eq!(sent.credit(), 0);
        sent.push(one.clone());
        assert!(!sent.has_credit(), "and after");
        sent.acknowledge(1).unwrap();
        assert!(sent.has_credit());
        let mut sent = Sent::new(Credit { bytes: one.len() as u64, ..WIDE });
        send(&mut sent, &[call(1)]);
        assert!(!sent.has_credit());
    }

    proptest! {
        #[test]
        fn over_any_row_of_sockets_each_frame_arrives_once_and_in_order(
            batches in prop::collection::vec(1..5_u64, 1..20),
            steps in prop::collection::vec((0..3_u8, 0..8_usize), 0..60),
        ) {
            let (mut sent, mut received) = (Sent::new(WIDE), Received::new(WIDE));
            let (mut network, mut arrived) = (VecDeque::<Bytes>::new(), Vec::new());
            let mut batches = batches.into_iter();
            let mut next = 1;
            let mut deliver = |network: &mut VecDeque<Bytes>, received: &mut Received, n: usize| {
                for _ in 0..n {
                    let Some(mut frame) = network.pop_front() else { break };
                    if let Some(Frame::Call(call)) = received.decode(&mut frame).unwrap() {
                        arrived.push(call.id.0);
                    }
                }
            };
            let split = |mut batch: Bytes| {
                let mut frames = Vec::new();
                while !batch.is_empty() {
                    frames.push(wire::split_frame(&mut batch).unwrap());
                }
                frames
            };
            for (step, n) in steps {
                match step {
                    0 => {
                        let Some(count) = batches.next() else { continue };
                        let frames: Vec<_> = (next..next + count).map(call).collect();
                        next += count;
                        network.extend(split(send(&mut sent, &frames)));
                    }
                    1 => {
                        deliver(&mut network, &mut received, n);
                        if n % 2 == 0 && let Some(count) = received.acknowledge() {
                            sent.acknowledge(count).unwrap();
                        }
                    }
                    _ => {
                        network.clear();
                        let again = sent.resend(received.frames()).unwrap();
                        network.extend(again.into_iter().flat_map(split));
                    }
                }
            }
            deliver(&mut network, &mut received, usize::MAX);
            prop_assert_eq!(arrived, (1..next).collect::<Vec<_>>());
            sent.acknowledge(received.frames()).unwrap();
            prop_assert_eq!((sent.unacknowledged(), sent.bytes, sent.kept.len()), (0, 0, 0));
        }
    }
}
