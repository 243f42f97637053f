//! How fast attempts begin.

use std::time::{Duration, Instant};

use super::Rate;

/// What is left of a [`Rate`]: a bucket that each attempt takes one out of, and that fills again.
///
/// It is kept as the time when it is full, as in the generic cell rate algorithm (ITU-T I.371).
#[derive(Clone, Copy, Debug, Default)]
pub struct Bucket {
    full_at: Option<Instant>,
}

impl Bucket {
    /// Takes one out. Where there is none, says when there is.
    pub fn take(&mut self, rate: Rate, now: Instant) -> Result<(), Instant> {
        self.look(rate, now)?;
        let full_at = self.full_at.filter(|at| *at > now).unwrap_or(now);
        self.full_at = Some(full_at + every(rate));
        Ok(())
    }

    /// Whether there is one, or else when there is.
    pub fn look(&mut self, rate: Rate, now: Instant) -> Result<(), Instant> {
        let every = every(rate);
        // A rate that was lowered is not paid for the past.
        let full_at = self.full_at.map(|at| at.min(now + every * rate.burst));
        self.full_at = full_at;
        let others = every * rate.burst.saturating_sub(1);
        match full_at.and_then(|at| at.checked_sub(others)) {
            Some(at) if at > now => Err(at),
            _ => Ok(()),
        }
    }

    /// When it is full: from then on it is as good as a new one.
    pub fn full_at(&self) -> Option<Instant> {
        self.full_at
    }
}

/// How long it takes to fill one in.
fn every(rate: Rate) -> Duration {
    Duration::from_nanos(1_000_000_000_000 / u64::from(rate.per_1000_s.max(1)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[expect(clippy::disallowed_methods, reason = "only a starting point")]
    fn some_time() -> Instant {
        Instant::now()
    }

    #[test]
    fn what_begins_after_a_pause_is_a_burst_and_then_evenly_spread() {
        let (mut bucket, begin) = (Bucket::default(), some_time());
        let rate = Rate { per_1000_s: 2000, burst: 3 };
        let mut now = begin;
        let mut taken = Vec::new();
        while taken.len() < 6 {
            match bucket.take(rate, now) {
                Ok(()) => taken.push((now - begin).as_millis()),
                Err(at) => now = at,
            }
        }
        assert_eq!(taken, [0, 0, 0, 500, 1000, 1500]);
    }

    #[test]
    fn a_rate_that_was_raised_holds_at_once() {
        let (mut bucket, now) = (Bucket::default(), some_time());
        let slow = Rate { per_1000_s: 1, burst: 1 };
        bucket.take(slow, now).unwrap();
        assert_eq!(bucket.take(slow, now), Err(now + Duration::from_secs(1000)));
        let fast = Rate { per_1000_s: 1_000_000, burst: 1 };
        assert_eq!(bucket.take(fast, now), Err(now + Duration::from_millis(1)));
    }

    proptest! {
        #[test]
        fn in_no_time_more_begin_than_a_burst_and_what_the_rate_gives(
            per_1000_s in 1..2_000_000_u32,
            burst in 1..50_u32,
            waits in proptest::collection::vec(0..2_000_u64, 1..200),
        ) {
            let rate = Rate { per_1000_s, burst };
            let (mut bucket, begin) = (Bucket::default(), some_time());
            let (mut now, mut taken) = (begin, Vec::new());
            for wait in waits {
                now += Duration::from_millis(wait);
                match bucket.take(rate, now) {
                    Ok(()) => taken.push(now),
                    Err(at) => {
                        prop_assert!(at > now);
                        // It is there when it was said to be.
                        now = at;
                        prop_assert_eq!(bucket.take(rate, now), Ok(()));
                        taken.push(now);
                    }
                }
            }
            for (i, from) in taken.iter().enumerate() {
                for (j, until) in taken.iter().enumerate().skip(i) {
                    let given = (*until - *from).as_secs_f64() * f64::from(per_1000_s) / 1000.0;
                    prop_assert!((j - i + 1) as f64 <= f64::from(burst) + given + 0.001);
                }
            }
        }
    }
}
