//! Descriptors that an earlier agent left open: of the overlay device's queue and of the UDP sockets. What arrived meanwhile waits in them.

use std::{
    fs,
    net::SocketAddrV4,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
};

use nix::sys::socket::{SockType, SockaddrIn, getsockname, getsockopt, sockopt};
use tracing::{info, warn};

use super::tun::{Endpoint, Queue, device_of};
use crate::netlink::device_name;

/// Descriptors with the names under which they were kept, for messages. What a descriptor is, the kernel says.
#[derive(Debug, Default)]
pub(crate) struct Inherited(Vec<(String, OwnedFd)>);

/// A descriptor that the next agent can take over.
#[derive(Debug)]
pub(crate) struct Descriptor<'a> {
    /// The same for the same purpose; without colons.
    pub(crate) name: String,
    /// Differs from that of every other descriptor of this name.
    pub(crate) id: u64,
    pub(crate) fd: BorrowedFd<'a>,
}

impl<'a> Descriptor<'a> {
    /// That of a device's queue.
    pub(super) fn of_queue(device: &str, queue: &'a Queue) -> Self {
        // The names of systemd's descriptors must not have colons (sd_notify(3)), nor have devices.
        Self { name: format!("tun-{device}"), id: queue.id(), fd: queue.as_fd() }
    }

    /// That of a UDP socket with this inode.
    pub(super) fn of_socket(Endpoint { address, ifindex }: Endpoint, inode: u64, fd: BorrowedFd<'a>) -> Self {
        let (ip, port) = (address.ip(), address.port());
        Self { name: format!("udp-{ip}-{port}-{ifindex}"), id: inode, fd }
    }
}

impl Inherited {
    /// Descriptors with their names.
    pub(crate) fn new(descriptors: Vec<(String, OwnedFd)>) -> Self {
        Self(descriptors)
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The descriptors, to be passed on.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
        self.0.iter().map(|(name, fd)| (name.as_str(), fd.as_fd()))
    }

    /// Takes the queue of the tun device with this name.
    pub(super) fn take_queue(&mut self, device: &str) -> Option<Queue> {
        let fd = self.take(|fd| device_of(fd).as_deref() == Some(device))?;
        Queue::new(fd)
            .inspect_err(|error| warn!("the queue of {device} that was kept is not usable: {error}"))
            .ok()
    }

    /// Takes the UDP socket that is bound to this address and device.
    pub(super) fn take_socket(&mut self, endpoint: Endpoint) -> Option<OwnedFd> {
        let device = device_name(endpoint.ifindex).ok()?;
        self.take(|fd| is_bound(fd, endpoint.address, &device))
    }

    fn take(&mut self, is_it: impl Fn(BorrowedFd<'_>) -> bool) -> Option<OwnedFd> {
        let index = self.0.iter().position(|(_, fd)| is_it(fd.as_fd()))?;
        let (name, fd) = self.0.swap_remove(index);
        info!("took over {name}: {}", describe(fd.as_fd()));
        Some(fd)
    }

    /// Closes the others, which are not what this agent needs.
    pub(super) fn discard(&mut self) {
        for (name, fd) in self.0.drain(..) {
            warn!("the descriptor {name} is not taken over: it is {}", describe(fd.as_fd()));
        }
    }
}

fn is_bound(fd: BorrowedFd<'_>, address: SocketAddrV4, device: &str) -> bool {
    let socket = getsockname::<SockaddrIn>(fd.as_raw_fd()).map(SocketAddrV4::from);
    socket == Ok(address)
        && getsockopt(&fd, sockopt::SockType) == Ok(SockType::Datagram)
        && getsockopt(&fd, sockopt::BindToDevice).is_ok_and(|bound| bound == *device)
}

/// What a descriptor is, for messages.
fn describe(fd: BorrowedFd<'_>) -> String {
    if let Some(device) = device_of(fd) {
        return format!("the queue of the tun device {device}");
    }
    if let Ok(address) = getsockname::<SockaddrIn>(fd.as_raw_fd()).map(SocketAddrV4::from) {
        let device = getsockopt(&fd, sockopt::BindToDevice).unwrap_or_default();
        return match device.is_empty() {
            true => format!("a socket bound to {address}"),
            false => format!("a socket bound to {address} on {}", device.display()),
        };
    }
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    link.map_or_else(|_| "unknown".to_owned(), |path| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn only_a_socket_that_is_bound_as_expected_is_taken() {
        let on_loopback = |socket: UdpSocket| {
            nix::sys::socket::setsockopt(&socket, sockopt::BindToDevice, &"lo".into()).unwrap();
            socket
        };
        let [bound, other, unbound] = [(); 3].map(|()| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
        let address = |socket: &UdpSocket| match socket.local_addr().unwrap() {
            std::net::SocketAddr::V4(address) => address,
            std::net::SocketAddr::V6(address) => panic!("{address}"),
        };
        let [wanted, others, unbounds] = [&bound, &other, &unbound].map(address);
        let (bound, other) = (on_loopback(bound), on_loopback(other));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, unbounds.port())).unwrap();
        let file = fs::File::open("/proc/self/exe").unwrap();
        let fds: Vec<OwnedFd> =
            vec![listener.into(), file.into(), unbound.into(), other.into(), bound.into()];
        let mut inherited = Inherited::new(fds.into_iter().map(|fd| ("udp-x".to_owned(), fd)).collect());
        // Index 1 is the loopback device in every network namespace.
        let endpoint = |address| Endpoint { address, ifindex: 1 };
        assert!(inherited.take_queue("ovl0").is_none());
        assert!(inherited.take_socket(endpoint(unbounds)).is_none(), "bound to no device, or of TCP");
        assert!(inherited.take_socket(endpoint(wanted)).is_some());
        assert!(inherited.take_socket(endpoint(wanted)).is_none(), "it is taken once");
        let mut texts: Vec<_> = inherited.descriptors().map(|(_, fd)| describe(fd)).collect();
        texts.sort();
        assert!(texts[0].starts_with('/'), "{texts:?}");
        assert!(texts.contains(&format!("a socket bound to {others} on lo")), "{texts:?}");
        inherited.discard();
        assert!(inherited.is_empty());
    }
}
