//! Raw ICMP sockets. They need CAP_NET_RAW; without it, nothing is sent and nothing is heard.

use std::{
    io::IoSliceMut,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    cmsg_space, libc, setsockopt_impl, sockopt_impl,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType,
        SockaddrIn, recvmsg, sendmsg, setsockopt, socket, sockopt,
    },
};
use overlay_ebpf::{
    rejection::Rejection,
    wire::{Bytes as _, Ipv4},
};
use tokio::{io::Interest, net::UdpSocket, sync::mpsc, time::sleep};
use tracing::warn;

use super::{Report, error_message::error_message, limiter::Limiter};

/// TOS of ICMP errors: precedence Internetwork Control (RFC 1812 section 4.3.2.5).
const INTERNETWORK_CONTROL: i32 = 0xc0;
/// Longest message that is looked at, in bytes.
const LONGEST: usize = 2048;
/// Shortest time between two reports.
const INTERVAL: Duration = Duration::from_millis(5);
/// Reports that wait for the agent. More are lost, as packets are.
const WAITING: usize = 64;

/// `ICMP_FILTER` (linux/icmp.h): a mask of the types that a raw socket does not take.
const ICMP_FILTER: libc::c_int = 1;
/// All types but Destination Unreachable.
const ONLY_UNREACHABLE: u32 = !(1 << 3);

sockopt_impl!(
    /// The types of messages that a raw ICMP socket does not take.
    IcmpFilter,
    SetOnly,
    libc::SOL_RAW,
    ICMP_FILTER,
    u32
);

/// Tells senders why their packets are rejected.
#[derive(Debug)]
pub(crate) struct Answers {
    socket: Option<OwnedFd>,
    limiters: Mutex<Limiters>,
}

/// Containers that forge sources may exhaust the limiter of other messages, not that of those without which TCP hangs.
#[derive(Debug, Default)]
struct Limiters {
    path_mtu: Limiter,
    others: Limiter,
}

impl Answers {
    /// Opens the socket. Without the right to, no sender is told.
    pub(crate) fn open() -> Self {
        let socket = open().and_then(|socket| {
            setsockopt(&socket, sockopt::Ipv4Tos, &INTERNETWORK_CONTROL).context("set the TOS of ICMP")?;
            // It only sends: no type below 32 is taken, and there is hardly another.
            setsockopt(&socket, IcmpFilter, &u32::MAX).context("filter ICMP")?;
            Ok(socket)
        });
        let socket = socket.inspect_err(|error| warn!("no ICMP errors are sent to containers: {error:#}"));
        Self { socket: socket.ok(), limiters: Mutex::default() }
    }

    /// Tells the sender of `packet`, from the address `own`, unless it must not be told or was told often just now.
    pub(crate) fn send(&self, packet: &[u8], own: Ipv4Addr, rejection: Rejection) {
        let (Some(socket), Some(header)) = (&self.socket, packet.view::<Ipv4>(0)) else { return };
        let receiver = Ipv4Addr::from(header.source());
        let Some(message) = error_message(packet, rejection) else { return };
        let mut limiters = self.limiters.lock().unwrap_or_else(PoisonError::into_inner);
        let Limiters { path_mtu, others } = &mut *limiters;
        let limiter = match rejection {
            Rejection::MtuExceeded(_) => path_mtu,
            Rejection::TtlExpired | Rejection::NoRoute | Rejection::PeerUnreachable => others,
        };
        if !limiter.may_send(receiver, rejection.reason(), Instant::now()) {
            return;
        }
        drop(limiters);
        let info = libc::in_pktinfo {
            ipi_ifindex: 0,
            ipi_spec_dst: libc::in_addr { s_addr: u32::from(own).to_be() },
            ipi_addr: libc::in_addr { s_addr: 0 },
        };
        let to = SockaddrIn::from(SocketAddrV4::new(receiver, 0));
        let (parts, control) = ([std::io::IoSlice::new(&message)], [ControlMessage::Ipv4PacketInfo(&info)]);
        // As with any router, an error message may be lost.
        let _ = sendmsg(socket.as_raw_fd(), &parts, &control, MsgFlags::MSG_DONTWAIT, Some(&to));
    }
}

/// Hears what ICMP says about outer packets, in a task that ends when the receiver is dropped. Fails without CAP_NET_RAW.
pub(crate) fn listen() -> Result<mpsc::Receiver<Report>> {
    let socket = open()?;
    setsockopt(&socket, IcmpFilter, &ONLY_UNREACHABLE).context("filter ICMP")?;
    setsockopt(&socket, sockopt::Ipv4PacketInfo, &true).context("ask for the device of ICMP")?;
    // Of what tokio offers, this fits: it receives datagrams, of whatever protocol.
    let socket = UdpSocket::from_std(socket.into()).context("wait for ICMP")?;
    let (sender, receiver) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        let mut buffer = vec![0; LONGEST];
        loop {
            tokio::select! {
                readable = socket.readable() => if readable.is_err() { return },
                () = sender.closed() => return,
            }
            let received = socket.try_io(Interest::READABLE, || receive(&socket, &mut buffer));
            let Ok((length, ifindex)) = received else { continue };
            if let Some(report) = buffer.get(..length).and_then(|message| Report::parse(message, ifindex)) {
                let _ = sender.try_send(report);
                // Messages that come faster wait in the socket, and are lost when it is full.
                sleep(INTERVAL).await;
            }
        }
    });
    Ok(receiver)
}

/// Receives one message. Returns its length and the device on which it arrived.
fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> std::io::Result<(usize, u32)> {
    let mut control = cmsg_space!(libc::in_pktinfo);
    let mut parts = [IoSliceMut::new(buffer)];
    let message =
        recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_DONTWAIT)?;
    let mut ifindex = 0;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::Ipv4PacketInfo(info) = control {
            ifindex = info.ipi_ifindex.cast_unsigned();
        }
    }
    Ok((message.bytes, ifindex))
}

fn open() -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Inet, SockType::Raw, flags, SockProtocol::Icmp)
        .context("open a raw ICMP socket (it needs CAP_NET_RAW)")
}
