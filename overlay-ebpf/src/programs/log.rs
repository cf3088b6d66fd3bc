//! Lines in the agent's log about failures inside the programs: off unless the loader says so, and rate-limited.

use super::maps;

/// Shortest time between two lines of one CPU, in nanoseconds.
const INTERVAL: u64 = 100_000_000;

/// Logs one line about a failure, with arguments as `aya_log_ebpf::warn`: for paths that no packet should take.
macro_rules! log_failure {
    ($ctx:expr, $($line:tt)+) => {
        if crate::programs::log::is_due() {
            aya_log_ebpf::warn!($ctx, $($line)+);
        }
    };
}
pub(super) use log_failure;

/// Whether a line may be logged now.
#[inline(always)]
pub(super) fn is_due() -> bool {
    maps::logs_failures()
        && maps::with_last_line(|last| {
            let now = maps::now();
            let due = now.wrapping_sub(*last) >= INTERVAL;
            if due {
                *last = now;
            }
            due
        })
}
