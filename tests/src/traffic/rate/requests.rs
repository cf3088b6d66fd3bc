//! Latency of requests over TCP: one byte each way, one request at a time.
//!
//! Both ends run on one CPU. On two, each packet waits for an interrupt between CPUs and often for an idle one to wake up: on a
//! virtual machine that takes longer than the path, and it varies. The agent's threads run where the kernel puts them.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    panic::resume_unwind,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{cpu, topology::Endpoint};

/// How long either end waits for the other.
const STALL: Duration = Duration::from_secs(5);

/// Percentiles of the time from a request to its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latency {
    /// The median.
    pub p50: Duration,
    /// 99 of 100 are not longer.
    pub p99: Duration,
    /// 999 of 1000 are not longer.
    pub p999: Duration,
}

/// Sends one-byte requests for `duration` over one TCP connection with `TCP_NODELAY`, each after the answer to the last one.
/// The first tenth of the time is not measured.
///
/// # Errors
///
/// When no connection comes about or an answer takes longer than 5 seconds.
pub fn request_latency(from: Endpoint<'_>, to: Endpoint<'_>, duration: Duration) -> Result<Latency> {
    let listener = to
        .netns
        .run(|| TcpListener::bind((to.address, 0)))?
        .with_context(|| format!("listen on {} in {}", to.address, to.netns.name()))?;
    let target = listener.local_addr().context("read the listener's port")?;
    // Connected before it is accepted: the kernel's queue holds it.
    let client = from
        .netns
        .run(|| TcpStream::connect_timeout(&target, STALL))?
        .with_context(|| format!("connect from {} to {target}", from.netns.name()))?;
    let (server, _) = listener.accept().context("accept the connection")?;
    for socket in [&client, &server] {
        socket.set_nodelay(true).context("set TCP_NODELAY")?;
        socket.set_read_timeout(Some(STALL)).context("set the read timeout")?;
    }
    let cpu = cpu::first()?;
    let times = thread::scope(|scope| {
        let server = scope.spawn(move || cpu::stay_on(&cpu).and_then(|()| answer(server)));
        let client = scope.spawn(move || cpu::stay_on(&cpu).and_then(|()| ask(client, duration)));
        let times = client.join().unwrap_or_else(|panic| resume_unwind(panic));
        let answered = server.join().unwrap_or_else(|panic| resume_unwind(panic));
        let times = times?;
        answered.map(|()| times)
    })?;
    percentiles(times)
}

/// Answers until the other end closes the connection.
fn answer(mut socket: TcpStream) -> Result<()> {
    let mut byte = [0];
    while socket.read(&mut byte).context("wait for a request")? > 0 {
        socket.write_all(&byte).context("answer a request")?;
    }
    Ok(())
}

fn ask(mut socket: TcpStream, duration: Duration) -> Result<Vec<Duration>> {
    let (mut times, mut byte) = (Vec::new(), [0]);
    let start = Instant::now();
    let warm = start + duration / 10;
    loop {
        let sent = Instant::now();
        if sent.duration_since(start) >= duration {
            return Ok(times);
        }
        socket.write_all(&byte).context("send a request")?;
        socket.read_exact(&mut byte).context("wait for an answer")?;
        if sent >= warm {
            times.push(sent.elapsed());
        }
    }
}

fn percentiles(mut times: Vec<Duration>) -> Result<Latency> {
    ensure!(!times.is_empty(), "no request was answered in the time given");
    times.sort_unstable();
    let at = |thousandths: usize| {
        let rank = (times.len() * thousandths).div_ceil(1000).max(1);
        times.get(rank - 1).copied().context("a percentile is out of range")
    };
    Ok(Latency { p50: at(500)?, p99: at(990)?, p999: at(999)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_the_nearest_rank() {
        let times: Vec<Duration> = (1..=2000).rev().map(Duration::from_micros).collect();
        let [p50, p99, p999] = [1000, 1980, 1998].map(Duration::from_micros);
        assert_eq!(percentiles(times).unwrap(), Latency { p50, p99, p999 });
    }

    #[test]
    fn one_request_is_every_percentile() {
        let only = Duration::from_micros(7);
        assert_eq!(percentiles(vec![only]).unwrap(), Latency { p50: only, p99: only, p999: only });
        assert!(percentiles(Vec::new()).is_err());
    }
}
