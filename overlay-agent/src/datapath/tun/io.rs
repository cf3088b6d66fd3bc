//! The two threads of the tun rung: device to socket, socket to device.

use std::{
    io::{ErrorKind, IoSliceMut},
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsFd as _, BorrowedFd},
    sync::{Arc, atomic::Ordering},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    cmsg_space,
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        eventfd::EventFd,
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg},
    },
};
use overlay_ebpf::{reason::DropReason, source::Sender};
use tun_rs::{IDEAL_BATCH_SIZE, VIRTIO_NET_HDR_LEN};

use super::{Settings, Shared, Socket, fragment::fragments, partial, shell, shell::Refusal};

/// Longest packet that IPv4 allows; eBPF peers on veth or virtio may send one.
const LONGEST: usize = 65535;

/// Packets moved before looking at the settings.
const BUDGET: usize = 256;

/// How long a packet that was read waits for its socket when the rung stops.
const LAST_WAIT: u16 = 1000;

/// Times the budget that the last packets of a socket may take: its buffer holds about 11000 of them.
const LAST_BUDGETS: usize = 64;

/// Moves packets from the overlay device to peers until the rung stops.
pub(super) fn egress(shared: &Shared) -> Result<()> {
    let mut raw = vec![0u8; VIRTIO_NET_HDR_LEN + LONGEST];
    let mut packets = vec![vec![0u8; LONGEST]; IDEAL_BATCH_SIZE];
    let mut sizes = vec![0usize; IDEAL_BATCH_SIZE];
    let [wake, _] = &shared.wakes;
    while wait(shared, wake, &[shared.device.as_fd()])?.is_some() {
        let settings = shared.settings.load_full();
        for _ in 0..BUDGET {
            // A super-packet comes out as the packets it stands for, with their checksums complete.
            let count = match shared.device.receive(&mut raw, &mut packets, &mut sizes) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.raw_os_error().is_some() => {
                    return Err(error).context("read from the overlay device: was it removed?");
                }
                // This one packet is no valid one.
                Err(_) => {
                    shared.counters.dropped(DropReason::DeviceFailed);
                    continue;
                }
            };
            for (packet, size) in packets.iter_mut().zip(&sizes).take(count) {
                let packet = packet.get_mut(..*size).unwrap_or_default();
                partial::keep_udp_checksum(&raw, packet);
                // The lock of the routes is released before the packet is sent.
                let decided = shell::egress(packet, &settings.config, &*shared.routes());
                match decided {
                    Ok(to) if to.fragment => send_fragments(shared, &settings, packet, to),
                    Ok(to) => send(shared, &settings, packet, to),
                    Err(refusal) => refuse(shared, &settings, packet, refusal),
                }
            }
        }
    }
    Ok(())
}

/// Counts a discarded packet, and tells its sender when it should know.
fn refuse(shared: &Shared, settings: &Settings, packet: &[u8], refusal: Refusal) {
    shared.counters.dropped(refusal.reason());
    match refusal {
        Refusal::Drop(_) => {}
        Refusal::Reject(rejection) => shared.answers.send(packet, settings.own, rejection),
    }
}

fn send_fragments(shared: &Shared, settings: &Settings, packet: &[u8], to: shell::Destination) {
    match fragments(packet, usize::from(to.next_hop.mtu)) {
        Some(fragments) => fragments.iter().for_each(|fragment| send(shared, settings, fragment, to)),
        None => shared.counters.dropped(DropReason::MtuExceeded),
    }
}

fn send(shared: &Shared, settings: &Settings, packet: &[u8], to: shell::Destination) {
    // A device so new that it has no socket yet: no other device may send in its place.
    let reaches = |socket: &&Arc<Socket>| socket.endpoint.ifindex == to.next_hop.ifindex;
    let Some(socket) = settings.sockets.iter().find(reaches) else {
        return shared.counters.dropped(DropReason::SendFailed);
    };
    let peer = Ipv4Addr::from(to.next_hop.peer);
    let address = SockaddrIn::from(SocketAddrV4::new(peer, settings.config.port));
    let tos = [ControlMessage::Ipv4Tos(&to.tos)];
    // Most packets have TOS 0, which is the socket's.
    let control = if to.tos == 0 { &tos[..0] } else { &tos[..] };
    loop {
        let payload = [std::io::IoSlice::new(packet)];
        return match sendmsg(socket.raw(), &payload, control, MsgFlags::empty(), Some(&address)) {
            Ok(_) => shared.counters.sent(packet.len()),
            Err(Errno::EINTR) => continue,
            // The underlay's queue is full: wait as a blocking sender would, unless the settings change.
            Err(Errno::EAGAIN) if is_writable(shared, socket) => continue,
            Err(Errno::EMSGSIZE) => shared.counters.dropped(DropReason::MtuExceeded),
            Err(_) => shared.counters.dropped(DropReason::SendFailed),
        };
    }
}

/// Moves packets from peers to the overlay device until the rung stops.
pub(super) fn ingress(shared: &Shared) -> Result<()> {
    let mut buffer = vec![0u8; VIRTIO_NET_HDR_LEN + LONGEST];
    let mut control = cmsg_space!(libc::c_int);
    let [_, wake] = &shared.wakes;
    let mut settings = shared.settings.load_full();
    loop {
        let sources: Vec<_> = settings.sockets.iter().map(|socket| socket.as_fd()).collect();
        let Some(ready) = wait(shared, wake, &sources)? else { return Ok(()) };
        for (socket, _) in settings.sockets.iter().zip(ready).filter(|(_, ready)| *ready) {
            receive(shared, &settings, socket, &mut buffer, &mut control)?;
        }
        let next = shared.settings.load_full();
        // What waits in a socket that was replaced would be lost with it, and in no counter.
        for socket in settings.sockets.iter().filter(|socket| !next.sockets.contains(socket)) {
            for _ in 0..LAST_BUDGETS {
                if !receive(shared, &next, socket, &mut buffer, &mut control)? {
                    break;
                }
            }
        }
        settings = next;
    }
}

/// Moves the packets that wait in one socket, up to the budget. Returns whether there may be more.
fn receive(
    shared: &Shared,
    settings: &Settings,
    socket: &Socket,
    buffer: &mut [u8],
    control: &mut [u8],
) -> Result<bool> {
    let ifindex = socket.endpoint.ifindex;
    let is_first = settings.sockets.first().is_some_and(|first| first.endpoint.ifindex == ifindex);
    let device = if is_first { 0 } else { ifindex };
    for _ in 0..BUDGET {
        let Some((header, payload)) = buffer.split_at_mut_checked(VIRTIO_NET_HDR_LEN) else {
            bail!("the receive buffer is too short");
        };
        let mut parts = [IoSliceMut::new(payload)];
        let received = recvmsg::<SockaddrIn>(socket.raw(), &mut parts, Some(control), MsgFlags::empty());
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
            Err(Errno::EAGAIN) => return Ok(false),
            // An ICMP error for a datagram sent earlier: those behind it are still there.
            Err(
                Errno::EINTR
                | Errno::ECONNREFUSED
                | Errno::EHOSTUNREACH
                | Errno::ENETUNREACH
                | Errno::EMSGSIZE,
            ) => continue,
            Err(error) => return Err(error).context("receive from the UDP socket"),
        };
        let payload = payload.get_mut(..len).unwrap_or_default();
        // No peer has the address of a datagram without one.
        let address = from.map_or([0; 4], |from| u32::from(from.ip()).to_be_bytes());
        let sender = Sender { address, device };
        let decided = shell::ingress(payload, sender, tos, &settings.config, &*shared.routes());
        if let Err(refusal) = decided {
            refuse(shared, settings, payload, refusal);
            continue;
        }
        header.copy_from_slice(bytemuck::bytes_of(&partial::header(payload, settings.mtu)));
        let whole = buffer.get(..VIRTIO_NET_HDR_LEN + len).unwrap_or_default();
        match shared.device.send(whole) {
            Ok(()) => shared.counters.delivered(len),
            Err(error) => match error.raw_os_error() {
                // What a tun descriptor answers when its device was deleted.
                Some(libc::EBADFD) => {
                    shared.counters.dropped(DropReason::DeviceFailed);
                    return Err(error).context("write to the overlay device: was it removed?");
                }
                // The kernel's tun_get_user counts no packet that it cannot describe to the stack, or that may be written again.
                None | Some(libc::EINVAL | libc::EAGAIN) => shared.counters.dropped(DropReason::DeviceFailed),
                Some(_) => shared.counters.refused_by_device(),
            },
        }
    }
    Ok(true)
}

/// Waits until a source is readable or there are new settings, and returns which sources are; `None` when it is time to stop.
fn wait(shared: &Shared, wake: &EventFd, sources: &[BorrowedFd<'_>]) -> Result<Option<Vec<bool>>> {
    let all = sources.iter().copied().chain([wake.as_fd()]);
    let mut fds: Vec<_> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error).context("wait for packets"),
    }
    let mut ready: Vec<_> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
    if ready.pop() == Some(true) {
        // Resets it; fails only when it is reset already.
        let _ = wake.read();
    }
    Ok((!shared.stop.load(Ordering::Relaxed)).then_some(ready))
}

/// Waits until the egress thread's socket can take another packet; `false` when there are new settings, or when the rung stops and the
/// socket takes none for a while.
fn is_writable(shared: &Shared, socket: &Socket) -> bool {
    let [wake, _] = &shared.wakes;
    if shared.stop.load(Ordering::Relaxed) {
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
        return poll(&mut fds, LAST_WAIT).is_ok_and(|ready| ready > 0);
    }
    let mut fds =
        [PollFd::new(socket.as_fd(), PollFlags::POLLOUT), PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
    let is_ready = poll(&mut fds, PollTimeout::NONE).is_ok();
    is_ready && (!fds[1].any().unwrap_or(false) || shared.stop.load(Ordering::Relaxed))
}
