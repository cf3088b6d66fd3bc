//! CPU time of the whole machine.

use std::fs;

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};

/// Seconds that all CPUs of this machine have worked since it started: user, nice, system, irq and softirq of `/proc/stat`.
///
/// The resolution is one tick of the kernel's accounting, 10 ms, for each CPU.
///
/// # Errors
///
/// When `/proc/stat` cannot be read.
pub(super) fn busy_seconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let ticks = busy_ticks(&text).context("read the line `cpu` of /proc/stat")?;
    let second = sysconf(SysconfVar::CLK_TCK).ok().flatten().context("read the clock ticks per second")?;
    Ok(ticks as f64 / second as f64)
}

/// The first line: `cpu user nice system idle iowait irq softirq steal ...` (proc(5)), in ticks.
fn busy_ticks(text: &str) -> Option<u64> {
    let mut words = text.lines().next()?.split_whitespace();
    if words.next()? != "cpu" {
        return None;
    }
    let ticks: Vec<u64> = words.take(7).map(str::parse).collect::<Result<_, _>>().ok()?;
    let [user, nice, system, _idle, _iowait, irq, softirq] = ticks.as_slice() else { return None };
    Some(user + nice + system + irq + softirq)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_and_stolen_time_is_not_work() {
        let text = "cpu  1 20 300 9999 9999 4000 50000 9999 9999 9999\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(busy_ticks(text), Some(54321));
    }

    #[test]
    fn another_format_is_refused() {
        for text in ["", "cpu", "cpu 1 2 3 4 5 6", "cpu0 1 2 3 4 5 6 7", "cpu 1 2 3 4 5 6 x"] {
            assert_eq!(busy_ticks(text), None, "{text}");
        }
    }

    #[test]
    fn work_takes_time() {
        let before = busy_seconds().unwrap();
        let start = std::time::Instant::now();
        while start.elapsed().as_millis() < 100 {}
        assert!(busy_seconds().unwrap() > before);
    }
}
