//! What the libraries log, on stderr: for people on a terminal, as JSON elsewhere.

use std::fmt::Display;
use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

use crate::exit::{Code, Failure};

/// Starts logging what `filter` lets through; `origin` says where the filter comes from.
pub(crate) fn start(filter: &str, origin: impl Display) -> Result<(), Failure> {
    let parsed = EnvFilter::builder().parse(filter).map_err(|error| {
        Failure::new(
            Code::BadConfig,
            format!("{origin}: `{filter}` does not say what to log: {error}"),
        )
        .hint("use error, warn, info, debug or trace, or a filter such as parlour_host=debug")
    })?;
    let log = tracing_subscriber::fmt().with_env_filter(parsed).with_writer(io::stderr);
    let started = if io::stderr().is_terminal() {
        log.try_init()
    } else {
        log.with_ansi(false).json().try_init()
    };
    started.map_err(|error| Failure::new(Code::Failed, format!("cannot log: {error}")))
}

/// Starts logging for a verb without settings: what `PARLOUR_LOG` says, or warnings.
pub(crate) fn start_by_environment() -> Result<(), Failure> {
    let filter = std::env::var("PARLOUR_LOG").unwrap_or_else(|_| "warn".to_owned());
    start(&filter, "PARLOUR_LOG")
}
