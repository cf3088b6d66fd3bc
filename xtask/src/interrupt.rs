//! Forwards SIGINT, SIGTERM and SIGHUP to the running child, and lets xtask wait until that child has cleaned up.
//!
//! Children run in their own process group (see [`crate::step`]) and the whole group receives the signal once, because cargo
//! does not forward signals to its test programs.

use std::process::ExitCode;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// The process group of the running child, 0 when there is none. xtask runs one child at a time.
static GROUP: AtomicI32 = AtomicI32::new(0);
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
    GROUP.store(i32::try_from(id).unwrap_or(0), Ordering::SeqCst);
    // A signal since the start of the child has not been forwarded.
    if let Some(signal) = caught() {
        forward(signal);
    }
    Attended
}

/// See [`attend`].
pub(crate) struct Attended;

impl Drop for Attended {
    fn drop(&mut self) {
        GROUP.store(0, Ordering::SeqCst);
    }
}

fn caught() -> Option<i32> {
    match CAUGHT.load(Ordering::SeqCst) {
        0 => None,
        signal => Some(signal),
    }
}

fn forward(signal: i32) {
    let group = GROUP.load(Ordering::SeqCst);
    if let (1.., Ok(signal)) = (group, Signal::try_from(signal)) {
        // Fails only if the group has just ended.
        let _ = killpg(Pid::from_raw(group), signal);
    }
}
