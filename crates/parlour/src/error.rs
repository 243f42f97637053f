use std::fmt;

use parlour_core::{Fault, FaultKind, InvalidName, MetadataError};

use crate::reply::chain;

/// Why something did not work: a kind to decide on, a sentence to read, and whether an agent may have
/// run.
///
/// The sentence does not repeat that of its [`source`](std::error::Error::source).
///
/// ```no_run
/// use parlour::{Client, Error, ErrorKind, FaultKind, Payload};
///
/// async fn ask(client: &Client, question: &str) -> Result<Option<Payload>, Error> {
///     match client.call("oracle", question).await {
///         Ok(answer) => Ok(Some(answer)),
///         Err(error) if error.is_retryable() && !error.may_have_run() => {
///             client.call("oracle", question).await.map(Some)
///         }
///         Err(error) if error.kind() == ErrorKind::Fault(FaultKind::AgentFailed) => Ok(None),
///         Err(error) => Err(error),
///     }
/// }
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    hint: Option<String>,
    may_have_run: bool,
    /// What passed is the deadline of the message that was being handled.
    of_callers_deadline: bool,
    fault: Option<Fault>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The kinds of [`Error`].
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// No host could be reached at the URL, or what answered there is not one.
    Connect,
    /// The connection was lost after the request had been sent and before its answer came, and the
    /// host did not go on with it.
    ConnectionLost,
    /// The deadline passed first, here or at the host.
    Timeout,
    /// The host or the agent answered with a fault.
    Fault(FaultKind),
    /// The host said something that the protocol does not allow.
    Protocol,
    /// A name breaks its rule; nothing was sent.
    InvalidName,
    /// Another argument is unusable, such as a URL; nothing was sent.
    Invalid,
    /// A value could not be encoded; nothing was sent.
    Encode,
    /// An answer came and is not what was expected.
    Decode,
    /// The client has been closed.
    Closed,
    /// A signal ended it before it was done.
    Interrupted,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            hint: None,
            may_have_run: false,
            of_callers_deadline: false,
            fault: None,
            source: None,
        }))
    }

    pub(crate) fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    pub(crate) fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.0.source = Some(source.into());
        self
    }

    pub(crate) fn may_have_run_if(mut self, may_have_run: bool) -> Self {
        self.0.may_have_run = may_have_run;
        self
    }

    pub(crate) fn of_callers_deadline(mut self) -> Self {
        self.0.of_callers_deadline = true;
        self
    }

    pub(crate) fn is_of_callers_deadline(&self) -> bool {
        self.0.of_callers_deadline
    }

    pub(crate) fn connection_lost(sent: bool) -> Self {
        Self::new(ErrorKind::ConnectionLost, "the connection to the host was lost")
            .with_hint("if doing it twice does no harm, send it again")
            .may_have_run_if(sent)
    }

    /// Why a delivery has ended without what was waited for. Its deadline, too, is not that of the wait.
    pub(crate) fn of_end(fault: Fault) -> Self {
        let kind = ErrorKind::Fault(fault.kind());
        let mut error = Self::from(fault);
        error.0.kind = kind;
        error
    }

    pub(crate) fn closed() -> Self {
        Self::new(ErrorKind::Closed, "the client is closed")
    }

    /// The kind, which is all a program should decide on.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The fault that the host or the agent answered with, with all its details.
    pub fn fault(&self) -> Option<&Fault> {
        self.0.fault.as_ref()
    }

    /// Whether an agent may have run. If not, the same request can be sent again at no risk.
    pub fn may_have_run(&self) -> bool {
        self.0.may_have_run
    }

    /// What to type or change next, if anyone knows.
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref().or_else(|| self.fault().and_then(Fault::hint_text))
    }

    /// Whether sending the same request again later can succeed. Look at
    /// [`may_have_run`](Self::may_have_run) before doing so.
    pub fn is_retryable(&self) -> bool {
        match self.kind() {
            ErrorKind::Connect | ErrorKind::ConnectionLost | ErrorKind::Timeout => true,
            ErrorKind::Fault(kind) => kind.is_retryable(),
            _ => false,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

// What `main` and a failed `unwrap` print: for people, with the hint. `{:#?}` has it field by field.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !f.alternate() {
            write!(f, "{}", chain(self))?;
            if let Some(hint) = self.hint() {
                write!(f, "\nhint: {hint}")?;
            }
            write!(f, "\nkind: {:?}", self.0.kind)?;
            return match self.0.may_have_run {
                true => f.write_str(", the agent may have run"),
                false => Ok(()),
            };
        }
        let mut debug = f.debug_struct("Error");
        debug.field("kind", &self.0.kind).field("message", &self.0.message);
        if let Some(hint) = self.hint() {
            debug.field("hint", &hint);
        }
        if let Some(source) = &self.0.source {
            debug.field("source", source);
        }
        debug.field("may_have_run", &self.0.may_have_run).finish_non_exhaustive()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        let kind = match fault.kind() {
            FaultKind::DeadlineExceeded => ErrorKind::Timeout,
            kind => ErrorKind::Fault(kind),
        };
        let mut error = Self::new(kind, fault.to_string()).may_have_run_if(fault.may_have_run());
        error.0.fault = Some(fault);
        error
    }
}

impl From<InvalidName> for Error {
    fn from(error: InvalidName) -> Self {
        Self::new(ErrorKind::InvalidName, error.to_string())
    }
}

impl From<MetadataError> for Error {
    fn from(error: MetadataError) -> Self {
        Self::new(ErrorKind::Invalid, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_keeps_its_details() {
        let fault = Fault::new(FaultKind::Overloaded, "the queue is full").hint("wait");
        let error = Error::from(fault.clone());
        assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::Overloaded));
        assert_eq!(error.to_string(), "the queue is full");
        assert_eq!((error.hint(), error.fault()), (Some("wait"), Some(&fault)));
        assert!(error.is_retryable() && !error.may_have_run());
    }

    #[test]
    fn what_main_prints_is_for_people() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let error = Error::new(ErrorKind::Connect, "cannot connect").with_source(refused);
        assert_eq!(
            format!("{:?}", error.with_hint("start a host")),
            "cannot connect: connection refused\nhint: start a host\nkind: Connect"
        );
        let failed = Error::from(Fault::new(FaultKind::AgentFailed, "no ink"));
        assert_eq!(
            format!("{failed:?}"),
            "no ink\nkind: Fault(AgentFailed), the agent may have run"
        );
        assert!(format!("{failed:#?}").contains("may_have_run: true"));
    }

    #[test]
    fn a_deadline_is_a_timeout_wherever_it_passed() {
        let error = Error::from(Fault::new(FaultKind::DeadlineExceeded, "late"));
        assert_eq!(error.kind(), ErrorKind::Timeout);
    }
}
