//! The network's UDP socket on one underlay device.

use std::{
    net::SocketAddrV4,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, SockFlag, SockType, SockaddrIn, bind as bind_socket, setsockopt, socket, sockopt,
        },
        stat::fstat,
    },
};
use rustix::net::sockopt::Ipv4PathMtuDiscovery;
use tracing::warn;

use crate::{
    datapath::{inherited::Descriptor, losses::SocketLosses},
    netlink::device_name,
};

/// Room for a burst of 1472-byte packets while the thread is not scheduled.
const SEND_BUFFER: usize = 4 << 20;

/// Room for what arrives in a second while one agent takes over from another: 20,000 packets, of which each takes up to 2304 bytes of
/// the kernel's memory. The kernel doubles the number (socket(7)).
const RECEIVE_BUFFER: usize = 24 << 20;

/// The UDP sockets of this thread's network namespace, with their lost datagrams in the last column (kernel doc
/// Documentation/networking/proc_net_tcp.rst has the others).
const UDP_SOCKETS: &str = "/proc/thread-self/net/udp";
/// Columns in front of the socket's inode.
const INODE_COLUMN: usize = 9;

/// What a socket is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) address: SocketAddrV4,
    /// Index of the device whose datagrams it takes.
    pub(crate) ifindex: u32,
}

/// A bound socket. Sockets are equal that are bound to the same endpoint.
#[derive(Debug)]
pub(crate) struct Socket {
    pub(crate) endpoint: Endpoint,
    fd: OwnedFd,
    inode: u64,
    /// What the kernel has dropped and `losses` has.
    counted: AtomicU32,
    losses: Arc<SocketLosses>,
}

/// Counts what the kernel has dropped until now, at last.
impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(error) = self.count_losses() {
            warn!("{error:#}");
        }
    }
}

impl PartialEq for Socket {
    fn eq(&self, other: &Self) -> bool {
        self.endpoint == other.endpoint
    }
}

impl Eq for Socket {}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Socket {
    pub(super) fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Opens the network's UDP socket. It takes datagrams that arrive on its device only: otherwise a container could send
    /// one with a peer's address to the host's, and be taken for that peer. Sockets of several devices, also of a device and
    /// its predecessor, may have one address.
    pub(crate) fn bind(endpoint: Endpoint, losses: Arc<SocketLosses>) -> Result<Self> {
        let Endpoint { address, ifindex } = endpoint;
        let device = device_name(ifindex)?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Inet, SockType::Datagram, flags, None).context("open a UDP socket")?;
        setsockopt(&fd, sockopt::BindToDevice, &device.as_str().into()).with_context(|| {
            format!("bind the UDP socket to {device} (kernels before 5.7 need CAP_NET_RAW)")
        })?;
        match bind_socket(fd.as_raw_fd(), &SockaddrIn::from(address)) {
            Err(Errno::EADDRINUSE) => bail!(
                "UDP {address} is in use: stop what uses it (flanneld, or another overlay-agent?) or choose another port"
            ),
            bound => bound.with_context(|| format!("bind UDP {address}"))?,
        }
        Self::prepare(fd, endpoint, losses, 0)
    }

    /// Takes over a socket that an earlier agent has bound to `endpoint`. What it has lost before does not count.
    pub(crate) fn adopt(fd: OwnedFd, endpoint: Endpoint, losses: Arc<SocketLosses>) -> Result<Self> {
        let inode = fstat(&fd).context("identify the UDP socket")?.st_ino;
        let lost = std::fs::read_to_string(UDP_SOCKETS).ok().and_then(|table| dropped(&table, inode));
        Self::prepare(fd, endpoint, losses, lost.context("the UDP socket is of another network namespace")?)
    }

    fn prepare(fd: OwnedFd, endpoint: Endpoint, losses: Arc<SocketLosses>, counted: u32) -> Result<Self> {
        // The outer header carries the inner one's ECN and DSCP, so it must be known on arrival.
        setsockopt(&fd, sockopt::IpRecvTos, &true).context("ask for the TOS of datagrams")?;
        setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER)
            .context("enlarge the socket's receive buffer")?;
        setsockopt(&fd, sockopt::SndBufForce, &SEND_BUFFER).context("enlarge the socket's send buffer")?;
        // DF on every outer packet. Unlike IP_PMTUDISC_DO this does not believe ICMP about the path: ports and addresses are
        // known, so any host could shrink it. The agent checks such messages, and says how long inner packets may be.
        rustix::net::sockopt::set_ip_mtu_discover(&fd, Ipv4PathMtuDiscovery::PROBE)
            .context("set DF on datagrams")?;
        let inode = fstat(&fd).context("identify the UDP socket")?.st_ino;
        Ok(Self { endpoint, fd, inode, counted: AtomicU32::new(counted), losses })
    }

    /// For the next agent.
    pub(crate) fn descriptor(&self) -> Descriptor<'_> {
        Descriptor::of_socket(self.endpoint, self.inode, self.as_fd())
    }

    /// Adds what the kernel has dropped since the last call to the losses. Fails when the kernel does not list the socket.
    pub(crate) fn count_losses(&self) -> Result<()> {
        let table = std::fs::read_to_string(UDP_SOCKETS).with_context(|| format!("read {UDP_SOCKETS}"))?;
        let dropped = dropped(&table, self.inode)
            .with_context(|| format!("{UDP_SOCKETS} lacks the socket {}", self.endpoint.address))?;
        self.losses.add(dropped.wrapping_sub(self.counted.swap(dropped, Relaxed)));
        Ok(())
    }
}

/// The kernel's count of the datagrams that a socket has lost, in the table of all UDP sockets. It wraps.
fn dropped(table: &str, inode: u64) -> Option<u32> {
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let is_it = fields.nth(INODE_COLUMN)?.parse() == Ok(inode);
        fields.next_back().filter(|_| is_it)?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drops_of_a_socket_are_found_by_its_inode() {
        // Linux 6.18.
        let table = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
  332: 014DA8C0:205D 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 19542 2 00000000c9dd82f2 4294967295
 2134: 3500007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000   991        0 8285 2 00000000d32c0ae5 7";
        assert_eq!(dropped(table, 19542), Some(u32::MAX));
        assert_eq!(dropped(table, 8285), Some(7));
        assert_eq!(dropped(table, 0), None);
    }
}
