//! Numbered datagrams at a high rate during other work: none may be lost or overtake another.

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

/// Datagrams of one burst, and from one burst to the next: 20,000 a second.
const BURST: u64 = 20;
const INTERVAL: Duration = Duration::from_millis(1);
/// Bytes of a datagram, a multiple of 8.
const SIZE: usize = 200;
/// How long the receiver waits for what is on its way.
const REST: Duration = Duration::from_secs(1);
/// The receiver's queue in bytes: what a busy machine keeps it from reading for a second.
const QUEUE: usize = 64 << 20;

/// What became of the datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbered {
    /// Sent without an error.
    pub sent: u64,
    /// The kernel of the sender refused them.
    pub refused: u64,
    /// Arrived with the right bytes.
    pub received: u64,
    /// Arrived behind one with a higher number.
    pub reordered: u64,
    /// The longest time between two arrivals, less that between sending the second and the one before it: a sender that the machine keeps
    /// from sending is no outage.
    pub outage: Duration,
}

impl Numbered {
    /// Datagrams that did not arrive.
    pub fn lost(&self) -> u64 {
        self.refused + self.sent.saturating_sub(self.received)
    }
}

/// Sends datagrams of one flow from `from` to `to` while `work` is done. Returns what `work` does.
///
/// # Errors
///
/// When sockets cannot be created, wrong bytes or one datagram twice arrived, and whatever `work` returns.
pub fn meanwhile<T>(
    from: Endpoint<'_>,
    to: Endpoint<'_>,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Numbered)> {
    let (result, flows) = flows(&[(from, to)], work)?;
    Ok((result, flows.first().copied().context("there is one flow")?))
}

/// As [`meanwhile`], for several flows at a time, each from its first end to its second. Returns what became of each, in the same order.
///
/// # Errors
///
/// As [`meanwhile`].
pub fn flows<T>(
    ends: &[(Endpoint<'_>, Endpoint<'_>)],
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Vec<Numbered>)> {
    let sockets = ends.iter().map(|(from, to)| open(*from, *to)).collect::<Result<Vec<_>>>()?;
    let [stop, finished] = &[const { AtomicBool::new(false) }; 2];
    thread::scope(|scope| {
        let running: Vec<_> = sockets
            .iter()
            .map(|(sender, receiver)| {
                let receiving = scope.spawn(move || receive(receiver, finished));
                (scope.spawn(move || send(sender, stop)), receiving)
            })
            .collect();
        let result = work();
        stop.store(true, Ordering::Relaxed);
        let (mut sent, mut receiving) = (Vec::new(), Vec::new());
        for (sender, receiver) in running {
            sent.push(sender.join().unwrap_or_else(|panic| resume_unwind(panic)));
            receiving.push(receiver);
        }
        // Receivers wait for what is on its way from the last of the senders.
        finished.store(true, Ordering::Relaxed);
        let received: Vec<_> = receiving
            .into_iter()
            .map(|receiver| receiver.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .collect();
        let result = result?;
        let mut flows = Vec::new();
        for (sent, received) in sent.into_iter().zip(received) {
            let (received, gaps) = received?;
            let outage = longest_outage(&gaps, &sent.bursts);
            let flow = Numbered { sent: sent.sent, refused: sent.refused, outage, ..received };
            ensure!(flow.received > 0, "none of {} datagrams arrived", flow.sent);
            flows.push(flow);
        }
        Ok((result, flows))
    })
}

/// The sockets of one flow: that of its sender, and that of its receiver.
fn open(from: Endpoint<'_>, to: Endpoint<'_>) -> Result<(UdpSocket, UdpSocket)> {
    let receiver =
        to.netns.run(|| UdpSocket::bind((to.address, 0)))?.context("open the receiver's socket")?;
    setsockopt(&receiver, RcvBufForce, &QUEUE).context("set the receiver's queue")?;
    receiver.set_read_timeout(Some(REST)).context("set the read timeout")?;
    let target = receiver.local_addr().context("read the receiver's port")?;
    let sender =
        from.netns.run(|| UdpSocket::bind((from.address, 0)))?.context("open the sender's socket")?;
    sender.connect(target).context("connect the sender's socket")?;
    Ok((sender, receiver))
}

/// As [`meanwhile`], and no datagram may be lost or overtake another.
///
/// # Errors
///
/// As [`meanwhile`], and when that happened.
pub fn without_loss<T>(from: Endpoint<'_>, to: Endpoint<'_>, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let (result, numbered) = meanwhile(from, to, work)?;
    ensure!(numbered.lost() == 0 && numbered.reordered == 0, "{} lost: {numbered:?}", numbered.lost());
    Ok(result)
}

/// What a sender did.
struct Sent {
    sent: u64,
    refused: u64,
    /// The number of the first datagram of each burst, and when it was sent.
    bursts: Vec<(u64, Instant)>,
}

/// A long time between two arrivals, and the number of the second.
type Gap = (u64, Duration);

fn send(socket: &UdpSocket, finished: &AtomicBool) -> Sent {
    let (mut number, mut refused, mut next) = (0, 0, Instant::now());
    let mut bursts = Vec::new();
    while !finished.load(Ordering::Relaxed) {
        bursts.push((number, Instant::now()));
        for _ in 0..BURST {
            match socket.send(&datagram(number)) {
                Ok(_) => number += 1,
                Err(_) => refused += 1,
            }
        }
        next += INTERVAL;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Sent { sent: number, refused, bursts }
}

fn receive(socket: &UdpSocket, finished: &AtomicBool) -> Result<(Numbered, Vec<Gap>)> {
    let (mut numbered, mut next, mut bytes) = (Numbered::default(), 0, [0; SIZE + 1]);
    let (mut last, mut gaps) = (None, Vec::new());
    loop {
        let length = match socket.recv(&mut bytes) {
            Ok(length) => length,
            Err(_) if finished.load(Ordering::Relaxed) => return Ok((numbered, gaps)),
            Err(_) => continue,
        };
        let now = Instant::now();
        let datagram_bytes = bytes.get(..length).unwrap_or_default();
        let number = datagram_bytes.first_chunk().map_or(0, |number| u64::from_be_bytes(*number));
        ensure!(datagram_bytes == datagram(number), "datagram {number} arrived with other bytes");
        if let Some(gap) = last.replace(now).map(|last| now.duration_since(last))
            && gap > INTERVAL
        {
            gaps.push((number, gap));
        }
        numbered.received += 1;
        if number < next {
            numbered.reordered += 1;
        }
        next = next.max(number + 1);
    }
}

/// See [`Numbered::outage`]. A datagram within a burst was sent at once after the one before it.
fn longest_outage(gaps: &[Gap], bursts: &[(u64, Instant)]) -> Duration {
    let interval = |number: u64| {
        let place = bursts.binary_search_by_key(&number, |(first, _)| *first).ok()?;
        let (_, before) = bursts.get(place.checked_sub(1)?)?;
        Some(bursts.get(place)?.1.duration_since(*before))
    };
    let outages = gaps.iter().map(|(number, gap)| gap.saturating_sub(interval(*number).unwrap_or_default()));
    outages.max().unwrap_or_default()
}

/// The datagram with this number: no two share a word.
fn datagram(number: u64) -> [u8; SIZE] {
    let mut bytes = [0; SIZE];
    for (index, word) in (0u64..).zip(bytes.chunks_exact_mut(8)) {
        let value =
            if index == 0 { number } else { (number << 8 | index).wrapping_mul(0x9e37_79b9_7f4a_7c15) };
        word.copy_from_slice(&value.to_be_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sender_that_stands_still_is_no_outage() {
        let start = Instant::now();
        let ms = Duration::from_millis;
        let bursts = [(0, start), (20, start + ms(1)), (40, start + ms(51)), (60, start + ms(52))];
        // Its sender had paused.
        assert_eq!(longest_outage(&[(40, ms(50))], &bursts), Duration::ZERO);
        // All between were lost: what counts is when the next one might have arrived.
        assert_eq!(longest_outage(&[(40, ms(50)), (60, ms(52))], &bursts), ms(51));
        // In the middle of a burst, and without any gap.
        assert_eq!(longest_outage(&[(45, ms(3))], &bursts), ms(3));
        assert_eq!(longest_outage(&[], &bursts), Duration::ZERO);
    }
}
