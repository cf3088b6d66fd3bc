//! What must be true of the core's verdict about a frame that arrives.

use overlay_ebpf::{
    abi::{NextHop, UnderlayValue},
    ingress,
    reason::{DropReason, PuntReason},
    rejection::Rejection,
    route::Routes as _,
    verdict::{Decap, IngressVerdict, InnerVerdict},
};

use crate::{
    egress::keeps_checksum,
    raw::{self, Packet},
    rejection,
    scenario::{Scenario, contains},
};

/// Checks one input: a scenario and a frame.
pub(crate) fn check(input: &[u8]) {
    let Some(scenario) = Scenario::read(input) else { return };
    let Scenario { config, routes, own_mac, other_device, packet: frame, .. } = &scenario;
    let is_first = *other_device == 0;
    let device =
        || Some((UnderlayValue::new((*own_mac)?, is_first), if is_first { 7 } else { *other_device }));
    let len = frame.len() + scenario.hidden;
    let verdict = ingress::decide(*frame, len, device, config, routes);
    judge(&scenario, len, verdict);
}

/// The outer headers of a frame that this host's socket would get, whole or in part.
#[derive(Clone, Copy)]
struct Outer<'a> {
    ip: Packet<'a>,
    /// Destination port, length and checksum.
    port: u16,
    udp_len: usize,
    checksum: u16,
}

impl<'a> Outer<'a> {
    /// `None` for a frame that is not this overlay's.
    fn of(scenario: &Scenario<'a>) -> Option<Self> {
        let frame = scenario.packet;
        let to = frame.get(..6)?;
        let ip = Packet::new(frame.get(14..)?)?;
        let is_ours = raw::word(frame, 12) == 0x0800
            && ip.version() == 4
            && ip.header_len() >= 20
            && ip.protocol() == 17
            && ip.destination() == scenario.config.public_ip
            && ip.fragment_offset() == 0;
        let udp = ip.transport().get(..8)?;
        let outer = Self {
            ip,
            port: raw::word(udp, 2),
            udp_len: raw::word(udp, 4).into(),
            checksum: raw::word(udp, 6),
        };
        let own = scenario.own_mac?;
        let is_received = to == own || to[0] % 2 == 1;
        (is_ours && is_received && outer.port == scenario.config.port).then_some(outer)
    }

    fn has_right_lengths(self, len: usize) -> bool {
        self.udp_len >= 8 && self.udp_len + 20 == self.ip.total_len() && self.ip.total_len() + 14 <= len
    }

    fn is_partial(self) -> bool {
        let addresses = [self.ip.source(), self.ip.destination()].concat();
        let length = u16::try_from(self.udp_len).expect("a length of 16 bits").to_be_bytes();
        self.checksum != 0 && self.checksum == raw::sum(&[&addresses[..], &[0, 17], &length].concat())
    }
}

fn judge(scenario: &Scenario<'_>, len: usize, verdict: IngressVerdict) {
    let Some(outer) = Outer::of(scenario) else {
        assert_eq!(verdict, IngressVerdict::Pass, "the frame is not ours");
        return;
    };
    // The stage that the tun rung starts with.
    let payload = || {
        assert!(outer.ip.header_len() == 20 && !outer.ip.is_fragment(), "the kernel has to see it first");
        assert_eq!(outer.ip.header_sum(), 0xffff, "the outer header is corrupt");
        assert!(outer.has_right_lengths(len), "the outer lengths disagree");
        assert!(!outer.is_partial(), "the kernel's state points at the outer checksum");
        let inner = &scenario.packet[42..];
        Inner { inner, len: outer.udp_len - 8, peer: outer.ip.source(), outer_tos: outer.ip.tos() }
    };
    match verdict {
        IngressVerdict::Pass => panic!("the frame is ours"),
        IngressVerdict::Punt(PuntReason::OuterOptions) => assert!(outer.ip.header_len() > 20),
        IngressVerdict::Punt(PuntReason::OuterFragment) => assert!(outer.ip.is_fragment()),
        IngressVerdict::Punt(PuntReason::OuterHeaderChecksum) => assert!(outer.ip.header_sum() != 0xffff),
        IngressVerdict::Punt(PuntReason::OuterLength) => assert!(!outer.has_right_lengths(len)),
        IngressVerdict::Punt(PuntReason::OuterChecksumPartial) => assert!(outer.is_partial()),
        IngressVerdict::Punt(PuntReason::OuterGro) => payload().judge(scenario, InnerVerdict::TrailingBytes),
        IngressVerdict::Punt(PuntReason::SlowPeer) => {
            let inner = payload();
            let Inner { len, peer, outer_tos, .. } = inner;
            let Scenario { packet, config, routes, .. } = scenario;
            let on_slow_path =
                ingress::decide_inner(*packet, 42, len, scenario.sender(peer), outer_tos, config, routes);
            let is_slow = matches!(on_slow_path, InnerVerdict::Decap(decap) if decap.is_slow);
            assert!(is_slow, "the slow path would not deliver it: {on_slow_path:?}");
            inner.judge(scenario, on_slow_path);
        }
        IngressVerdict::Punt(other) => panic!("no reason to punt a frame: {other:?}"),
        IngressVerdict::Decap(decap) => {
            assert!(!decap.is_slow, "a program delivers a packet of a slow peer");
            payload().judge(scenario, InnerVerdict::Decap(decap));
        }
        IngressVerdict::Reject(rejected) => payload().judge(scenario, InnerVerdict::Reject(rejected)),
        IngressVerdict::Drop(reason) => payload().judge(scenario, InnerVerdict::Drop(reason)),
    }
}

/// The payload of a datagram, as far as it can be seen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inner<'a> {
    pub(crate) inner: &'a [u8],
    pub(crate) len: usize,
    pub(crate) peer: [u8; 4],
    pub(crate) outer_tos: u8,
}

impl Inner<'_> {
    /// Checks a verdict about this payload.
    pub(crate) fn judge(self, scenario: &Scenario<'_>, verdict: InnerVerdict) {
        let Some(packet) = Packet::new(self.inner).filter(|_| self.len >= 20) else {
            assert_eq!(verdict, InnerVerdict::Drop(DropReason::Truncated), "there is no header");
            return;
        };
        let is_packet = packet.version() == 4
            && packet.header_len() >= 20
            && packet.header_len() <= packet.total_len()
            && packet.total_len() <= self.len;
        let is_believed = scenario.believes(self.peer, packet.source());
        let is_for_us = contains(scenario.subnet, packet.destination());
        match verdict {
            InnerVerdict::Decap(decap) => {
                assert!(is_packet && packet.total_len() == self.len, "this is no packet");
                assert!(is_believed, "a packet of another host than the holder is delivered");
                assert!(is_for_us, "a packet for another subnet is delivered");
                self.delivered(scenario, packet, decap);
            }
            InnerVerdict::TrailingBytes => {
                assert!(is_packet && packet.total_len() < self.len, "no bytes follow it");
            }
            InnerVerdict::Reject(rejected) => {
                assert_eq!(rejected, Rejection::TtlExpired, "no reason to reject what arrives");
                assert!(packet.ttl() <= 1 && is_packet && is_believed && is_for_us);
                assert!(rejection::may_be_told(packet), "the sender must not be told");
            }
            InnerVerdict::Drop(reason) => self.is_dropped(scenario, packet, reason),
        }
    }

    fn delivered(self, scenario: &Scenario<'_>, packet: Packet<'_>, decap: Decap) {
        let Decap { rewrite, inner_len, protocol, is_slow } = decap;
        assert_eq!((inner_len, protocol), (self.len, packet.protocol()));
        let way = scenario.routes.next_hop(packet.source());
        assert_eq!(is_slow, scenario.slow_ingress || way.is_some_and(|way| way.has(NextHop::SLOW_PATH)));
        assert!(packet.ttl() > 1, "the TTL is used up");
        // RFC 6040 section 4.2, figure 4, by inner and outer codepoint.
        let ecn = match (packet.tos() & 3, self.outer_tos & 3) {
            (0, 3) => panic!("congestion is hidden"),
            (1 | 2, 3) => 3,
            (2, 1) => 1,
            (inner, _) => inner,
        };
        assert_eq!((rewrite.ttl, rewrite.tos), (packet.ttl() - 1, packet.tos() & 0xfc | ecn));
        keeps_checksum(self.inner, rewrite.tos, rewrite.ttl, rewrite.checksum);
    }

    fn is_dropped(self, scenario: &Scenario<'_>, packet: Packet<'_>, reason: DropReason) {
        let (header_len, total_len) = (packet.header_len(), packet.total_len());
        let is_true = match reason {
            DropReason::Truncated => header_len > self.len || total_len > self.len,
            DropReason::BadVersion => !matches!(packet.version(), 4 | 6),
            DropReason::Ipv6 => packet.version() == 6,
            DropReason::BadHeaderLength => header_len < 20,
            DropReason::BadTotalLength => total_len < header_len,
            DropReason::SpoofedSource => !scenario.believes(self.peer, packet.source()),
            DropReason::UnknownSource => scenario.routes.next_hop(packet.source()).is_none(),
            DropReason::NotForUs => !contains(scenario.subnet, packet.destination()),
            DropReason::TtlExpired => packet.ttl() <= 1 && !rejection::may_be_told(packet),
            DropReason::EcnCongestion => packet.tos() & 3 == 0 && self.outer_tos & 3 == 3,
            other => panic!("no reason to drop what arrives: {other:?}"),
        };
        assert!(is_true, "dropped as {reason:?}, which it is not");
    }
}
