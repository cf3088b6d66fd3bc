//! Which senders may be told by ICMP that their packet was discarded (RFC 1812 section 4.3.2.7).

use overlay_ebpf::{reason::DropReason, rejection::Rejection};

use crate::raw::Packet;

/// Whether the sender of this packet may be told.
pub(crate) fn may_be_told(packet: Packet<'_>) -> bool {
    let is_host = |address: [u8; 4]| !matches!(address[0], 0 | 127 | 224..);
    let is_query = match packet.protocol() {
        1 => {
            packet.transport().len() >= 2
                && matches!(packet.transport()[0], 0 | 8 | 13 | 14 | 15 | 16 | 17 | 18)
        }
        _ => true,
    };
    packet.fragment_offset() == 0 && is_host(packet.source()) && is_host(packet.destination()) && is_query
}

/// The rejection whose sender was not told.
pub(crate) fn untold(reason: DropReason, mtu: u16) -> Option<Rejection> {
    let all =
        [Rejection::TtlExpired, Rejection::NoRoute, Rejection::PeerUnreachable, Rejection::MtuExceeded(mtu)];
    all.into_iter().find(|rejection| rejection.reason() == reason)
}
