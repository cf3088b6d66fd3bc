//! Egress: what to do with an inner packet that was routed to the overlay device.

use crate::{
    abi::Config,
    entropy,
    hop::Rewrite,
    inner,
    reason::DropReason,
    route::Routes,
    source,
    verdict::{EgressVerdict, Encap, Outer},
    wire::{
        Bytes, Ipv4, OVERHEAD, Udp,
        ipv4::{FLAG_DF, PROTOCOL_UDP},
    },
};

/// Longest inner packet whose outer total length fits the header field: 65507 bytes.
const MAX_INNER_LEN: usize = u16::MAX as usize - OVERHEAD;

/// TTL of outer packets: what flannel's UDP socket sends with (RFC 1700).
const OUTER_TTL: u8 = 64;

/// Decides about the inner packet that starts at `offset` in `packet` and is `len` bytes long (of which `packet` need not
/// show all, but headers).
#[inline(always)]
pub fn decide<P: Bytes + ?Sized>(
    packet: &P,
    offset: usize,
    len: usize,
    config: &Config,
    routes: &impl Routes,
) -> EgressVerdict {
    let header = match inner::header(packet, offset, len) {
        Ok(header) => header,
        // A TCP super-packet beyond 64 KiB ("BIG TCP") says 0: the device that cannot send it whole gets segments.
        Err(DropReason::BadTotalLength) if len > u16::MAX as usize => return EgressVerdict::TooLong,
        Err(reason) => return EgressVerdict::Drop(reason),
    };
    if header.total_len() < len {
        return EgressVerdict::Drop(DropReason::TrailingBytes);
    }
    if let Err(reason) = source::check_egress(config, header.source()) {
        return EgressVerdict::Drop(reason);
    }
    // A packet for our own subnet is here only because no container holds that address: sending it anywhere would loop.
    if config.subnet.contains(header.destination()) {
        return EgressVerdict::Drop(DropReason::NoRoute);
    }
    let Some(peer) = routes.peer_of(header.destination()) else {
        return EgressVerdict::Drop(DropReason::NoRoute);
    };
    if header.ttl() <= 1 {
        return EgressVerdict::Drop(DropReason::TtlExpired);
    }
    if header.total_len() > MAX_INNER_LEN {
        return EgressVerdict::TooLong;
    }
    EgressVerdict::Encap(Encap {
        outer: outer(&header, entropy::source_port(packet, offset, &header), config, peer),
        // RFC 6040 section 4.1, normal mode: the inner ECN field stays and the outer copies it.
        rewrite: Rewrite::next_hop(&header, header.tos()),
        peer,
    })
}

/// Outer headers: DF and identification 0 (an atomic datagram, RFC 6864), no UDP checksum, TOS copied from the inner header.
#[inline(always)]
fn outer(header: &Ipv4, source_port: u16, config: &Config, peer: [u8; 4]) -> Outer {
    let udp_len = (header.total_len() + Udp::LEN) as u16;
    let (total_len, source) = (udp_len + Ipv4::LEN as u16, config.public_ip);
    Outer {
        ipv4: Ipv4::new(header.tos(), total_len, FLAG_DF, OUTER_TTL, PROTOCOL_UDP, source, peer),
        udp: Udp::new(source_port, config.port, udp_len),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::Prefix;

    /// One peer that claims every address, also ours.
    struct Greedy;

    impl Routes for Greedy {
        fn peer_of(&self, _address: [u8; 4]) -> Option<[u8; 4]> {
            Some([192, 168, 77, 2])
        }
    }

    #[test]
    fn a_packet_for_our_own_subnet_never_leaves_whatever_the_routes_say() {
        let own = Prefix::new([10, 244, 1, 0], 24);
        let config = Config::new([192, 168, 77, 1], Prefix::new([10, 244, 0, 0], 16), own, 8285);
        let mut packet = [0x45, 0, 0, 20, 0, 0, 0, 0, 64, 1, 0, 0, 10, 244, 1, 2, 10, 244, 1, 9];
        let verdict = |packet: &[u8]| decide(packet, 0, packet.len(), &config, &Greedy);
        assert_eq!(verdict(&packet), EgressVerdict::Drop(DropReason::NoRoute));
        packet[18] = 2;
        assert!(matches!(verdict(&packet), EgressVerdict::Encap(_)));
    }
}
