//! Egress of the overlay device: acts on the packet core's verdict about an inner packet.
#![allow(unsafe_code, reason = "kernel helpers that aya does not wrap")]

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::{bpf_redirect, bpf_redirect_neigh, bpf_skb_change_head},
    programs::TcContext,
};
use overlay_ebpf::{
    abi::NextHop,
    bypass::Bypass,
    egress,
    hop::Rewrite,
    reason::{DropReason, PuntReason},
    verdict::{EgressVerdict, Encap, Outer},
    wire::{Bytes as _, Ethernet, Ipv4, OVERHEAD},
};

use super::{
    TO_THE_SLOW_PATH, discard, flows, heartbeat,
    log::log_failure,
    maps::{self, RouteMap},
    memory::{self, Packet},
    punt, reject,
};

/// Grow the packet, keep its segments' size (the device's MTU leaves the room), and tell the kernel what the new bytes
/// are, so that it can cut a super-packet into segments that carry outer headers each.
const ENCAP_FLAGS: u64 =
    (BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP) as u64;

/// Of the transport header, what the core looks at: ports, TCP's data offset, the checksum.
const TRANSPORT: usize = 18;
/// Inner headers. More is pulled only for packets with IP options: pulling rearranges the buffer.
pub(super) const HEADERS: usize = Ipv4::LEN + TRANSPORT;

/// `EALREADY`: the kernel allows one level of encapsulation per socket buffer.
const EALREADY: i64 = 114;

/// Runs on an inner packet behind `LINK` bytes of link-layer header: 0 or 14.
#[inline(always)]
pub(super) fn run<const LINK: usize>(ctx: &TcContext) -> i32 {
    let Some(config) = maps::config() else {
        log_failure!(ctx, "egress: the configuration map has no entry");
        return TO_THE_SLOW_PATH;
    };
    memory::pull_headers(ctx, LINK + HEADERS);
    if let Some(header) = Packet::of_skb(ctx).view::<Ipv4>(LINK)
        && header.header_len() > Ipv4::LEN
    {
        memory::pull_headers(ctx, LINK + header.header_len() + TRANSPORT);
    }
    let len = ctx.len() as usize - LINK;
    match egress::decide(&Packet::of_skb(ctx), LINK, len, memory::gso_size(ctx), config, &RouteMap(config)) {
        EgressVerdict::Encap(encap) => {
            if maps::bypasses(Bypass::Flows) {
                confirm::<LINK>(ctx);
            }
            redirect::<LINK>(ctx, &encap, len, false)
        }
        EgressVerdict::SlowEncap(reason, _) => punt(reason),
        EgressVerdict::Fragment(_) => punt(PuntReason::PathMtu),
        EgressVerdict::TooLong => punt(PuntReason::TooLong),
        EgressVerdict::Reject(rejection) => reject(rejection),
        EgressVerdict::Drop(reason) => discard(reason),
    }
}

/// The host's stack has forwarded this packet: its flow may bypass it, if it arrived as it leaves.
#[inline(always)]
fn confirm<const LINK: usize>(ctx: &TcContext) {
    // SAFETY: the kernel hands the program a valid context.
    let from = unsafe { (*ctx.skb.skb).ingress_ifindex };
    let packet = Packet::of_skb(ctx);
    // 0: it comes from this host.
    if from != 0
        && let Some(header) = packet.view::<Ipv4>(LINK)
    {
        flows::confirm(ctx, &packet, LINK, header);
    }
}

/// Encapsulates the packet and hands it to the underlay: to the device, when the link-layer addresses are known, and otherwise to
/// the kernel, which resolves the neighbour as for any routed packet. With `bypass`, it comes from a container, and this is its hop
/// through the host's stack, too.
#[inline(always)]
pub(super) fn redirect<const LINK: usize>(ctx: &TcContext, encap: &Encap, len: usize, bypass: bool) -> i32 {
    match ctx.adjust_room(OVERHEAD as i32, BPF_ADJ_ROOM_MAC, ENCAP_FLAGS) {
        Ok(()) => {}
        Err(error) if error == -EALREADY => return punt(PuntReason::AlreadyEncapsulated),
        Err(error) => {
            log_failure!(ctx, "egress: adjust_room refused to add headers: error {}", error);
            return discard(DropReason::EncapFailed);
        }
    }
    if LINK == 0 {
        // SAFETY: the context is the one the kernel gave us; the helper checks the length.
        let error = unsafe { bpf_skb_change_head(ctx.as_ptr().cast(), Ethernet::LEN as u32, 0) };
        if error != 0 {
            log_failure!(ctx, "egress: change_head refused to add an Ethernet header: error {}", error);
            return discard(DropReason::EncapFailed);
        }
    }
    if write_headers(ctx, encap, bypass).is_none() {
        log_failure!(ctx, "egress: the packet has no room for the headers that were added");
        return discard(DropReason::EncapFailed);
    }
    maps::count(|counters| {
        counters.egress_packets += 1;
        counters.egress_bytes += len as u64;
        if bypass {
            counters.egress_bypass_packets += 1;
        }
    });
    let ifindex = encap.next_hop.ifindex;
    let action = match encap.next_hop.has(NextHop::RESOLVED) && heartbeat::is_agent_alive() {
        // SAFETY: a helper without pointers.
        true => unsafe { bpf_redirect(ifindex, 0) },
        // SAFETY: no parameters: the kernel looks up the next hop of the outer destination itself.
        false => unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) },
    };
    action as i32
}

/// Writes the new headers into the room that was made for them. `None` when it is not there.
#[inline(always)]
fn write_headers(ctx: &TcContext, encap: &Encap, bypass: bool) -> Option<()> {
    let mut packet = Packet::of_skb(ctx);
    let inner = packet.view_mut::<Ipv4>(Ethernet::LEN + OVERHEAD)?;
    encap.rewrite.apply(inner);
    if bypass {
        Rewrite::next_hop(inner, inner.tos()).apply(inner);
    }
    *packet.view_mut::<Outer>(Ethernet::LEN)? = encap.outer;
    *packet.view_mut::<Ethernet>(0)? = encap.next_hop.ethernet();
    Some(())
}
