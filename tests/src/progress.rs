//! Shows progress: lines, or a bar with the time that is left.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

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

/// A bar with the time that is left, on standard error. Without a terminal, a line for each step that is done.
pub(crate) struct Bar {
    bar: ProgressBar,
    is_hidden: bool,
}

impl Bar {
    /// A bar for work that takes about `expected`.
    pub(crate) fn start(expected: Duration) -> Self {
        let bar = ProgressBar::new(millis(expected));
        let is_hidden = bar.is_hidden();
        if let Ok(style) =
            ProgressStyle::with_template("[{elapsed}] {bar:30} {percent:>3}%, {eta} left  {wide_msg}")
        {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(500));
        Self { bar, is_hidden }
    }

    /// Shows what is being done.
    pub(crate) fn step(&self, text: &str) {
        self.bar.set_message(text.to_owned());
    }

    /// Reports what was done, where no bar is shown.
    pub(crate) fn done(&self, text: &str) {
        if self.is_hidden {
            eprintln!("[{:>5.1} s] {text}", self.bar.elapsed().as_secs_f64());
        }
    }

    /// Prints a text in any case, above the bar.
    pub(crate) fn print(&self, text: &str) {
        self.bar.suspend(|| println!("{text}"));
    }

    /// Moves the bar by work that was expected to take so long.
    pub(crate) fn advance(&self, expected: Duration) {
        self.bar.inc(millis(expected));
    }

    /// Removes the bar.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
