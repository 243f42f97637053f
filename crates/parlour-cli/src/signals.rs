//! The two signals that ask the program to end.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::exit::{Code, Failure};

/// SIGINT and SIGTERM, held from the moment this is made.
#[derive(Debug)]
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Takes the signals over. Must be called within a runtime.
    pub(crate) fn install() -> Result<Self, Failure> {
        let install = || -> io::Result<Self> {
            Ok(Self {
                interrupt: signal(SignalKind::interrupt())?,
                terminate: signal(SignalKind::terminate())?,
            })
        };
        install().map_err(|error| {
            Failure::new(Code::Failed, format!("cannot listen for signals: {error}"))
        })
    }

    /// Has a file that may not grow end in an error, as a full disk does, and not in the program's end.
    /// Must be called within a runtime.
    pub(crate) fn survive_long_files() -> Result<(), Failure> {
        let signal = signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw()));
        signal.map(drop).map_err(|error| {
            Failure::new(Code::Failed, format!("cannot listen for signals: {error}"))
        })
    }

    /// Waits for the next one, and says with which code a program ends that obeys it at once.
    ///
    /// Cancel safe: a signal is reported by the next call if this one is dropped.
    pub(crate) async fn next(&mut self) -> Code {
        tokio::select! {
            _ = self.interrupt.recv() => Code::Interrupted,
            _ = self.terminate.recv() => Code::Terminated,
        }
    }
}
