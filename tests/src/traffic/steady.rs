//! A steady flow of verified datagrams during other work.

use std::{
    panic::resume_unwind,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{
    topology::Endpoint,
    traffic::udp::{is_answered, with_echo},
};

/// Pause between an answer and the next datagram.
const PAUSE: Duration = Duration::from_millis(5);
/// How long an answer may take before it counts as lost: far longer than any queue delays it.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Counts of the datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Answered with the right bytes.
    pub answered: u32,
    /// Not answered. None is sent twice.
    pub lost: u32,
}

/// Sends datagrams from `from` to `to`, one after the other, while `work` is done. Returns what `work` does.
///
/// # Errors
///
/// When sockets cannot be created, no datagram was answered, and whatever `work` returns.
pub fn meanwhile<T>(
    from: Endpoint<'_>,
    to: Endpoint<'_>,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Flow)> {
    let finished = AtomicBool::new(false);
    thread::scope(|scope| {
        let flow = scope.spawn(|| send(from, to, &finished));
        let result = work();
        finished.store(true, Ordering::Relaxed);
        let flow = flow.join().unwrap_or_else(|panic| resume_unwind(panic));
        let result = result?;
        let flow = flow.context("send datagrams meanwhile")?;
        ensure!(flow.answered > 0, "none of {} datagrams was answered", flow.lost);
        Ok((result, flow))
    })
}

/// As [`meanwhile`], and no datagram may be lost. Returns what `work` does.
///
/// # Errors
///
/// As [`meanwhile`], and when a datagram was lost.
pub fn without_loss<T>(from: Endpoint<'_>, to: Endpoint<'_>, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let (result, Flow { answered, lost }) = meanwhile(from, to, work)?;
    ensure!(lost == 0, "{lost} of {} datagrams were lost", answered + lost);
    Ok(result)
}

fn send(from: Endpoint<'_>, to: Endpoint<'_>, finished: &AtomicBool) -> Result<Flow> {
    with_echo(from, to, |socket| {
        let mut flow = Flow { answered: 0, lost: 0 };
        while !finished.load(Ordering::Relaxed) {
            match is_answered(socket, flow.answered + flow.lost, TIMEOUT)? {
                true => flow.answered += 1,
                false => flow.lost += 1,
            }
            thread::sleep(PAUSE);
        }
        Ok(flow)
    })
}
