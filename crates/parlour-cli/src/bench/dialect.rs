//! Callers and workers that speak the dialect of `autogen-http-runtime` 0.1.0, to its own host or to
//! one that understands it. Both write compact JSON, so fields are found as text; no payload of the
//! driver holds anything that JSON would escape.

use std::io;

use parlour_core::AgentId;

use super::digits::{self, DIGITS};
use super::input::Input;
use super::peer::{Finder, Peer};
use super::tally::{Slots, Tally, Turns};
use super::websocket::{self, TEXT};

/// Makes calls over its own WebSocket.
#[derive(Debug)]
pub(super) struct Caller {
    slots: Slots,
    /// A request, and where in it its number stands.
    request: Vec<u8>,
    number_at: usize,
    number: Finder,
    no_error: Finder,
    data: Finder,
}

impl Caller {
    pub(super) fn new(target: &AgentId, payload: &str, in_flight: usize) -> Self {
        let (start, end) = (
            r#"{"type":"request","request_id":""#,
            format!(r#"","target":{},{}}}"#, agent(target), content(payload)),
        );
        let mut request = Vec::new();
        websocket::header(TEXT, start.len() + DIGITS + end.len(), &mut request);
        let number_at = request.len() + start.len();
        request.extend_from_slice(start.as_bytes());
        request.extend_from_slice(&[b'0'; DIGITS]);
        request.extend_from_slice(end.as_bytes());
        Self {
            slots: Slots::new(in_flight),
            request,
            number_at,
            number: Finder::new(r#""request_id":""#),
            no_error: Finder::new(r#""error":"""#),
            data: Finder::new(format!(r#""data":"{payload}""#)),
        }
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

    fn hear(&mut self, input: &mut Input, tally: &mut Tally, out: &mut Vec<u8>) -> io::Result<()> {
        websocket::messages(input, out, |message, out| {
            let number = self.number.quoted(message).and_then(digits::read);
            let Some(id) = number else {
                tally.stray(message);
                return Ok(());
            };
            let is_well =
                self.no_error.after(message).is_some() && self.data.after(message).is_some();
            let what = if is_well { Ok(()) } else { Err(message) };
            if let Some(id) = self.slots.answer(id, what, tally) {
                self.request(id, out);
            }
            Ok(())
        })
    }
}

/// Answers every request with its data.
#[derive(Debug)]
pub(super) struct Worker {
    number: Finder,
    data: Finder,
    sender: Finder,
}

impl Worker {
    pub(super) fn new() -> Self {
        Self {
            number: Finder::new(r#""request_id":""#),
            data: Finder::new(r#""data":""#),
            sender: Finder::new(r#""original_sender":""#),
        }
    }
}

impl Peer for Worker {
    fn hear(&mut self, input: &mut Input, tally: &mut Tally, out: &mut Vec<u8>) -> io::Result<()> {
        websocket::messages(input, out, |message, out| {
            let number = self.number.quoted(message);
            let (Some(number), Some(data)) = (number, self.data.quoted(message)) else {
                tally.stray(message);
                return Ok(());
            };
            let parts: [&[u8]; 7] = [
                br#"{"type":"response","request_id":""#,
                number,
                br#"","error":"","data_type":"text","data_content_type":"text/plain","data":""#,
                data,
                br#"","original_sender":""#,
                self.sender.quoted(message).unwrap_or_default(),
                br#""}"#,
            ];
            websocket::header(TEXT, parts.iter().map(|part| part.len()).sum(), out);
            parts.iter().for_each(|part| out.extend_from_slice(part));
            Ok(())
        })
    }
}

/// The parameters of `agent.call`, as JSON.
pub(super) fn parameters(target: &AgentId, payload: &str) -> String {
    format!(r#"{{"target":{},{}}}"#, agent(target), content(payload))
}

fn agent(id: &AgentId) -> String {
    format!(r#"{{"type":"{}","key":"{}"}}"#, id.agent_type.as_str(), id.key.as_str())
}

fn content(payload: &str) -> String {
    format!(
        r#""source":null,"data_type":"text","data_content_type":"text/plain","data":"{payload}""#
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::tally::FIRST_ID;

    /// Gives what a client wrote with a mask of zeros to `peer`, as if a host had passed it on.
    fn pass(written: &[u8], peer: &mut impl Peer, tally: &mut Tally) -> Vec<u8> {
        let (mut input, mut output) = (Input::new(1024), Vec::new());
        let mut bytes = written[..4].to_vec();
        bytes[1] &= 0x7f;
        bytes.extend_from_slice(&written[8..]);
        input.fill(&bytes[..]).unwrap();
        peer.hear(&mut input, tally, &mut output).unwrap();
        output
    }

    #[test]
    fn a_request_comes_back_as_a_response_and_the_next_follows() {
        let mut tally = Tally::new();
        let payload = "x".repeat(100);
        let mut caller = Caller::new(&AgentId::parse("bench/1").unwrap(), &payload, 1);
        let mut worker = Worker::new();

        let mut request = Vec::new();
        caller.begin(&mut tally, &mut request);
        let json: serde_json::Value = serde_json::from_slice(&request[8..]).unwrap();
        assert_eq!(json["request_id"], format!("{FIRST_ID:012}"));
        assert_eq!(json["target"]["key"], "1");

        let response = pass(&request, &mut worker, &mut tally);
        let json: serde_json::Value = serde_json::from_slice(&response[8..]).unwrap();
        assert_eq!(json["data"], payload);

        let next = pass(&response, &mut caller, &mut tally);
        let json: serde_json::Value = serde_json::from_slice(&next[8..]).unwrap();
        assert_eq!(json["request_id"], format!("{:012}", FIRST_ID + 1));
        assert_eq!((tally.answered, tally.errors, tally.strays), (1, 0, 0));
    }
}
