//! Pauses between attempts.

use std::time::Duration;

/// Pauses that grow from 0.1 s to 5 s, with a random part so that hosts that wait for the same server do not act in step.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    const SHORTEST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(5);

    /// A connection that lasted this long works: the next failure counts as the first.
    pub(super) const STEADY: Duration = Duration::from_secs(5);

    /// The next pause is the shortest.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// How long to wait before the next attempt.
    pub(super) fn next(&mut self) -> Duration {
        let pause = Self::SHORTEST.saturating_mul(1 << self.failures.min(10)).min(Self::LONGEST);
        self.failures += 1;
        pause.mul_f64(rand::random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_start_short_again() {
        let mut backoff = Backoff::default();
        assert!(backoff.next() <= Backoff::SHORTEST);
        for _ in 0..40 {
            assert!(backoff.next() <= Backoff::LONGEST);
        }
        assert!(backoff.next() >= Backoff::LONGEST / 2);
        backoff.reset();
        assert!(backoff.next() <= Backoff::SHORTEST);
    }
}
