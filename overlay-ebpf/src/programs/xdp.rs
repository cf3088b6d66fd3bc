//! XDP of the underlay: decapsulates a frame before GRO and marks it for the tc program behind it, which delivers it.
#![allow(unsafe_code, reason = "kernel helpers that aya does not wrap")]

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS},
    helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_meta, bpf_xdp_get_buff_len},
    programs::XdpContext,
};
use overlay_ebpf::{
    abi::{Config, Mark},
    ingress,
    reason::{DropReason, PuntReason},
    verdict::{Decap, IngressVerdict},
    wire::{Bytes as _, Ethernet, Ipv4, OVERHEAD},
};

use super::{
    log::log_failure,
    maps::{self, RouteMap},
    memory::Packet,
};

/// Runs on a frame as the driver received it.
#[inline(always)]
pub(super) fn run(ctx: &XdpContext) -> u32 {
    let Some(config) = maps::config() else {
        log_failure!(ctx, "xdp: the configuration map has no entry");
        return XDP_PASS;
    };
    // SAFETY: the context is the one the kernel gave us.
    let len = unsafe { bpf_xdp_get_buff_len(ctx.ctx) } as usize;
    let device = || maps::underlay(config, ctx.ingress_ifindex() as u32);
    match ingress::decide(&Packet::of_xdp(ctx), len, device, config, &RouteMap(config)) {
        IngressVerdict::Pass => XDP_PASS,
        IngressVerdict::Decap(decap) => decapsulate(ctx, config, &decap),
        // Not counted: the tc program sees the same frame, comes to the same verdict and counts it.
        IngressVerdict::Punt(_) | IngressVerdict::Reject(_) => XDP_PASS,
        IngressVerdict::Drop(reason) => discard(reason),
    }
}

#[inline(always)]
fn decapsulate(ctx: &XdpContext, config: &Config, decap: &Decap) -> u32 {
    let Some(ethernet) = Packet::of_xdp(ctx).view::<Ethernet>(0).copied() else {
        log_failure!(ctx, "xdp: the frame has no Ethernet header");
        return discard(DropReason::DecapFailed);
    };
    if let Err(error) = adjust_head(ctx, OVERHEAD as i32) {
        log_failure!(ctx, "xdp: adjust_head refused to remove headers: error {}", error);
        return discard(DropReason::DecapFailed);
    }
    // Behind the outer headers, where the frame was, memory is in the cache: in front of the frame, the mark would cost a miss.
    // SAFETY: the context is the one the kernel gave us.
    if unsafe { bpf_xdp_adjust_meta(ctx.ctx, -(size_of::<Mark>() as i32)) } != 0 {
        // A driver without metadata: the tc program decapsulates the frame, of which no byte has changed.
        if let Err(error) = adjust_head(ctx, -(OVERHEAD as i32)) {
            log_failure!(ctx, "xdp: adjust_head refused to restore headers: error {}", error);
            return discard(DropReason::DecapFailed);
        }
        maps::count(|counters| counters.punt(PuntReason::NoRoomForMark));
        return XDP_PASS;
    }
    if write_headers(ctx, ethernet, config.mark(), decap).is_none() {
        log_failure!(
            ctx,
            "xdp: the frame has no inner header or no mark behind the headers that were removed"
        );
        return discard(DropReason::DecapFailed);
    }
    maps::count_ingress(decap.inner_len);
    XDP_PASS
}

/// Moves the start of the frame by so many bytes.
#[inline(always)]
fn adjust_head(ctx: &XdpContext, bytes: i32) -> Result<(), i64> {
    // SAFETY: the context is the one the kernel gave us.
    match unsafe { bpf_xdp_adjust_head(ctx.ctx, bytes) } {
        0 => Ok(()),
        error => Err(error),
    }
}

/// Writes the Ethernet header in front of the inner packet, and the mark in front of both. `None` when there is no room.
#[inline(always)]
fn write_headers(ctx: &XdpContext, ethernet: Ethernet, mark: Mark, decap: &Decap) -> Option<()> {
    let mut packet = Packet::of_xdp(ctx);
    decap.rewrite.apply(packet.view_mut::<Ipv4>(Ethernet::LEN)?);
    *packet.view_mut::<Ethernet>(0)? = ethernet;
    *Packet::metadata_of_xdp(ctx).view_mut::<Mark>(0)? = mark;
    Some(())
}

#[inline(always)]
fn discard(reason: DropReason) -> u32 {
    maps::count(|counters| counters.drop(reason));
    XDP_DROP
}
