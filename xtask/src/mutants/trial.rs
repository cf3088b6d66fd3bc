//! Builds what a change affects, in the copy, and runs the tests that should notice.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::change::{Change, Tests};
use super::tree::Tree;
use crate::build::{OBJECT_VARIABLE, ebpf_builds};
use crate::setup::Toolchain;
use crate::test::tally::{Lines, Tally};
use crate::{interrupt, step, workspace};

/// Longest run of one selection of tests. Wrong code may run for ever, which counts as noticed.
const LIMIT: Duration = Duration::from_secs(240);
/// Time in which end-to-end tests remove what they made, before they are killed.
const CLEAN_UP: Duration = Duration::from_secs(20);

/// Of the log of a failure, the last lines, and their first characters.
const SHOWN: usize = 20;
const WIDTH: usize = 400;

/// A place to try changes.
pub(super) struct Trial {
    pub(super) tree: Tree,
    directory: PathBuf,
    toolchain: Toolchain,
    /// The end-to-end tests as the unchanged tree has them: of a change, only the agent is built.
    end_to_end: Option<PathBuf>,
    /// Held, because two runs would change the same copy.
    _lock: File,
}

/// What became of a change.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    /// Tests failed: what they are.
    Caught(String),
    /// All tests passed.
    Survived,
    /// There was nothing to test.
    DoesNotBuild,
}

impl Outcome {
    /// In words.
    pub(super) fn verdict(&self, change: &Change) -> String {
        match (self, change.reason) {
            (Self::Caught(failures), None) => format!("caught by {failures}"),
            (Self::Caught(failures), Some(_)) => format!("caught by {failures}, so the reason is wrong"),
            (Self::Survived, Some(reason)) => format!("survived, with a reason: {reason}"),
            (Self::Survived, None) => format!("SURVIVED: {}", change.wrong),
            (Self::DoesNotBuild, _) => "does not build".to_owned(),
        }
    }
}

impl Trial {
    /// Brings the copy up to date and builds the end-to-end tests, if any of `changes` needs them.
    pub(super) fn prepare(toolchain: Toolchain, changes: &[&Change]) -> Result<Self> {
        let directory = workspace::target_dir()?.join("mutants");
        let tree = directory.join("tree");
        fs::create_dir_all(&tree).with_context(|| format!("cannot make {}", tree.display()))?;
        let lock = directory.join("lock");
        let lock = File::create(&lock).with_context(|| format!("cannot write {}", lock.display()))?;
        if lock.try_lock().is_err() {
            bail!("another `cargo xtask mutants` uses {}", directory.display());
        }
        let mut trial =
            Self { tree: Tree::copy_to(tree)?, directory, toolchain, end_to_end: None, _lock: lock };
        let is_end_to_end = |tests: &Tests| matches!(tests, Tests::EndToEnd(_));
        if changes.iter().any(|change| change.tests.iter().any(is_end_to_end)) {
            let built = trial.build_tests("e2e", &["--workspace", "--test", "e2e"])?;
            let Some(built) = built else {
                bail!("the end-to-end tests do not build; see {}", trial.log().display());
            };
            trial.end_to_end = Some(built);
        }
        Ok(trial)
    }

    /// The output of the last build and of the tests behind it.
    pub(super) fn log(&self) -> PathBuf {
        self.directory.join("output.log")
    }

    /// Prints the end of the log.
    pub(super) fn show_log(&self) {
        let text = fs::read(self.log()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        for line in lines.iter().skip(lines.len().saturating_sub(SHOWN)) {
            println!("  | {}", line.chars().take(WIDTH).collect::<String>());
        }
    }

    /// Makes a change, runs its tests until one notices, and takes the change back.
    pub(super) fn run(&self, change: &Change) -> Result<Outcome> {
        let _applied = self.tree.apply(change)?;
        for tests in change.tests {
            match self.run_tests(*tests)? {
                Outcome::Survived => {}
                outcome @ (Outcome::Caught(_) | Outcome::DoesNotBuild) => return Ok(outcome),
            }
        }
        Ok(Outcome::Survived)
    }

    /// Builds what `tests` need of the copy as it is, and runs them.
    pub(super) fn run_tests(&self, tests: Tests) -> Result<Outcome> {
        let (program, package) = match tests {
            Tests::Core => {
                (self.build_tests("overlay_ebpf", &["--package", "overlay-ebpf", "--lib"])?, "overlay-ebpf")
            }
            Tests::Agent(_) => (
                self.build_tests("overlay_agent", &["--package", "overlay-agent", "--lib"])?,
                "overlay-agent",
            ),
            Tests::Vectors | Tests::Programs(_) => {
                (self.build_tests("programs", &["--workspace", "--test", "programs"])?, "tests")
            }
            Tests::EndToEnd(_) => (self.end_to_end.clone(), "tests"),
        };
        let Some(program) = program else { return Ok(Outcome::DoesNotBuild) };
        let mut command = Command::new(program);
        command.current_dir(self.tree.root().join(package));
        match tests {
            Tests::Core => {}
            Tests::Agent(filter) => {
                command.arg(filter);
            }
            Tests::Vectors => {
                command.args(["golden::core_", "golden::tun_"]);
            }
            Tests::Programs(filter) => {
                let Some(object) = self.build_object()? else { return Ok(Outcome::DoesNotBuild) };
                command.arg(filter).env(OBJECT_VARIABLE, object);
            }
            Tests::EndToEnd(filter) => {
                let Some(object) = self.build_object()? else { return Ok(Outcome::DoesNotBuild) };
                let Some(agent) = self.build_agent(&object)? else { return Ok(Outcome::DoesNotBuild) };
                command.arg(filter).env(OBJECT_VARIABLE, object).env("OVERLAY_AGENT", agent);
            }
        }
        self.judge(&mut command)
    }

    /// Runs a test program and reads its results.
    fn judge(&self, command: &mut Command) -> Result<Outcome> {
        let log = self.log();
        let Some(success) = self.execute(command, &log, Some(LIMIT))? else {
            return Ok(Outcome::Caught(format!("the time limit of {} s", LIMIT.as_secs())));
        };
        let mut lines = Lines::default();
        lines.push(&fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?);
        let tally = Tally::parse(&lines);
        match (success, tally.is_success(), tally.failures.as_slice()) {
            (true, true, _) => Ok(Outcome::Survived),
            // All tests were skipped, or the names in the list are wrong.
            (true, false, _) => bail!("`{}` runs no test; see {}", step::display(command), log.display()),
            (false, _, []) => Ok(Outcome::Caught("a test program that died".to_owned())),
            (false, _, [first]) => Ok(Outcome::Caught(first.clone())),
            (false, _, [first, rest @ ..]) => Ok(Outcome::Caught(format!("{first} and {} more", rest.len()))),
        }
    }

    /// Builds test programs and returns the one of the target `name`; `None` when it does not build.
    fn build_tests(&self, name: &str, selection: &[&str]) -> Result<Option<PathBuf>> {
        let mut cargo = self.cargo("tests");
        cargo.arg("test").args(selection).args(["--no-run", "--message-format=json-render-diagnostics"]);
        self.build(cargo, name)
    }

    /// Builds the agent with an object inside, in a directory of its own, because the tests are built without one.
    fn build_agent(&self, object: &Path) -> Result<Option<PathBuf>> {
        let mut cargo = self.cargo("agent");
        cargo.args(["build", "--package", "overlay-agent", "--message-format=json-render-diagnostics"]);
        // They read every byte of a packet. Unoptimised, the tun rung is slower than the tests want.
        for package in ["tun-rs", "overlay-ebpf"] {
            cargo.args(["--config", &format!("profile.dev.package.{package}.opt-level=3")]);
        }
        cargo.env(OBJECT_VARIABLE, object);
        self.build(cargo, "overlay-agent")
    }

    fn build_object(&self) -> Result<Option<PathBuf>> {
        let (commands, object) = ebpf_builds(&self.toolchain, &self.directory.join("bpf"))?;
        for mut cargo in commands {
            cargo.current_dir(self.tree.root());
            if self.execute(&mut cargo, &self.log(), None)? != Some(true) {
                return Ok(None);
            }
        }
        Ok(Some(object))
    }

    /// A cargo for the copy.
    fn cargo(&self, target: &str) -> Command {
        let mut cargo = Command::new(workspace::cargo_program());
        cargo.current_dir(self.tree.root()).env("CARGO_TARGET_DIR", self.directory.join(target));
        cargo.env_remove(OBJECT_VARIABLE);
        cargo
    }

    /// Runs a cargo that writes what it makes as JSON, and returns the program of the target `name`.
    fn build(&self, mut cargo: Command, name: &str) -> Result<Option<PathBuf>> {
        let messages = self.directory.join("messages.json");
        if self.execute(&mut cargo, &messages, None)? != Some(true) {
            return Ok(None);
        }
        let text =
            fs::read_to_string(&messages).with_context(|| format!("cannot read {}", messages.display()))?;
        let program = |line: &str| -> Option<PathBuf> {
            let message: serde_json::Value = serde_json::from_str(line).ok()?;
            let is_it = message.pointer("/target/name")?.as_str()? == name;
            is_it.then(|| message.get("executable")?.as_str().map(PathBuf::from))?
        };
        let program = text.lines().find_map(program);
        Ok(Some(program.with_context(|| format!("`{}` made no {name}", step::display(&cargo)))?))
    }

    /// Runs a command with its output in `stdout` and its errors in the log. Returns whether it succeeded, `None` when it was ended
    /// at the limit.
    fn execute(&self, command: &mut Command, stdout: &Path, limit: Option<Duration>) -> Result<Option<bool>> {
        let create =
            |path: &Path| File::create(path).with_context(|| format!("cannot write {}", path.display()));
        let errors = create(&self.log())?;
        let output = if stdout == self.log() { errors.try_clone()? } else { create(stdout)? };
        let mut child = step::spawn(command.stdout(Stdio::from(output)).stderr(Stdio::from(errors)))?;
        let attended = interrupt::attend(child.id());
        let status = wait(&mut child, limit);
        drop(attended);
        interrupt::check()?;
        status
    }
}

/// Waits for the end of a child; at the limit, ends it and all of its process group.
fn wait(child: &mut Child, limit: Option<Duration>) -> Result<Option<bool>> {
    let start = Instant::now();
    let mut signals = [(limit, Signal::SIGTERM), (limit.map(|limit| limit + CLEAN_UP), Signal::SIGKILL)]
        .into_iter()
        .peekable();
    let mut is_late = false;
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for a child")? {
            return Ok((!is_late).then_some(status.success()));
        }
        if let Some((_, signal)) = signals.next_if(|(at, _)| at.is_some_and(|at| start.elapsed() > at)) {
            is_late = true;
            // Fails only if the group has just ended.
            let _ = killpg(Pid::from_raw(child.id().cast_signed()), signal);
        }
        thread::sleep(Duration::from_millis(20));
    }
}
