//! How the program ends: an exit code for scripts to decide on, and faults for people to read.

use std::error::Error as _;

use parlour::ErrorKind;
use parlour_core::{Fault, FaultKind, InvalidName};

/// The exit codes, as `parlour --help` lists them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(crate) enum Code {
    Ok = 0,
    Failed = 1,
    Usage = 2,
    NotFound = 3,
    Denied = 4,
    Conflict = 5,
    Timeout = 6,
    CannotConnect = 7,
    PartlyFailed = 8,
    Storage = 74,
    AlreadyRunning = 75,
    BadConfig = 78,
    Interrupted = 130,
    Terminated = 143,
}

impl Code {
    /// The code for an answer of this kind from a host.
    pub(crate) fn of(kind: FaultKind) -> Self {
        match kind {
            FaultKind::UnknownAgent | FaultKind::NotFound | FaultKind::Gone => Self::NotFound,
            FaultKind::Unauthenticated | FaultKind::Forbidden => Self::Denied,
            FaultKind::Conflict => Self::Conflict,
            FaultKind::DeadlineExceeded => Self::Timeout,
            _ => Self::Failed,
        }
    }
}

/// Why a verb did not do what it was asked to.
#[derive(Debug)]
pub(crate) struct Failure {
    code: Code,
    faults: Vec<Fault>,
    is_of_host: bool,
}

impl Failure {
    /// A failure of this program's own making.
    pub(crate) fn new(code: Code, detail: impl Into<Box<str>>) -> Self {
        let kind = match code {
            Code::Usage | Code::BadConfig => FaultKind::Invalid,
            Code::NotFound => FaultKind::NotFound,
            Code::Denied => FaultKind::Forbidden,
            Code::Conflict | Code::AlreadyRunning => FaultKind::Conflict,
            Code::Timeout => FaultKind::DeadlineExceeded,
            Code::PartlyFailed => FaultKind::Overloaded,
            _ => FaultKind::Unavailable,
        };
        Self { code, faults: vec![Fault::new(kind, detail)], is_of_host: false }
    }

    /// Several faults that are told at once, such as everything wrong with a configuration.
    pub(crate) fn all(code: Code, faults: Vec<Fault>) -> Self {
        Self { code, faults, is_of_host: false }
    }

    /// An end of which nobody needs to be told, such as a reader of our output that has gone.
    pub(crate) fn silent(code: Code) -> Self {
        Self { code, faults: Vec::new(), is_of_host: false }
    }

    /// Adds what to type or change next.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<Box<str>>) -> Self {
        if let Some(fault) = self.faults.pop() {
            self.faults.push(fault.hint(hint));
        }
        self
    }

    pub(crate) fn code(&self) -> Code {
        self.code
    }

    /// Whether a host answered this, so that `parlour explain` has a page on it.
    pub(crate) fn is_of_host(&self) -> bool {
        self.is_of_host
    }

    pub(crate) fn faults(&self) -> &[Fault] {
        &self.faults
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self { code: Code::of(fault.kind()), faults: vec![fault], is_of_host: true }
    }
}

/// What an error of the library means here.
impl From<parlour::Error> for Failure {
    fn from(error: parlour::Error) -> Self {
        let (code, kind) = match error.kind() {
            ErrorKind::Connect | ErrorKind::ConnectionLost => {
                (Code::CannotConnect, FaultKind::Unavailable)
            }
            ErrorKind::Timeout => (Code::Timeout, FaultKind::DeadlineExceeded),
            ErrorKind::Fault(kind) => (Code::of(kind), kind),
            ErrorKind::InvalidName | ErrorKind::Invalid => (Code::Usage, FaultKind::Invalid),
            _ => (Code::Failed, FaultKind::Internal),
        };
        if let Some(fault) = error.fault() {
            return Self { code, faults: vec![fault.clone()], is_of_host: true };
        }
        let mut detail = error.to_string();
        if let Some(source) = error.source() {
            detail = format!("{detail}: {source}");
        }
        let mut fault = Fault::new(kind, detail).may_have_run_if(error.may_have_run());
        if let Some(hint) = error.hint() {
            fault = fault.hint(hint);
        }
        Self::all(code, vec![fault])
    }
}

impl From<InvalidName> for Failure {
    fn from(error: InvalidName) -> Self {
        Self::new(Code::Usage, error.to_string())
    }
}
