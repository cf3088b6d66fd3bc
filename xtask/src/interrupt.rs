//! Forwards SIGINT, SIGTERM and SIGHUP to the running children, and lets xtask wait until these have cleaned up.
//!
//! Children run in their own process group (see [`crate::step`]) and the whole group receives the signal once, because cargo
//! does not forward signals to its test programs.

use std::process::ExitCode;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// The process groups of running children.
static GROUPS: Mutex<Vec<i32>> = Mutex::new(Vec::new());
/// The last signal received, 0 when there was none.
static CAUGHT: AtomicI32 = AtomicI32::new(0);

/// Starts the thread that receives signals. An `exec` ends it and restores the default handlers.
pub(crate) fn watch() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot install signal handlers")?;
    thread::spawn(move || {
        for signal in signals.forever() {
            CAUGHT.store(signal, Ordering::SeqCst);
            forward(signal);
        }
    });
    Ok(())
}

/// Fails after a signal was received.
pub(crate) fn check() -> Result<()> {
    if caught().is_some() {
        bail!("interrupted");
    }
    Ok(())
}

/// The exit code after a signal, 128 + its number, as in shells.
pub(crate) fn exit_code() -> Option<ExitCode> {
    caught().map(|signal| u8::try_from(128 + signal).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Forwards signals to the process group `id` until the returned guard is dropped.
pub(crate) fn attend(id: u32) -> Attended {
    let group = i32::try_from(id).unwrap_or(0);
    groups().push(group);
    // A signal since the start of the child has not been forwarded.
    if let Some(signal) = caught() {
        send(signal, group);
    }
    Attended(group)
}

/// See [`attend`].
pub(crate) struct Attended(i32);

impl Drop for Attended {
    fn drop(&mut self) {
        groups().retain(|group| *group != self.0);
    }
}

fn groups() -> MutexGuard<'static, Vec<i32>> {
    // The list is valid even after a panic.
    GROUPS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn caught() -> Option<i32> {
    match CAUGHT.load(Ordering::SeqCst) {
        0 => None,
        signal => Some(signal),
    }
}

fn forward(signal: i32) {
    for group in groups().iter() {
        send(signal, *group);
    }
}

fn send(signal: i32, group: i32) {
    if let (1.., Ok(signal)) = (group, Signal::try_from(signal)) {
        // Fails only if the group has just ended.
        let _ = killpg(Pid::from_raw(group), signal);
    }
}
