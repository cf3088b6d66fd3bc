//! The packets that the benchmark shows to the programs.

use std::net::Ipv4Addr;

use overlay_ebpf::{
    abi::Endpoint,
    wire::{
        Ipv4, OVERHEAD, Udp,
        ipv4::{FLAG_DF, FLAG_MF, PROTOCOL_TCP, PROTOCOL_UDP},
    },
};

/// This host.
pub(super) const PUBLIC_IP: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 1);
/// UDP port of the network.
pub(super) const PORT: u16 = 8285;
/// A container of this host.
pub(super) const OWN: Ipv4Addr = Ipv4Addr::new(10, 255, 255, 200);
/// The path's limit for inner packets in bytes.
pub(super) const PATH_MTU: u16 = 1400;
/// Length of inner packets in bytes.
const LEN: u16 = 100;
/// Ethernet header of every packet: to the device of test runs.
const ETHERNET: [u8; 14] = [0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2, 8, 0];

/// The container, behind this device.
pub(super) fn endpoint(ifindex: u32) -> Endpoint {
    let [g0, g1, g2, g3, g4, g5, m0, m1, m2, m3, m4, m5, ..] = ETHERNET;
    let (mac, gateway_mac) = ([m0, m1, m2, m3, m4, m5], [g0, g1, g2, g3, g4, g5]);
    Endpoint { ifindex, mac, gateway_mac, flags: 0 }
}

/// A kind of packet, and so the verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// Carried.
    Tcp,
    /// Carried.
    Udp,
    /// The second fragment of a datagram: carried.
    Fragment,
    /// All of the decision, then punted: longer than the path carries.
    PuntMtu,
    /// Punted before the lookup: two datagrams in one.
    PuntMerged,
    /// Dropped behind the lookup, which finds nothing.
    NoRoute,
    /// Dropped: of a source that its sender does not hold.
    Spoofed,
    /// Dropped: IPv6.
    Ipv6,
    /// Left alone: UDP to another port.
    NotOurs,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Fragment => "fragment",
            Self::PuntMtu => "punt: too long",
            Self::PuntMerged => "punt: merged datagrams",
            Self::NoRoute => "no route",
            Self::Spoofed => "spoofed source",
            Self::Ipv6 => "ipv6",
            Self::NotOurs => "not ours",
        }
    }

    /// Whether a program encapsulates or decapsulates it.
    pub(super) fn is_carried(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp | Self::Fragment)
    }

    /// A frame for the program of a device whose packets leave for the container `other` of a peer.
    pub(super) fn leaving(self, other: Ipv4Addr) -> Vec<u8> {
        let inner = match self {
            Self::Spoofed => inner(PROTOCOL_UDP, FLAG_DF, LEN, other, other),
            Self::NoRoute => inner(PROTOCOL_UDP, FLAG_DF, LEN, OWN, Ipv4Addr::new(11, 0, 0, 1)),
            Self::PuntMtu => inner(PROTOCOL_UDP, 0, PATH_MTU + 1, OWN, other),
            Self::Tcp | Self::Udp | Self::Fragment | Self::PuntMerged | Self::Ipv6 | Self::NotOurs => {
                self.plain(OWN, other)
            }
        };
        [&ETHERNET[..], &inner].concat()
    }

    /// A frame that arrives from the host `peer` with a packet of its container `other`.
    pub(super) fn arriving(self, peer: Ipv4Addr, other: Ipv4Addr) -> Vec<u8> {
        let inner = match self {
            Self::NoRoute => inner(PROTOCOL_UDP, FLAG_DF, LEN, Ipv4Addr::new(11, 0, 0, 1), OWN),
            Self::PuntMerged => [self.plain(other, OWN), self.plain(other, OWN)].concat(),
            Self::Tcp
            | Self::Udp
            | Self::Fragment
            | Self::PuntMtu
            | Self::Spoofed
            | Self::Ipv6
            | Self::NotOurs => self.plain(other, OWN),
        };
        let peer = if self == Self::Spoofed { Ipv4Addr::new(172, 30, 0, 1) } else { peer };
        let port = if self == Self::NotOurs { PORT + 1 } else { PORT };
        let udp_len = (inner.len() + Udp::LEN) as u16;
        let total_len = (inner.len() + OVERHEAD) as u16;
        let ipv4 = Ipv4::new(0, total_len, FLAG_DF, 64, PROTOCOL_UDP, peer.octets(), PUBLIC_IP.octets());
        let udp = Udp::new(50_000, port, udp_len);
        [&ETHERNET[..], bytemuck::bytes_of(&ipv4), bytemuck::bytes_of(&udp), &inner].concat()
    }

    fn plain(self, source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
        let (protocol, flags) = match self {
            Self::Tcp => (PROTOCOL_TCP, FLAG_DF),
            Self::Fragment => (PROTOCOL_UDP, FLAG_MF | 100),
            Self::Udp
            | Self::PuntMtu
            | Self::PuntMerged
            | Self::NoRoute
            | Self::Spoofed
            | Self::Ipv6
            | Self::NotOurs => (PROTOCOL_UDP, FLAG_DF),
        };
        let mut packet = inner(protocol, flags, LEN, source, destination);
        if self == Self::Ipv6
            && let Some(first) = packet.first_mut()
        {
            *first = 0x60;
        }
        packet
    }
}

/// An inner packet of `len` bytes, at least 40.
fn inner(protocol: u8, flags: u16, len: u16, source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
    let header = Ipv4::new(0, len, flags, 64, protocol, source.octets(), destination.octets());
    let mut packet = bytemuck::bytes_of(&header).to_vec();
    packet.extend([0x9c, 0x40, 0, 80]);
    packet.extend((len - 20).to_be_bytes());
    packet.resize(usize::from(len), 0x50);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_as_long_as_their_headers_say() {
        let (peer, other) = (Ipv4Addr::new(172, 16, 0, 1), Ipv4Addr::new(10, 0, 0, 1));
        for kind in [Kind::Tcp, Kind::Udp, Kind::Fragment, Kind::Spoofed, Kind::NotOurs] {
            assert_eq!(kind.leaving(other).len(), 114, "{kind:?}");
            assert_eq!(kind.arriving(peer, other).len(), 142, "{kind:?}");
        }
        assert_eq!(Kind::PuntMtu.leaving(other).len(), 1415);
        assert_eq!(Kind::PuntMerged.arriving(peer, other).len(), 242);
    }
}
