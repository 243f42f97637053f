//! `parlour completion`: what a shell needs to complete the other verbs.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Args;
use crate::exit::{Code, Failure};
use crate::output::Output;

pub(crate) fn run(shell: Shell, output: &Output) -> Result<Code, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "parlour", &mut script);
    output.data(&script)?;
    Ok(Code::Ok)
}
