//! Waits for a condition.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

/// Ample time on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Waits until `done` is true.
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while !done()? {
        ensure!(Instant::now() < deadline, "not within {} seconds: {what}", TIMEOUT.as_secs());
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
