//! `parlour call`: one call, and its reply's body on stdout.

use parlour::{CallRequest, Error, IntoAgentId, Payload};
use serde_json::json;

use crate::args::Call;
use crate::body;
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output, escape};
use crate::room::{self, Handled};

pub(crate) fn run(args: &Call, output: &Output) -> Result<Code, Failure> {
    room::run(call(args, output))
}

async fn call(args: &Call, output: &Output) -> Result<Code, Failure> {
    // A wrong name needs no host to be told, nor does stdin have to be read for it.
    let target = args.target.as_str().into_agent_id()?;
    let payload = body::read(&args.body).await?;
    let client = room::connect(&args.client, "call").await?;
    let call = client.call(target, payload).timeout(args.timeout);
    let call = Handled::from_environment().precede(call);
    let reply = if args.progress { followed(call, output).await } else { call.await };
    client.close().await;
    let reply = reply?;
    match output.mode() {
        Mode::Text => output.data(&reply.bytes)?,
        Mode::Json | Mode::Jsonl => output.json(&body::describe(&reply))?,
    }
    Ok(Code::Ok)
}

/// Makes the call, and shows what comes before its reply.
async fn followed(call: CallRequest, output: &Output) -> Result<Payload, Error> {
    let mut call = call.with_progress();
    while let Some(update) = call.next().await {
        match output.mode() {
            // If nobody reads it any more, writing the reply will say so.
            Mode::Jsonl => drop(output.json(&json!({"progress": body::describe(&update)}))),
            Mode::Text | Mode::Json => {
                output.note(&escape(&String::from_utf8_lossy(&update.bytes)))
            }
        }
    }
    call.reply().await
}
