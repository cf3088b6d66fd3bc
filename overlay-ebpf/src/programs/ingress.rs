//! tc ingress of the underlay: delivers packets that XDP decapsulated, acts on the packet core's verdict about the others.
#![allow(unsafe_code, reason = "kernel helpers that aya does not wrap")]

use aya_ebpf::{
    bindings::{BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_INGRESS, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    helpers::{bpf_redirect, bpf_redirect_peer},
    programs::TcContext,
};
use bytemuck::Zeroable as _;
use overlay_ebpf::{
    abi::{Config, Endpoint, Mark},
    bypass::{self, Bypass},
    hop::Rewrite,
    ingress::{self, INNER_OFFSET},
    reason::{DropReason, PuntReason},
    unfinished,
    verdict::{Decap, IngressVerdict},
    wire::{Bytes as _, Ethernet, Ipv4, OVERHEAD, ipv4::PROTOCOL_TCP},
};

use super::{
    TO_THE_SLOW_PATH, discard, flows, heartbeat,
    log::log_failure,
    maps::{self, RouteMap},
    memory::{self, Packet},
    punt, reject,
};

/// Ethernet, outer and inner headers, and the type of an ICMP message. An outer header with options may reach further; the stack
/// handles those anyway.
const HEADERS: usize = INNER_OFFSET + Ipv4::LEN + ICMP_TYPE;
const ICMP_TYPE: usize = 2;

/// Runs on a frame with its Ethernet header, after GRO: it may be a super-packet.
#[inline(always)]
pub(super) fn run(ctx: &TcContext) -> i32 {
    let Some(config) = maps::config() else {
        log_failure!(ctx, "ingress: the configuration map has no entry");
        return TO_THE_SLOW_PATH;
    };
    let is_decapped = take_mark(ctx, config.mark());
    match (is_decapped, has_vlan_tag(ctx)) {
        (true, false) => return deliver_decapped(ctx, config),
        // A frame of another network, which may use our address; its outer headers are gone.
        (true, true) => return discard(DropReason::VlanTagged),
        (false, true) => return TO_THE_SLOW_PATH,
        (false, false) => {}
    }
    memory::pull_headers(ctx, HEADERS);
    if let Some(header) = Packet::of_skb(ctx).view::<Ipv4>(INNER_OFFSET)
        && header.header_len() > Ipv4::LEN
    {
        memory::pull_headers(ctx, INNER_OFFSET + header.header_len() + ICMP_TYPE);
    }
    // SAFETY: the kernel hands the program a valid context.
    let device = || maps::underlay(config, unsafe { (*ctx.skb.skb).ifindex });
    match ingress::decide(&Packet::of_skb(ctx), ctx.len() as usize, device, config, &RouteMap(config)) {
        IngressVerdict::Pass => TO_THE_SLOW_PATH,
        // The kernel still marks a segmented packet as tunnelled (before 7.x no helper clears that). TCP is segmented
        // correctly all the same; segmentation of UDP would take the inner UDP header for the tunnel's.
        IngressVerdict::Decap(decap) if decap.protocol != PROTOCOL_TCP && memory::gso_size(ctx) != 0 => {
            punt(PuntReason::SegmentedDatagrams)
        }
        IngressVerdict::Decap(decap) => decapsulate(ctx, config, &decap),
        IngressVerdict::Punt(reason) => punt(reason),
        IngressVerdict::Reject(rejection) => reject(rejection),
        IngressVerdict::Drop(reason) => discard(reason),
    }
}

/// Whether XDP on this device decapsulated the frame for this network: another network's mark stays for its own program. This
/// one is erased, because the buffer may pass other hooks.
#[inline(always)]
fn take_mark(ctx: &TcContext, own: Mark) -> bool {
    let mut metadata = Packet::metadata_of_skb(ctx);
    let mark = metadata.view_mut::<Mark>(0).filter(|mark| **mark == own);
    mark.map(|mark| *mark = Mark::zeroed()).is_some()
}

/// Whether the frame belongs to a VLAN: the kernel has taken the tag out of the bytes, but it is not this device's frame.
#[inline(always)]
fn has_vlan_tag(ctx: &TcContext) -> bool {
    // SAFETY: the kernel hands the program a valid context.
    unsafe { (*ctx.skb.skb).vlan_present != 0 }
}

#[inline(always)]
fn decapsulate(ctx: &TcContext, config: &Config, decap: &Decap) -> i32 {
    // Without FIXED_GSO the kernel would grow the segments by what is taken off.
    if let Err(error) = ctx.adjust_room(-(OVERHEAD as i32), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO as u64)
    {
        log_failure!(ctx, "ingress: adjust_room refused to remove headers: error {}", error);
        return discard(DropReason::DecapFailed);
    }
    let mut packet = Packet::of_skb(ctx);
    // Writing past the kernel's running checksum is right here: an IPv4 header sums to the same before and after.
    let Some(inner) = packet.view_mut::<Ipv4>(Ethernet::LEN) else {
        log_failure!(ctx, "ingress: the packet has no inner header behind those that were removed");
        return discard(DropReason::DecapFailed);
    };
    decap.rewrite.apply(inner);
    maps::count_ingress(decap.inner_len);
    hand_over(ctx, &mut packet).unwrap_or_else(|| deliver(config))
}

/// Delivers a packet that XDP decapsulated.
#[inline(always)]
fn deliver_decapped(ctx: &TcContext, config: &Config) -> i32 {
    match maps::bypasses(Bypass::Off) {
        true => deliver(config),
        false => {
            memory::pull_headers(ctx, Ethernet::LEN + super::egress::HEADERS);
            hand_over(ctx, &mut Packet::of_skb(ctx)).unwrap_or_else(|| deliver(config))
        }
    }
}

/// Hands a decapsulated packet to the container that it is for, past the host's stack, if that is possible: this is then its hop
/// through the stack, too.
#[inline(always)]
fn hand_over(ctx: &TcContext, packet: &mut Packet) -> Option<i32> {
    if maps::bypasses(Bypass::Off) || !heartbeat::is_agent_alive() {
        return None;
    }
    let inner = *packet.view::<Ipv4>(Ethernet::LEN)?;
    let endpoint = bypass::enters_container(&inner, &maps::EndpointMap)?;
    if maps::bypasses(Bypass::Flows) && !flows::may_bypass(packet, Ethernet::LEN, &inner) {
        return None;
    }
    // The other packets pass the device, which finishes them where its offloads are switched off.
    let is_finished =
        memory::gso_size(ctx) == 0 && !unfinished::has_partial_checksum(packet, Ethernet::LEN, &inner);
    let inner = packet.view_mut::<Ipv4>(Ethernet::LEN)?;
    Rewrite::next_hop(inner, inner.tos()).apply(inner);
    *packet.view_mut::<Ethernet>(0)? = Ethernet::ipv4(endpoint.mac, endpoint.gateway_mac);
    maps::count(|counters| counters.ingress_bypass_packets += 1);
    let action = match endpoint.flags & Endpoint::PEER != 0 && is_finished {
        // SAFETY: helpers without pointers.
        true => unsafe { bpf_redirect_peer(endpoint.ifindex, 0) },
        false => unsafe { bpf_redirect(endpoint.ifindex, 0) },
    };
    Some(action as i32)
}

/// Delivers the packet through the ingress of the overlay device, like one that the agent writes there.
#[inline(always)]
fn deliver(config: &Config) -> i32 {
    // SAFETY: a helper without pointers.
    unsafe { bpf_redirect(config.overlay_ifindex, BPF_F_INGRESS as u64) as i32 }
}
