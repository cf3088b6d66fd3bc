//! Registers tests with their requirements: a test that cannot run on this machine is ignored with the reason.
//!
//! Tests of rates, and of loss and order at high rates, run alone. The others, which mostly wait (for agents, timeouts, leases), run beside
//! each other, each in a process of its own, because cgroup, CPUs and sandbox belong to a process.

use std::{
    env,
    fmt::Write as _,
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use overlay_tests::sandbox::{Kind, Sandbox};

use crate::machine::Need;

/// How many tests that mostly wait run at a time.
const BESIDE: usize = 3;
/// How many tests the summary of times lists.
const SLOWEST: usize = 25;
/// Set for the process of a single test that its parent started.
const CHILD: &str = "OVERLAY_E2E_CHILD";

/// Every test of this binary.
#[derive(Default)]
pub(crate) struct Suite {
    alone: Vec<Trial>,
    waiting: Vec<Trial>,
    is_waiting: bool,
    shared: Arc<Shared>,
}

/// What running tests share.
#[derive(Default)]
struct Shared {
    /// A test that runs alone holds it for writing.
    machine: RwLock<()>,
    times: Mutex<Vec<(String, Duration)>>,
}

impl Suite {
    /// Tests that `register` adds mostly wait. They assert no rate, and no loss or order of packets at a high rate.
    pub(crate) fn waiting(&mut self, register: impl FnOnce(&mut Self)) {
        self.register_as(true, register);
    }

    /// Tests that `register` adds run alone, also below [`Self::waiting`].
    pub(crate) fn alone(&mut self, register: impl FnOnce(&mut Self)) {
        self.register_as(false, register);
    }

    fn register_as(&mut self, is_waiting: bool, register: impl FnOnce(&mut Self)) {
        let before = std::mem::replace(&mut self.is_waiting, is_waiting);
        register(self);
        self.is_waiting = before;
    }

    /// Adds a test. Root and the tools are always needed.
    pub(crate) fn add(
        &mut self,
        name: impl Into<String>,
        needs: &'static [Need],
        test: impl Fn(&Arc<Sandbox>) -> Result<()> + Send + 'static,
    ) {
        let name = name.into();
        let (shared, own_name) = (Arc::clone(&self.shared), name.clone());
        let in_child = self.is_waiting && env::var_os(CHILD).is_none();
        let trial = Trial::ignorable_test(name, move || {
            if let Some(reason) = Need::missing(needs) {
                return Ok(Completion::ignored_with(reason));
            }
            let run = || if in_child { run_child(&own_name) } else { test(&Sandbox::start(Kind::Test)?) };
            let (result, time) = match in_child {
                true => {
                    let _beside = shared.machine.read().unwrap_or_else(PoisonError::into_inner);
                    timed(run)
                }
                false => {
                    let _alone = shared.machine.write().unwrap_or_else(PoisonError::into_inner);
                    timed(run)
                }
            };
            shared.times.lock().unwrap_or_else(PoisonError::into_inner).push((own_name.clone(), time));
            result.map(|()| Completion::Completed).map_err(|error| Failed::from(format!("{error:#}")))
        });
        if self.is_waiting { &mut self.waiting } else { &mut self.alone }.push(trial);
    }

    /// Runs the selected tests and prints the times of the slowest. Returns whether none failed.
    pub(crate) fn run(self, mut arguments: Arguments) -> bool {
        arguments.test_threads = Some(if env::var_os(CHILD).is_some() { 1 } else { BESIDE });
        let start = Instant::now();
        let trials = self.alone.into_iter().chain(self.waiting).collect();
        let conclusion = libtest_mimic::run(&arguments, trials);
        let mut times = self.shared.times.lock().unwrap_or_else(PoisonError::into_inner);
        times.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
        if times.len() > 1 {
            print!("{}", summary(&times, start.elapsed()));
        }
        !conclusion.has_failed()
    }
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    (work(), start.elapsed())
}

/// The slowest tests, and all together beside the time that passed. `times` begins with the longest.
fn summary(times: &[(String, Duration)], passed: Duration) -> String {
    let total: Duration = times.iter().map(|(_, time)| *time).sum();
    let mut text = format!(
        "\n{} tests took {:.0} s in {:.0} s; the slowest:\n",
        times.len(),
        total.as_secs_f64(),
        passed.as_secs_f64()
    );
    for (name, time) in times.iter().take(SLOWEST) {
        let _ = writeln!(text, "  {:>6.1} s  {name}", time.as_secs_f64());
    }
    text
}

/// Runs one test in a process of its own. A signal reaches the whole process group, so that process cleans up after itself.
fn run_child(name: &str) -> Result<()> {
    let program = env::current_exe().context("find the test program")?;
    let mut command = Command::new(program);
    command.args(["--exact", name]).env(CHILD, "1").stdin(Stdio::null());
    let output = command.output().context("start a process for the test")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || !text.contains("1 passed") {
        // Marked: they are not this program's own results.
        let errors = String::from_utf8_lossy(&output.stderr);
        let lines = text.lines().chain(errors.lines()).map(|line| format!("| {line}\n"));
        bail!("{}\n{}", output.status, lines.collect::<String>());
    }
    Ok(())
}
