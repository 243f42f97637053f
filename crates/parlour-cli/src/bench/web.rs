//! Callers over HTTP/1.1, one call at a time on each connection: JSON-RPC and REST.

use std::io;

use parlour_core::{AgentId, TopicId};

use super::dialect;
use super::digits::{self, DIGITS};
use super::http::{self, Response};
use super::input::Input;
use super::peer::{Finder, Peer};
use super::tally::{FIRST_ID, Slots, Tally, Turns};

/// Stands where a number is to be.
pub(super) const MARK: &str = "~~~~~~~~~~~~";

/// Makes calls by sending the same request over and over.
#[derive(Debug)]
pub(super) struct Caller {
    turns: Box<dyn Turns>,
    /// Answers come in the order of requests, so the number stays here.
    id: u64,
    request: Vec<u8>,
    /// Where the number of a request stands that is to differ from all others.
    number_at: Option<usize>,
    answer: Answer,
}

/// What a good answer looks like.
#[derive(Debug)]
enum Answer {
    Rpc { result: Finder, data: Finder },
    Rest { payload: usize },
    Published { recipients: Finder, none_dropped: Finder },
    Accepted { ack: Finder },
}

impl Caller {
    /// Calls by `agent.call` over JSON-RPC.
    pub(super) fn rpc(host: &str, client_id: &str, target: &AgentId, payload: &str) -> Self {
        let parameters = dialect::parameters(target, payload);
        let body =
            format!(r#"{{"jsonrpc":"2.0","method":"agent.call","params":{parameters},"id":"1"}}"#);
        let headers = format!("Content-Type: application/json\r\nx-client-id: {client_id}\r\n");
        let answer = Answer::Rpc {
            result: Finder::new(r#""result":{"#),
            data: Finder::new(format!(r#""data":"{payload}""#)),
        };
        Self::new(post(host, "/rpc", &headers, &body), answer)
    }

    fn new(request: Vec<u8>, answer: Answer) -> Self {
        let turns = Box::new(Slots::new(1));
        Self { turns, id: FIRST_ID, request, number_at: None, answer }
    }

    /// Calls by posting the payload to the agent.
    pub(super) fn rest(host: &str, target: &AgentId, payload: &str) -> Self {
        let (agent_type, key) = (target.agent_type.as_str(), target.key.as_str());
        let path = format!("/v1/agents/{agent_type}/{key}/call");
        let request = post(host, &path, "Content-Type: text/plain\r\n", payload);
        Self::new(request, Answer::Rest { payload: payload.len() })
    }

    /// Has messages accepted for later, each under a key of its own if there is something for keys to
    /// begin with. The number of each also stands where the [`MARK`] is in the payload.
    pub(super) fn sender(
        host: &str,
        target: &AgentId,
        payload: &str,
        keys: Option<&str>,
        turns: Box<dyn Turns>,
    ) -> Self {
        let (agent_type, key) = (target.agent_type.as_str(), target.key.as_str());
        let path = format!("/v1/agents/{agent_type}/{key}/deliveries");
        let mut headers = "Content-Type: text/plain\r\n".to_owned();
        if let Some(keys) = keys {
            headers += &format!("Idempotency-Key: {keys}{MARK}\r\n");
        }
        let request = post(host, &path, &headers, payload);
        let number_at = request.windows(MARK.len()).position(|part| part == MARK.as_bytes());
        let answer = Answer::Accepted { ack: Finder::new(r#""ack":"durable""#) };
        Self { turns, number_at, ..Self::new(request, answer) }
    }

    fn request(&mut self, id: u64, out: &mut Vec<u8>) {
        self.id = id;
        if let Some(at) = self.number_at {
            digits::put(id, &mut self.request[at..at + DIGITS]);
        }
        out.extend_from_slice(&self.request);
    }

    /// Publishes by posting the payload to the topic, for so many recipients.
    pub(super) fn publisher(host: &str, topic: &TopicId, payload: &str, recipients: u64) -> Self {
        let (topic_type, source) = (topic.topic_type.as_str(), topic.source.as_str());
        let path = format!("/v1/topics/{topic_type}/{source}");
        let answer = Answer::Published {
            recipients: Finder::new(format!(r#""recipients":{recipients}}}"#)),
            none_dropped: Finder::new(r#""dropped":[]"#),
        };
        Self::new(post(host, &path, "Content-Type: text/plain\r\n", payload), answer)
    }
}

impl Answer {
    fn is_well(&mut self, response: &Response<'_>) -> bool {
        let wanted = if matches!(self, Self::Accepted { .. }) { 202 } else { 200 };
        response.status == wanted
            && match self {
                Self::Rpc { result, data } => {
                    result.after(&response.body).is_some() && data.after(&response.body).is_some()
                }
                Self::Rest { payload } => response.body.len() == *payload,
                Self::Published { recipients, none_dropped } => {
                    recipients.after(&response.body).is_some()
                        && none_dropped.after(&response.body).is_some()
                }
                Self::Accepted { ack } => ack.after(&response.body).is_some(),
            }
    }
}

impl Peer for Caller {
    fn begin(&mut self, tally: &mut Tally, out: &mut Vec<u8>) {
        self.turns.begin(tally).for_each(|id| self.request(id, out));
    }

    fn prompt(&mut self, tally: &mut Tally, out: &mut Vec<u8>) {
        let mut next = None;
        self.turns.woken(tally, &mut |id| next = Some(id));
        if let Some(id) = next {
            self.request(id, out);
        }
    }

    fn hear(&mut self, input: &mut Input, tally: &mut Tally, out: &mut Vec<u8>) -> io::Result<()> {
        while let Some(response) = http::response(input.waiting())? {
            let is_well = self.answer.is_well(&response);
            let what = if is_well { Ok(()) } else { Err(&*response.body) };
            if let Some(id) = self.turns.answer(self.id, what, tally) {
                self.request(id, out);
            }
            let taken = response.taken;
            input.take(taken);
        }
        Ok(())
    }
}

/// A POST request, whole.
pub(super) fn post(host: &str, path: &str, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nHost: {host}\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use parlour_core::{Key, TopicType};

    use super::*;

    fn answer(caller: &mut Caller, tally: &mut Tally, head: &str, body: &str) -> Vec<u8> {
        let bytes = format!("HTTP/1.1 {head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        let (mut input, mut output) = (Input::new(1024), Vec::new());
        input.fill(bytes.as_bytes()).unwrap();
        caller.hear(&mut input, tally, &mut output).unwrap();
        output
    }

    #[test]
    fn a_fault_in_a_well_formed_answer_is_an_error() {
        let target = AgentId::parse("bench/1").unwrap();
        let mut tally = Tally::new();
        let mut caller = Caller::rpc("h", "me", &target, "hello");
        caller.begin(&mut tally, &mut Vec::new());

        let good = r#"{"jsonrpc":"2.0","result":{"data":"hello"},"id":"1"}"#;
        assert_eq!(answer(&mut caller, &mut tally, "200 OK", good), caller.request);
        let bad = r#"{"jsonrpc":"2.0","result":null,"error":{"code":-32000},"id":"1"}"#;
        assert_eq!(answer(&mut caller, &mut tally, "200 OK", bad), caller.request);
        assert_eq!((tally.answered, tally.errors), (1, 1));
        assert_eq!(tally.first_error.as_deref(), Some(bad));
    }

    #[test]
    fn an_event_that_did_not_reach_everybody_is_an_error() {
        let topic = TopicId::new(TopicType::parse("news").unwrap(), Key::parse("tech").unwrap());
        let mut tally = Tally::new();
        let mut publisher = Caller::publisher("h", &topic, "hello", 2);
        publisher.begin(&mut tally, &mut Vec::new());
        for (recipients, dropped) in [(2, ""), (1, ""), (2, r#""a/b""#)] {
            let body =
                format!(r#"{{"ack":"memory","dropped":[{dropped}],"recipients":{recipients}}}"#);
            answer(&mut publisher, &mut tally, "200 OK", &body);
        }
        assert_eq!((tally.answered, tally.errors), (1, 2));
    }

    #[test]
    fn each_message_has_a_key_of_its_own_and_what_is_not_durable_is_an_error() {
        let target = AgentId::parse("bench/1").unwrap();
        let mut tally = Tally::new();
        let mut sender =
            Caller::sender("h", &target, "hello", Some("run-"), Box::new(Slots::new(1)));
        let mut first = Vec::new();
        sender.begin(&mut tally, &mut first);
        let key = format!("Idempotency-Key: run-{FIRST_ID:012}\r\n");
        let first = String::from_utf8(first).unwrap();
        assert!(first.contains(&key), "{first}");

        let good = r#"{"ack":"durable","generation":1}"#;
        let next = answer(&mut sender, &mut tally, "202 Accepted", good);
        let next_key = format!("Idempotency-Key: run-{:012}\r\n", FIRST_ID + 1);
        assert_eq!(String::from_utf8(next).unwrap(), first.replace(&key, &next_key));
        answer(&mut sender, &mut tally, "202 Accepted", r#"{"ack":"memory"}"#);
        assert_eq!((tally.answered, tally.errors), (1, 1));
    }

    #[test]
    fn a_rest_answer_is_the_payload_and_nothing_else() {
        let target = AgentId::parse("bench/1").unwrap();
        let mut tally = Tally::new();
        let mut caller = Caller::rest("h", &target, "hello");
        caller.begin(&mut tally, &mut Vec::new());
        answer(&mut caller, &mut tally, "200 OK", "hello");
        answer(&mut caller, &mut tally, "503 Service Unavailable", "hello");
        answer(&mut caller, &mut tally, "200 OK", "hell");
        assert_eq!((tally.answered, tally.errors), (1, 2));
    }
}
