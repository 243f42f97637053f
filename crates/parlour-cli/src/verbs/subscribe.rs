//! `parlour subscribe`: the events of a topic, as they come.

use parlour_core::{Event, Key, TopicFilter};
use serde_json::{Value, json};

use crate::args::Subscribe;
use crate::body;
use crate::exit::{Code, Failure};
use crate::log;
use crate::output::{Mode, Output, escape};
use crate::room;

pub(crate) fn run(args: &Subscribe, output: &Output) -> Result<Code, Failure> {
    log::start_by_environment()?;
    room::run(subscribe(args, output))
}

async fn subscribe(args: &Subscribe, output: &Output) -> Result<Code, Failure> {
    let (pattern, source) = match args.pattern.split_once('/') {
        Some((pattern, source)) => (pattern, Some(Key::parse(source)?)),
        None => (&*args.pattern, None),
    };
    TopicFilter::parse(pattern)?;
    let client = room::connect(&args.client, "subscribe").await?;
    let mut events = client.subscribe(pattern).await?;
    output.note(&format!(
        "subscribed to {} at {}",
        escape(&args.pattern),
        escape(&args.client.url)
    ));
    let mut left = args.count.unwrap_or(u64::MAX);
    let mut missed = 0;
    while left > 0 {
        let Some(event) = events.next().await else {
            return Err(Failure::new(Code::CannotConnect, "the connection has ended"));
        };
        // The host chooses by type alone, so the source is looked at here.
        if source.as_ref().is_some_and(|source| *source != event.topic.source) {
            continue;
        }
        print(&event, output)?;
        left -= 1;
        if events.missed() > missed {
            output.warn(&format!("{} events came too fast and are lost", events.missed() - missed));
            missed = events.missed();
        }
    }
    client.close().await;
    Ok(Code::Ok)
}

fn print(event: &Event, output: &Output) -> Result<(), Failure> {
    if output.mode_or(Mode::Jsonl) != Mode::Text {
        return output.json(&document(event));
    }
    let text = match std::str::from_utf8(&event.payload.bytes) {
        Ok(text) => escape(text).into_owned(),
        Err(_) => {
            let content_type = escape(&event.payload.content_type).into_owned();
            format!("{} bytes of {content_type}", event.payload.bytes.len())
        }
    };
    let topic = event.topic.to_string();
    let from = event.header.sender.as_ref().map(|sender| format!(" from {sender}"));
    output.line(&format!("{}{}: {text}", escape(&topic), escape(&from.unwrap_or_default())))
}

fn document(event: &Event) -> Value {
    let header = &event.header;
    let mut fields = body::describe(&event.payload);
    fields.insert("id".into(), header.id.as_str().into());
    fields.insert("conversation".into(), header.conversation.as_str().into());
    fields.insert("sender".into(), json!(header.sender.as_ref().map(ToString::to_string)));
    let topic = &event.topic;
    fields.insert(
        "topic".into(),
        json!({"type": topic.topic_type.as_str(), "source": topic.source.as_str()}),
    );
    Value::Object(fields)
}
