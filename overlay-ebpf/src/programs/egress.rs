//! Egress of the overlay device: acts on the packet core's verdict about an inner packet.
#![allow(unsafe_code, reason = "kernel helpers that aya does not wrap")]

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO, TC_ACT_SHOT,
        TC_ACT_UNSPEC, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::{bpf_redirect_neigh, bpf_skb_change_head},
    programs::TcContext,
};
use overlay_ebpf::{
    abi::Config,
    egress::{self, Encap, Outer},
    verdict::{DropReason, EgressVerdict, PuntReason},
    wire::{Bytes as _, Ethernet, Ipv4, OVERHEAD},
};

use super::{
    maps::{self, RouteMap},
    memory::{self, Packet},
};

/// Grow the packet, keep its segments' size (the device's MTU leaves the room), and tell the kernel what the new bytes
/// are, so that it can cut a super-packet into segments that carry outer headers each.
const ENCAP_FLAGS: u64 =
    (BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP) as u64;

/// Inner header and ports. More is pulled only for packets with IP options: pulling rearranges the buffer.
const HEADERS: usize = Ipv4::LEN + 4;

/// `EALREADY`: the kernel allows one level of encapsulation per socket buffer.
const EALREADY: i64 = 114;

/// `TC_ACT_UNSPEC` goes on to the next program and then to the device, whose other end is the agent.
const TO_THE_AGENT: i32 = TC_ACT_UNSPEC;

/// Runs on an inner packet, behind the device's link-layer header if it has one.
#[inline(always)]
pub(super) fn run(ctx: &TcContext) -> i32 {
    let Some(config) = maps::config() else {
        return TO_THE_AGENT;
    };
    let link_header = maps::link_header();
    memory::make_visible(ctx, link_header + HEADERS);
    if let Some(header) = Packet::of_skb(ctx).view::<Ipv4>(link_header)
        && header.header_len() > Ipv4::LEN
    {
        let headers = link_header + header.header_len() + 4;
        memory::make_visible(ctx, headers);
    }
    let len = ctx.len() as usize - link_header;
    match egress::decide(&Packet::of_skb(ctx), link_header, len, config, &RouteMap) {
        EgressVerdict::Encap(encap) => redirect(ctx, config, &encap, link_header, len),
        EgressVerdict::Punt(reason) => {
            maps::count_punt(reason);
            TO_THE_AGENT
        }
        EgressVerdict::Drop(reason) => {
            maps::count_drop(reason);
            TC_ACT_SHOT
        }
    }
}

/// Wraps the packet and hands it to the underlay, where the kernel resolves the neighbour as for any routed packet.
#[inline(always)]
fn redirect(ctx: &TcContext, config: &Config, encap: &Encap, link_header: usize, len: usize) -> i32 {
    match ctx.adjust_room(OVERHEAD as i32, BPF_ADJ_ROOM_MAC, ENCAP_FLAGS) {
        Ok(()) => {}
        Err(error) if error == -EALREADY => {
            maps::count_punt(PuntReason::AlreadyEncapsulated);
            return TO_THE_AGENT;
        }
        Err(_) => return failed(),
    }
    // SAFETY: the context is the one the kernel gave us; the helper checks the length.
    if link_header == 0 && unsafe { bpf_skb_change_head(ctx.as_ptr().cast(), Ethernet::LEN as u32, 0) } != 0 {
        return failed();
    }
    let mut packet = Packet::of_skb(ctx);
    let Some(inner) = packet.view_mut::<Ipv4>(Ethernet::LEN + OVERHEAD) else {
        return failed();
    };
    inner.apply(encap.rewrite);
    let Some(outer) = packet.view_mut::<Outer>(Ethernet::LEN) else {
        return failed();
    };
    *outer = encap.outer;
    let Some(ethernet) = packet.view_mut::<Ethernet>(0) else {
        return failed();
    };
    *ethernet = Ethernet::UNRESOLVED_IPV4;
    maps::count_egress(len);
    // SAFETY: no parameters: the kernel looks up the next hop of the outer destination itself.
    unsafe { bpf_redirect_neigh(config.underlay_ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

#[inline(always)]
fn failed() -> i32 {
    maps::count_drop(DropReason::EncapFailed);
    TC_ACT_SHOT
}
