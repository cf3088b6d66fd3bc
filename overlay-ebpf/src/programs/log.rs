//! Lines in the agent's log about failures inside the programs: off unless the loader says so, and rate-limited.

/// Logs one line about a failure, with arguments as `aya_log_ebpf::warn`: for paths that no packet should take.
macro_rules! log_failure {
    ($ctx:expr, $($line:tt)+) => {
        if crate::programs::maps::is_line_due() {
            aya_log_ebpf::warn!($ctx, $($line)+);
        }
    };
}
pub(super) use log_failure;
