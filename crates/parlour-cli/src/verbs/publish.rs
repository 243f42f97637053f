//! `parlour publish`: one event, and who got it or is owed it.

use parlour::{Ack, Client, IntoTopicId, PublishRequest};
use serde_json::json;

use crate::args::Publish;
use crate::body;
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output, escape};
use crate::room::{self, Handled};

pub(crate) fn run(args: &Publish, output: &Output) -> Result<Code, Failure> {
    room::run(publish(args, output))
}

async fn publish(args: &Publish, output: &Output) -> Result<Code, Failure> {
    // A wrong name needs no host to be told, nor does stdin have to be read for it.
    let topic = args.topic.as_str().into_topic_id()?;
    let payload = body::read(&args.body).await?;
    let client = room::connect(&args.client, "publish").await?;
    let event = Handled::from_environment().precede(client.publish(topic, payload));
    if args.durable {
        return publish_durably(args, &client, event, output).await;
    }
    let published = event.await;
    client.close().await;
    let published = published?;
    let (recipients, dropped) = (published.recipients, &published.dropped);
    if output.mode() == Mode::Text {
        output.line(&format!("recipients {recipients}"))?;
        for name in dropped {
            output.line(&format!("dropped    {}", escape(name)))?;
        }
    } else {
        output.json(&json!({"recipients": recipients, "dropped": dropped}))?;
    }
    if dropped.is_empty() {
        return Ok(Code::Ok);
    }
    let detail = format!("{} of those who want the event have a full queue", dropped.len());
    Err(Failure::new(Code::PartlyFailed, detail)
        .hint("they do not keep up: `parlour workers` shows what waits for them"))
}

async fn publish_durably(
    args: &Publish,
    client: &Client,
    event: PublishRequest,
    output: &Output,
) -> Result<Code, Failure> {
    let mut event = event.durable();
    if let Some(key) = &args.idempotency_key {
        event = event.idempotency_key(key.as_str());
    }
    let accepted = event.await;
    client.close().await;
    let accepted = accepted?;
    let ack = if accepted.ack == Ack::Durable { "durable" } else { "memory" };
    let (id, recipients) = (accepted.id.as_str(), accepted.recipients);
    if output.mode() == Mode::Text {
        output.line(&format!("id         {}", escape(id)))?;
        output.line(&format!("ack        {ack}"))?;
        output.line(&format!("recipients {recipients}"))?;
    } else {
        output.json(&json!({
            "id": id,
            "conversation": accepted.conversation.as_str(),
            "ack": ack,
            "recipients": recipients,
            "known": !accepted.is_new,
        }))?;
    }
    if !accepted.is_new {
        output.note("it had been published before, under the same key");
    }
    if recipients == 0 {
        output.note("nobody has subscribed; `parlour subscriptions set --help` says how to");
    }
    Ok(Code::Ok)
}
