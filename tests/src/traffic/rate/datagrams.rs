//! Small datagrams between two UDP sockets: as many as one thread sends, or a given number per second.

use std::{
    net::UdpSocket,
    panic::resume_unwind,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};

use crate::topology::Endpoint;

/// Payload bytes of a small packet.
pub const SMALL: usize = 64;
/// Bytes of the receiver's buffer: room for what arrives while it waits for its turn on the CPU. The kernel counts 768 bytes for
/// a small packet.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Most packets that are sent without looking at the clock.
const BURST: u64 = 32;
/// How long the receiver waits for late packets.
const LATE: Duration = Duration::from_millis(50);
/// Largest share of packets that may be lost.
const LOSS: f64 = 0.01;
/// Tries after the first one.
const STEPS: usize = 6;

/// What was sent and what arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Offer {
    /// Packets sent.
    pub sent: u64,
    /// Packets received.
    pub received: u64,
    /// Seconds from the first packet to the last one received.
    pub seconds: f64,
}

impl Offer {
    /// Packets received per second.
    pub fn rate(&self) -> f64 {
        self.received as f64 / self.seconds
    }

    /// Whether no more packets were lost than may be.
    pub fn arrived(&self) -> bool {
        let lost = self.sent.saturating_sub(self.received);
        lost as f64 <= self.sent as f64 * LOSS
    }
}

/// Small packets per second that arrive when one thread sends as many as it can.
///
/// # Errors
///
/// As [`datagrams`].
pub fn small_packets(from: Endpoint<'_>, to: Endpoint<'_>, duration: Duration) -> Result<f64> {
    Ok(datagrams(from, to, None, duration)?.rate())
}

/// The highest rate in packets per second that arrives with less than 1% loss: the sender's full speed if that arrives, else the
/// best of six tries that halve the distance between a rate that arrives and one that does not.
///
/// # Errors
///
/// As [`datagrams`], and when none of the rates arrives.
pub fn highest_rate(from: Endpoint<'_>, to: Endpoint<'_>, step: Duration) -> Result<f64> {
    let full = datagrams(from, to, None, step)?;
    if full.arrived() {
        return Ok(full.rate());
    }
    search(full, |rate| datagrams(from, to, Some(rate), step))
}

/// Halves the distance between a rate that arrives and one that does not, from what arrived at full speed.
fn search(full: Offer, mut offer: impl FnMut(f64) -> Result<Offer>) -> Result<f64> {
    // A path carries not much less under overload than without loss, and at most what was sent.
    let (mut low, mut high) = (0.0, (full.sent as f64 / full.seconds).min(full.rate() * 2.0));
    let (mut rate, mut best) = (full.rate(), None::<f64>);
    for _ in 0..STEPS {
        let seen = offer(rate)?;
        if seen.arrived() {
            best = Some(best.unwrap_or_default().max(seen.rate()));
            low = rate;
        } else {
            high = rate;
        }
        rate = f64::midpoint(low, high);
    }
    best.with_context(|| {
        format!("more than 1% of the packets are lost at every rate down to {high:.0} per second")
    })
}

/// Sends small datagrams for `duration` with one thread, `rate` per second or as many as it can, and counts what arrives.
///
/// # Errors
///
/// When sockets cannot be created or nothing arrives.
pub fn datagrams(
    from: Endpoint<'_>,
    to: Endpoint<'_>,
    rate: Option<f64>,
    duration: Duration,
) -> Result<Offer> {
    let receiver = to.netns.run(|| UdpSocket::bind((to.address, 0)))?.context("bind the receiver")?;
    setsockopt(&receiver, RcvBufForce, &RECEIVE_BUFFER).context("enlarge the receive buffer")?;
    receiver.set_read_timeout(Some(LATE)).context("set the read timeout")?;
    let target = receiver.local_addr().context("read the receiver's port")?;
    let sender = from.netns.run(|| UdpSocket::bind((from.address, 0)))?.context("bind the sender")?;
    sender.connect(target).with_context(|| format!("connect a UDP socket to {target}"))?;
    let finished = AtomicBool::new(false);
    let start = Instant::now();
    let (sent, (received, last)) = thread::scope(|scope| {
        let counter = scope.spawn(|| count(&receiver, &finished));
        let sent = send(&sender, rate, start, duration);
        finished.store(true, Ordering::Relaxed);
        (sent, counter.join().unwrap_or_else(|panic| resume_unwind(panic)))
    });
    let last = last.with_context(|| format!("no small packet arrived at {target}"))?;
    let seconds = last.duration_since(start).max(duration).as_secs_f64();
    ensure!(received > 0 && sent > 0, "no small packet arrived at {target}");
    Ok(Offer { sent, received, seconds })
}

/// Sends until the time is over, and returns how many packets the kernel accepted or dropped.
fn send(sender: &UdpSocket, rate: Option<f64>, start: Instant, duration: Duration) -> u64 {
    let (bytes, mut sent) = ([0; SMALL], 0);
    loop {
        let elapsed = start.elapsed();
        if elapsed >= duration {
            return sent;
        }
        let due = rate.map_or(u64::MAX, |rate| (elapsed.as_secs_f64() * rate) as u64);
        let burst = due.saturating_sub(sent).min(BURST);
        for _ in 0..burst {
            // A full queue is part of what is measured: only what arrives counts.
            let _ = sender.send(&bytes);
        }
        sent += burst;
        if burst == 0 {
            thread::yield_now();
        }
    }
}

/// Number of packets received and the time of the last one.
fn count(receiver: &UdpSocket, finished: &AtomicBool) -> (u64, Option<Instant>) {
    let mut buffer = [0; SMALL];
    let (mut received, mut last) = (0_u64, None);
    loop {
        match receiver.recv(&mut buffer) {
            Ok(_) => {
                received += 1;
                // The clock costs little, but every packet pays.
                if received % 16 == 1 || finished.load(Ordering::Relaxed) {
                    last = Some(Instant::now());
                }
            }
            Err(_) if finished.load(Ordering::Relaxed) => return (received, last),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A path that carries so many packets per second and drops the others.
    fn path(capacity: f64) -> impl FnMut(f64) -> Result<Offer> {
        move |rate| {
            let received = rate.min(capacity) as u64;
            Ok(Offer { sent: rate as u64, received, seconds: 1.0 })
        }
    }

    #[test]
    fn the_search_finds_the_capacity() {
        for capacity in [40_000.0, 99_000.0, 180_000.0] {
            let full = Offer { sent: 200_000, received: (capacity * 0.8) as u64, seconds: 1.0 };
            let found = search(full, path(capacity)).unwrap();
            assert!((found / capacity - 1.0).abs() < 0.03, "{found} of {capacity}");
        }
    }

    #[test]
    fn a_path_that_carries_less_under_overload_is_searched_below_too() {
        let full = Offer { sent: 200_000, received: 50_000, seconds: 1.0 };
        let found = search(full, path(30_000.0)).unwrap();
        assert!((28_000.0..=30_000.0).contains(&found), "{found}");
    }

    #[test]
    fn loss_at_every_rate_is_an_error() {
        let lossy = |rate| Ok(Offer { sent: rate as u64, received: (rate * 0.9) as u64, seconds: 1.0 });
        let full = Offer { sent: 200_000, received: 100_000, seconds: 1.0 };
        assert!(search(full, lossy).unwrap_err().to_string().contains("at every rate down to"));
    }

    #[test]
    fn one_percent_may_be_lost() {
        assert!(Offer { sent: 1000, received: 990, seconds: 1.0 }.arrived());
        assert!(!Offer { sent: 1000, received: 989, seconds: 1.0 }.arrived());
    }
}
