//! ICMP echo with the `ping` command: loss, TTL and round-trip time.

use std::{net::Ipv4Addr, process::Command};

use anyhow::{Context, Result, ensure};

use crate::netns::Netns;

/// Result of `ping`.
#[derive(Clone, Debug, PartialEq)]
pub struct Ping {
    /// Requests sent.
    pub sent: u32,
    /// Answers received.
    pub received: u32,
    /// TTL of the first answer.
    pub ttl: Option<u8>,
    /// Smallest round-trip time in microseconds.
    pub fastest: Option<f64>,
}

/// Sends `count` echo requests 100 ms apart: after the last, `ping` waits as long as that, or twice the longest round trip so far.
///
/// # Errors
///
/// When `ping` cannot be run or prints something else than expected; lost packets are no error.
pub fn ping(from: &Netns, to: Ipv4Addr, count: u32) -> Result<Ping> {
    let arguments = ["-n", "-i", "0.1", "-W", "1", "-c", &count.to_string(), &to.to_string()];
    let output = from.output(Command::new("ping").args(arguments).env("LC_ALL", "C"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse(&text).with_context(|| {
        format!("read what ping {to} printed: {text}{}", String::from_utf8_lossy(&output.stderr))
    })
}

/// Pings and checks that every answer came, with TTL `ttl`.
pub fn ping_with_ttl(from: &Netns, to: Ipv4Addr, ttl: u8) -> Result<Ping> {
    let seen = ping(from, to, 3)?;
    ensure!(seen.received == seen.sent, "{} of {} echo requests to {to} answered", seen.received, seen.sent);
    ensure!(seen.ttl == Some(ttl), "ping {to} shows ttl={}, not {ttl}", seen.ttl.unwrap_or_default());
    Ok(seen)
}

fn parse(text: &str) -> Option<Ping> {
    let summary = text.lines().find(|line| line.contains(" packets transmitted"))?;
    let mut parts = summary.split(", ");
    let sent = parts.next()?.split(' ').next()?.parse().ok()?;
    let received = parts.next()?.split(' ').next()?.parse().ok()?;
    let ttl = value_after(text, "ttl=").and_then(|value| value.parse().ok());
    let times = text.lines().filter_map(|line| value_after(line, "time=")?.parse::<f64>().ok());
    let fastest = times.min_by(f64::total_cmp).map(|milliseconds| milliseconds * 1000.0);
    Some(Ping { sent, received, ttl, fastest })
}

fn value_after<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(key)?;
    rest.split_whitespace().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        let text = "PING 10.244.2.0 (10.244.2.0) 56(84) bytes of data.\n\
                    64 bytes from 10.244.2.0: icmp_seq=1 ttl=62 time=0.054 ms\n\
                    64 bytes from 10.244.2.0: icmp_seq=2 ttl=62 time=0.031 ms\n\n\
                    --- 10.244.2.0 ping statistics ---\n\
                    3 packets transmitted, 2 received, 33.3333% packet loss, time 41ms\n\
                    rtt min/avg/max/mdev = 0.031/0.042/0.054/0.011 ms\n";
        assert_eq!(parse(text), Some(Ping { sent: 3, received: 2, ttl: Some(62), fastest: Some(31.0) }));
    }

    #[test]
    fn silence_is_read() {
        let text = "PING 10.244.9.9 (10.244.9.9) 56(84) bytes of data.\n\n\
                    --- 10.244.9.9 ping statistics ---\n\
                    2 packets transmitted, 0 received, 100% packet loss, time 1027ms\n";
        assert_eq!(parse(text), Some(Ping { sent: 2, received: 0, ttl: None, fastest: None }));
        assert_eq!(parse("ping: connect: Network is unreachable\n"), None);
    }
}
