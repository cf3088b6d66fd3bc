//! Packets that are discarded in a way that their sender should know, as a router says it by ICMP (RFC 1812 section 4.3).

use crate::{
    reason::DropReason,
    wire::{Bytes, Ipv4, ipv4::PROTOCOL_ICMP},
};

/// Why a packet is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// Its TTL is used up: ICMP Time Exceeded.
    TtlExpired,
    /// No peer holds a lease for its destination: ICMP Network Unreachable.
    NoRoute,
    /// There is no way to the peer: ICMP Host Unreachable.
    PeerUnreachable,
    /// It is longer than this number of bytes, which is what the path carries, and must not be fragmented: ICMP Fragmentation
    /// Needed.
    MtuExceeded(u16),
}

impl Rejection {
    /// Number of kinds.
    pub const KINDS: u32 = 4;

    /// The kind, less than [`Self::KINDS`].
    #[inline(always)]
    pub fn kind(self) -> u32 {
        match self {
            Self::TtlExpired => 0,
            Self::NoRoute => 1,
            Self::PeerUnreachable => 2,
            Self::MtuExceeded(_) => 3,
        }
    }

    /// The reason under which the packet is counted.
    #[inline(always)]
    pub fn reason(self) -> DropReason {
        match self {
            Self::TtlExpired => DropReason::TtlExpired,
            Self::NoRoute => DropReason::NoRoute,
            Self::PeerUnreachable => DropReason::PeerUnreachable,
            Self::MtuExceeded(_) => DropReason::MtuExceeded,
        }
    }
}

/// Whether the sender of the packet at `offset` may be told by ICMP: never about an ICMP error or a message of unknown type, about
/// a fragment other than the first, about a broadcast or multicast, or when the source is no single host (RFC 1812 section
/// 4.3.2.7). What `packet` does not show counts as an error.
#[inline(always)]
pub fn may_answer<P: Bytes + ?Sized>(packet: &P, offset: usize, header: &Ipv4) -> bool {
    if header.is_later_fragment() || !is_unicast(header.source()) || !is_unicast(header.destination()) {
        return false;
    }
    if header.protocol() != PROTOCOL_ICMP {
        return true;
    }
    // Two bytes, type and code: the verifier does not follow a comparison for one.
    let message = packet.view::<[u8; 2]>(offset + header.header_len());
    message.is_some_and(|[kind, _]| is_query(*kind))
}

/// Whether an address is neither unspecified, loopback, multicast, reserved nor the limited broadcast.
#[inline(always)]
fn is_unicast(address: [u8; 4]) -> bool {
    let [first, ..] = address;
    first != 0 && first != 127 && first < 224
}

/// ICMP messages that are queries or their answers (RFC 792, RFC 1122 section 3.2.2): echo, timestamp, information, address mask.
#[inline(always)]
fn is_query(kind: u8) -> bool {
    matches!(kind, 0 | 8 | 13..=18)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn may_answer(change: impl FnOnce(&mut Vec<u8>)) -> bool {
        let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 1, 0, 0, 10, 244, 1, 2, 10, 244, 2, 2, 8, 0];
        packet.resize(28, 0);
        change(&mut packet);
        super::may_answer(&packet[..], 0, packet.as_slice().view::<Ipv4>(0).unwrap())
    }

    #[test]
    fn queries_and_other_protocols_are_answered() {
        assert!(may_answer(|_| {}));
        for kind in [0, 8, 13, 14, 15, 16, 17, 18] {
            assert!(may_answer(|packet| packet[20] = kind), "{kind}");
        }
        for protocol in [6, 17, 47, 132] {
            assert!(may_answer(|packet| packet[9] = protocol), "{protocol}");
        }
        assert!(may_answer(|packet| packet[6] = 0x20), "a first fragment");
    }

    #[test]
    fn errors_later_fragments_and_groups_are_not_answered() {
        for kind in [3, 4, 5, 11, 12, 1, 40, 255] {
            assert!(!may_answer(|packet| packet[20] = kind), "{kind}");
        }
        assert!(!may_answer(|packet| packet.truncate(20)), "the type cannot be seen");
        assert!(!may_answer(|packet| packet[7] = 1), "a later fragment");
        for first in [0, 127, 224, 239, 240, 255] {
            for position in [12, 16] {
                assert!(!may_answer(|packet| packet[position] = first), "{first} at {position}");
            }
        }
    }
}
