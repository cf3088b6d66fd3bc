//! Raw frames, sent from a device.

use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use nix::{
    ifaddrs::getifaddrs,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, SockaddrLike, sendto, socket},
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
    let link = |interface: &nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        (interface.interface_name == device && address.family() == Some(AddressFamily::Packet))
            .then_some(address)
    };
    let mut interfaces = getifaddrs().context("list network devices")?;
    let address = interfaces
        .find_map(|interface| link(&interface))
        .with_context(|| format!("find the device {device}"))?;
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
        .context("open a packet socket")?;
    let mut sent = 0;
    for frame in frames {
        sent += usize::from(sendto(socket.as_raw_fd(), frame, &address, MsgFlags::empty()).is_ok());
    }
    Ok(sent)
}
