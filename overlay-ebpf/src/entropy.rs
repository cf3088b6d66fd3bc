//! The outer UDP source port: a hash of the inner flow, so that receive-side scaling and equal-cost multipath spread
//! flows but keep each in order (RFC 7348 section 5 and RFC 8086 section 3.2.1 ask for the same).

use crate::wire::{Bytes, Ipv4, ipv4};

/// Lowest port of the dynamic range (RFC 6335 section 6).
pub const FIRST_PORT: u16 = 49152;

/// The outer source port for the inner packet at `offset` in `packet`: from [`FIRST_PORT`] to 65535.
///
/// The hash covers addresses, protocol and, where there are any, ports. A fragment has none that all its siblings
/// share, so fragments hash without.
#[inline(always)]
pub fn source_port<P: Bytes + ?Sized>(packet: &P, offset: usize, header: &Ipv4) -> u16 {
    let has_ports =
        matches!(header.protocol(), ipv4::PROTOCOL_TCP | ipv4::PROTOCOL_UDP | ipv4::PROTOCOL_SCTP)
            && !header.is_fragment()
            && header.total_len() >= header.header_len() + 4;
    let ports = match has_ports {
        true => packet.view::<[u8; 4]>(offset + header.header_len()).copied().unwrap_or_default(),
        false => [0; 4],
    };
    let hash = hash(header.source(), header.destination(), header.protocol(), ports);
    // The upper 14 bits: 49152 + 16383 is 65535.
    FIRST_PORT + (hash >> 18) as u16
}

/// A multiply-rotate mix; the constants are those of xxHash32 and lowbias32. It need not resist an attacker: all it
/// decides is which queue or path a flow takes.
#[inline(always)]
fn hash(source: [u8; 4], destination: [u8; 4], protocol: u8, ports: [u8; 4]) -> u32 {
    let h = u32::from_be_bytes(source).wrapping_mul(0x9e37_79b1);
    let h = (h ^ u32::from_be_bytes(destination)).rotate_left(15).wrapping_mul(0x85eb_ca6b);
    let h = (h ^ u32::from_be_bytes(ports)).rotate_left(13).wrapping_mul(0xc2b2_ae35);
    let h = h ^ protocol as u32;
    let h = (h ^ (h >> 16)).wrapping_mul(0x7feb_352d);
    h ^ (h >> 15)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn tcp(source_port: u16, flags_fragment: u16) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 40, 0, 0];
        packet.extend(flags_fragment.to_be_bytes());
        packet.extend([64, 6, 0, 0, 10, 244, 1, 2, 10, 244, 2, 2]);
        packet.extend(source_port.to_be_bytes());
        packet.extend([0, 80]);
        packet.resize(40, 0);
        packet
    }

    fn port_of(packet: &[u8]) -> u16 {
        source_port(packet, 0, packet.view::<Ipv4>(0).unwrap())
    }

    #[test]
    fn flows_spread_over_the_dynamic_ports() {
        let ports: HashSet<u16> = (1024..3072).map(|port| port_of(&tcp(port, 0))).collect();
        assert!(ports.len() > 1900, "2048 flows fell on {} ports", ports.len());
        assert!(ports.iter().all(|port| *port >= FIRST_PORT));
        // Both halves of the hash's top bit are used: a device that takes few bits still spreads.
        assert!(ports.iter().filter(|port| **port >= 57344).count() > 900);
    }

    #[test]
    fn all_fragments_of_a_packet_share_a_port() {
        let first = port_of(&tcp(1234, ipv4::FLAG_MF));
        let later = port_of(&tcp(9999, 185));
        assert_eq!(first, later);
    }

    #[test]
    fn a_packet_too_short_for_ports_is_hashed_without() {
        let mut packet = tcp(1234, 0);
        packet[3] = 22;
        let port = port_of(&packet);
        packet[21] ^= 1;
        assert_eq!(port_of(&packet), port, "bytes behind the packet do not count");
        packet.truncate(22);
        assert_eq!(port_of(&packet), port);
    }
}
