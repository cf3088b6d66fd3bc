//! Which bytes are a valid inner packet.

use crate::{
    reason::DropReason,
    wire::{Bytes, Ipv4},
};

/// Checks that an IPv4 packet starts at `offset` in `packet` and lies inside the `available` bytes from there. Returns its
/// header, or the reason to drop the packet.
///
/// The caller checks whether bytes follow it: they mean different things in the two directions. The header checksum is not
/// checked here but by the receiving stack: RFC 1624 updates keep a wrong one wrong.
#[inline(always)]
pub fn header<P: Bytes + ?Sized>(packet: &P, offset: usize, available: usize) -> Result<Ipv4, DropReason> {
    let Some(header) = packet.view::<Ipv4>(offset).filter(|_| available >= Ipv4::LEN) else {
        return Err(DropReason::Truncated);
    };
    match header.version() {
        4 => {}
        6 => return Err(DropReason::Ipv6),
        _ => return Err(DropReason::BadVersion),
    }
    if header.header_len() < Ipv4::LEN {
        return Err(DropReason::BadHeaderLength);
    }
    if header.header_len() > available {
        return Err(DropReason::Truncated);
    }
    if header.total_len() < header.header_len() {
        return Err(DropReason::BadTotalLength);
    }
    if header.total_len() > available {
        return Err(DropReason::Truncated);
    }
    Ok(*header)
}
