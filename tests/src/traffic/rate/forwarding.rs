//! Forwarding capacity: small packets that a packet socket puts on a container's device, counted where they arrive.
//!
//! The sender builds one frame and sends it again and again, past the container's own IP stack and queue. It is one flow. What is
//! done by the kernel alone is done in the sender's system call: the path and the sender share one CPU, nothing is lost, and the
//! rate has the sender's part in it, which [`sender_alone`] tells. With receive packet steering to another CPU, the interrupts
//! between the CPUs halve the rate on a virtual machine. At the other end a socket with a full buffer drops the packets, which is
//! the cheapest end that sends no ICMP errors.

use std::{
    fs,
    io::IoSlice,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    libc, setsockopt_impl,
    sys::socket::{
        AddressFamily, LinkAddr, MsgFlags, MultiHeaders, SockFlag, SockType, SockaddrLike, bind, sendmmsg,
        setsockopt, socket,
        sockopt::{RcvBuf, SetBool, SndBuf},
    },
};

use super::{cpu::busy_seconds, datagrams::SMALL};
use crate::{
    topology::{Endpoint, UPLINK},
    traffic::checksum::sum,
};

/// Frames of one system call.
const BATCH: usize = 64;
/// Bytes of the sender's buffer.
const SEND_BUFFER: usize = 1 << 20;
/// The path is empty when no packet has arrived for so long.
const QUIET: Duration = Duration::from_millis(50);
/// Longest time until the path is empty.
const DRAIN: Duration = Duration::from_secs(5);
/// A hardware address that no device here has.
const NO_HOST: [u8; 6] = [2, 0, 0, 0, 0, 0];
/// How long the hardware address of the next hop may take.
const RESOLVE: Duration = Duration::from_secs(3);

/// Send past the queueing discipline of the device, see packet(7).
#[derive(Clone, Copy, Debug)]
struct PacketQdiscBypass;

setsockopt_impl!(PacketQdiscBypass, libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, bool, SetBool);

/// What a path forwarded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Forwarded {
    /// Frames that the sender's device took.
    pub sent: u64,
    /// Packets that the receiver's device counted.
    pub received: u64,
    /// Seconds of sending.
    pub seconds: f64,
    /// CPU time of the whole machine, the sender's included, until the path was empty, in seconds.
    pub cpu_seconds: f64,
}

impl Forwarded {
    /// Packets received per second.
    pub fn rate(&self) -> f64 {
        self.received as f64 / self.seconds
    }

    /// Whether the path took all that was sent, up to 1%: then the sender, or the CPU that it shares with the path, was the limit.
    pub fn is_without_loss(&self) -> bool {
        self.received as f64 >= self.sent as f64 * 0.99
    }
}

/// Sends frames with 64 bytes of UDP payload from the device of a container for `duration`, and counts the packets at the device
/// of another.
///
/// # Errors
///
/// When the frames cannot be built or sent, or none arrives.
pub fn forwarding(from: Endpoint<'_>, to: Endpoint<'_>, duration: Duration) -> Result<Forwarded> {
    let receiver = to.netns.run(|| UdpSocket::bind((to.address, 0)))?.context("bind the receiver")?;
    // The kernel raises it to its minimum.
    setsockopt(&receiver, RcvBuf, &1).context("shrink the receive buffer")?;
    let target = receiver.local_addr().context("read the receiver's port")?;
    let (source, hop) = from.netns.run(|| -> Result<_> {
        let source = UdpSocket::bind((from.address, 0)).context("bind the sender")?;
        let hop = resolve(&source, target)?;
        Ok((source, hop))
    })??;
    let port = source.local_addr().context("read the sender's port")?.port();
    let (socket, own) =
        from.netns.run(open)?.with_context(|| format!("open {UPLINK} of {}", from.netns.name()))?;
    let frame = frame(hop, own, (from.address, port), (to.address, target.port()));

    // Every part of the path sees the flow before it is measured.
    send(&socket, &frame, duration / 5)?;
    let before = drain(to)?;
    let busy = busy_seconds()?;
    let start = Instant::now();
    let sent = send(&socket, &frame, duration)?;
    let seconds = start.elapsed().as_secs_f64();
    let received = drain(to)?.saturating_sub(before);
    let cpu_seconds = busy_seconds()? - busy;
    ensure!(received > 0, "none of {sent} packets arrived at {target}");
    Ok(Forwarded { sent, received, seconds, cpu_seconds })
}

/// Frames per second that the sender alone reaches: the host drops them as they arrive, because they are addressed to another.
///
/// # Errors
///
/// When the frames cannot be sent.
pub fn sender_alone(from: Endpoint<'_>, duration: Duration) -> Result<f64> {
    let (socket, own) =
        from.netns.run(open)?.with_context(|| format!("open {UPLINK} of {}", from.netns.name()))?;
    let frame = frame(NO_HOST, own, (from.address, 9), (from.address, 9));
    let start = Instant::now();
    Ok(send(&socket, &frame, duration)? as f64 / start.elapsed().as_secs_f64())
}

/// The hardware address to which the socket's packets to `target` go. Sends one, so that the kernel looks it up.
fn resolve(socket: &UdpSocket, target: SocketAddr) -> Result<[u8; 6]> {
    let deadline = Instant::now() + RESOLVE;
    loop {
        socket.send_to(&[0], target).with_context(|| format!("send to {target}"))?;
        let table = fs::read_to_string("/proc/thread-self/net/arp").context("read the neighbour table")?;
        if let Some(address) = neighbour(&table, UPLINK) {
            return Ok(address);
        }
        ensure!(Instant::now() < deadline, "the next hop towards {target} has no hardware address");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The address of the only neighbour at a device that is complete: flag 2 of `/proc/net/arp`.
fn neighbour(table: &str, device: &str) -> Option<[u8; 6]> {
    table.lines().skip(1).find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, _, flags, address, _, name] = words.as_slice() else { return None };
        let flags = u32::from_str_radix(flags.strip_prefix("0x")?, 16).ok()?;
        let bytes: Option<Vec<u8>> =
            address.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
        (flags & 2 != 0 && *name == device).then_some(bytes?.try_into().ok()?)
    })
}

/// A packet socket at the device of the current namespace, which receives nothing, and the device's hardware address.
fn open() -> Result<(OwnedFd, [u8; 6])> {
    let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
        .context("open a packet socket")?;
    let address = getifaddrs().context("list network devices")?.find_map(|interface| {
        let address = interface.address?;
        let is_link = address.family() == Some(AddressFamily::Packet) && interface.interface_name == UPLINK;
        is_link.then_some(address)
    });
    let address = address.context("find the device")?;
    bind(fd.as_raw_fd(), &address).context("bind to the device")?;
    setsockopt(&fd, PacketQdiscBypass, &true).context("set PACKET_QDISC_BYPASS")?;
    setsockopt(&fd, SndBuf, &SEND_BUFFER).context("enlarge the send buffer")?;
    let own = address.as_link_addr().and_then(LinkAddr::addr).context("read the device's address")?;
    Ok((fd, own))
}

/// An Ethernet frame with a UDP datagram of 64 bytes of payload, with both checksums.
fn frame(hop: [u8; 6], own: [u8; 6], from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Vec<u8> {
    const UDP_LEN: u16 = 8 + SMALL as u16;
    let (total_len, udp_len) = ((20 + UDP_LEN).to_be_bytes(), UDP_LEN.to_be_bytes());
    let addresses = [from.0.octets(), to.0.octets()].concat();
    // Version and length, TOS, total length; identification, DF; TTL 64, UDP, checksum.
    let start = [&[0x45, 0], total_len.as_slice(), &[0, 0, 0x40, 0, 64, 17]].concat();
    let header_sum = !sum([start.as_slice(), &addresses]);
    let payload = [0; SMALL];
    let ports = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    let pseudo = [addresses.as_slice(), &[0, 17], &udp_len].concat();
    let udp_sum = match !sum([pseudo.as_slice(), &ports, &udp_len, &[0, 0], &payload]) {
        0 => 0xffff,
        other => other,
    };
    [
        hop.as_slice(),
        &own,
        &[8, 0],
        &start,
        &header_sum.to_be_bytes(),
        &addresses,
        &ports,
        &udp_len,
        &udp_sum.to_be_bytes(),
        &payload,
    ]
    .concat()
}

/// Sends the frame again and again for `duration`; returns how many times the device took it.
fn send(socket: &OwnedFd, frame: &[u8], duration: Duration) -> Result<u64> {
    let mut headers = MultiHeaders::<LinkAddr>::preallocate(BATCH, None);
    let slices = [[IoSlice::new(frame)]; BATCH];
    let (start, mut sent) = (Instant::now(), 0);
    while start.elapsed() < duration {
        let addresses = [None; BATCH];
        match sendmmsg(socket.as_raw_fd(), &mut headers, &slices, addresses, [], MsgFlags::empty()) {
            Ok(results) => sent += results.count() as u64,
            // The device's queue is full, and the frame is lost.
            Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::EINTR) => {}
            Err(error) => bail!("send frames: {error}"),
        }
    }
    Ok(sent)
}

/// Waits until no packets arrive any more, and returns how many the container's device has received since it exists.
fn drain(to: Endpoint<'_>) -> Result<u64> {
    let deadline = Instant::now() + DRAIN;
    to.netns.run(|| {
        let mut count = received()?;
        loop {
            thread::sleep(QUIET);
            let now = received()?;
            if now == count {
                return Ok(now);
            }
            ensure!(Instant::now() < deadline, "packets still arrive {DRAIN:?} after the last one was sent");
            count = now;
        }
    })?
}

fn received() -> Result<u64> {
    let text = fs::read_to_string("/proc/thread-self/net/dev").context("read the statistics of devices")?;
    rx_packets(&text, UPLINK).with_context(|| format!("find the received packets of {UPLINK}"))
}

/// Received packets of a device in `/proc/net/dev`: `name: bytes packets ...`.
fn rx_packets(text: &str, device: &str) -> Option<u64> {
    let (_, numbers) =
        text.lines().filter_map(|line| line.split_once(':')).find(|(name, _)| name.trim() == device)?;
    numbers.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traffic::checksum::{Verified, verify};

    #[test]
    fn the_frame_is_a_valid_datagram() {
        let (from, to) = (Ipv4Addr::new(10, 244, 1, 2), Ipv4Addr::new(10, 244, 2, 2));
        for port in [1, 5000, 0xffff] {
            let frame = frame([1; 6], [2; 6], (from, port), (to, 8));
            assert_eq!(frame.len(), 14 + 20 + 8 + SMALL);
            assert_eq!(verify(&frame[14..]).unwrap(), Verified::Udp);
        }
    }

    #[test]
    fn the_complete_neighbour_is_found() {
        let table = "IP address       HW type     Flags       HW address            Mask     Device\n\
            10.244.1.9       0x1         0x0         00:00:00:00:00:00     *        eth0\n\
            10.244.1.7       0x1         0x2         02:00:00:00:00:07     *        eth1\n\
            10.244.1.1       0x1         0x2         02:00:00:00:0a:ff     *        eth0\n";
        assert_eq!(neighbour(table, "eth0"), Some([2, 0, 0, 0, 10, 255]));
        assert_eq!(neighbour(table, "eth2"), None);
    }

    #[test]
    fn received_packets_are_the_second_number() {
        let text = "Inter-|   Receive |  Transmit\n face |bytes    packets errs\n    lo:  1 2 3\n  eth0: 100 77 0 0\n";
        assert_eq!(rx_packets(text, "eth0"), Some(77));
        assert_eq!(rx_packets(text, "eth"), None);
    }

    #[test]
    fn one_percent_is_no_loss() {
        let forwarded = Forwarded { sent: 1000, received: 990, seconds: 1.0, cpu_seconds: 1.0 };
        assert!(forwarded.is_without_loss());
        assert!(!Forwarded { received: 989, ..forwarded }.is_without_loss());
    }
}
