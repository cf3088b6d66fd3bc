//! Lines in the agent's log about failures inside the programs: off unless the loader says so, and rate-limited.
#![allow(unsafe_code, reason = "a global that the loader writes, and a map entry of this CPU")]

use aya_ebpf::{helpers::bpf_ktime_get_ns, macros::map, maps::PerCpuArray};

/// Whether failures are logged. Set by the loader, constant for the verifier, which then removes the logging code if it is 0.
#[unsafe(no_mangle)]
static LOG_FAILURES: u32 = 0;

/// When this CPU logged its last line, in nanoseconds since boot.
#[map]
static LAST_LINE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

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
    // SAFETY: a static; volatile because the loader writes it where the compiler cannot see.
    if unsafe { core::ptr::read_volatile(&raw const LOG_FAILURES) } == 0 {
        return false;
    }
    let Some(last) = LAST_LINE.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: a helper without parameters.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the entry is this CPU's, and networking programs run with bottom halves off: no other reference exists.
    let last = unsafe { &mut *last };
    if now.wrapping_sub(*last) < INTERVAL {
        return false;
    }
    *last = now;
    true
}
