//! `parlour send`: a message that is accepted for later.

use std::time::Duration;

use http::HeaderMap;
use parlour::IntoAgentId;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use crate::args::Send;
use crate::body;
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output};
use crate::rest::{Rest, header, text};
use crate::room;
use crate::verbs::deliveries;

pub(crate) fn run(args: &Send, output: &Output) -> Result<Code, Failure> {
    room::run(send(args, output))
}

async fn send(args: &Send, output: &Output) -> Result<Code, Failure> {
    // A wrong name needs no host to be told, nor does stdin have to be read for it.
    let target = args.target.as_str().into_agent_id()?;
    let payload = body::read(&args.body).await?;
    let rest = Rest::new(&args.client)?;
    let mut headers = HeaderMap::new();
    header(&mut headers, "content-type", &*payload.content_type)?;
    if !payload.data_type.is_empty() {
        header(&mut headers, "parlour-data-type", &*payload.data_type)?;
    }
    for (name, value) in payload.metadata.iter() {
        header(&mut headers, &format!("parlour-meta-{name}"), value)?;
    }
    if let Some(key) = &args.key {
        header(&mut headers, "idempotency-key", key)?;
    }
    let millis = |time: &Duration| time.as_millis().to_string();
    for (name, time) in [("parlour-delay-ms", &args.delay), ("parlour-ttl-ms", &args.ttl)] {
        if let Some(time) = time {
            header(&mut headers, name, millis(time))?;
        }
    }
    if let Some(attempts) = args.max_attempts {
        header(&mut headers, "parlour-max-attempts", attempts.to_string())?;
    }
    let [agent_type, key] = [target.agent_type.as_str(), target.key.as_str()]
        .map(|part| utf8_percent_encode(part, NON_ALPHANUMERIC).to_string());
    let path = format!("/v1/agents/{agent_type}/{key}/deliveries");
    let accepted = rest.send(&path, headers, payload.bytes).await?;
    let id = text(&accepted, "id");
    let Some(timeout) = args.wait else {
        match output.mode() {
            Mode::Text => output.line(&id)?,
            Mode::Json | Mode::Jsonl => output.json(&accepted)?,
        }
        return Ok(Code::Ok);
    };
    output.note(&format!("accepted as {id} ({})", text(&accepted, "ack")));
    deliveries::reply(&rest, &id, timeout, output).await
}
