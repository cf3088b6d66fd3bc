//! Ingress: what to do with a packet that arrived on the underlay.
//!
//! Two stages. [`decide`] takes a whole Ethernet frame and checks whether it is addressed to this overlay; the eBPF programs
//! call it. [`decide_inner`] decides about the inner packet; the tun datapath, for which the kernel's UDP socket has removed
//! the outer headers, starts there.

use crate::{
    abi::{Config, NextHop, UnderlayValue},
    checksum,
    hop::Rewrite,
    inner,
    reason::{DropReason, PuntReason},
    rejection::{Rejection, may_answer},
    route::Routes,
    source::{self, Sender},
    verdict::{Decap, IngressVerdict, InnerVerdict},
    wire::{
        Bytes, Ethernet, Ipv4, OVERHEAD, Udp,
        ethernet::ETHERTYPE_IPV4,
        ipv4::{ECN_CE, ECN_ECT0, ECN_ECT1, ECN_MASK, ECN_NOT_ECT, PROTOCOL_UDP},
    },
};

/// Where the inner packet starts in a frame whose outer header has no options: 42 bytes.
pub const INNER_OFFSET: usize = Ethernet::LEN + OVERHEAD;

/// Decides about an Ethernet frame of `len` bytes (of which `frame` need not show all, but headers). `device` is the one that
/// received it, and its index; `None` for a device that carries no outer packets.
#[inline(always)]
pub fn decide<P: Bytes + ?Sized>(
    frame: &P,
    len: usize,
    device: impl FnOnce() -> Option<(UnderlayValue, u32)>,
    config: &Config,
    routes: &impl Routes,
) -> IngressVerdict {
    let Some((ipv4, udp, device)) = ours(frame, device, config) else { return IngressVerdict::Pass };
    if ipv4.header_len() > Ipv4::LEN {
        return IngressVerdict::Punt(PuntReason::OuterOptions);
    }
    if ipv4.is_fragment() {
        return IngressVerdict::Punt(PuntReason::OuterFragment);
    }
    if !ipv4.has_valid_checksum() {
        return IngressVerdict::Punt(PuntReason::OuterHeaderChecksum);
    }
    if Ethernet::LEN + ipv4.total_len() > len
        || udp.length() < Udp::LEN
        || udp.length() + Ipv4::LEN != ipv4.total_len()
    {
        return IngressVerdict::Punt(PuntReason::OuterLength);
    }
    if is_partial(&ipv4, &udp) {
        return IngressVerdict::Punt(PuntReason::OuterChecksumPartial);
    }
    let payload = udp.length() - Udp::LEN;
    let sender = Sender { address: ipv4.source(), device };
    match decide_inner(frame, INNER_OFFSET, payload, sender, ipv4.tos(), config, routes) {
        InnerVerdict::Decap(decap) if decap.is_slow => IngressVerdict::Punt(PuntReason::SlowPeer),
        InnerVerdict::Decap(decap) => IngressVerdict::Decap(decap),
        InnerVerdict::Reject(rejection) => IngressVerdict::Reject(rejection),
        InnerVerdict::TrailingBytes => IngressVerdict::Punt(PuntReason::OuterGro),
        InnerVerdict::Drop(reason) => IngressVerdict::Drop(reason),
    }
}

/// Decides about the inner packet at `offset` in `packet`, the payload of a datagram from `sender` that is `payload` bytes
/// long and with `outer_tos` in its outer header.
#[inline(always)]
pub fn decide_inner<P: Bytes + ?Sized>(
    packet: &P,
    offset: usize,
    payload: usize,
    sender: Sender,
    outer_tos: u8,
    config: &Config,
    routes: &impl Routes,
) -> InnerVerdict {
    let header = match inner::header(packet, offset, payload) {
        Ok(header) => header,
        Err(reason) => return InnerVerdict::Drop(reason),
    };
    if header.total_len() < payload {
        return InnerVerdict::TrailingBytes;
    }
    let flags = match source::check_ingress(config, routes, header.source(), sender) {
        Ok(flags) => flags,
        Err(reason) => return InnerVerdict::Drop(reason),
    };
    if !config.subnet.contains(header.destination()) {
        return InnerVerdict::Drop(DropReason::NotForUs);
    }
    if header.ttl() <= 1 {
        return match may_answer(packet, offset, &header) {
            true => InnerVerdict::Reject(Rejection::TtlExpired),
            false => InnerVerdict::Drop(DropReason::TtlExpired),
        };
    }
    let Some(tos) = decap_tos(outer_tos, header.tos()) else {
        return InnerVerdict::Drop(DropReason::EcnCongestion);
    };
    InnerVerdict::Decap(Decap {
        rewrite: Rewrite::next_hop(&header, tos),
        inner_len: header.total_len(),
        protocol: header.protocol(),
        is_slow: config.is_ingress_slow() || flags & NextHop::SLOW_PATH != 0,
    })
}

/// The outer headers of a frame that is addressed to this overlay: IPv4 to our public address, UDP to our port, and not a frame
/// for another host that a promiscuous device shows us. The third value is [`Sender::device`].
#[inline(always)]
fn ours<P: Bytes + ?Sized>(
    frame: &P,
    device: impl FnOnce() -> Option<(UnderlayValue, u32)>,
    config: &Config,
) -> Option<(Ipv4, Udp, u32)> {
    let ethernet = *frame.view::<Ethernet>(0)?;
    if ethernet.ethertype() != ETHERTYPE_IPV4 {
        return None;
    }
    let ipv4 = *frame.view::<Ipv4>(Ethernet::LEN)?;
    if ipv4.version() != 4
        || ipv4.header_len() < Ipv4::LEN
        || ipv4.protocol() != PROTOCOL_UDP
        || !config.is_own_address(ipv4.destination())
        || ipv4.is_later_fragment()
    {
        return None;
    }
    let udp = *frame.view::<Udp>(Ethernet::LEN + ipv4.header_len())?;
    if udp.destination_port() != config.port {
        return None;
    }
    // Last: it is looked up, for packets of this overlay only.
    let (underlay, ifindex) = device()?;
    ethernet.is_for(underlay.mac).then_some((ipv4, udp, underlay.sender_device(ifindex)))
}

/// Whether the outer UDP checksum is the bare pseudo header's sum: the sender's kernel left it to offload hardware, and on veth
/// and virtio there is none. The kernel then keeps a pointer to the outer UDP header, which must not be cut off
/// under it: a later completion would write into the wrong bytes. One finished checksum in 65536 looks the same; the slow
/// path handles that datagram just as well.
#[inline(always)]
fn is_partial(ipv4: &Ipv4, udp: &Udp) -> bool {
    let pseudo_header =
        checksum::pseudo_header(ipv4.source(), ipv4.destination(), PROTOCOL_UDP, udp.length() as u16);
    udp.checksum() != 0 && udp.checksum() == pseudo_header
}

/// The inner TOS after decapsulation (RFC 6040 section 4.2, figure 4), or `None` when the packet must be dropped:
/// congestion was marked and the inner transport would not see it.
#[inline(always)]
fn decap_tos(outer: u8, inner: u8) -> Option<u8> {
    match (outer & ECN_MASK, inner & ECN_MASK) {
        (ECN_CE, ECN_NOT_ECT) => None,
        (ECN_CE, _) => Some(inner | ECN_CE),
        (ECN_ECT1, ECN_ECT0) => Some((inner & !ECN_MASK) | ECN_ECT1),
        (_, _) => Some(inner),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ecn_follows_figure_4_of_rfc_6040() {
        // Rows: inner Not-ECT, ECT(0), ECT(1), CE. Columns: outer Not-ECT, ECT(0), ECT(1), CE.
        let figure = [
            (0b00, [Some(0b00), Some(0b00), Some(0b00), None]),
            (0b10, [Some(0b10), Some(0b10), Some(0b01), Some(0b11)]),
            (0b01, [Some(0b01), Some(0b01), Some(0b01), Some(0b11)]),
            (0b11, [Some(0b11), Some(0b11), Some(0b11), Some(0b11)]),
        ];
        for (inner, row) in figure {
            for (outer, expected) in [0b00, 0b10, 0b01, 0b11].into_iter().zip(row) {
                assert_eq!(decap_tos(outer, inner), expected, "outer {outer:02b} inner {inner:02b}");
                // The DSCP of the inner header survives (RFC 2983, uniform treatment of the outer's).
                let with_dscp = decap_tos(outer | 0xb8, inner | 0x28);
                assert_eq!(with_dscp, expected.map(|ecn| ecn | 0x28));
            }
        }
    }

    #[test]
    fn the_source_check_decides_which_senders_are_believed() {
        use crate::{
            abi::{Prefix, TosRule},
            source::SourceCheck,
        };

        struct One(NextHop);
        impl Routes for One {
            fn next_hop(&self, address: [u8; 4]) -> Option<NextHop> {
                (address[2] == 2).then_some(self.0)
            }

            fn present_address(&self, former: [u8; 4]) -> Option<[u8; 4]> {
                // The second is of another peer.
                match former {
                    [192, 168, 77, 22] => Some(self.0.peer),
                    [192, 168, 77, 23] => Some([192, 168, 77, 3]),
                    _ => None,
                }
            }
        }
        let own = Prefix::new([10, 244, 1, 0], 24);
        let config = Config::new([192, 168, 77, 1], Prefix::new([10, 244, 0, 0], 16), own, 8285);
        let (peer, other) = ([192, 168, 77, 2], [192, 168, 77, 3]);
        let decide_on = |device: u32, third: u8, address: [u8; 4], check: SourceCheck, flags: u16| {
            let packet = [0x45, 0, 0, 20, 0, 0, 0, 0, 64, 1, 0, 0, 10, 244, third, 2, 10, 244, 1, 9];
            let routes = One(NextHop { peer, ifindex: 2, mtu: 1472, flags, ..NextHop::default() });
            let config = config.with_policy(TosRule::COPY, check);
            decide_inner(&packet[..], 0, 20, Sender { address, device }, 0, &config, &routes)
        };
        let decide = |third, address, check, flags| decide_on(0, third, address, check, flags);
        let (spoofed, unknown) =
            (InnerVerdict::Drop(DropReason::SpoofedSource), InnerVerdict::Drop(DropReason::UnknownSource));
        let accepted = |verdict| matches!(verdict, InnerVerdict::Decap(decap) if !decap.is_slow);
        use SourceCheck::{Loose, Off, Strict};
        for check in [Strict, Loose, Off] {
            assert!(accepted(decide(2, peer, check, 0)), "{check:?}");
            assert_eq!(decide(1, peer, check, 0), spoofed, "{check:?}");
            let slow = decide(2, peer, check, NextHop::SLOW_PATH);
            assert!(matches!(slow, InnerVerdict::Decap(decap) if decap.is_slow), "{check:?}");
        }
        assert_eq!(decide(2, other, Strict, 0), spoofed);
        assert_eq!((decide(3, peer, Strict, 0), decide(3, peer, Loose, 0)), (unknown, unknown));
        assert!(accepted(decide(2, other, Loose, 0)) && accepted(decide(3, other, Off, 0)));
        let [former, others] = [[192, 168, 77, 22], [192, 168, 77, 23]];
        assert!(accepted(decide(2, former, Strict, 0)) && accepted(decide_on(2, 2, former, Strict, 0)));
        assert_eq!((decide(2, others, Strict, 0), decide(3, former, Strict, 0)), (spoofed, unknown));
        assert_eq!(decide_on(3, 2, former, Strict, 0), spoofed);
        // The peer is reached through the device 2.
        assert!(accepted(decide_on(2, 2, peer, Strict, 0)) && accepted(decide_on(3, 2, peer, Loose, 0)));
        assert_eq!(decide_on(3, 2, peer, Strict, 0), spoofed);
    }
}
