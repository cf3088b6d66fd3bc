//! When a datapath that failed is set up again.

use std::time::Duration;

use tokio::time::Instant;

/// When to retry: at once when the datapath ran for long, else with exponential backoff.
#[derive(Debug, Default)]
pub(super) struct Retry {
    pub(super) at: Option<Instant>,
    up_since: Option<Instant>,
    failures: u32,
    /// Whether the last attempt failed.
    failed: bool,
}

impl Retry {
    const FIRST: Duration = Duration::from_secs(1);
    const LONGEST: Duration = Duration::from_secs(30);
    /// A datapath that lived longer than this worked.
    const STABLE: Duration = Duration::from_secs(10);

    pub(super) fn succeeded(&mut self, now: Instant) {
        (self.at, self.failed) = (None, false);
        self.up_since.get_or_insert(now);
    }

    /// An attempt failed.
    pub(super) fn failed(&mut self, now: Instant) {
        let was_stable = self.up_since.take().is_some_and(|since| now.duration_since(since) > Self::STABLE);
        self.failures = if was_stable { 1 } else { self.failures.saturating_add(1) };
        self.failed = true;
        self.at = Some(now + self.pause());
    }

    /// Whether it waits after an attempt that failed. A datapath that is lost again and again waits, whatever happens.
    pub(super) fn is_after_failure(&self) -> bool {
        self.at.is_some() && self.failed
    }

    /// A working datapath was lost. Returns when to make it again, `None` for at once.
    pub(super) fn lost(&mut self, now: Instant) -> Option<Instant> {
        let was_stable = self.up_since.take().is_none_or(|since| now.duration_since(since) > Self::STABLE);
        self.failures = if was_stable { 0 } else { self.failures.saturating_add(1) };
        self.at = (self.failures > 0).then(|| now + self.pause());
        self.at
    }

    fn pause(&self) -> Duration {
        let doublings = self.failures.saturating_sub(1);
        (Self::FIRST * 2_u32.saturating_pow(doublings)).min(Self::LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datapath_that_fails_repeatedly_is_retried_with_backoff() {
        let second = Duration::from_secs(1);
        let (mut retry, start) = (Retry::default(), Instant::now());
        retry.succeeded(start);
        assert_eq!(retry.lost(start + 60 * second), None, "at once after a long run");
        let mut now = start + 60 * second;
        for pause in [1, 2, 4, 8, 16, 30, 30] {
            retry.succeeded(now);
            assert_eq!(retry.lost(now + second), Some(now + second + pause * second));
            now += second;
        }
        retry.succeeded(now);
        assert_eq!(retry.at, None);
        assert_eq!(retry.lost(now + 11 * second), None);
        retry.failed(now);
        assert_eq!(retry.at, Some(now + second), "never at once after an attempt that failed");
        assert!(retry.is_after_failure());
        retry.succeeded(now);
        assert!(!retry.is_after_failure());
        assert!(retry.lost(now + second).is_some() && !retry.is_after_failure(), "a loss is no attempt");
        retry.failed(now + second);
        assert_eq!(retry.at, Some(now + 4 * second + second), "failures add up");
        retry.succeeded(now);
        retry.failed(now + 11 * second);
        assert_eq!(retry.at, Some(now + 12 * second), "until it ran for long");
    }
}
