//! One network namespace: created by name, entered by threads and programs, deleted on drop.
//!
//! Only the *network* namespace is entered. `ip netns exec` would add a private mount namespace with a fresh /sys, in
//! which an agent finds no bpffs and loses the one it mounts. A program inherits the namespace of the thread that starts
//! it, so a short-lived thread enters and starts it.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    panic::resume_unwind,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::sandbox::{Sandbox, hold};

/// A network namespace that lives as long as this value, or longer when its sandbox is kept.
#[derive(Debug)]
pub struct Netns {
    name: String,
    handle: File,
    sandbox: Arc<Sandbox>,
    keeps_pins: AtomicBool,
}

impl Netns {
    /// Creates a namespace for `role` with its loopback device up.
    pub fn create(sandbox: &Arc<Sandbox>, role: &str) -> Result<Arc<Self>> {
        let name = sandbox.netns_name(role);
        let creating = hold();
        run_tool(&["ip", "netns", "add", &name])?;
        drop(creating);
        let path = format!("/run/netns/{name}");
        let handle = File::open(&path).with_context(|| format!("open network namespace {path}"))?;
        let (sandbox, keeps_pins) = (Arc::clone(sandbox), AtomicBool::new(false));
        let netns = Self { name, handle, sandbox, keeps_pins };
        netns.tool("ip link set lo up")?;
        Ok(Arc::new(netns))
    }

    /// The name that `ip netns` knows it by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` in a thread inside the namespace and returns its result. A socket that `work` creates stays in the
    /// namespace and can be used from any thread.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let inside = || {
            setns(&self.handle, CloneFlags::CLONE_NEWNET)
                .with_context(|| format!("enter network namespace {}", self.name))?;
            Ok(work())
        };
        thread::scope(|scope| scope.spawn(inside).join()).unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Starts a program in the namespace.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        self.run(|| {
            let _creating = hold();
            command.spawn().with_context(|| format!("start {}", describe(command)))
        })?
    }

    /// The directories of what agents pinned here.
    pub fn pins(&self) -> io::Result<Vec<PathBuf>> {
        let end = format!(":{}", self.handle.metadata()?.ino());
        let entries = match fs::read_dir(PINS) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let entries: Vec<_> = entries.collect::<io::Result<_>>()?;
        let own = entries.into_iter().filter(|entry| entry.file_name().to_string_lossy().ends_with(&end));
        Ok(own.map(|entry| entry.path()).collect())
    }

    /// Leaves what agents pinned here when the namespace is deleted.
    pub fn keep_pins(&self) {
        self.keeps_pins.store(true, Ordering::Relaxed);
    }

    /// Runs a program in the namespace to its end, its output captured.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered or the program cannot be started; not when the program fails.
    pub fn output(&self, command: &mut Command) -> Result<Output> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = self.spawn(command)?;
        child.wait_with_output().with_context(|| format!("wait for {}", describe(command)))
    }

    /// Runs a command line, split at white space, in the namespace and returns what it prints.
    pub fn tool(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let Some(program) = words.next() else { bail!("run an empty command line in {}", self.name) };
        let output = self.output(Command::new(program).args(words))?;
        printed(&output).with_context(|| format!("run `{line}` in network namespace {}", self.name))
    }
}

/// Where agents pin what outlives them, in a directory whose name ends with the number of their namespace.
const PINS: &str = "/sys/fs/bpf/overlay-agent";

impl Drop for Netns {
    fn drop(&mut self) {
        if self.sandbox.is_kept() {
            return;
        }
        let pins = match self.keeps_pins.load(Ordering::Relaxed) {
            true => Ok(()),
            false => self.pins().and_then(|pins| pins.into_iter().try_for_each(fs::remove_dir_all)),
        };
        if let Err(error) = pins {
            eprintln!("error: remove what agents pinned in {}: {error}", self.name);
        }
        let _removing = hold();
        if let Err(error) = run_tool(&["ip", "netns", "delete", &self.name]) {
            eprintln!("error: {error:#}");
        }
    }
}

/// Runs a program outside of any namespace and returns what it prints.
pub fn run_tool(words: &[&str]) -> Result<String> {
    let [program, arguments @ ..] = words else { bail!("run an empty command line") };
    let mut command = Command::new(program);
    let output = command
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {program}: `cargo xtask setup` installs what is missing"))?;
    printed(&output).with_context(|| format!("run `{}`", words.join(" ")))
}

fn printed(output: &Output) -> Result<String> {
    if !output.status.success() {
        bail!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn describe(command: &Command) -> String {
    format!("{}: `cargo xtask setup` installs the tools that are missing", command.get_program().display())
}
