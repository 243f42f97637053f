//! Whole lives of messages: accepted, delivered to an agent, acknowledged, settled.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use parlour_core::{AgentId, Key};
use serde::Serialize;

use super::digits::{self, DIGITS};
use super::http;
use super::input::Input;
use super::load::Load;
use super::measure::{Measured, measure_after};
use super::peer::{Finder, Peer};
use super::setup::Host;
use super::tally::{Tally, now};
use super::web::{self, MARK};
use super::{Door, LifeArgs, agent_type, native, process};
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output};

const SENDER_BUFFER: usize = 16 << 10;
const WORKER_BUFFER: usize = 256 << 10;

const COMPLETED: &str = "parlour_deliveries_completed_total";
/// How long the host may take to settle what was answered last.
const SETTLING: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);

#[derive(Debug, Serialize)]
struct Report {
    door: Door,
    connections: usize,
    payload: usize,
    /// Lives that were over before those that were measured.
    kept: u64,
    /// All lives that the host says are over: as many as were sent.
    settled: u64,
    #[serde(flatten)]
    measured: Measured,
}

pub(super) fn run(args: &LifeArgs, output: &Output) -> Result<Code, Failure> {
    if args.target.door != Door::Rest {
        return Err(Failure::new(Code::Usage, "messages are accepted for later by --door rest"));
    }
    process::allow_files((args.connections + 64) as u64);
    let host = Host::parse(&args.target.url)?;
    let before = host.metric(COMPLETED)?;
    let (load, lives) = connect(args, &host)?;
    let measured = measure_after(load, &args.target, &args.time, args.kept)?;
    let begun = lives.begun();
    let started = now();
    let settled = loop {
        let settled = host.metric(COMPLETED)? - before;
        if settled >= begun || now().saturating_duration_since(started) > SETTLING {
            break settled;
        }
        std::thread::sleep(PAUSE);
    };
    if settled != begun {
        let detail = format!("{begun} messages were sent, and {settled} are settled");
        return Err(Failure::new(Code::Failed, detail));
    }
    let report = Report {
        door: args.target.door,
        connections: args.connections,
        payload: args.payload,
        kept: args.kept,
        settled,
        measured,
    };
    match output.mode() {
        Mode::Text => output.data(report.measured.text("lives").as_bytes())?,
        Mode::Json | Mode::Jsonl => output.json(&report)?,
    }
    Ok(report.measured.code())
}

fn connect(args: &LifeArgs, host: &Host) -> Result<(Load, Lives), Failure> {
    let mut load = Load::new()?;
    let agent_type = agent_type("bench")?;
    let lives = Lives::new(args.connections, args.workers);
    for _ in 0..args.workers {
        let mut link = host.native(agent_type.as_str(), WORKER_BUFFER)?;
        link.register([&agent_type])?;
        load.add(link, native::Worker::of(lives.clone()))?;
    }
    for number in 0..args.connections {
        let target = AgentId::new(agent_type.clone(), Key::parse(number.to_string())?);
        let sender = Sender::new(&host.authority, &target, args.payload, number, lives.clone());
        load.add(host.connect(SENDER_BUFFER)?, sender)?;
    }
    Ok((load, lives))
}

/// What the senders and the workers know of all messages. A sender has one under way at a time.
#[derive(Clone, Debug)]
pub(super) struct Lives(Rc<RefCell<Inner>>);

#[derive(Debug)]
struct Inner {
    lives: Vec<Life>,
    /// The place of the first sender among the connections.
    first: usize,
    begun: u64,
}

#[derive(Clone, Copy, Debug)]
struct Life {
    number: u64,
    began: Instant,
    is_accepted: bool,
    is_delivered: bool,
}

impl Life {
    fn is_over(self) -> bool {
        self.is_accepted && self.is_delivered
    }
}

impl Lives {
    /// For so many senders, whose connections come behind `first` others.
    fn new(senders: usize, first: usize) -> Self {
        let none = Life { number: u64::MAX, began: now(), is_accepted: true, is_delivered: true };
        Self(Rc::new(RefCell::new(Inner { lives: vec![none; senders], first, begun: 0 })))
    }

    fn begun(&self) -> u64 {
        self.0.borrow().begun
    }

    /// The next message of a sender, by its number.
    fn begin(&self, sender: usize, tally: &mut Tally) -> u64 {
        let mut inner = self.0.borrow_mut();
        inner.begun += 1;
        let senders = inner.lives.len() as u64;
        let life = &mut inner.lives[sender];
        let number = if life.number == u64::MAX { sender as u64 } else { life.number + senders };
        *life = Life { number, began: tally.now, is_accepted: false, is_delivered: false };
        tally.expect(1);
        number
    }

    fn is_over(&self, sender: usize) -> bool {
        self.0.borrow().lives[sender].is_over()
    }

    /// Its host has said that it has the message of this sender.
    fn accepted(&self, sender: usize, tally: &mut Tally) {
        let life = &mut self.0.borrow_mut().lives[sender];
        life.is_accepted = true;
        end(*life, tally);
    }

    /// A worker was given this message.
    pub(super) fn delivered(&self, payload: &[u8], tally: &mut Tally) {
        let inner = &mut *self.0.borrow_mut();
        let number = payload.first_chunk::<DIGITS>().and_then(|digits| digits::read(digits));
        let sender = number.map(|number| (number % inner.lives.len() as u64) as usize);
        let life = sender.map(|sender| &mut inner.lives[sender]);
        let life = life.filter(|life| Some(life.number) == number && !life.is_delivered);
        let (Some(life), Some(sender)) = (life, sender) else {
            tally.stray(b"a message that was delivered before, or was never sent");
            return;
        };
        life.is_delivered = true;
        end(*life, tally);
        tally.woken.push(inner.first + sender);
    }
}

fn end(life: Life, tally: &mut Tally) {
    if life.is_over() {
        tally.delivered();
        tally.took(life.began);
    }
}

/// Sends the next message when the last was accepted, delivered and answered.
struct Sender {
    number: usize,
    lives: Lives,
    request: Vec<u8>,
    /// Where the number of a message stands.
    number_at: usize,
    ack: Finder,
}

impl Sender {
    fn new(host: &str, target: &AgentId, payload: usize, number: usize, lives: Lives) -> Self {
        let text = MARK.to_owned() + &"x".repeat(payload.saturating_sub(MARK.len()));
        let (request, at) = web::delivery(host, target, &text, None);
        Self { number, lives, request, number_at: at.unwrap_or_default(), ack: web::durable() }
    }

    fn send(&mut self, tally: &mut Tally, output: &mut Vec<u8>) {
        let number = self.lives.begin(self.number, tally);
        digits::put(number, &mut self.request[self.number_at..self.number_at + DIGITS]);
        output.extend_from_slice(&self.request);
    }
}

impl Peer for Sender {
    fn begin(&mut self, tally: &mut Tally, output: &mut Vec<u8>) {
        self.send(tally, output);
    }

    fn prompt(&mut self, tally: &mut Tally, output: &mut Vec<u8>) {
        if self.lives.is_over(self.number) && !tally.has_ended() {
            self.send(tally, output);
        }
    }

    fn hear(
        &mut self,
        input: &mut Input,
        tally: &mut Tally,
        output: &mut Vec<u8>,
    ) -> io::Result<()> {
        while let Some(response) = http::response(input.waiting())? {
            if response.status != 202 || self.ack.after(&response.body).is_none() {
                let answer = String::from_utf8_lossy(&response.body);
                return Err(io::Error::other(format!("a message was not accepted: {answer}")));
            }
            let taken = response.taken;
            input.take(taken);
            self.lives.accepted(self.number, tally);
            self.prompt(tally, output);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepted(sender: &mut Sender, tally: &mut Tally) -> Vec<u8> {
        let body = r#"{"ack":"durable"}"#;
        let answer =
            format!("HTTP/1.1 202 Accepted\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        let (mut input, mut output) = (Input::new(1024), Vec::new());
        input.fill(answer.as_bytes()).unwrap();
        sender.hear(&mut input, tally, &mut output).unwrap();
        output
    }

    #[test]
    fn the_next_message_follows_when_the_last_was_accepted_and_delivered_in_any_order() {
        let target = AgentId::parse("bench/1").unwrap();
        let (lives, mut tally) = (Lives::new(2, 3), Tally::new());
        let mut sender = Sender::new("h", &target, 20, 1, lives.clone());
        let mut output = Vec::new();
        sender.begin(&mut tally, &mut output);
        assert!(output.ends_with(b"\r\n\r\n000000000001xxxxxxxx"));

        assert!(accepted(&mut sender, &mut tally).is_empty());
        lives.delivered(b"000000000001xxxxxxxx", &mut tally);
        assert_eq!((&*tally.woken, tally.answered), (&[4][..], 1));
        let mut output = Vec::new();
        sender.prompt(&mut tally, &mut output);
        assert!(output.ends_with(b"000000000003xxxxxxxx"));

        lives.delivered(b"000000000003xxxxxxxx", &mut tally);
        assert_eq!(tally.answered, 1);
        assert!(accepted(&mut sender, &mut tally).ends_with(b"000000000005xxxxxxxx"));
        assert_eq!((tally.answered, tally.open, tally.strays, lives.begun()), (2, 1, 0, 3));
        for old in [&b"000000000003xxxxxxxx"[..], b"000000000007", b"short"] {
            lives.delivered(old, &mut tally);
        }
        assert_eq!(tally.strays, 3);
    }
}
