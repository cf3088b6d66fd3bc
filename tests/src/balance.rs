//! Balances a flow of datagrams between two containers: each one that was sent has arrived or is in a counter of lost packets.

use std::{
    collections::{BTreeMap, HashSet},
    io::IoSlice,
    net::UdpSocket,
    os::fd::AsRawFd,
    panic::resume_unwind,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, sendmmsg, setsockopt, sockopt::RcvBufForce};
use serde_json::Value;

use crate::{
    netns::Netns,
    pair::Pair,
    topology::{POD_LINK, Side, UPLINK},
    traffic::udp::is_no_datagram,
};

/// Bytes of each datagram's payload: the flow, the number, zeros.
const SIZE: usize = 64;
/// Datagrams in one system call.
const BATCH: usize = 64;
/// Bytes of the receiver's buffer: a burst must not be lost at its very end.
const RECEIVE_BUFFER: usize = 128 << 20;
/// How long the last packets may take through all queues.
const TIMEOUT: Duration = Duration::from_secs(20);
/// How long nothing may change before a flow is settled.
const QUIET: Duration = Duration::from_millis(150);

/// Where the datagrams of a flow are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Balance {
    /// Datagrams that the sender's kernel took.
    pub sent: u64,
    /// Datagrams that the receiver read.
    pub received: u64,
    /// What the counters of lost packets have grown by: `a.device_queue_full` of the agent on host A and so on, `link ...` for
    /// devices outside of the overlay, `receiver` for the buffer of the receiver's socket.
    pub lost: BTreeMap<String, u64>,
}

impl Balance {
    /// The growth of one counter.
    pub fn lost(&self, counter: &str) -> u64 {
        self.lost.get(counter).copied().unwrap_or_default()
    }

    fn is_even(&self) -> bool {
        self.sent == self.received + self.lost.values().sum::<u64>()
    }
}

/// Sends `count` datagrams at full speed from one container to the other and balances them.
///
/// # Errors
///
/// As [`Flow::settle`].
pub fn flood(pair: &Pair, from: &Side, to: &Side, count: u64) -> Result<Balance> {
    let mut flow = Flow::start(pair, from, to)?;
    flow.send(count)?;
    flow.settle()
}

/// Floods both ways, one after the other.
///
/// # Errors
///
/// As [`Flow::settle`].
pub fn flood_both_ways(pair: &Pair, count: u64) -> Result<()> {
    let (a, b) = (&pair.topology.a, &pair.topology.b);
    for (from, to) in [(a, b), (b, a)] {
        flood(pair, from, to, count)
            .with_context(|| format!("datagrams from container {} to {}", from.name, to.name))?;
    }
    Ok(())
}

/// Datagrams from one container to the other.
pub struct Flow<'a> {
    pair: &'a Pair,
    from: &'a Side,
    to: &'a Side,
    sender: UdpSocket,
    receiver: Receiver,
    before: BTreeMap<String, u64>,
    flow: u32,
    sent: u64,
}

impl<'a> Flow<'a> {
    /// Opens the sockets and reads all counters. Until [`Self::settle`] only this flow may lose packets.
    pub fn start(pair: &'a Pair, from: &'a Side, to: &'a Side) -> Result<Self> {
        let flow = rand::random();
        let bind = |side: &Side| -> Result<UdpSocket> {
            let bound = side.pod.run(|| UdpSocket::bind((side.pod_address, 0)))?;
            bound.with_context(|| format!("bind a UDP socket in {}", side.pod.name()))
        };
        let (sender, socket) = (bind(from)?, bind(to)?);
        sender.connect(socket.local_addr().context("read the receiver's port")?).context("connect")?;
        let receiver = Receiver::start(socket, flow)?;
        let mut flow = Self { pair, from, to, sender, receiver, before: BTreeMap::new(), flow, sent: 0 };
        flow.before = flow.losses()?;
        Ok(flow)
    }

    /// Sends datagrams as fast as the kernel takes them.
    pub fn send(&mut self, count: u64) -> Result<()> {
        let mut headers: MultiHeaders<SockaddrIn> = MultiHeaders::preallocate(BATCH, None);
        let end = self.sent + count;
        while self.sent < end {
            let numbers = self.sent..end.min(self.sent + BATCH as u64);
            let datagrams: Vec<_> = numbers.map(|number| datagram(self.flow, number)).collect();
            let slices: Vec<_> = datagrams.iter().map(|bytes| [IoSlice::new(bytes)]).collect();
            let fd = self.sender.as_raw_fd();
            let sent = sendmmsg(fd, &mut headers, &slices, vec![None; slices.len()], [], MsgFlags::empty())
                .with_context(|| format!("send datagram {}", self.sent))?;
            self.sent += sent.count() as u64;
        }
        Ok(())
    }

    /// Waits until every datagram has arrived or is in a counter.
    ///
    /// # Errors
    ///
    /// When the sum is another one after 20 seconds, or a datagram arrived twice.
    pub fn settle(self) -> Result<Balance> {
        let deadline = Instant::now() + TIMEOUT;
        let mut last = self.balance()?;
        loop {
            thread::sleep(QUIET);
            let now = self.balance()?;
            // An even sum may be one of too many losses on its way up.
            if now.is_even() && now == last {
                break;
            }
            ensure!(
                Instant::now() < deadline,
                "{} of {} datagrams arrived, and the counters of lost packets have grown by {}: {:?}",
                now.received,
                now.sent,
                now.lost.values().sum::<u64>(),
                now.lost
            );
            last = now;
        }
        self.receiver.finish()?;
        Ok(last)
    }

    fn balance(&self) -> Result<Balance> {
        // Before the counters: what arrives meanwhile is missing in the sum, and nothing is in it twice.
        let received = self.receiver.received();
        let grown = self.losses()?.into_iter().map(|(name, count)| {
            let before = self.before.get(&name).copied().unwrap_or_default();
            (name, count.wrapping_sub(before))
        });
        Ok(Balance { sent: self.sent, received, lost: grown.filter(|(_, count)| *count > 0).collect() })
    }

    /// All counters of packets that may be lost between the two sockets.
    fn losses(&self) -> Result<BTreeMap<String, u64>> {
        let mut losses = BTreeMap::new();
        for (agent, name) in [(&self.pair.a, "a"), (&self.pair.b, "b")] {
            let counters = agent.counters()?;
            losses.extend(counters.losses().map(|(reason, count)| (format!("{name}.{reason}"), count)));
        }
        // A veth counts at the sending end what the receiving end could not take.
        for (netns, link) in [(&self.from.pod, UPLINK), (&self.from.host, UPLINK), (&self.to.host, POD_LINK)]
        {
            losses.insert(format!("link {link} of {}", netns.name()), lost_by_link(netns, link)?);
        }
        losses.insert("receiver".to_owned(), self.receiver.dropped(&self.to.pod)?);
        Ok(losses)
    }
}

fn lost_by_link(netns: &Netns, link: &str) -> Result<u64> {
    let shown = netns.tool(&format!("ip -s -json link show dev {link}"))?;
    let shown: Value = serde_json::from_str(&shown).context("read the output of ip -json")?;
    let count = |field: &str| {
        let value = shown.pointer(&format!("/0/stats64/tx/{field}")).and_then(Value::as_u64);
        value.with_context(|| format!("{link} has no statistics of {field}"))
    };
    Ok(count("dropped")? + count("errors")?)
}

fn datagram(flow: u32, number: u64) -> [u8; SIZE] {
    let mut bytes = [0; SIZE];
    let head = flow.to_be_bytes().into_iter().chain(number.to_be_bytes());
    bytes.iter_mut().zip(head).for_each(|(byte, part)| *byte = part);
    bytes
}

/// The number of a datagram of `flow`.
fn number(flow: u32, bytes: &[u8]) -> Option<u64> {
    let (head, rest) = bytes.split_first_chunk()?;
    (u32::from_be_bytes(*head) == flow).then_some(u64::from_be_bytes(*rest.first_chunk()?))
}

/// A thread that receives the datagrams of a flow.
struct Receiver {
    socket: Arc<UdpSocket>,
    received: Arc<AtomicU64>,
    finished: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Receiver {
    fn start(socket: UdpSocket, flow: u32) -> Result<Self> {
        setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER).context("enlarge the receive buffer")?;
        socket.set_read_timeout(Some(Duration::from_millis(20))).context("set the read timeout")?;
        let (socket, received, finished) = (Arc::new(socket), Arc::default(), Arc::default());
        let shared = (Arc::clone(&socket), Arc::clone(&received), Arc::clone(&finished));
        let thread = thread::spawn(move || receive(&shared.0, flow, &shared.1, &shared.2));
        Ok(Self { socket, received, finished, thread: Some(thread) })
    }

    fn received(&self) -> u64 {
        self.received.load(Relaxed)
    }

    /// Datagrams that its socket has lost.
    fn dropped(&self, netns: &Netns) -> Result<u64> {
        let port = self.socket.local_addr().context("read the receiver's port")?.port();
        let table = netns.tool("cat /proc/thread-self/net/udp")?;
        let line = table.lines().find(|line| line.contains(&format!(":{port:04X} 00000000:0000")));
        let drops = line.and_then(|line| line.split_whitespace().next_back()?.parse().ok());
        drops.with_context(|| format!("find port {port} in {table}"))
    }

    fn finish(mut self) -> Result<()> {
        self.finished.store(true, Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(panic)) => resume_unwind(panic),
            None => Ok(()),
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.finished.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn receive(socket: &UdpSocket, flow: u32, received: &AtomicU64, finished: &AtomicBool) -> Result<()> {
    let (mut buffer, mut seen) = ([0; SIZE], HashSet::new());
    while !finished.load(Relaxed) {
        match socket.recv(&mut buffer) {
            Ok(count) => {
                let Some(number) = number(flow, buffer.get(..count).unwrap_or_default()) else {
                    bail!("a datagram of another flow arrived");
                };
                ensure!(seen.insert(number), "datagram {number} arrived twice");
                received.fetch_add(1, Relaxed);
            }
            Err(error) if is_no_datagram(&error) => {}
            Err(error) => return Err(error).context("receive datagrams"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_is_of_one_flow_and_has_one_number() {
        assert_eq!(number(7, &datagram(7, 1 << 40)), Some(1 << 40));
        assert_eq!(number(8, &datagram(7, 1)), None);
        assert_eq!(number(7, &datagram(7, 1)[..11]), None);
    }

    #[test]
    fn a_balance_is_even_only_when_each_datagram_is_somewhere_once() {
        let balance = |received, lost| Balance {
            sent: 10,
            received,
            lost: BTreeMap::from([("a.device_queue_full".to_owned(), lost)]),
        };
        assert!(balance(7, 3).is_even());
        assert!(!balance(7, 2).is_even() && !balance(7, 4).is_even());
    }
}
