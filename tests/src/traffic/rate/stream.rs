//! TCP throughput, measured with iperf3.

use std::{
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use super::cpu::busy_seconds;
use crate::topology::Endpoint;

/// The port that iperf3 uses.
const PORT: &str = "5201";

/// What TCP carried.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stream {
    /// Bits per second, all streams together, as the receiver counts them.
    pub bits_per_second: f64,
    /// Bytes received.
    pub bytes: f64,
    /// CPU time of the whole machine meanwhile, in seconds; starting and ending iperf3 is included.
    pub cpu_seconds: f64,
}

/// TCP throughput of one stream in bits per second, as iperf3's receiver counts it.
///
/// # Errors
///
/// As [`tcp_streams`].
pub fn tcp_throughput(from: Endpoint<'_>, to: Endpoint<'_>, duration: Duration) -> Result<f64> {
    Ok(tcp_streams(from, to, 1, duration)?.bits_per_second)
}

/// Sends over `streams` TCP connections at once for `duration`, in whole seconds and at least one.
///
/// # Errors
///
/// When iperf3 cannot be started, does not connect within 3 seconds, or no byte arrives.
pub fn tcp_streams(from: Endpoint<'_>, to: Endpoint<'_>, streams: u32, duration: Duration) -> Result<Stream> {
    let address = to.address.to_string();
    let mut server = Command::new("iperf3");
    server.args(["-s", "-1", "-B", &address, "-p", PORT]).stdin(Stdio::null()).stdout(Stdio::null());
    let _server = Running(to.netns.spawn(server.stderr(Stdio::null()))?);
    let (seconds, streams) = (duration.as_secs().max(1).to_string(), streams.to_string());
    let started = Instant::now();
    loop {
        let mut client = Command::new("iperf3");
        client.args(["-J", "-c", &address, "-p", PORT, "-t", &seconds, "-P", &streams]);
        client.args(["--connect-timeout", "2000"]);
        let before = busy_seconds()?;
        let output = from.netns.output(&mut client)?;
        let cpu_seconds = busy_seconds()? - before;
        let report: serde_json::Value =
            serde_json::from_slice(&output.stdout).context("read the report of iperf3")?;
        match throughput(&report) {
            Ok((bits_per_second, bytes)) => return Ok(Stream { bits_per_second, bytes, cpu_seconds }),
            // The server may not listen yet.
            Err(error) if started.elapsed() > Duration::from_secs(3) => {
                return Err(error).with_context(|| format!("measure TCP to {address} with iperf3"));
            }
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Bits per second and bytes of iperf3's report.
fn throughput(report: &serde_json::Value) -> Result<(f64, f64)> {
    if let Some(error) = report.get("error").and_then(|error| error.as_str()) {
        bail!("{error}");
    }
    let received = |field: &str| {
        let value = report.pointer(&format!("/end/sum_received/{field}")).and_then(serde_json::Value::as_f64);
        value.with_context(|| format!("the report has no end.sum_received.{field}"))
    };
    let (rate, bytes) = (received("bits_per_second")?, received("bytes")?);
    ensure!(rate > 0.0 && bytes > 0.0, "no byte arrived");
    Ok((rate, bytes))
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
        let report = json!({"end": {
            "sum_sent": {"bits_per_second": 2e9, "bytes": 2e8},
            "sum_received": {"bits_per_second": 1e9, "bytes": 1e8},
        }});
        assert_eq!(throughput(&report).unwrap(), (1e9, 1e8));
    }

    #[test]
    fn failures_are_errors() {
        let refused = json!({"error": "unable to connect to server: Connection refused"});
        assert!(throughput(&refused).unwrap_err().to_string().contains("refused"));
        let nothing = json!({"end": {"sum_received": {"bits_per_second": 0.0, "bytes": 0}}});
        assert!(throughput(&nothing).unwrap_err().to_string().contains("no byte arrived"));
        assert!(throughput(&json!({})).is_err());
    }
}
