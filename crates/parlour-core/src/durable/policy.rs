//! When an attempt that failed is made again.

use std::time::Duration;

use crate::FaultKind;

/// How often a delivery is attempted, and how long it waits in between.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "made from settings, field by field")]
pub struct RetryPolicy {
    /// Attempts that may fail; after the last of them the delivery is dead. At least 1.
    pub max_attempts: u32,
    /// Attempts that may be lost with their worker or host; counted apart from those that failed.
    pub max_lost: u32,
    /// The longest wait before the second attempt; it doubles with each further one.
    pub base: Duration,
    /// The longest wait of all.
    pub cap: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_attempts: 5,
            max_lost: 10,
            base: Duration::from_millis(200),
            cap: Duration::from_secs(60),
        }
    }
}

impl RetryPolicy {
    /// How long to wait after `tries` attempts: full jitter, evenly between nothing and
    /// `base × 2^(tries − 1)`, which is `cap` at the most. `random` is evenly between 0 and 1.
    ///
    /// The formula is that of "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015).
    pub fn wait(&self, tries: u32, random: f64) -> Duration {
        let doublings = tries.saturating_sub(1).min(31);
        self.base.saturating_mul(1 << doublings).min(self.cap).mul_f64(random.clamp(0.0, 1.0))
    }

    /// Whether an attempt that ended with this kind of fault can succeed when it is made again
    /// unchanged.
    pub fn retries(kind: FaultKind) -> bool {
        !matches!(
            kind,
            FaultKind::Invalid
                | FaultKind::TooLarge
                | FaultKind::NotFound
                | FaultKind::Gone
                | FaultKind::Unauthenticated
                | FaultKind::Forbidden
                | FaultKind::Conflict
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap_and_are_spread_over_their_whole_length() {
        let policy = RetryPolicy::default();
        let longest = |tries| policy.wait(tries, 1.0).as_millis();
        assert_eq!([1, 2, 3, 4].map(longest), [200, 400, 800, 1600]);
        assert_eq!([9, 10, 40, u32::MAX].map(longest), [51_200, 60_000, 60_000, 60_000]);
        assert_eq!(policy.wait(3, 0.0), Duration::ZERO);
        assert_eq!(policy.wait(3, 0.25).as_millis(), 200);
    }

    #[test]
    fn a_failing_agent_is_asked_again_and_an_invalid_message_is_not() {
        assert!(RetryPolicy::retries(FaultKind::AgentFailed));
        assert!(RetryPolicy::retries(FaultKind::WorkerLost));
        assert!(!RetryPolicy::retries(FaultKind::Invalid));
    }
}
