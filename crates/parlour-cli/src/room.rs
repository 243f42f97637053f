//! Getting into a room: the token, the connection, and what an error there means for the exit code.

use std::future::Future;
use std::path::Path;

use parlour_core::MessageId;
use tokio::runtime::Runtime;

use crate::args::Client;
use crate::exit::{Code, Failure};
use crate::signals::Signals;

/// A runtime for a verb that talks to a host.
///
/// The connection has a thread of its own: whoever reads our stdout slowly must not make the host
/// believe that we are dead.
pub(crate) fn runtime() -> Result<Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Code::Failed, format!("cannot start threads: {error}")))
}

/// Runs a verb until it ends or a signal ends it.
pub(crate) fn run(verb: impl Future<Output = Result<Code, Failure>>) -> Result<Code, Failure> {
    let runtime = runtime()?;
    let code = runtime.block_on(async {
        let mut signals = Signals::install()?;
        tokio::select! {
            ended = verb => ended,
            code = signals.next() => Ok(code),
        }
    });
    // A thread may wait for stdin, which nobody will close.
    runtime.shutdown_background();
    code
}

/// The token that the host asks for, if a file was named.
pub(crate) fn token(client: &Client) -> Result<Option<String>, Failure> {
    client.token_file.as_deref().map(|path| read_token(path, Code::Usage)).transpose()
}

/// The token in a file, without the spaces and line ends around it.
pub(crate) fn read_token(path: &Path, code: Code) -> Result<String, Failure> {
    let name = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::new(code, format!("cannot read the token in {name}: {error}")))?;
    match text.trim() {
        "" => Err(Failure::new(code, format!("there is no token in {name}"))),
        token if token.chars().all(|c| c.is_ascii_graphic()) => Ok(token.to_owned()),
        _ => Err(Failure::new(code, format!("the token in {name} has characters it may not have"))
            .hint("a token is one word of letters, digits and punctuation")),
    }
}

/// A connection to the host, which lists it as `parlour VERB`.
pub(crate) async fn connect(client: &Client, verb: &str) -> Result<parlour::Client, Failure> {
    let mut builder = parlour::Client::builder(&client.url).name(format!("parlour {verb}"));
    if let Some(token) = token(client)? {
        builder = builder.token(token);
    }
    Ok(builder.connect().await?)
}

/// What this program is handling, if `parlour worker` runs it.
#[derive(Debug)]
pub(crate) struct Handled {
    conversation: Option<MessageId>,
    cause: Option<MessageId>,
    hops: Option<u8>,
}

impl Handled {
    pub(crate) fn from_environment() -> Self {
        let variable = |name| std::env::var(name).ok();
        let id = |name| MessageId::parse(variable(name)?).ok();
        Self {
            conversation: id("PARLOUR_CONVERSATION"),
            cause: id("PARLOUR_CAUSE"),
            hops: variable("PARLOUR_HOPS").and_then(|hops| hops.parse().ok()),
        }
    }

    /// Makes a request follow from what is handled, so that a loop of programs is caught.
    pub(crate) fn precede<To>(self, mut request: parlour::Request<To>) -> parlour::Request<To> {
        if let Some(conversation) = self.conversation {
            request = request.conversation(conversation);
        }
        if let Some(cause) = self.cause {
            request = request.cause(cause);
        }
        if let Some(hops) = self.hops {
            request = request.hops(hops.saturating_add(1));
        }
        request
    }
}
