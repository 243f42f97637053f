//! `parlour call`: one call, and its reply's body on stdout.

use parlour::IntoAgentId;

use crate::args::Call;
use crate::body;
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output};
use crate::room::{self, Handled};

pub(crate) fn run(args: &Call, output: &Output) -> Result<Code, Failure> {
    room::run(call(args, output))
}

async fn call(args: &Call, output: &Output) -> Result<Code, Failure> {
    // A wrong name needs no host to be told, nor does stdin have to be read for it.
    let target = args.target.as_str().into_agent_id()?;
    let payload = body::read(&args.body).await?;
    let client = room::connect(&args.client).await?;
    let call = client.call(target, payload).timeout(args.timeout);
    let reply = Handled::from_environment().precede(call).await;
    client.close().await;
    let reply = reply?;
    match output.mode() {
        Mode::Text => output.data(&reply.bytes)?,
        Mode::Json | Mode::Jsonl => output.json(&body::describe(&reply))?,
    }
    Ok(Code::Ok)
}
