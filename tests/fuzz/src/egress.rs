//! What must be true of the core's verdict about an inner packet that leaves.

use overlay_ebpf::{
    abi::NextHop,
    egress,
    reason::{DropReason, PuntReason},
    rejection::Rejection,
    route::Routes as _,
    verdict::{EgressVerdict, Encap},
};

use crate::{
    raw::{self, Packet},
    rejection,
    scenario::{Scenario, contains},
};

/// Checks one input: a scenario and a packet.
pub(crate) fn check(input: &[u8]) {
    let Some(scenario) = Scenario::read(input) else { return };
    let Scenario { config, routes, gso_size, offset, .. } = &scenario;
    let buffer = [&vec![0xa5; *offset], scenario.packet].concat();
    let len = scenario.packet.len() + scenario.hidden;
    let verdict = egress::decide(&buffer[..], *offset, len, *gso_size, config, routes);
    judge(&scenario, len, *gso_size, verdict);
    if let EgressVerdict::Encap(encap) = verdict {
        let sibling = sibling(buffer, *offset);
        let same = egress::decide(&sibling[..], *offset, len, *gso_size, config, routes);
        let EgressVerdict::Encap(other) = same else {
            panic!("another verdict about the same flow: {same:?}")
        };
        let [port, other] = [encap, other].map(|encap| encap.outer.udp.source_port());
        assert_eq!(port, other, "packets of one flow have two source ports");
    }
}

/// Another packet of the same flow: with another identification and, of a fragment, another payload.
fn sibling(mut packet: Vec<u8>, offset: usize) -> Vec<u8> {
    let ip = Packet::new(&packet[offset..]).expect("the packet is valid");
    let payload = offset + ip.header_len();
    let is_fragment = ip.is_fragment();
    packet[offset + 4] ^= 0xff;
    if is_fragment && let Some(byte) = packet.get_mut(payload) {
        *byte ^= 0xff;
    }
    packet
}

/// Checks a verdict about the packet of `scenario`, which is `len` bytes long.
pub(crate) fn judge(scenario: &Scenario<'_>, len: usize, gso_size: usize, verdict: EgressVerdict) {
    let packet = Packet::new(scenario.packet).filter(|_| len >= 20);
    let Some(packet) = packet else {
        assert_eq!(verdict, EgressVerdict::Drop(DropReason::Truncated), "there is no header");
        return;
    };
    let path = scenario.routes.next_hop(packet.destination());
    let longest = segment_len(packet, gso_size);
    match verdict {
        EgressVerdict::Encap(encap) => {
            carried(scenario, packet, len, encap);
            let NextHop { mtu, .. } = encap.next_hop;
            assert!(longest <= mtu.into(), "{longest} bytes leave on a path of {mtu}");
            assert!(!encap.next_hop.has(NextHop::SLOW_PATH), "a program carries a packet of a slow peer");
            let is_finished = gso_size == 0 && !packet.is_unfinished();
            let takes_all = !encap.next_hop.has(NextHop::FINISHED_ONLY);
            assert!(takes_all || is_finished, "the peer gets an unfinished packet");
            let is_cut_by_kernel = matches!(packet.protocol(), 6 | 17);
            assert!(gso_size == 0 || is_cut_by_kernel, "the kernel encapsulates no such super-packet");
        }
        EgressVerdict::SlowEncap(reason, encap) => {
            carried(scenario, packet, len, encap);
            if reason == PuntReason::SegmentedDatagrams {
                assert!(gso_size != 0 && !matches!(packet.protocol(), 6 | 17), "the kernel cuts it");
                return;
            }
            assert!(longest <= encap.next_hop.mtu.into(), "too long for the path");
            let flag = match reason {
                PuntReason::SlowPeer => NextHop::SLOW_PATH,
                PuntReason::Unfinished => NextHop::FINISHED_ONLY,
                other => panic!("no reason to send on the slow path: {other:?}"),
            };
            assert!(encap.next_hop.has(flag), "the peer does not ask for {reason:?}");
            let is_unfinished = gso_size != 0 || packet.is_unfinished();
            assert!(reason != PuntReason::Unfinished || is_unfinished, "the packet is finished");
        }
        EgressVerdict::Fragment(encap) => {
            carried(scenario, packet, len, encap);
            assert!(!packet.dont_fragment(), "a packet with DF is fragmented");
            assert!(longest > encap.next_hop.mtu.into(), "it is not too long");
        }
        EgressVerdict::TooLong => assert!(len > 65507, "{len} bytes fit an outer packet"),
        EgressVerdict::Reject(rejected) => {
            assert!(rejection::may_be_told(packet), "the sender must not be told");
            assert!(scenario.may_send_from(packet.source()), "a forged source is answered");
            assert!(is_whole(packet, len), "what is no packet is answered");
            is_rejected(scenario, packet, path, longest, rejected);
        }
        EgressVerdict::Drop(reason) => {
            if let Some(untold) = rejection::untold(reason, path.map_or(0, |path| path.mtu)) {
                assert!(!rejection::may_be_told(packet), "the sender is not told of {reason:?}");
                return is_rejected(scenario, packet, path, longest, untold);
            }
            is_dropped(scenario, packet, len, reason);
        }
    }
}

fn is_whole(packet: Packet<'_>, len: usize) -> bool {
    packet.version() == 4
        && packet.header_len() >= 20
        && packet.header_len() <= packet.total_len()
        && packet.total_len() == len
}

/// Checks what all verdicts that send a packet have in common.
fn carried(scenario: &Scenario<'_>, packet: Packet<'_>, len: usize, encap: Encap) {
    let Encap { outer, rewrite, next_hop } = encap;
    assert!(is_whole(packet, len), "this is no packet, or bytes follow it");
    assert!(scenario.may_send_from(packet.source()), "a spoofed source leaves");
    assert!(!contains(scenario.subnet, packet.destination()), "a packet for our own subnet leaves");
    assert_eq!(Some(next_hop), scenario.routes.next_hop(packet.destination()), "another peer's packet");
    assert!(next_hop.ifindex != 0, "there is no way to the peer");
    assert!(packet.ttl() > 1, "the TTL is used up");

    let bytes = bytemuck::bytes_of(&outer);
    let outer = Packet::new(bytes).expect("28 bytes");
    assert!(len + 28 <= 65535, "the outer packet is too long");
    assert_eq!((bytes[0], outer.total_len(), outer.ttl(), outer.protocol()), (0x45, len + 28, 64, 17));
    assert_eq!((raw::word(bytes, 4), outer.fragment_word()), (0, 0x4000), "identification, flags");
    assert_eq!(outer.header_sum(), 0xffff, "the outer checksum is wrong");
    assert_eq!((outer.source(), outer.destination()), (scenario.config.public_ip, next_hop.peer));
    let dscp = scenario.dscp.unwrap_or(packet.tos() & 0xfc);
    assert_eq!(outer.tos(), dscp | packet.tos() & 3, "RFC 6040 section 4.1");
    let [source, port, length, checksum] = [0, 2, 4, 6].map(|at| raw::word(outer.transport(), at));
    assert!(source >= 49152, "the source port {source} is not dynamic");
    assert_eq!((port, usize::from(length), checksum), (scenario.config.port, len + 8, 0));

    assert_eq!((rewrite.ttl, rewrite.tos), (packet.ttl() - 1, packet.tos()), "one hop, the same TOS");
    keeps_checksum(scenario.packet, rewrite.tos, rewrite.ttl, rewrite.checksum);
}

/// Checks that a right header checksum stays right, and a wrong one wrong. Options are not part of the sum's change.
pub(crate) fn keeps_checksum(packet: &[u8], tos: u8, ttl: u8, checksum: u16) {
    let before = packet[..20].to_vec();
    let mut after = before.clone();
    (after[1], after[8]) = (tos, ttl);
    after[10..12].copy_from_slice(&checksum.to_be_bytes());
    // A sum of zero and one of all ones are the same, and no header with a version has a sum of zero.
    let same = raw::sum(&after) % 0xffff == raw::sum(&before) % 0xffff;
    assert!(same, "the checksum {checksum:04x} does not follow the change of TTL and TOS");
    // RFC 1624 section 4: a checksum as its sender computes it, which is never all ones, becomes one.
    let is_canonical = raw::sum(&before) == 0xffff && raw::word(&before, 10) != 0xffff;
    assert!(!is_canonical || checksum != 0xffff, "a router that recomputes the checksum finds 0");
}

fn is_rejected(
    scenario: &Scenario<'_>,
    packet: Packet<'_>,
    path: Option<NextHop>,
    longest: usize,
    rejected: Rejection,
) {
    match rejected {
        Rejection::NoRoute => {
            let is_own = contains(scenario.subnet, packet.destination());
            assert!(is_own || path.is_none(), "there is a route");
        }
        Rejection::TtlExpired => assert!(packet.ttl() <= 1, "the TTL is {}", packet.ttl()),
        Rejection::PeerUnreachable => {
            assert!(path.is_some_and(|path| path.ifindex == 0), "there is a way to the peer");
        }
        Rejection::MtuExceeded(mtu) => {
            assert_eq!(Some(mtu), path.map(|path| path.mtu), "another MTU than the path's");
            assert!(packet.dont_fragment() && longest > mtu.into(), "it fits, or may be fragmented");
        }
    }
}

fn is_dropped(scenario: &Scenario<'_>, packet: Packet<'_>, len: usize, reason: DropReason) {
    let (header_len, total_len) = (packet.header_len(), packet.total_len());
    let is_true = match reason {
        DropReason::Truncated => header_len > len || total_len > len,
        DropReason::BadVersion => !matches!(packet.version(), 4 | 6),
        DropReason::Ipv6 => packet.version() == 6,
        DropReason::BadHeaderLength => header_len < 20,
        DropReason::BadTotalLength => total_len < header_len && len <= 65535,
        DropReason::TrailingBytes => total_len < len,
        DropReason::SpoofedSource => !scenario.may_send_from(packet.source()),
        other => panic!("no reason to drop a packet that leaves: {other:?}"),
    };
    assert!(is_true, "dropped as {reason:?}, which it is not");
}

/// The length of the longest packet on the wire.
fn segment_len(packet: Packet<'_>, gso_size: usize) -> usize {
    if gso_size == 0 {
        return packet.total_len();
    }
    let transport = match packet.protocol() {
        // The longest where it cannot be seen.
        6 if packet.transport().len() < 14 => 60,
        6 => usize::from(packet.transport()[12] / 16) * 4,
        _ => 8,
    };
    packet.total_len().min(packet.header_len() + transport + gso_size)
}
