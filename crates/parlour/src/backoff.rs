use std::ops::RangeInclusive;
use std::time::Duration;

/// How long to wait before the next attempt to connect: a random time below a ceiling that doubles,
/// so that clients which lost the same host do not come back at the same moment.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// The first ceiling.
    pub(crate) const BASE: Duration = Duration::from_millis(100);
    /// The highest ceiling.
    pub(crate) const CAP: Duration = Duration::from_secs(5);

    /// The range to draw the next wait from, in milliseconds.
    pub(crate) fn next_range(&mut self) -> RangeInclusive<u64> {
        let factor = 1_u32.checked_shl(self.attempts).unwrap_or(u32::MAX);
        self.attempts = self.attempts.saturating_add(1).min(16);
        0..=Self::BASE.saturating_mul(factor).min(Self::CAP).as_millis() as u64
    }

    /// Begins again at the first ceiling.
    pub(crate) fn reset(&mut self) {
        self.attempts = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ceilings_double_up_to_the_cap_and_begin_again() {
        let mut backoff = Backoff::default();
        let ceilings: Vec<_> = (0..8).map(|_| *backoff.next_range().end()).collect();
        assert_eq!(ceilings, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        (0..100).for_each(|_| assert_eq!(*backoff.next_range().end(), 5000));
        backoff.reset();
        assert_eq!(backoff.next_range(), 0..=100);
    }
}
