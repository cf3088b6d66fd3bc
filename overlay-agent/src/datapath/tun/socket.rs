//! The network's UDP socket on one underlay device.

use std::{
    net::SocketAddrV4,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrIn, bind as bind_socket, setsockopt, socket, sockopt,
    },
};
use rustix::net::sockopt::Ipv4PathMtuDiscovery;

use crate::netlink::device_name;

/// Room for a burst of 1472-byte packets while the thread is not scheduled.
const SOCKET_BUFFER: usize = 4 << 20;

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
    pub(crate) fn bind(endpoint: Endpoint) -> Result<Self> {
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
        // The outer header carries the inner one's ECN and DSCP, so it must be known on arrival.
        setsockopt(&fd, sockopt::IpRecvTos, &true).context("ask for the TOS of datagrams")?;
        setsockopt(&fd, sockopt::RcvBufForce, &SOCKET_BUFFER)
            .context("enlarge the socket's receive buffer")?;
        setsockopt(&fd, sockopt::SndBufForce, &SOCKET_BUFFER).context("enlarge the socket's send buffer")?;
        // DF on every outer packet. Unlike IP_PMTUDISC_DO this does not believe ICMP about the path: ports and addresses are
        // known, so any host could shrink it (the eBPF rungs do not listen to it either).
        rustix::net::sockopt::set_ip_mtu_discover(&fd, Ipv4PathMtuDiscovery::PROBE)
            .context("set DF on datagrams")?;
        Ok(Self { endpoint, fd })
    }
}
