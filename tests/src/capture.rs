//! Captures the IPv4 packets at a container's device and verifies their checksums.

use std::{
    collections::BTreeMap,
    os::fd::{AsRawFd, OwnedFd},
    panic::resume_unwind,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    libc,
    sys::{
        socket::{
            AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, SockaddrLike, bind, recvfrom,
            setsockopt, socket,
            sockopt::{RcvBufForce, ReceiveTimeout},
        },
        time::{TimeVal, TimeValLike},
    },
};

use crate::{
    netns::Netns,
    topology::UPLINK,
    traffic::checksum::{Verified, verify},
};

/// Bytes of the socket's buffer: packets are verified while more come.
const RECEIVE_BUFFER: usize = 128 << 20;
/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;
/// EtherType of IPv4, as in a frame.
const IPV4: [u8; 2] = [8, 0];

/// Which packets are captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Those that arrive.
    Incoming,
    /// Those that leave, too: the container must finish its checksums itself.
    Both,
}

/// What was captured.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Packets with correct checksums.
    pub verified: BTreeMap<Verified, u64>,
    /// Packets with a wrong checksum.
    pub bad: u64,
    /// What is wrong with the first bad packet.
    pub first: Option<String>,
}

impl Seen {
    /// Checks that no packet was bad, and that at least so many were verified.
    ///
    /// # Errors
    ///
    /// When a packet was bad or fewer were verified.
    pub fn is_clean(&self, expected: &[(Verified, u64)]) -> Result<()> {
        ensure!(
            self.bad == 0,
            "{} bad packets, the first: {}",
            self.bad,
            self.first.as_deref().unwrap_or("?")
        );
        for (kind, least) in expected {
            let count = self.verified.get(kind).copied().unwrap_or_default();
            ensure!(count >= *least, "only {count} packets of {kind:?} were verified, not {least}");
        }
        Ok(())
    }
}

/// A running capture at the device of a container.
pub struct Capture {
    finished: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Seen>>>,
}

impl Capture {
    /// Starts to capture.
    pub fn start(netns: &Netns, direction: Direction) -> Result<Self> {
        let socket = netns.run(open)?.with_context(|| format!("capture in {}", netns.name()))?;
        let finished = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&finished);
        let thread = thread::spawn(move || capture(&socket, direction, &end));
        Ok(Self { finished, thread: Some(thread) })
    }

    /// Stops once every packet that was captured is verified.
    ///
    /// # Errors
    ///
    /// When the kernel could not deliver packets to the capture.
    pub fn finish(mut self) -> Result<Seen> {
        self.finished.store(true, Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(seen)) => seen,
            Some(Err(panic)) => resume_unwind(panic),
            None => Ok(Seen::default()),
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.finished.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn open() -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)
        .context("open a packet socket")?;
    let address = getifaddrs().context("list network devices")?.find_map(|interface| {
        let address = interface.address?;
        let is_link = address.family() == Some(AddressFamily::Packet) && interface.interface_name == UPLINK;
        is_link.then_some(address)
    });
    bind(fd.as_raw_fd(), &address.with_context(|| format!("find {UPLINK}"))?)
        .context("bind to the device")?;
    setsockopt(&fd, RcvBufForce, &RECEIVE_BUFFER).context("enlarge the receive buffer")?;
    setsockopt(&fd, ReceiveTimeout, &TimeVal::milliseconds(20)).context("set the read timeout")?;
    Ok(fd)
}

fn capture(socket: &OwnedFd, direction: Direction, finished: &AtomicBool) -> Result<Seen> {
    let (mut seen, mut buffer) = (Seen::default(), vec![0; 1 << 17]);
    loop {
        // Before the read that finds no more packets.
        let last = finished.load(Relaxed);
        let (count, address) = match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
            Ok(received) => received,
            Err(Errno::EAGAIN) if last => return Ok(seen),
            Err(Errno::EAGAIN | Errno::EINTR) => continue,
            Err(error) => return Err(error).context("read captured packets"),
        };
        let is_outgoing = address.is_some_and(|address| address.pkttype() == libc::PACKET_OUTGOING);
        if is_outgoing && direction == Direction::Incoming {
            continue;
        }
        let Some((ethernet, packet)) = buffer.get(..count).and_then(|frame| frame.split_at_checked(ETHERNET))
        else {
            continue;
        };
        if !ethernet.ends_with(&IPV4) {
            continue;
        }
        match verify(packet) {
            Ok(kind) => *seen.verified.entry(kind).or_default() += 1,
            Err(error) => {
                seen.bad += 1;
                let start = packet.get(..packet.len().min(60)).unwrap_or_default();
                seen.first.get_or_insert_with(|| format!("{error:#} ({count} bytes): {start:02x?}"));
            }
        }
    }
}
