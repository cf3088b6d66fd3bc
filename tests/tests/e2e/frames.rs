//! Raw frames, sent from a device or captured there.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    libc,
    sys::socket::{
        AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike, bind, recvfrom,
        sendto, socket,
    },
};

/// Bytes from hexadecimal text.
pub(crate) fn from_hex(text: &str) -> Result<Vec<u8>> {
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    text.as_bytes().chunks(2).map(byte).collect::<Option<_>>().context("not hexadecimal")
}

/// The frame with another destination address, given as `02:00:00:00:00:01`.
pub(crate) fn addressed_to(frame: &[u8], mac: &str) -> Result<Vec<u8>> {
    let mac = from_hex(&mac.replace(':', ""))?;
    ensure!(mac.len() == 6 && frame.len() >= 14, "no Ethernet frame or address");
    Ok([&mac, frame.get(6..).unwrap_or_default()].concat())
}

/// Sends frames from a device of the current namespace and returns how many it accepted.
pub(crate) fn send(device: &str, frames: &[Vec<u8>]) -> Result<usize> {
    let address = link(device)?;
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
        .context("open a packet socket")?;
    let mut sent = 0;
    for frame in frames {
        sent += usize::from(sendto(socket.as_raw_fd(), frame, &address, MsgFlags::empty()).is_ok());
    }
    Ok(sent)
}

/// The link-layer address of a device of the current namespace.
fn link(device: &str) -> Result<LinkAddr> {
    let mut interfaces = getifaddrs().context("list network devices")?;
    let found = interfaces.find_map(|interface| {
        let address = interface.address?;
        let is_link = interface.interface_name == device && address.family() == Some(AddressFamily::Packet);
        if is_link { address.as_link_addr().copied() } else { None }
    });
    found.with_context(|| format!("find the device {device}"))
}

/// Captures the IPv4 packets that arrive on the device of a container, those for other stations included.
pub(crate) struct Capture(OwnedFd);

impl Capture {
    /// Starts to capture in the current namespace.
    pub(crate) fn start(device: &str) -> Result<Self> {
        let socket = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::EthAll,
        )
        .context("open a packet socket")?;
        bind(socket.as_raw_fd(), &link(device)?).context("bind a packet socket")?;
        Ok(Self(socket))
    }

    /// The packets that have arrived, without their Ethernet headers, in the order of their arrival.
    pub(crate) fn packets(&self) -> Result<Vec<Vec<u8>>> {
        let (mut packets, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
        loop {
            let (count, address) = match recvfrom::<LinkAddr>(self.0.as_raw_fd(), &mut buffer) {
                Ok(received) => received,
                Err(Errno::EAGAIN) => return Ok(packets),
                Err(error) => return Err(error).context("read captured packets"),
            };
            let is_outgoing = address.is_some_and(|address| address.pkttype() == libc::PACKET_OUTGOING);
            let frame = buffer.get(..count).unwrap_or_default();
            if let Some(packet) =
                frame.get(14..).filter(|_| !is_outgoing && frame.get(12..14) == Some(&[8, 0]))
            {
                packets.push(packet.to_vec());
            }
        }
    }
}
