//! The parts of the test run: runs the cargo commands of each, passes their output through and counts results.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use super::Prepared;
use super::tally::{Lines, Tally, started_programs};
use crate::build::{NEXT_AGENT_VARIABLE, OBJECT_VARIABLE};
use crate::{interrupt, step, workspace};

/// How long test programs may clean up after cargo has ended.
const CLEAN_UP_TIMEOUT: Duration = Duration::from_secs(60);

/// A part of the test run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Part {
    /// Unit and documentation tests of all crates.
    Unit,
    /// Golden packets through every implementation.
    Programs,
    /// The etcd store against real servers.
    Etcd,
    /// The agent in network namespaces.
    EndToEnd,
}

impl Part {
    /// Name of the option that selects it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Programs => "programs",
            Self::Etcd => "etcd",
            Self::EndToEnd => "e2e",
        }
    }

    /// Headline.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Unit => "unit tests and documentation tests",
            Self::Programs => "golden packets through the core, the tun shell and the kernel programs",
            Self::Etcd => "the etcd store against etcd servers on loopback",
            Self::EndToEnd => "end to end, in network namespaces",
        }
    }

    /// Whether it needs root, the tools of setup and a built agent.
    pub(super) fn needs_root(self) -> bool {
        self != Self::Unit
    }

    /// Arguments of `cargo test` that select its test programs. Documentation tests have none.
    pub(super) fn programs(self) -> impl Iterator<Item = &'static str> {
        self.calls().iter().filter(|call| **call != ["--doc"]).flat_map(|call| call.iter().copied())
    }

    /// Arguments of its `cargo test` commands. All select the whole workspace: with the same features in each, dependencies are
    /// compiled once.
    fn calls(self) -> &'static [&'static [&'static str]] {
        match self {
            Self::Unit => &[&["--lib", "--bins"], &["--doc"]],
            Self::Programs => &[&["--test", "programs"]],
            Self::Etcd => &[&["--test", "etcd"]],
            Self::EndToEnd => &[&["--test", "e2e"]],
        }
    }
}

/// Runs one part and counts results. A failed test is no error.
pub(super) fn run(part: Part, filter: Option<&str>, built: Option<&Prepared>) -> Result<Tally> {
    let mut tally = Tally::default();
    for call in part.calls() {
        let mut cargo = workspace::cargo()?;
        cargo.args(["test", "--workspace", "--no-fail-fast"]).args(*call).args(filter);
        // The tally does not recognize result lines with colour codes.
        cargo.env("CARGO_TERM_COLOR", "never");
        if part == Part::Etcd {
            // Most of the time, these tests wait for leases and timeouts.
            cargo.env("RUST_TEST_THREADS", "4");
        }
        if let Some(Prepared { built, next_agent }) = built {
            cargo.env("OVERLAY_AGENT", &built.agent).env(OBJECT_VARIABLE, &built.ebpf_object);
            cargo.envs(next_agent.iter().map(|agent| (NEXT_AGENT_VARIABLE, agent)));
        }
        tally.merge(&run_call(&mut cargo)?);
    }
    Ok(tally)
}

/// Runs one `cargo test`, passes its output on as it comes, and counts its result lines.
fn run_call(cargo: &mut Command) -> Result<Tally> {
    step::flush();
    let name = step::display(cargo);
    let mut child = step::spawn(cargo.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let attended = interrupt::attend(child.id());
    let output = pass_on(child.stdout.take(), std::io::stdout());
    let errors = pass_on(child.stderr.take(), std::io::stderr());
    let status = child.wait().with_context(|| format!("cannot wait for `{name}`"))?;
    // After an interrupted cargo, the test program may still clean up with the streams open.
    let (output, errors) = (output.finish(), errors.finish());
    drop(attended);

    let mut tally = Tally::parse(&output);
    tally.complete(&name, started_programs(&errors), status.success());
    Ok(tally)
}

/// Copies a stream to `to` without buffering, and collects its lines.
fn pass_on(mut from: Option<impl Read + Send + 'static>, mut to: impl Write + Send + 'static) -> PassedOn {
    let lines = Arc::new(Mutex::new(Lines::default()));
    let (ended, end) = mpsc::channel();
    let kept = Arc::clone(&lines);
    thread::spawn(move || {
        let mut buffer = [0; 8192];
        while let Some(stream) = &mut from
            && let Ok(length @ 1..) = stream.read(&mut buffer)
        {
            let bytes = buffer.get(..length).unwrap_or_default();
            // Without a reader, the tests still have to finish and clean up.
            let _ = to.write_all(bytes).and_then(|()| to.flush());
            lock(&kept).push(bytes);
        }
        let _ = ended.send(());
    });
    PassedOn { lines, end }
}

/// See [`pass_on`].
struct PassedOn {
    lines: Arc<Mutex<Lines>>,
    end: Receiver<()>,
}

impl PassedOn {
    /// Waits for the end of the stream and returns its lines. The wait is limited, because a leaked process can hold a stream
    /// open.
    fn finish(self) -> Lines {
        if let Err(RecvTimeoutError::Timeout) = self.end.recv_timeout(CLEAN_UP_TIMEOUT) {
            eprintln!("warning: a process leaked by the tests holds their output open");
        }
        std::mem::take(&mut lock(&self.lines))
    }
}

fn lock(lines: &Mutex<Lines>) -> MutexGuard<'_, Lines> {
    // The bytes are valid even after a panic.
    lines.lock().unwrap_or_else(PoisonError::into_inner)
}
