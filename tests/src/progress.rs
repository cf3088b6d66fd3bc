//! Prints progress lines.

use std::time::Instant;

/// Lines with the time since the start, on standard error.
pub(crate) struct Progress {
    started: Instant,
}

impl Progress {
    pub(crate) fn start() -> Self {
        Self { started: Instant::now() }
    }

    pub(crate) fn line(&self, text: &str) {
        eprintln!("[{:>5.1} s] {text}", self.seconds());
    }

    /// One step of a lane.
    pub(crate) fn step(&self, lane: &str, step: &str, seen: &str) {
        self.line(&format!("{lane:<8} {step:<52} {seen}"));
    }

    pub(crate) fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }
}
