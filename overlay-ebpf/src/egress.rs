//! Egress: what to do with an inner packet that was routed to the overlay device.

use crate::{
    abi::{Config, NextHop},
    entropy,
    hop::Rewrite,
    inner,
    reason::{DropReason, PuntReason},
    rejection::{Rejection, may_answer},
    route::Routes,
    source, unfinished,
    verdict::{EgressVerdict, Encap, Outer},
    wire::{
        Bytes, Ipv4, OVERHEAD, Udp,
        ipv4::{FLAG_DF, PROTOCOL_TCP, PROTOCOL_UDP},
    },
};

/// Longest inner packet whose outer total length fits the header field: 65507 bytes.
const MAX_INNER_LEN: usize = u16::MAX as usize - OVERHEAD;
/// TTL of outer packets: what flannel's UDP socket sends with (RFC 1700).
const OUTER_TTL: u8 = 64;

/// Decides about the inner packet that starts at `offset` in `packet` and is `len` bytes long (of which `packet` need not
/// show all, but headers). `gso_size` is the payload in bytes of each segment of a super-packet, 0 for a packet that is one.
#[inline(always)]
pub fn decide<P: Bytes + ?Sized>(
    packet: &P,
    offset: usize,
    len: usize,
    gso_size: usize,
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
    let reject = |rejection: Rejection| match may_answer(packet, offset, &header) {
        true => EgressVerdict::Reject(rejection),
        false => EgressVerdict::Drop(rejection.reason()),
    };
    // A packet for our own subnet is here only because no container holds that address: sending it anywhere would loop.
    if config.subnet.contains(header.destination()) {
        return reject(Rejection::NoRoute);
    }
    let Some(next_hop) = routes.next_hop(header.destination()) else {
        return reject(Rejection::NoRoute);
    };
    if header.ttl() <= 1 {
        return reject(Rejection::TtlExpired);
    }
    if next_hop.ifindex == 0 {
        return reject(Rejection::PeerUnreachable);
    }
    if header.total_len() > MAX_INNER_LEN {
        return EgressVerdict::TooLong;
    }
    let encap = Encap {
        outer: outer(&header, entropy::source_port(packet, offset, &header), config, next_hop.peer),
        // RFC 6040 section 4.1, normal mode: the inner ECN field stays and the outer copies it.
        rewrite: Rewrite::next_hop(&header, header.tos()),
        next_hop,
    };
    // Of other protocols, such as SCTP, the kernel does not say how long the segments are, and encapsulates none.
    if gso_size != 0 && !matches!(header.protocol(), PROTOCOL_TCP | PROTOCOL_UDP) {
        return EgressVerdict::SlowEncap(PuntReason::SegmentedDatagrams, encap);
    }
    if unfinished::segment_len(packet, offset, &header, gso_size) > next_hop.mtu as usize {
        return match header.dont_fragment() {
            true => reject(Rejection::MtuExceeded(next_hop.mtu)),
            false => EgressVerdict::Fragment(encap),
        };
    }
    if next_hop.has(NextHop::SLOW_PATH) {
        return EgressVerdict::SlowEncap(PuntReason::SlowPeer, encap);
    }
    if next_hop.has(NextHop::FINISHED_ONLY)
        && (gso_size != 0 || unfinished::has_partial_checksum(packet, offset, &header))
    {
        return EgressVerdict::SlowEncap(PuntReason::Unfinished, encap);
    }
    EgressVerdict::Encap(encap)
}

/// Outer headers: DF and identification 0 (an atomic datagram, RFC 6864), no UDP checksum.
#[inline(always)]
fn outer(header: &Ipv4, source_port: u16, config: &Config, peer: [u8; 4]) -> Outer {
    let udp_len = (header.total_len() + Udp::LEN) as u16;
    let (total_len, source) = (udp_len + Ipv4::LEN as u16, config.public_ip);
    Outer {
        ipv4: Ipv4::new(
            config.tos.outer(header.tos()),
            total_len,
            FLAG_DF,
            OUTER_TTL,
            PROTOCOL_UDP,
            source,
            peer,
        ),
        udp: Udp::new(source_port, config.port, udp_len),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        abi::{Prefix, TosRule},
        source::SourceCheck,
    };

    const PEER: [u8; 4] = [192, 168, 77, 2];

    /// One peer that claims every address, also ours.
    struct Greedy(NextHop);

    impl Routes for Greedy {
        fn next_hop(&self, _address: [u8; 4]) -> Option<NextHop> {
            Some(self.0)
        }
    }

    fn config() -> Config {
        let own = Prefix::new([10, 244, 1, 0], 24);
        Config::new([192, 168, 77, 1], Prefix::new([10, 244, 0, 0], 16), own, 8285)
    }

    fn greedy(mtu: u16, flags: u16) -> Greedy {
        Greedy(NextHop { peer: PEER, ifindex: 2, mtu, flags, ..NextHop::default() })
    }

    /// TCP without payload from 10.244.1.2 to 10.244.2.2, of a total length that only its header states.
    fn tcp(total_len: u16, flags_fragment: u16) -> Vec<u8> {
        let mut packet = vec![0x45, 0];
        packet.extend(total_len.to_be_bytes());
        packet.extend([0, 0]);
        packet.extend(flags_fragment.to_be_bytes());
        packet.extend([64, 6, 0, 0, 10, 244, 1, 2, 10, 244, 2, 2]);
        packet.resize(40, 0);
        packet[32] = 0x50;
        packet
    }

    fn verdict(packet: &[u8], gso_size: usize, routes: &Greedy) -> EgressVerdict {
        let len = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
        decide(packet, 0, len, gso_size, &config(), routes)
    }

    #[test]
    fn a_packet_for_our_own_subnet_never_leaves_whatever_the_routes_say() {
        let mut packet = [0x45, 0, 0, 20, 0, 0, 0, 0, 64, 47, 0, 0, 10, 244, 1, 2, 10, 244, 1, 9];
        assert_eq!(verdict(&packet, 0, &greedy(1472, 0)), EgressVerdict::Reject(Rejection::NoRoute));
        packet[18] = 2;
        assert!(matches!(verdict(&packet, 0, &greedy(1472, 0)), EgressVerdict::Encap(_)));
    }

    #[test]
    fn the_longest_segment_decides_whether_a_packet_fits_the_path() {
        let path = greedy(1400, 0);
        let rejected = EgressVerdict::Reject(Rejection::MtuExceeded(1400));
        assert!(matches!(verdict(&tcp(1400, FLAG_DF), 0, &path), EgressVerdict::Encap(_)));
        assert_eq!(verdict(&tcp(1401, FLAG_DF), 0, &path), rejected);
        assert!(matches!(verdict(&tcp(1401, 0), 0, &path), EgressVerdict::Fragment(_)));
        assert!(matches!(verdict(&tcp(60_000, FLAG_DF), 1360, &path), EgressVerdict::Encap(_)));
        assert_eq!(verdict(&tcp(60_000, FLAG_DF), 1361, &path), rejected);
        assert!(matches!(verdict(&tcp(60_000, 0), 1361, &path), EgressVerdict::Fragment(_)));
    }

    #[test]
    fn a_super_packet_beyond_64_kib_is_too_long_and_says_no_length() {
        let packet = tcp(0, FLAG_DF);
        let decide = |len| decide(&packet[..], 0, len, 1400, &config(), &greedy(1472, 0));
        assert_eq!(decide(65_536), EgressVerdict::TooLong);
        assert_eq!(decide(65_535), EgressVerdict::Drop(DropReason::BadTotalLength));
    }

    #[test]
    fn a_peer_without_a_way_is_unreachable() {
        let mut path = greedy(1472, 0);
        path.0.ifindex = 0;
        assert_eq!(verdict(&tcp(100, 0), 0, &path), EgressVerdict::Reject(Rejection::PeerUnreachable));
    }

    #[test]
    fn flags_of_a_peer_send_its_packets_to_the_slow_path() {
        let slow = |reason, verdict| matches!(verdict, EgressVerdict::SlowEncap(why, _) if why == reason);
        assert!(slow(PuntReason::SlowPeer, verdict(&tcp(100, 0), 0, &greedy(1472, NextHop::SLOW_PATH))));
        let finished_only = greedy(1472, NextHop::FINISHED_ONLY);
        let mut packet = tcp(100, 0);
        packet[36..38].copy_from_slice(&[0x12, 0x34]);
        assert!(matches!(verdict(&packet, 0, &finished_only), EgressVerdict::Encap(_)));
        assert!(slow(PuntReason::Unfinished, verdict(&packet, 60, &finished_only)));
        // The sum of the pseudo header: 0x0af4 + 0x0102 + 0x0af4 + 0x0202 + 6 + 80.
        packet[36..38].copy_from_slice(&[0x19, 0x42]);
        assert!(slow(PuntReason::Unfinished, verdict(&packet, 0, &finished_only)));
        assert!(matches!(verdict(&packet, 0, &greedy(1472, 0)), EgressVerdict::Encap(_)));
    }

    #[test]
    fn policy_decides_about_the_outer_tos_and_foreign_sources() {
        let mut packet = tcp(40, 0);
        packet[1] = 0xb9;
        let decide = |packet: &[u8], config: &Config| decide(packet, 0, 40, 0, config, &greedy(1472, 0));
        let has_tos = |rule, tos| {
            let verdict = decide(&packet, &config().with_policy(rule, SourceCheck::Strict));
            matches!(verdict, EgressVerdict::Encap(encap) if encap.outer.ipv4.tos() == tos)
        };
        assert!(has_tos(TosRule::COPY, 0xb9) && has_tos(TosRule::fixed(0), 1));
        assert!(has_tos(TosRule::fixed(10), 0x29));
        packet[14] = 3;
        let spoofed = EgressVerdict::Drop(DropReason::SpoofedSource);
        for check in [SourceCheck::Strict, SourceCheck::Loose] {
            assert_eq!(decide(&packet, &config().with_policy(TosRule::COPY, check)), spoofed);
        }
        let off = config().with_policy(TosRule::COPY, SourceCheck::Off);
        assert!(matches!(decide(&packet, &off), EgressVerdict::Encap(_)));
    }
}
