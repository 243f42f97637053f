use std::fmt;
use std::time::Duration;

/// Why a call has no answer: a kind to decide on, a sentence to read, and whether the agent may have
/// run.
///
/// Each binding maps a [`FaultKind`] to its own codes; nothing decides on the text.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Fault(Box<Inner>);

#[derive(Clone, Debug, Eq, PartialEq)]
struct Inner {
    kind: FaultKind,
    detail: Box<str>,
    hint: Option<Box<str>>,
    may_have_run: bool,
    retry_after: Option<Duration>,
    config_key: Option<Box<str>>,
    limit: Option<u64>,
}

impl Fault {
    /// A fault of this kind, with a short lowercase sentence for a person.
    ///
    /// Whether the agent may have run follows from the kind: only `agent_failed` and `worker_lost`
    /// begin with yes. [`may_have_run_if`](Self::may_have_run_if) says otherwise.
    pub fn new(kind: FaultKind, detail: impl Into<Box<str>>) -> Self {
        Self(Box::new(Inner {
            kind,
            detail: detail.into(),
            hint: None,
            may_have_run: matches!(kind, FaultKind::AgentFailed | FaultKind::WorkerLost),
            retry_after: None,
            config_key: None,
            limit: None,
        }))
    }

    /// Adds what to type or change next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<Box<str>>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// States whether the agent may have run.
    #[must_use]
    pub fn may_have_run_if(mut self, may_have_run: bool) -> Self {
        self.0.may_have_run = may_have_run;
        self
    }

    /// Adds how long to wait before trying again.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.0.retry_after = Some(wait);
        self
    }

    /// Names the limit that was met: the key it is configured by, and its value.
    #[must_use]
    pub fn limit(mut self, config_key: impl Into<Box<str>>, limit: Option<u64>) -> Self {
        self.0.config_key = Some(config_key.into());
        self.0.limit = limit;
        self
    }

    /// The same with texts of at most `max` bytes each, cut at a letter.
    #[must_use]
    pub fn shortened(mut self, max: usize) -> Self {
        let cut = |text: &mut Box<str>| {
            if text.len() > max {
                let end = text.floor_char_boundary(max.saturating_sub('…'.len_utf8()));
                *text = format!("{}…", &text[..end]).into();
            }
        };
        cut(&mut self.0.detail);
        [&mut self.0.hint, &mut self.0.config_key].into_iter().flatten().for_each(cut);
        self
    }

    /// Roughly the memory that it holds.
    pub fn weight(&self) -> usize {
        self.0.detail.len() + self.0.hint.as_ref().map_or(0, |hint| hint.len())
    }

    /// The kind, which is all a program should decide on.
    pub fn kind(&self) -> FaultKind {
        self.0.kind
    }

    /// The sentence for a person.
    pub fn detail(&self) -> &str {
        &self.0.detail
    }

    /// What to type or change next, if anyone knows.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// Whether the agent may have run. If not, the same call can be sent again at no risk.
    pub fn may_have_run(&self) -> bool {
        self.0.may_have_run
    }

    /// Whether sending the same call again later can succeed.
    pub fn is_retryable(&self) -> bool {
        self.0.kind.is_retryable()
    }

    /// How long to wait before that, if anyone knows.
    pub fn retry_after_time(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// The configuration key of the limit that was met.
    pub fn config_key(&self) -> Option<&str> {
        self.0.config_key.as_deref()
    }

    /// The value of the limit that was met.
    pub fn limit_value(&self) -> Option<u64> {
        self.0.limit
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.detail)
    }
}

impl std::error::Error for Fault {}

/// Defines the kinds once: variant, wire name, title, whether a retry can help, and what it means.
macro_rules! kinds {
    ($($kind:ident, $name:literal, $title:literal, $retryable:literal, $doc:literal;)*) => {
        /// The kinds of [`Fault`].
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        #[non_exhaustive]
        pub enum FaultKind {
            $(#[doc = $doc] $kind,)*
        }

        impl FaultKind {
            /// Every kind.
            pub const ALL: &[Self] = &[$(Self::$kind,)*];

            /// The name on every wire, such as `worker_lost`.
            pub fn name(self) -> &'static str {
                match self { $(Self::$kind => $name,)* }
            }

            /// A few words for a person.
            pub fn title(self) -> &'static str {
                match self { $(Self::$kind => $title,)* }
            }

            /// What it means, in full.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$kind => $doc,)* }
            }

            /// Whether sending the same thing again later can succeed.
            pub fn is_retryable(self) -> bool {
                match self { $(Self::$kind => $retryable,)* }
            }

            /// The kind of that name.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$kind),)* _ => None }
            }
        }
    };
}

kinds! {
    UnknownAgent, "unknown_agent", "Unknown agent", true,
        "No worker serves this agent type now. The call was not delivered.";
    NotFound, "not_found", "Not found", false,
        "There is no such thing under that name.";
    Gone, "gone", "Gone", false,
        "It was there and has been let go, such as events past their retention.";
    Unauthenticated, "unauthenticated", "Unauthenticated", false,
        "The request carries no credential that the host knows.";
    Forbidden, "forbidden", "Forbidden", false,
        "The host knows who asks, or where the request comes from, and does not allow it.";
    Invalid, "invalid", "Invalid request", false,
        "The request breaks the rules of its protocol. Sending it again unchanged cannot help.";
    TooLarge, "too_large", "Too large", false,
        "Something is larger than a limit allows.";
    Conflict, "conflict", "Conflict", false,
        "It contradicts what is already there, such as a second exclusive registration.";
    Overloaded, "overloaded", "Overloaded", true,
        "Something bounded is full: a queue, so that the message was not delivered; or what waits for a \
         caller that reads too slowly, so that its call ended although the agent ran. `may_have_run` \
         tells which.";
    CircuitOpen, "circuit_open", "Circuit open", true,
        "Calls to this destination keep failing, and are held back for a while.";
    WorkerLost, "worker_lost", "Worker lost", true,
        "The worker went away while it had the call, which may or may not have run.";
    DeadlineExceeded, "deadline_exceeded", "Deadline exceeded", true,
        "The caller's deadline passed first.";
    Cancelled, "cancelled", "Cancelled", false,
        "The caller gave the call up.";
    AgentFailed, "agent_failed", "Agent failed", false,
        "The agent ran and answered with an error of its own.";
    Unavailable, "unavailable", "Unavailable", true,
        "The host is shutting down, or cannot serve this now.";
    StorageFull, "storage_full", "Storage full", true,
        "The host has no room to keep more.";
    Internal, "internal", "Internal error", false,
        "Something failed that is a bug in Parlour.";
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_found_by_its_name() {
        for &kind in FaultKind::ALL {
            assert_eq!(FaultKind::from_name(kind.name()), Some(kind));
        }
        assert_eq!(FaultKind::from_name("strange"), None);
    }
}
