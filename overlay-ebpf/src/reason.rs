//! Why a packet is discarded or handed to the slow path: the names of the counters.

/// Declares an enum of counted reasons with, for each, the name under which scripts find it and a text for people.
macro_rules! reasons {
    ($(#[$meta:meta])* $name:ident { $($variant:ident = $label:literal: $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum $name { $(#[doc = $text] $variant,)+ }

        impl $name {
            /// Every reason, in the order of the counters.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];
            /// How many reasons there are.
            pub const COUNT: usize = Self::ALL.len();

            /// The name used in counters and metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }

            /// What it means, in one sentence.
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }

            /// Position of this reason's counter.
            #[inline(always)]
            pub const fn index(self) -> usize {
                self as usize
            }
        }
    };
}

reasons! {
    /// Why a packet was discarded. Each discarded packet increments the counter of exactly one of these.
    DropReason {
        Truncated = "truncated": "The packet ends before its own headers or total length say.",
        BadVersion = "bad_version": "The inner packet is neither IPv4 nor IPv6.",
        Ipv6 = "ipv6": "The inner packet is IPv6, which this network does not carry; not an error.",
        BadHeaderLength = "bad_header_length": "The inner header length is less than 20 bytes.",
        BadTotalLength = "bad_total_length": "The inner total length is less than the header length.",
        TrailingBytes = "trailing_bytes": "Bytes follow the inner packet.",
        SpoofedSource = "spoofed_source": "The sender does not hold the lease of the inner source address.",
        UnknownSource = "unknown_source": "No lease covers the inner source address.",
        NotForUs = "not_for_us": "The inner destination is not in this host's subnet.",
        NoRoute = "no_route": "No peer holds a lease for the inner destination.",
        TtlExpired = "ttl_expired": "The inner TTL is used up.",
        EcnCongestion = "ecn_congestion": "The underlay marked congestion and the inner transport does not understand ECN (RFC 6040 section 4.2).",
        TooLong = "too_long": "The packet with its outer headers exceeds what IPv4 can say, 65535 bytes.",
        MtuExceeded = "mtu_exceeded": "The packet exceeds the path MTU to the peer and must not be fragmented.",
        PeerUnreachable = "peer_unreachable": "The kernel has no route to the peer.",
        EncapFailed = "encap_failed": "The kernel refused to make room for the outer headers or to redirect the packet.",
        DecapFailed = "decap_failed": "The kernel refused to remove the outer headers.",
        VlanTagged = "vlan_tagged": "The card had taken off a VLAN tag that XDP cannot see: the outer packet was another network's.",
        SendFailed = "send_failed": "The kernel refused to send the packet to the peer.",
        DeviceFailed = "device_failed": "The overlay device refused the packet.",
    }
}

reasons! {
    /// Why the fast path handed a packet to the slow path.
    PuntReason {
        OuterOptions = "outer_options": "The outer header has IP options, which the kernel's stack must see.",
        OuterFragment = "outer_fragment": "The outer packet is a first fragment: the kernel's stack reassembles it.",
        OuterHeaderChecksum = "outer_header_checksum": "The outer header's checksum is wrong: the kernel's stack discards it.",
        OuterLength = "outer_length": "The outer lengths disagree: the kernel's stack trims or discards it.",
        OuterChecksumPartial = "outer_checksum_partial": "The outer checksum is still to be completed, so the kernel's state points at it.",
        OuterGro = "outer_gro": "Several datagrams were merged by the kernel's receive offload.",
        SegmentedDatagrams = "segmented_datagrams": "The kernel left several datagrams in one packet, of a kind that only its own segmentation can cut.",
        TooLong = "too_long": "The packet with its outer headers exceeds 65535 bytes: the slow path gets it in segments.",
        NoRoomForMark = "no_room_for_mark": "The driver leaves XDP no room to mark a packet: the tc program decapsulates it instead.",
        AlreadyEncapsulated = "already_encapsulated": "The packet is inside another tunnel's encapsulation.",
        Rejected = "rejected": "The packet is discarded, and the slow path tells its sender by ICMP.",
        PathMtu = "path_mtu": "The packet exceeds the path MTU to the peer: the slow path fragments it, or tells its sender.",
        Unfinished = "unfinished": "The peer needs complete checksums and packets of MTU size, which the slow path makes.",
        SlowPeer = "slow_peer": "All packets of this peer take the slow path, because of an IPsec policy or its device.",
    }
}

impl DropReason {
    /// Whether such drops mean that something is wrong. IPv6 is not: every Linux host sends router solicitations and
    /// neighbour discovery into every device.
    pub const fn is_error(self) -> bool {
        !matches!(self, Self::Ipv6)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_unique_and_indices_dense() {
        let names: HashSet<_> = DropReason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), DropReason::COUNT);
        assert!(DropReason::ALL.iter().map(|reason| reason.index()).eq(0..DropReason::COUNT));
        let names: HashSet<_> = PuntReason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), PuntReason::COUNT);
    }

    #[test]
    fn only_ipv6_is_no_error() {
        let harmless: Vec<_> = DropReason::ALL.iter().filter(|reason| !reason.is_error()).collect();
        assert_eq!(harmless, [&DropReason::Ipv6]);
    }
}
