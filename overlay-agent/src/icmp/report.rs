//! ICMP errors about outer packets: from a router on the way, from the peer, or from this host's kernel when a neighbour does not
//! answer. They can be forged, so only what can be true is believed, and what it changes is bounded.

use std::net::Ipv4Addr;

use overlay_ebpf::{
    checksum,
    entropy::FIRST_PORT,
    wire::{Bytes as _, Ipv4, OVERHEAD, Udp, ipv4::PROTOCOL_UDP},
};

/// Length of the ICMP header in bytes.
const ICMP_HEADER: usize = 8;
/// Type of Destination Unreachable.
const UNREACHABLE: u8 = 3;
/// Its code for Fragmentation Needed.
const FRAGMENTATION_NEEDED: u8 = 4;

/// Sizes at which routers that name no MTU usually cut (RFC 1191 section 7.1), in bytes.
const PLATEAUS: [u16; 9] = [32000, 17914, 8166, 4352, 2002, 1492, 1006, 508, 296];

/// What an error says about an outer packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The device on which the message arrived.
    pub ifindex: u32,
    /// Source of the outer packet.
    pub source: Ipv4Addr,
    /// Destination of the outer packet: a peer, perhaps.
    pub peer: Ipv4Addr,
    /// Its UDP destination port.
    pub port: u16,
    /// Why it did not arrive.
    pub problem: Problem,
}

/// Why an outer packet did not arrive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// It was longer than this number of bytes, which is what the path carries.
    TooLong(u16),
    /// The peer cannot be reached. What the error quotes of the inner packet.
    Unreachable(Vec<u8>),
}

impl Report {
    /// Reads an ICMP message, with its IP header, that arrived on a device. `None` for all but errors about packets such as this
    /// agent and its programs send.
    pub fn parse(message: &[u8], ifindex: u32) -> Option<Self> {
        let header = message.view::<Ipv4>(0)?;
        let icmp = message.get(header.header_len()..header.total_len().min(message.len()))?;
        let [kind, code] = *icmp.view::<[u8; 2]>(0)?;
        // Raw sockets get messages before the kernel has checked them.
        if kind != UNREACHABLE || checksum::of_bytes(icmp) != 0 {
            return None;
        }
        let quote = icmp.get(ICMP_HEADER..)?;
        let (outer, udp) = (quote.view::<Ipv4>(0)?, quote.view::<Udp>(Ipv4::LEN)?);
        let is_outer = outer.version() == 4
            && outer.header_len() == Ipv4::LEN
            && outer.protocol() == PROTOCOL_UDP
            && outer.dont_fragment()
            && !outer.is_fragment()
            && (udp.source_port() >= FIRST_PORT || udp.source_port() == udp.destination_port());
        if !is_outer {
            return None;
        }
        let problem = match code {
            FRAGMENTATION_NEEDED => {
                let [high, low] = *icmp.view::<[u8; 2]>(6)?;
                Problem::TooLong(next_hop_mtu(u16::from_be_bytes([high, low]), outer.total_len())?)
            }
            _ => Problem::Unreachable(quote.get(OVERHEAD..)?.to_vec()),
        };
        Some(Self {
            ifindex,
            source: outer.source().into(),
            peer: outer.destination().into(),
            port: udp.destination_port(),
            problem,
        })
    }
}

/// The MTU that the message is about: the one that it names, or the next usual one below the packet. A packet of at most that
/// length would not have been too long.
fn next_hop_mtu(named: u16, length: usize) -> Option<u16> {
    let mtu = match named {
        0 => PLATEAUS.into_iter().find(|plateau| usize::from(*plateau) < length)?,
        named => named,
    };
    (usize::from(mtu) < length).then_some(mtu)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message about a packet of `length` bytes from 192.168.77.1:60000 to 192.168.77.2:8285.
    fn message(code: u8, mtu: u16, length: u16) -> Vec<u8> {
        let mut icmp = vec![3, code, 0, 0, 0, 0];
        icmp.extend(mtu.to_be_bytes());
        icmp.extend([0x45, 0]);
        icmp.extend(length.to_be_bytes());
        icmp.extend([0, 0, 0x40, 0, 60, 17, 0, 0, 192, 168, 77, 1, 192, 168, 77, 2]);
        icmp.extend([0xea, 0x60, 0x20, 0x5d, 0, 0, 0, 0]);
        icmp.extend([0x45, 0, 0, 0, 1, 2, 3, 4]);
        with_checksum(icmp)
    }

    fn with_checksum(mut icmp: Vec<u8>) -> Vec<u8> {
        icmp[2..4].fill(0);
        let sum = checksum::of_bytes(&icmp);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        let length = (20 + icmp.len()) as u16;
        let mut message = vec![0x45, 0];
        message.extend(length.to_be_bytes());
        message.extend([0, 0, 0, 0, 64, 1, 0, 0, 10, 0, 0, 1, 192, 168, 77, 1]);
        message.extend(icmp);
        message
    }

    fn changed(index: usize, value: u8) -> Option<Report> {
        let mut icmp = message(4, 1400, 1500)[20..].to_vec();
        icmp[index] = value;
        Report::parse(&with_checksum(icmp), 2)
    }

    #[test]
    fn fragmentation_needed_names_the_peer_and_the_mtu() {
        let report = Report::parse(&message(4, 1400, 1500), 2).unwrap();
        assert_eq!((report.peer, report.port), (Ipv4Addr::new(192, 168, 77, 2), 8285));
        assert_eq!(report.problem, Problem::TooLong(1400));
        // An old router, which names none.
        assert_eq!(Report::parse(&message(4, 0, 1500), 2).unwrap().problem, Problem::TooLong(1492));
    }

    #[test]
    fn an_unreachable_peer_comes_with_the_inner_packet() {
        let report = Report::parse(&message(1, 0, 1500), 2).unwrap();
        assert_eq!(report.problem, Problem::Unreachable(vec![0x45, 0, 0, 0, 1, 2, 3, 4]));
    }

    #[test]
    fn what_cannot_be_true_is_ignored() {
        assert!(changed(8, 0x45).is_some());
        assert_eq!(Report::parse(&message(4, 1500, 1500), 2), None, "it would have fitted");
        for (index, value, why) in [
            (0, 11, "Time Exceeded"),
            (8, 0x46, "options"),
            (8, 0x65, "another version"),
            (14, 0, "without DF"),
            (14, 0x60, "a fragment"),
            (17, 6, "TCP"),
            (28, 0x10, "a source port that is never used"),
        ] {
            assert_eq!(changed(index, value), None, "{why}");
        }
        let whole = message(4, 1400, 1500);
        let mut corrupt = whole.clone();
        corrupt[60] ^= 1;
        assert_eq!(Report::parse(&corrupt, 2), None, "the checksum is wrong");
        for length in 0..whole.len() {
            let _ = Report::parse(&whole[..length], 2);
        }
    }
}
