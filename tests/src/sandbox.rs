//! Owns the namespaces, processes and files of one run of the demo or the tests, and removes them when the run ends.
//!
//! Every namespace is called `<kind>-<pid>-<number>-<role>` and every file lies in `/run/overlay-tests/<kind>-<pid>`. So
//! a later run recognizes what a killed one left, because its process is gone, and removes it.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, Uid},
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

use crate::netns::run_tool;

/// Parent directory of the stores, sockets and logs.
const DIRECTORY: &str = "/run/overlay-tests";
/// Directory of `ip netns`.
const NETNS_DIRECTORY: &str = "/run/netns";

/// Purpose of a sandbox; the first part of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// End-to-end tests.
    Test,
    /// The demo.
    Demo,
    /// A benchmark.
    Bench,
    /// Left by `demo --keep`; removed only on request, although its process is gone.
    Kept,
}

impl Kind {
    const fn prefix(self) -> &'static str {
        match self {
            Self::Test => "ovltest",
            Self::Demo => "ovldemo",
            Self::Bench => "ovlbench",
            Self::Kept => "ovlkeep",
        }
    }
}

/// Owner of everything that one run creates.
#[derive(Debug)]
pub struct Sandbox {
    name: String,
    next: AtomicU32,
    kept: AtomicBool,
}

impl Sandbox {
    /// Starts a sandbox, after removing what killed runs of the same kind left behind.
    pub fn start(kind: Kind) -> Result<Arc<Self>> {
        if !Uid::effective().is_root() {
            bail!("building network namespaces needs root: run this as root or with sudo");
        }
        if kind != Kind::Kept {
            remove_where(|owner| owner.kind == kind.prefix() && !is_alive(owner.pid))?;
        }
        let name = format!("{}-{}", kind.prefix(), process::id());
        let directory = Path::new(DIRECTORY).join(&name);
        // Another run that ends at this moment may remove the parent.
        let created = (0..10).find_map(|_| fs::create_dir_all(&directory).ok());
        created
            .map_or_else(|| fs::create_dir_all(&directory), Ok)
            .with_context(|| format!("create {}", directory.display()))?;
        Ok(Arc::new(Self { name, next: AtomicU32::new(1), kept: AtomicBool::new(false) }))
    }

    /// A name for a new namespace that no other run uses.
    pub fn netns_name(&self, role: &str) -> String {
        format!("{}-{}-{role}", self.name, self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// A new, empty directory for `role`, removed with the sandbox.
    pub fn new_directory(&self, role: &str) -> Result<PathBuf> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(DIRECTORY).join(&self.name).join(format!("{number}-{role}"));
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(path)
    }

    /// Keeps everything in this sandbox when values are dropped.
    pub fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    /// Whether [`Sandbox::keep`] was called.
    pub fn is_kept(&self) -> bool {
        self.kept.load(Ordering::Relaxed)
    }

    /// On SIGINT, SIGTERM or SIGHUP removes everything this process created, in all its sandboxes, and exits with
    /// 128 + the signal's number.
    pub fn remove_on_signals() -> Result<()> {
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])
            .context("install handlers for SIGINT, SIGTERM and SIGHUP")?;
        thread::spawn(move || {
            let Some(signal) = signals.forever().next() else { return };
            eprintln!("\ninterrupted: removing namespaces, agents and files of this run");
            // Held until the process exits: no namespace and no program can join while the others are being removed.
            let _closing = hold();
            if let Err(error) = remove_where(|owner| owner.pid == process::id()) {
                eprintln!("error: {error:#}");
            }
            process::exit(128 + signal);
        });
        Ok(())
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if self.is_kept() {
            return;
        }
        let _removing = hold();
        if let Err(error) = remove_where(|owner| owner.name() == self.name) {
            eprintln!("error: {error:#}");
        }
    }
}

/// Removes what earlier `demo --keep` runs left up, agents included. Returns how many topologies there were.
pub fn remove_kept() -> Result<usize> {
    remove_where(|owner| owner.kind == Kind::Kept.prefix())
}

/// Held while a namespace is created or removed or a program is started in one. The clean-up after a signal takes it and keeps
/// it until the process exits; see [`Sandbox::remove_on_signals`].
pub(crate) fn hold() -> MutexGuard<'static, ()> {
    static CREATING: Mutex<()> = Mutex::new(());
    CREATING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The sandbox that a name belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Owner<'a> {
    kind: &'a str,
    pid: u32,
}

impl<'a> Owner<'a> {
    /// Reads `<kind>-<pid>` or `<kind>-<pid>-...`; `None` for foreign names.
    fn parse(name: &'a str) -> Option<Self> {
        let mut parts = name.split('-');
        let kind = parts.next()?;
        let known =
            [Kind::Test, Kind::Demo, Kind::Bench, Kind::Kept].iter().any(|known| known.prefix() == kind);
        let pid = parts.next()?.parse().ok()?;
        known.then_some(Self { kind, pid })
    }

    fn name(&self) -> String {
        format!("{}-{}", self.kind, self.pid)
    }
}

/// Removes the namespaces, the processes in them and the files of all sandboxes that `chosen` accepts; returns how many
/// sandboxes that were.
fn remove_where(chosen: impl Fn(&Owner<'_>) -> bool) -> Result<usize> {
    let mut sandboxes = Vec::new();
    for name in entries(NETNS_DIRECTORY) {
        let Some(owner) = Owner::parse(&name).filter(|owner| chosen(owner)) else { continue };
        // Taken before the processes die, so that only these are signalled.
        let pids = run_tool(&["ip", "netns", "pids", &name]).unwrap_or_default();
        for pid in pids.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            end_process(Pid::from_raw(pid));
        }
        if let Err(error) = run_tool(&["ip", "netns", "delete", &name]) {
            // Another run may remove it, too.
            ensure!(!Path::new(NETNS_DIRECTORY).join(&name).exists(), "{error:#}");
        }
        sandboxes.push(owner.name());
    }
    for name in entries(DIRECTORY) {
        let Some(owner) = Owner::parse(&name).filter(|owner| chosen(owner)) else { continue };
        let path = Path::new(DIRECTORY).join(&name);
        if let Err(error) = fs::remove_dir_all(&path)
            && error.kind() != ErrorKind::NotFound
        {
            return Err(error).with_context(|| format!("remove {}", path.display()));
        }
        sandboxes.push(owner.name());
    }
    // Fails, as intended, while other sandboxes have files there.
    let _ = fs::remove_dir(DIRECTORY);
    sandboxes.sort_unstable();
    sandboxes.dedup();
    Ok(sandboxes.len())
}

fn entries(directory: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Terminates a process, and kills it after a second.
fn end_process(pid: Pid) {
    if kill(pid, Signal::SIGTERM).is_err() {
        return;
    }
    for _ in 0..50 {
        if !is_alive(pid.as_raw().unsigned_abs()) {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
    let _ = kill(pid, Signal::SIGKILL);
}

/// Whether a process exists and is more than a zombie.
fn is_alive(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // "pid (command) state ...": the command may itself contain parentheses.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_their_owner() {
        assert_eq!(Owner::parse("ovltest-77-3-hosta"), Some(Owner { kind: "ovltest", pid: 77 }));
        assert_eq!(Owner::parse("ovlkeep-5"), Some(Owner { kind: "ovlkeep", pid: 5 }));
    }

    #[test]
    fn foreign_names_are_nobodys() {
        for name in ["cni-7f1c", "ovltest", "ovltest-x-1", "blue-77-3-hosta", ""] {
            assert_eq!(Owner::parse(name), None, "{name}");
        }
    }

    #[test]
    fn this_process_is_alive_and_an_impossible_one_is_not() {
        assert!(is_alive(process::id()));
        assert!(!is_alive(u32::MAX));
    }
}
