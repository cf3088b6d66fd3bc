//! The kernel's run statistics as a clock for runs that change their packet.

use anyhow::{Context as _, Result};
use aya::sys::{Stats, enable_stats};

use super::{
    packet::Kind,
    subject::{self, Program, Subject},
};

/// Calls for one measurement.
const CALLS: usize = 1500;
/// Runs in the kernel's loop by which the clock is measured.
const REFERENCE_RUNS: u32 = 50_000;

/// Measures with the run statistics, less the cost of reading their clock.
#[derive(Debug, Default)]
pub(super) struct Stopwatch {
    /// Nanoseconds.
    overhead: f64,
}

impl Stopwatch {
    /// Measures what the statistics add to each run: the same packet in the kernel's loop, timed by both clocks.
    pub(super) fn calibrate(&mut self, subject: &mut Subject, program: &Program) -> Result<()> {
        let frames = subject.frames(program, program.reference, 1)?;
        let frame = frames.first().context("a frame of the reference kind")?;
        let (_, alone) = subject.set(program)?.programs.time_run(program.hook, frame, REFERENCE_RUNS)?;
        let counted = statistics(subject, program, |subject| {
            subject.set(program)?.programs.time_run(program.hook, frame, REFERENCE_RUNS).map(drop)
        })?;
        self.overhead = (counted - alone.as_nanos() as f64).max(0.0);
        Ok(())
    }

    /// Nanoseconds per run of a kind that the program carries, one run for each packet.
    pub(super) fn time_once_each(&self, subject: &mut Subject, program: &Program, kind: Kind) -> Result<f64> {
        let frames = subject.frames(program, kind, subject::DESTINATIONS)?;
        // The first run for a destination finds nothing of it in the caches.
        for frame in &frames {
            subject.set(program)?.programs.time_run(program.hook, frame, 1)?;
        }
        subject.confirm(program, &frames)?;
        let mean = statistics(subject, program, |subject| {
            for frame in frames.iter().cycle().take(CALLS) {
                let (action, _) = subject.set(program)?.programs.time_run(program.hook, frame, 1)?;
                subject::check(program, kind, action)?;
            }
            Ok(())
        })?;
        Ok(mean - self.overhead)
    }
}

/// The mean time of the runs that `run` makes, in nanoseconds, by the kernel's statistics.
fn statistics(
    subject: &mut Subject,
    program: &Program,
    run: impl FnOnce(&mut Subject) -> Result<()>,
) -> Result<f64> {
    let _enabled = enable_stats(Stats::RunTime).context("enable the kernel's run statistics (5.8)")?;
    let before = subject.set(program)?.programs.info(program.hook)?;
    run(subject)?;
    let after = subject.set(program)?.programs.info(program.hook)?;
    let time = after.run_time().saturating_sub(before.run_time());
    let count = after.run_count().saturating_sub(before.run_count());
    Ok(time.as_nanos() as f64 / count.max(1) as f64)
}
