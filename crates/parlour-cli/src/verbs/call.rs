//! `parlour call`: one call, and its reply's body on stdout.

use crate::args::Call;
use crate::body;
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output};
use crate::room::{self, Handled};

pub(crate) fn run(args: &Call, output: &Output) -> Result<Code, Failure> {
    room::run(call(args, output))
}

async fn call(args: &Call, output: &Output) -> Result<Code, Failure> {
    let payload = body::read(&args.body).await?;
    let client = room::connect(&args.client).await?;
    let call = client.call(&args.target, payload).timeout(args.timeout);
    let reply = Handled::from_environment().precede(call).await;
    client.close().await;
    let reply = reply.map_err(room::failure)?;
    match output.mode() {
        Mode::Text => output.data(&reply.bytes)?,
        Mode::Json | Mode::Jsonl => output.json(&body::describe(&reply))?,
    }
    Ok(Code::Ok)
}
