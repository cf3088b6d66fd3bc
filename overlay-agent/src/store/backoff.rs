//! Pauses between attempts.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};

/// A connection that lasted this long works: the next failure counts as the first.
pub(super) const STEADY: Duration = Duration::from_secs(5);

/// Pauses that grow from 0.05 s to 2.5 s, and up to double that at random: hosts that wait for one server spread out.
pub(super) fn backoff() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(50))
        .with_max_delay(Duration::from_millis(2500))
        .without_max_times()
        .with_jitter()
        .build()
}
