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
    /// The longest time without an arrival.
    pub gap: Duration,
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
    let receiver =
        to.netns.run(|| UdpSocket::bind((to.address, 0)))?.context("open the receiver's socket")?;
    setsockopt(&receiver, RcvBufForce, &QUEUE).context("set the receiver's queue")?;
    receiver.set_read_timeout(Some(REST)).context("set the read timeout")?;
    let target = receiver.local_addr().context("read the receiver's port")?;
    let sender =
        from.netns.run(|| UdpSocket::bind((from.address, 0)))?.context("open the sender's socket")?;
    sender.connect(target).context("connect the sender's socket")?;
    let finished = AtomicBool::new(false);
    thread::scope(|scope| {
        let receiving = scope.spawn(|| receive(&receiver, &finished));
        let sending = scope.spawn(|| send(&sender, &finished));
        let result = work();
        finished.store(true, Ordering::Relaxed);
        let (sent, refused) = sending.join().unwrap_or_else(|panic| resume_unwind(panic));
        let received = receiving.join().unwrap_or_else(|panic| resume_unwind(panic));
        let result = result?;
        let numbered = Numbered { sent, refused, ..received? };
        ensure!(numbered.received > 0, "none of {sent} datagrams arrived");
        Ok((result, numbered))
    })
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

fn send(socket: &UdpSocket, finished: &AtomicBool) -> (u64, u64) {
    let (mut number, mut refused, mut next) = (0, 0, Instant::now());
    while !finished.load(Ordering::Relaxed) {
        for _ in 0..BURST {
            match socket.send(&datagram(number)) {
                Ok(_) => number += 1,
                Err(_) => refused += 1,
            }
        }
        next += INTERVAL;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    (number, refused)
}

fn receive(socket: &UdpSocket, finished: &AtomicBool) -> Result<Numbered> {
    let (mut numbered, mut next, mut bytes) = (Numbered::default(), 0, [0; SIZE + 1]);
    let mut last = None;
    loop {
        let length = match socket.recv(&mut bytes) {
            Ok(length) => length,
            Err(_) if finished.load(Ordering::Relaxed) => return Ok(numbered),
            Err(_) => continue,
        };
        let now = Instant::now();
        let gap = last.replace(now).map_or(Duration::ZERO, |last| now.duration_since(last));
        numbered.gap = numbered.gap.max(gap);
        let datagram_bytes = bytes.get(..length).unwrap_or_default();
        let number = datagram_bytes.first_chunk().map_or(0, |number| u64::from_be_bytes(*number));
        ensure!(datagram_bytes == datagram(number), "datagram {number} arrived with other bytes");
        numbered.received += 1;
        if number < next {
            numbered.reordered += 1;
        }
        next = next.max(number + 1);
    }
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
