//! The `parlour` binary: reads the command line, runs one verb, and ends with the code that says how
//! it went. The only crate that prints.

mod args;
mod bench;
mod body;
mod config;
mod data;
mod demo;
mod exit;
mod log;
mod output;
mod program;
mod rest;
mod room;
mod signals;
mod verbs;

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches};

use crate::args::{Args, Verb};
use crate::exit::{Code, Failure};
use crate::output::{Color, Mode, Output};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let args = match parse(&words) {
        Ok(args) => args,
        Err(code) => return ExitCode::from(code as u8),
    };
    let output = Output::new(args.common.mode(), args.common.quiet, args.common.color);
    let code = run(&args.verb, &output).unwrap_or_else(|failure| {
        output.failure(&failure);
        failure.code()
    });
    ExitCode::from(code as u8)
}

fn run(verb: &Verb, output: &Output) -> Result<Code, Failure> {
    match verb {
        Verb::Demo(args) => demo::run(args, output),
        Verb::DemoWorker(args) => demo::worker::run(args, output),
        Verb::DemoHost(args) => demo::kept::run(args, output),
        Verb::Serve(args) => verbs::serve::run(args, output),
        Verb::Worker(args) => verbs::worker::run(args, output),
        Verb::Call(args) => verbs::call::run(args, output),
        Verb::Send(args) => verbs::send::run(args, output),
        Verb::Deliveries(args) => verbs::deliveries::run(args, output),
        Verb::DeadLetters(args) => verbs::dead_letters::run(args, output),
        Verb::Publish(args) => verbs::publish::run(args, output),
        Verb::Subscribe(args) => verbs::subscribe::run(args, output),
        Verb::Subscriptions(args) => verbs::subscriptions::run(args, output),
        Verb::Agents(args) => verbs::agents::run(args, output),
        Verb::Workers(args) => verbs::workers::run(args, output),
        Verb::Status(client) => verbs::status::run(client, output),
        Verb::Backup(args) => verbs::backup::run(args, output),
        Verb::Restore(args) => verbs::restore::run(args, output),
        Verb::Verify(args) => verbs::verify::run(args, output),
        Verb::Doctor(args) => verbs::doctor::run(args, output),
        Verb::Config(args) => verbs::config::run(args, output),
        Verb::Explain(args) => verbs::explain::run(args, output),
        Verb::Bench(args) => bench::run(args, output),
        Verb::Completion { shell } => verbs::completion::run(*shell, output),
        Verb::Version => verbs::version::run(output),
    }
}

/// Reads the command line. What is wrong with it has been said when this fails.
fn parse(words: &[OsString]) -> Result<Args, Code> {
    let color = match flag(words, "--color").as_deref() {
        Some("always") => clap::ColorChoice::Always,
        Some("never") => clap::ColorChoice::Never,
        _ => clap::ColorChoice::Auto,
    };
    let command = Args::command().color(color);
    let parsed = command.try_get_matches_from(words).and_then(|m| Args::from_arg_matches(&m));
    parsed.map_err(|error| {
        if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
            // A reader of our help that has gone needs no error.
            let _ = error.print();
            return Code::Ok;
        }
        let wants_json = words.iter().any(|word| word == "--json")
            || matches!(flag(words, "--output").as_deref(), Some("json" | "jsonl"));
        if wants_json {
            let text = error.to_string();
            let detail = text.strip_prefix("error: ").unwrap_or(&text).trim_end();
            let failure = Failure::new(Code::Usage, detail);
            Output::new(Some(Mode::Json), false, Color::Never).failure(&failure);
        } else {
            let _ = error.print();
            let _ = std::io::stderr().flush();
        }
        Code::Usage
    })
}

/// The value of a flag on a command line that may be wrong elsewhere.
fn flag(words: &[OsString], name: &str) -> Option<String> {
    let mut words = words.iter().map(|word| word.to_string_lossy()).take_while(|word| word != "--");
    while let Some(word) = words.next() {
        if word == name {
            return words.next().map(Into::into);
        }
        if let Some(value) = word.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')) {
            return Some(value.to_owned());
        }
    }
    None
}
