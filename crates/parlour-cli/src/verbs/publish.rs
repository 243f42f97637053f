//! `parlour publish`: one event, and who got it.

use parlour::IntoTopicId;
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
    let event = client.publish(topic, payload);
    let published = Handled::from_environment().precede(event).await;
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
