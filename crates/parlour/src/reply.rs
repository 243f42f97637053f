use std::fmt;

use parlour_core::{Fault, FaultKind, Payload};

use crate::{Error, IntoPayload};

/// What a handler may return: something that can be sent ([`IntoPayload`]: text, bytes, [`Json`],
/// `()` …), or a [`Result`] of it.
///
/// [`Json`]: crate::Json
///
/// ```compile_fail,E0277
/// # use parlour::Agent;
/// async fn length(text: String) -> usize {
///     text.len()
/// }
/// let agent = Agent::stateless().on_call(length); // `usize` cannot be sent as a message
/// ```
#[diagnostic::on_unimplemented(
    message = "a handler cannot return `{Self}`",
    label = "returned by a handler",
    note = "return text, bytes, `Json<T>` where `T: Serialize`, `Payload` or `()`; or a `Result` of one \
            of these, whose error is an `AgentError` or converts into one"
)]
pub trait IntoReply {
    /// Makes the reply.
    fn into_reply(self) -> Result<Payload, AgentError>;
}

impl<T: IntoPayload> IntoReply for T {
    fn into_reply(self) -> Result<Payload, AgentError> {
        Ok(self.into_payload()?)
    }
}

impl<T: IntoPayload, E: Into<AgentError>> IntoReply for Result<T, E> {
    fn into_reply(self) -> Result<Payload, AgentError> {
        Ok(self.map_err(Into::into)?.into_payload()?)
    }
}

/// Why a handler has no answer. `?` makes one of any error, and so do texts.
///
/// A [`Fault`] reaches the caller as it is; everything else as a fault of kind `agent_failed` with
/// the error's text and those of its sources. But what fails because the caller's own deadline passed
/// while the handler waited for another agent is `deadline_exceeded` to the caller too.
///
/// ```
/// use parlour::{AgentError, Fault, FaultKind};
///
/// async fn root(text: String) -> Result<String, AgentError> {
///     let number: f64 = text.trim().parse()?;
///     if number < 0.0 {
///         return Err(Fault::new(FaultKind::Invalid, "it has no root").hint("use `abs` first").into());
///     }
///     if number.is_nan() {
///         return Err("that is no number".into());
///     }
///     Ok(number.sqrt().to_string())
/// }
/// # let _ = parlour::Agent::stateless().on_call(root);
/// ```
#[derive(Debug)]
pub struct AgentError(Box<dyn std::error::Error + Send + Sync>);

impl AgentError {
    pub(crate) fn into_fault(self) -> Fault {
        match self.0.downcast::<Fault>() {
            Ok(fault) => *fault,
            Err(error) if is_of_callers_deadline(&*error) => late(true),
            Err(error) => Fault::new(FaultKind::AgentFailed, chain(&*error)),
        }
    }
}

// `AgentError` is no `Error` itself, or this would overlap with `From<T> for T`.
impl<E: Into<Box<dyn std::error::Error + Send + Sync>>> From<E> for AgentError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl fmt::Display for AgentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether the caller's own deadline passed while the handler waited for others.
fn is_of_callers_deadline(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| error.source())
        .filter_map(|error| error.downcast_ref::<Error>())
        .any(Error::is_of_callers_deadline)
}

/// A call's deadline passed, after its handler began or before.
pub(crate) fn late(began: bool) -> Fault {
    let detail = match began {
        true => "the deadline passed before the agent answered",
        false => "the deadline passed before it was the message's turn",
    };
    Fault::new(FaultKind::DeadlineExceeded, detail).may_have_run_if(began)
}

/// The text of an error and of its sources, without those that an error repeats by itself.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the ledger is closed")]
    struct Closed(#[source] std::fmt::Error);

    #[test]
    fn any_error_fails_the_agent_with_its_text_and_a_fault_stays_itself() {
        let fault = |error: AgentError| {
            let fault = error.into_fault();
            (fault.kind(), fault.to_string())
        };
        assert_eq!(fault("no paper".into()), (FaultKind::AgentFailed, "no paper".into()));
        assert_eq!(fault(String::from("no ink").into()).1, "no ink");
        let source = std::fmt::Error;
        assert_eq!(fault(Closed(source).into()).1, format!("the ledger is closed: {source}"));
        let invalid = Fault::new(FaultKind::Invalid, "not a number");
        assert_eq!(fault(invalid.into()), (FaultKind::Invalid, "not a number".into()));
    }
}
