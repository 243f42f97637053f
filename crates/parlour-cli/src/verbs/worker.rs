//! `parlour worker`: serves an agent type with a program, or with an echo.

use std::sync::Arc;

use parlour::{Agent, Cx, Payload, TopicId};
use tokio::sync::oneshot;

use crate::args::{Client, Worker};
use crate::exit::{Code, Failure};
use crate::log;
use crate::output::{Output, escape};
use crate::program::{self, Program};
use crate::room;
use crate::signals::Signals;

pub(crate) fn run(args: &Worker, output: &Output) -> Result<Code, Failure> {
    log::start_by_environment()?;
    let runtime = room::runtime()?;
    let code = runtime.block_on(serve(args, output));
    // Drops what still runs, and with it the programs.
    drop(runtime);
    code
}

async fn serve(args: &Worker, output: &Output) -> Result<Code, Failure> {
    let mut signals = Signals::install()?;
    let (serving, url) = (*output, args.client.url.clone());
    let agent_type = args.agent_type.clone();
    let own = || format!("{}-{}", args.agent_type, std::process::id());
    let mut worker = parlour::Worker::builder(&args.client.url)
        .name(args.name.clone().unwrap_or_else(own))
        .capacity(args.capacity)
        .on_connected(move || {
            serving.announce(&format!("serving {} at {}", escape(&agent_type), escape(&url)));
        });
    if let Some(token) = room::token(&args.client)? {
        worker = worker.token(token);
    }
    if let Some(program) = args.command.first().filter(|program| !program::is_found(program)) {
        output.warn(&format!(
            "there is no program `{}`: calls will fail until there is one",
            escape(&program.to_string_lossy())
        ));
    }
    let mut agent = if args.echo {
        Agent::stateless().on_call(async |message: Payload| message)
    } else {
        let program = Arc::new(Program::new(args.command.clone(), args.content_type.clone()));
        let client = Arc::new(args.client.clone());
        let (of_event, at_event) = (Arc::clone(&program), Arc::clone(&client));
        let on_event = move |cx: Cx, topic: TopicId, message: Payload| {
            let (program, client) = (Arc::clone(&of_event), Arc::clone(&at_event));
            async move {
                let mut variables = variables(&client, &cx, &message);
                variables.push(("PARLOUR_TOPIC_TYPE".to_owned(), topic.topic_type.to_string()));
                variables.push(("PARLOUR_TOPIC_SOURCE".to_owned(), topic.source.to_string()));
                program.answer(variables, message.bytes).await.map(drop)
            }
        };
        let on_call = move |cx: Cx, message: Payload| {
            let (program, client) = (Arc::clone(&program), Arc::clone(&client));
            async move { program.answer(variables(&client, &cx, &message), message.bytes).await }
        };
        Agent::stateless().on_call(on_call).on_event(on_event)
    };
    if args.exclusive {
        agent = agent.exclusive();
    }
    for capability in &args.capabilities {
        agent = agent.capability(capability.as_str());
    }
    let worker = worker.agent(&args.agent_type, agent);
    let (stop, stopped) = oneshot::channel::<()>();
    let worker = worker.run_until(async move {
        let _ = stopped.await;
    });
    tokio::pin!(worker);
    let ended = tokio::select! {
        ended = &mut worker => ended,
        _ = signals.next() => {
            output.note("draining; a second signal ends it at once");
            let _ = stop.send(());
            tokio::select! {
                ended = worker => ended,
                code = signals.next() => return Ok(code),
            }
        }
    };
    ended.map(|()| Code::Ok).map_err(Failure::from)
}

/// What the program finds in its environment.
fn variables(client: &Client, cx: &Cx, message: &Payload) -> Vec<(String, String)> {
    let mut variables = vec![
        ("PARLOUR_KEY".to_owned(), cx.agent().key.to_string()),
        ("PARLOUR_DATA_TYPE".to_owned(), message.data_type.to_string()),
        ("PARLOUR_ATTEMPT".to_owned(), cx.attempt().to_string()),
        ("PARLOUR_CONVERSATION".to_owned(), cx.conversation().to_string()),
        ("PARLOUR_CAUSE".to_owned(), cx.message_id().to_string()),
        ("PARLOUR_HOPS".to_owned(), cx.hops().to_string()),
        ("PARLOUR_URL".to_owned(), client.url.clone()),
    ];
    if let Some(file) = &client.token_file {
        variables.push(("PARLOUR_TOKEN_FILE".to_owned(), file.display().to_string()));
    }
    for (name, value) in message.metadata.iter() {
        let name = name.replace(['-', '.'], "_").to_ascii_uppercase();
        variables.push((format!("PARLOUR_META_{name}"), value.to_owned()));
    }
    variables
}
