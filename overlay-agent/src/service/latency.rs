//! How long connections took to be established, in buckets of powers of two.

use std::{
    ops::AddAssign,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use overlay_ebpf::service::abi::{LATENCY_BUCKETS, latency_bucket};
use serde::{Deserialize, Serialize};

/// Numbers of connections by the time that they took: bucket `n` has those of less than 2^n microseconds which are in no lower one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latencies([u64; LATENCY_BUCKETS]);

impl Latencies {
    /// How many connections these are.
    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// The time in microseconds within which a share of the connections, from 0 to 1, was established: exact to the bucket, and inside of
    /// it as if all times were equally frequent. `None` without connections.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let total = self.total();
        let rank = (total as f64 * share.clamp(0.0, 1.0)).max(f64::MIN_POSITIVE);
        let mut below = 0.0;
        let mut bounds = (0.0, 1.0);
        for count in self.0 {
            let count = count as f64;
            if count > 0.0 && below + count >= rank {
                return Some(bounds.0 + (bounds.1 - bounds.0) * (rank - below) / count);
            }
            below += count;
            bounds = (bounds.1, bounds.1 * 2.0);
        }
        None
    }

    /// Those that were added since `earlier`. Where there are fewer than then, because counting has begun again, all.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let is_continued = self.0.iter().zip(earlier.0).all(|(now, then)| *now >= then);
        let mut since = *self;
        if is_continued {
            for (count, then) in since.0.iter_mut().zip(earlier.0) {
                *count -= then;
            }
        }
        since
    }
}

impl From<[u64; LATENCY_BUCKETS]> for Latencies {
    fn from(counts: [u64; LATENCY_BUCKETS]) -> Self {
        Self(counts)
    }
}

impl AddAssign for Latencies {
    fn add_assign(&mut self, other: Self) {
        for (count, other) in self.0.iter_mut().zip(other.0) {
            *count = count.saturating_add(other);
        }
    }
}

/// [`Latencies`] that several tasks add to.
#[derive(Debug, Default)]
pub(super) struct LatencyCells([AtomicU64; LATENCY_BUCKETS]);

impl LatencyCells {
    /// Adds a connection that was established within this time.
    pub(super) fn add(&self, time: Duration) {
        let bucket = latency_bucket(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
        if let Some(count) = self.0.get(bucket) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What was added so far.
    pub(super) fn snapshot(&self) -> Latencies {
        Latencies(std::array::from_fn(|bucket| {
            self.0.get(bucket).map_or(0, |count| count.load(Ordering::Relaxed))
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(microseconds: &[u64]) -> Latencies {
        let cells = LatencyCells::default();
        microseconds.iter().for_each(|time| cells.add(Duration::from_micros(*time)));
        cells.snapshot()
    }

    #[test]
    fn quantiles_are_in_the_bucket_of_the_connection() {
        assert_eq!(Latencies::default().quantile(0.5), None);
        // 100 connections: 98 between 64 and 127 us, two between 1.0 and 2.0 ms.
        let mut times = vec![100; 98];
        times.extend([1500, 1500]);
        let latencies = of(&times);
        let median = latencies.quantile(0.5).unwrap();
        assert!((64.0..128.0).contains(&median), "{median}");
        let p99 = latencies.quantile(0.99).unwrap();
        assert!((1024.0..2048.0).contains(&p99), "{p99}");
        assert_eq!(latencies.quantile(1.0), Some(2048.0));
        assert!(of(&[0]).quantile(0.5).unwrap() < 1.0);
        for share in [-1.0, 0.0, f64::NAN, 2.0] {
            assert!(latencies.quantile(share).is_some_and(|time| (0.0..=2048.0).contains(&time)), "{share}");
        }
        let longest = of(&[u64::MAX]).quantile(0.5).unwrap();
        assert!(longest > 1_000_000_000.0, "{longest}");
    }

    #[test]
    fn what_was_added_is_the_difference() {
        let (earlier, now) = (of(&[5, 90]), of(&[5, 90, 90, 3000]));
        assert_eq!(now.since(&earlier), of(&[90, 3000]));
        assert_eq!(now.since(&now).total(), 0);
        // The counters begin again with another run of the agent.
        assert_eq!(of(&[7]).since(&now), of(&[7]));
        let mut sum = earlier;
        sum += of(&[90, 3000]);
        assert_eq!(sum, now);
    }
}
