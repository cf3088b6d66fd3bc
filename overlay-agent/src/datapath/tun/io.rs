//! The two threads of the tun rung: device to socket, socket to device.

use std::{
    io::{ErrorKind, IoSliceMut},
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    sync::atomic::Ordering,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    cmsg_space,
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrIn,
        bind as bind_socket, recvmsg, sendmsg, setsockopt, socket, sockopt,
    },
};
use overlay_ebpf::verdict::DropReason;
use rustix::net::sockopt::Ipv4PathMtuDiscovery;
use tun_rs::{IDEAL_BATCH_SIZE, VIRTIO_NET_HDR_LEN};

use super::{Shared, partial, shell};

/// Longest packet that IPv4 allows; eBPF peers on veth or virtio may send one.
const LONGEST: usize = 65535;

/// Packets moved before looking whether to stop.
const BUDGET: usize = 256;

/// Room for a burst of 1472-byte packets while the thread is not scheduled.
const SOCKET_BUFFER: usize = 4 << 20;

/// Opens the network's UDP socket. It takes datagrams that arrive on `device` only: a container could otherwise send one
/// with a peer's address to the host's, and be taken for that peer.
///
/// # Errors
///
/// When the port is taken or the address is not this host's.
pub fn bind(address: SocketAddrV4, device: &str) -> Result<OwnedFd> {
    let fd = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )
    .context("open a UDP socket")?;
    setsockopt(&fd, sockopt::BindToDevice, &device.into())
        .with_context(|| format!("bind the UDP socket to {device}"))?;
    match bind_socket(fd.as_raw_fd(), &SockaddrIn::from(address)) {
        Ok(()) => {}
        Err(Errno::EADDRINUSE) => {
            bail!(
                "UDP {address} is in use: stop what uses it (flanneld, or another overlay-agent?) or choose another port"
            )
        }
        Err(error) => return Err(error).with_context(|| format!("bind UDP {address}")),
    }
    // The outer header carries the inner one's ECN and DSCP, so it must be known on arrival.
    setsockopt(&fd, sockopt::IpRecvTos, &true).context("ask for the TOS of datagrams")?;
    setsockopt(&fd, sockopt::RcvBufForce, &SOCKET_BUFFER).context("enlarge the socket's receive buffer")?;
    setsockopt(&fd, sockopt::SndBufForce, &SOCKET_BUFFER).context("enlarge the socket's send buffer")?;
    // DF on every outer packet. Unlike IP_PMTUDISC_DO this does not believe ICMP about the path: ports and addresses are
    // known, so anybody could shrink it (the eBPF rungs do not listen to it either).
    rustix::net::sockopt::set_ip_mtu_discover(&fd, Ipv4PathMtuDiscovery::PROBE)
        .context("set DF on datagrams")?;
    Ok(fd)
}

/// Moves packets from the overlay device to peers until told to stop.
pub(super) fn egress(shared: &Shared) -> Result<()> {
    let mut raw = vec![0u8; VIRTIO_NET_HDR_LEN + LONGEST];
    let mut packets = vec![vec![0u8; LONGEST]; IDEAL_BATCH_SIZE];
    let mut sizes = vec![0usize; IDEAL_BATCH_SIZE];
    while wait(shared, shared.device.as_fd())? {
        let routes = shared.routes.load();
        for _ in 0..BUDGET {
            // A super-packet comes out as the packets it stands for, with their checksums complete.
            let count = match shared.device.recv_multiple(&mut raw, &mut packets, &mut sizes, 0) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.raw_os_error().is_some() => {
                    return Err(error).context("read from the overlay device: was it removed?");
                }
                // The library could not make sense of this one packet.
                Err(_) => {
                    shared.counters.dropped(DropReason::DeviceFailed);
                    continue;
                }
            };
            for (packet, size) in packets.iter_mut().zip(&sizes).take(count) {
                let packet = packet.get_mut(..*size).unwrap_or_default();
                match shell::egress(packet, &shared.config, &**routes) {
                    Ok(to) => send(shared, packet, to),
                    Err(reason) => shared.counters.dropped(reason),
                }
            }
        }
    }
    Ok(())
}

fn send(shared: &Shared, packet: &[u8], to: shell::Send) {
    let address = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::from(to.peer), shared.config.port));
    let tos = [ControlMessage::Ipv4Tos(&to.tos)];
    // Most packets have TOS 0, which is the socket's.
    let control = if to.tos == 0 { &tos[..0] } else { &tos[..] };
    loop {
        let payload = [std::io::IoSlice::new(packet)];
        return match sendmsg(shared.socket.as_raw_fd(), &payload, control, MsgFlags::empty(), Some(&address))
        {
            Ok(_) => shared.counters.sent(packet.len()),
            Err(Errno::EINTR) => continue,
            // The underlay's queue is full: let it drain as a blocking sender would, unless it is time to stop.
            Err(Errno::EAGAIN) if writable(shared) => continue,
            Err(Errno::EMSGSIZE) => shared.counters.dropped(DropReason::MtuExceeded),
            Err(_) => shared.counters.dropped(DropReason::SendFailed),
        };
    }
}

/// Moves packets from peers to the overlay device until told to stop.
pub(super) fn ingress(shared: &Shared) -> Result<()> {
    let mut buffer = vec![0u8; VIRTIO_NET_HDR_LEN + LONGEST];
    let mut control = cmsg_space!(libc::c_int);
    while wait(shared, shared.socket.as_fd())? {
        let routes = shared.routes.load();
        for _ in 0..BUDGET {
            let Some((header, payload)) = buffer.split_at_mut_checked(VIRTIO_NET_HDR_LEN) else {
                bail!("the receive buffer is too short");
            };
            let mut parts = [IoSliceMut::new(payload)];
            let received = recvmsg::<SockaddrIn>(
                shared.socket.as_raw_fd(),
                &mut parts,
                Some(&mut control),
                MsgFlags::empty(),
            );
            let (len, from, tos) = match received {
                Ok(message) => {
                    let mut tos = 0;
                    for message in message.cmsgs().into_iter().flatten() {
                        if let ControlMessageOwned::Ipv4Tos(received) = message {
                            tos = received;
                        }
                    }
                    (message.bytes, message.address, tos)
                }
                Err(Errno::EAGAIN) => break,
                // An ICMP error for something sent earlier: the datagrams behind it are still there.
                Err(
                    Errno::EINTR
                    | Errno::ECONNREFUSED
                    | Errno::EHOSTUNREACH
                    | Errno::ENETUNREACH
                    | Errno::EMSGSIZE,
                ) => continue,
                Err(error) => return Err(error).context("receive from the UDP socket"),
            };
            let (Some(from), Some(payload)) = (from, payload.get_mut(..len)) else {
                continue;
            };
            let from = u32::from(from.ip()).to_be_bytes();
            if let Err(reason) = shell::ingress(payload, from, tos, &shared.config, &**routes) {
                shared.counters.dropped(reason);
                continue;
            }
            header.copy_from_slice(bytemuck::bytes_of(&partial::header(
                payload,
                shared.mtu.load(Ordering::Relaxed),
            )));
            let whole = buffer.get(..VIRTIO_NET_HDR_LEN + len).unwrap_or_default();
            match shared.device.send(whole) {
                Ok(_) => shared.counters.delivered(len),
                Err(error) if device_is_gone(&error) => {
                    return Err(error).context("write to the overlay device: was it removed?");
                }
                Err(_) => shared.counters.dropped(DropReason::DeviceFailed),
            }
        }
    }
    Ok(())
}

/// `EBADFD`: what a tun descriptor answers when its device was deleted.
fn device_is_gone(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADFD)
}

/// Waits until `source` is readable; `false` when it is time to stop.
fn wait(shared: &Shared, source: BorrowedFd<'_>) -> Result<bool> {
    let mut fds =
        [PollFd::new(source, PollFlags::POLLIN), PollFd::new(shared.stop.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error).context("wait for packets"),
    }
    Ok(!fds[1].any().unwrap_or(false))
}

/// Waits until the socket can take another packet; `false` when it is time to stop.
fn writable(shared: &Shared) -> bool {
    let mut fds = [
        PollFd::new(shared.socket.as_fd(), PollFlags::POLLOUT),
        PollFd::new(shared.stop.as_fd(), PollFlags::POLLIN),
    ];
    let ready = poll(&mut fds, PollTimeout::NONE);
    ready.is_ok() && !fds[1].any().unwrap_or(false)
}
