//! Measures TCP throughput, small packets per second and round-trip time.

use std::{
    net::UdpSocket,
    panic::resume_unwind,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};

use crate::{topology::Endpoint, traffic::udp::with_echo};

/// Payload bytes of a small packet.
const SMALL: usize = 64;
/// The port that iperf3 uses.
const PORT: &str = "5201";

/// TCP throughput of one stream in bits per second, as iperf3's receiver counts it.
pub fn tcp_throughput(from: Endpoint<'_>, to: Endpoint<'_>, duration: Duration) -> Result<f64> {
    let address = to.address.to_string();
    let mut server = Command::new("iperf3");
    server.args(["-s", "-1", "-B", &address, "-p", PORT]).stdin(Stdio::null()).stdout(Stdio::null());
    let _server = Running(to.netns.spawn(server.stderr(Stdio::null()))?);
    let seconds = duration.as_secs().max(1).to_string();
    let started = Instant::now();
    loop {
        let mut client = Command::new("iperf3");
        client.args(["-J", "-c", &address, "-p", PORT, "-t", &seconds, "--connect-timeout", "2000"]);
        let output = from.netns.output(&mut client)?;
        let report: serde_json::Value =
            serde_json::from_slice(&output.stdout).context("read the report of iperf3")?;
        match throughput(&report) {
            Ok(rate) => return Ok(rate),
            // The server may not listen yet.
            Err(error) if started.elapsed() > Duration::from_secs(3) => {
                return Err(error).with_context(|| format!("measure TCP to {address} with iperf3"));
            }
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn throughput(report: &serde_json::Value) -> Result<f64> {
    if let Some(error) = report.get("error").and_then(|error| error.as_str()) {
        bail!("{error}");
    }
    let rate = report.pointer("/end/sum_received/bits_per_second").and_then(serde_json::Value::as_f64);
    let rate = rate.context("the report has no end.sum_received.bits_per_second")?;
    ensure!(rate > 0.0, "no byte arrived");
    Ok(rate)
}

/// Small UDP packets per second that arrive when one thread sends as many as it can.
pub fn small_packets(from: Endpoint<'_>, to: Endpoint<'_>, duration: Duration) -> Result<f64> {
    let receiver = to.netns.run(|| UdpSocket::bind((to.address, 0)))?.context("bind the receiver")?;
    // Room for what arrives while the receiver waits for its turn on the CPU.
    setsockopt(&receiver, RcvBufForce, &(16 << 20)).context("enlarge the receive buffer")?;
    receiver.set_read_timeout(Some(Duration::from_millis(50))).context("set the read timeout")?;
    let target = receiver.local_addr().context("read the receiver's port")?;
    let sender = from.netns.run(|| UdpSocket::bind((from.address, 0)))?.context("bind the sender")?;
    sender.connect(target).with_context(|| format!("connect a UDP socket to {target}"))?;
    let finished = AtomicBool::new(false);
    let received = thread::scope(|scope| {
        let counter = scope.spawn(|| count(&receiver, &finished));
        let deadline = Instant::now() + duration;
        let bytes = [0; SMALL];
        while Instant::now() < deadline {
            for _ in 0..32 {
                // A full queue is part of what is measured: only what arrives counts.
                let _ = sender.send(&bytes);
            }
        }
        finished.store(true, Ordering::Relaxed);
        counter.join().unwrap_or_else(|panic| resume_unwind(panic))
    });
    ensure!(received > 0, "no small packet arrived at {target}");
    Ok(received as f64 / duration.as_secs_f64())
}

fn count(receiver: &UdpSocket, finished: &AtomicBool) -> u64 {
    let mut buffer = [0; SMALL];
    let mut received = 0;
    loop {
        match receiver.recv(&mut buffer) {
            Ok(_) => received += 1,
            Err(_) if finished.load(Ordering::Relaxed) => return received,
            Err(_) => {}
        }
    }
}

/// Median round-trip time of one-byte UDP datagrams, one at a time.
pub fn round_trip(from: Endpoint<'_>, to: Endpoint<'_>, duration: Duration) -> Result<Duration> {
    with_echo(from, to, |socket| {
        let deadline = Instant::now() + duration;
        let mut times = Vec::new();
        let mut buffer = [0; 1];
        while Instant::now() < deadline {
            let start = Instant::now();
            socket.send(&[0]).context("send a byte")?;
            socket.recv(&mut buffer).context("wait for the answer")?;
            times.push(start.elapsed());
        }
        times.sort_unstable();
        times.get(times.len() / 2).copied().context("no round trip in the time given")
    })
}

/// A program that is killed on drop.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_receivers_rate_counts() {
        let report =
            json!({"end": {"sum_sent": {"bits_per_second": 2e9}, "sum_received": {"bits_per_second": 1e9}}});
        assert_eq!(throughput(&report).unwrap(), 1e9);
    }

    #[test]
    fn failures_are_errors() {
        let refused = json!({"error": "unable to connect to server: Connection refused"});
        assert!(throughput(&refused).unwrap_err().to_string().contains("refused"));
        assert!(throughput(&json!({"end": {"sum_received": {"bits_per_second": 0.0}}})).is_err());
        assert!(throughput(&json!({})).is_err());
    }
}
