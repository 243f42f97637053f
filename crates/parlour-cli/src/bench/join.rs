//! Workers that come to a host all at once.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use parlour_core::AgentType;
use parlour_core::wire::{self, Frame, Hello, Register};
use parlour_core::{CallId, Registration};

use super::input::Input;
use super::peer::Peer;
use super::setup::{Host, upgrade};
use super::tally::Tally;
use super::websocket::{self, BINARY};
use super::{Door, http, native, nats};

/// Joins step by step, never waiting, and then is the worker that it was to become.
pub(super) struct Joiner {
    began: Instant,
    steps: VecDeque<Step>,
    worker: Box<dyn Peer>,
}

/// Something to say, and what takes the answer: it returns whether that has come.
struct Step {
    say: Vec<u8>,
    hear: fn(&mut Input, &mut Vec<u8>) -> io::Result<bool>,
}

impl Joiner {
    /// Becomes `worker`, which serves `agent_type`. How long that took counts from `began`.
    pub(super) fn new(
        door: Door,
        host: &Host,
        agent_type: &AgentType,
        worker: Box<dyn Peer>,
        began: Instant,
    ) -> Self {
        let request = |path, protocol| upgrade(&host.authority, path, protocol).into_bytes();
        let steps = match door {
            Door::Nats => {
                let subscription = nats::worker_subscription(agent_type);
                let say = format!("{}{subscription}PING\r\n", nats::CONNECT).into_bytes();
                VecDeque::from([Step { say, hear: nats_pong }])
            }
            Door::Raw => VecDeque::from([Step { say: request("/", None), hear: upgraded }]),
            _ => {
                let hello = Frame::from(Hello {
                    name: agent_type.as_str().into(),
                    versions: wire::VERSIONS.to_vec(),
                    ..Hello::default()
                });
                let register = Frame::Register(Register {
                    request: CallId(1),
                    agent_type: agent_type.clone(),
                    key: None,
                    registration: Registration::default(),
                });
                let upgrade = request("/open_channel", Some(wire::SUBPROTOCOL));
                VecDeque::from([
                    Step { say: upgrade, hear: upgraded },
                    Step { say: message(&hello), hear: native::welcomed },
                    Step { say: message(&register), hear: native::done },
                ])
            }
        };
        Self { began, steps, worker }
    }
}

impl Peer for Joiner {
    fn begin(&mut self, tally: &mut Tally, output: &mut Vec<u8>) {
        tally.expect(1);
        if let Some(step) = self.steps.front() {
            output.extend_from_slice(&step.say);
        }
    }

    fn hear(&mut self, input: &mut Input, tally: &mut Tally, out: &mut Vec<u8>) -> io::Result<()> {
        while let Some(step) = self.steps.front() {
            if !(step.hear)(input, out)? {
                return Ok(());
            }
            self.steps.pop_front();
            match self.steps.front() {
                Some(next) => out.extend_from_slice(&next.say),
                None => {
                    tally.delivered();
                    tally.took(self.began);
                }
            }
        }
        self.worker.hear(input, tally, out)
    }
}

fn message(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    websocket::message(BINARY, &native::message(frame), &mut bytes);
    bytes
}

fn upgraded(input: &mut Input, _output: &mut Vec<u8>) -> io::Result<bool> {
    let Some(answer) = http::response(input.waiting())? else { return Ok(false) };
    if answer.status != 101 {
        return Err(io::Error::other(format!("the host refused a WebSocket: {}", answer.status)));
    }
    let taken = answer.taken;
    input.take(taken);
    Ok(true)
}

fn nats_pong(input: &mut Input, _output: &mut Vec<u8>) -> io::Result<bool> {
    while let Some(end) = input.waiting().iter().position(|&byte| byte == b'\n') {
        let line = &input.waiting()[..end];
        let is_pong = line.starts_with(b"PONG");
        if line.starts_with(b"-ERR") {
            let line = String::from_utf8_lossy(line);
            return Err(io::Error::other(format!("the host refused a connection: {line}")));
        }
        input.take(end + 1);
        if is_pong {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use parlour_core::wire::{Done, Welcome};

    use super::*;
    use crate::bench::tally::now;

    fn said(frame: &Frame) -> Vec<u8> {
        let frame = native::message(frame);
        [&[0x80 | BINARY, frame.len() as u8][..], &frame].concat()
    }

    #[test]
    fn a_worker_says_the_next_thing_when_the_last_was_answered_and_counts_at_the_end() {
        let host = Host::parse("http://127.0.0.1:9").unwrap();
        let agent_type = AgentType::parse("bench").unwrap();
        let worker = Box::new(native::Worker::new(&Default::default(), false));
        let mut joiner = Joiner::new(Door::V1, &host, &agent_type, worker, now());
        let (mut tally, mut input) = (Tally::new(), Input::new(1024));
        let mut output = Vec::new();
        joiner.begin(&mut tally, &mut output);
        assert!(output.starts_with(b"GET /open_channel "));

        let welcome = Frame::from(Welcome {
            version: 1,
            name: "room".into(),
            max_payload: 1,
            heartbeat: Duration::from_secs(1),
            ..Welcome::default()
        });
        let done = Frame::Done(Done { request: CallId(1), recipients: 0, dropped: Vec::new() });
        let answers = [
            b"HTTP/1.1 101 Switching Protocols\r\nx: y\r\n\r\n".to_vec(),
            said(&welcome),
            said(&done),
        ];
        for (answer, says_more) in answers.iter().zip([true, true, false]) {
            output.clear();
            input.fill(&answer[..5]).unwrap();
            joiner.hear(&mut input, &mut tally, &mut output).unwrap();
            assert_eq!((output.len(), tally.open), (0, 1));
            input.fill(&answer[5..]).unwrap();
            joiner.hear(&mut input, &mut tally, &mut output).unwrap();
            assert_eq!(!output.is_empty(), says_more);
        }
        assert_eq!((tally.open, tally.answered), (0, 1));
    }
}
