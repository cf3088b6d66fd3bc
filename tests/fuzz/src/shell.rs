//! The tun rung without its I/O: what it does with a packet must be what the core decides, with the agent's own lookup of routes.

use overlay_agent::datapath::tun::{
    Lookup,
    shell::{self, Refusal},
};
use overlay_ebpf::{
    egress,
    hop::Rewrite,
    ingress,
    reason::DropReason,
    verdict::{EgressVerdict, InnerVerdict},
};

use crate::{egress::judge, fragments, ingress::Inner, partial, scenario::Scenario};

/// Checks one input, a scenario and a packet, in both directions.
pub(crate) fn check(input: &[u8]) {
    let Some(scenario) = Scenario::read(input) else { return };
    let lookup = Lookup::new(&scenario.routes.next_hops());
    check_egress(&scenario, &lookup);
    check_ingress(&scenario, &lookup);
}

fn check_egress(scenario: &Scenario<'_>, lookup: &Lookup) {
    let Scenario { config, routes, packet, .. } = scenario;
    let verdict = egress::decide(*packet, 0, packet.len(), 0, config, routes);
    judge(scenario, packet.len(), 0, verdict);
    let mut buffer = packet.to_vec();
    let sent = shell::egress(&mut buffer, config, lookup);
    let (encap, is_fragment) = match verdict {
        EgressVerdict::Encap(encap) | EgressVerdict::SlowEncap(_, encap) => (encap, false),
        EgressVerdict::Fragment(encap) => (encap, true),
        EgressVerdict::TooLong => return refused(packet, &buffer, sent, DropReason::TooLong.into()),
        EgressVerdict::Reject(rejection) => {
            return refused(packet, &buffer, sent, Refusal::Reject(rejection));
        }
        EgressVerdict::Drop(reason) => return refused(packet, &buffer, sent, reason.into()),
    };
    let to = sent.expect("the core sends the packet");
    assert_eq!((to.next_hop, to.tos, to.fragment), (encap.next_hop, encap.outer.ipv4.tos(), is_fragment));
    assert_eq!(buffer, rewritten(packet, encap.rewrite), "the packet is changed in another way");
    if to.fragment {
        fragments::judge(&buffer, to.next_hop.mtu.into());
    }
}

fn check_ingress(scenario: &Scenario<'_>, lookup: &Lookup) {
    let Scenario { config, routes, packet, sender: peer, outer_tos, .. } = scenario;
    let sender = scenario.sender(*peer);
    let verdict = ingress::decide_inner(*packet, 0, packet.len(), sender, *outer_tos, config, routes);
    let payload = Inner { inner: packet, len: packet.len(), peer: *peer, outer_tos: *outer_tos };
    payload.judge(scenario, verdict);
    let mut buffer = packet.to_vec();
    let delivered = shell::ingress(&mut buffer, sender, *outer_tos, config, lookup);
    match verdict {
        InnerVerdict::Decap(decap) => {
            delivered.expect("the core delivers the packet");
            assert_eq!(buffer, rewritten(packet, decap.rewrite), "the packet is changed in another way");
            partial::judge(&buffer, scenario.device_mtu.into());
        }
        InnerVerdict::TrailingBytes => {
            refused(packet, &buffer, delivered, DropReason::TrailingBytes.into());
        }
        InnerVerdict::Reject(rejection) => refused(packet, &buffer, delivered, Refusal::Reject(rejection)),
        InnerVerdict::Drop(reason) => refused(packet, &buffer, delivered, reason.into()),
    }
}

fn refused<T>(packet: &[u8], buffer: &[u8], decided: Result<T, Refusal>, expected: Refusal) {
    assert_eq!(decided.err(), Some(expected));
    assert_eq!(packet, buffer, "a packet that is refused is changed: its sender is told about another one");
}

fn rewritten(packet: &[u8], rewrite: Rewrite) -> Vec<u8> {
    let mut packet = packet.to_vec();
    (packet[1], packet[8]) = (rewrite.tos, rewrite.ttl);
    packet[10..12].copy_from_slice(&rewrite.checksum.to_be_bytes());
    packet
}
