//! XDP of the underlay: unwraps a frame before GRO and marks it for the tc program behind it, which delivers it.
#![allow(unsafe_code, reason = "kernel helpers that aya does not wrap")]

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS},
    helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_meta, bpf_xdp_get_buff_len},
    programs::XdpContext,
};
use overlay_ebpf::{
    abi::DECAPPED_MARK,
    ingress::{self, Decap},
    verdict::{DropReason, IngressVerdict, PuntReason},
    wire::{Bytes as _, Ethernet, Ipv4, OVERHEAD},
};

use super::{
    maps::{self, RouteMap},
    memory::Packet,
};

/// Runs on a frame as the driver received it.
#[inline(always)]
pub(super) fn run(ctx: &XdpContext) -> u32 {
    let Some(config) = maps::config() else {
        return XDP_PASS;
    };
    // SAFETY: the context is the one the kernel gave us.
    let len = unsafe { bpf_xdp_get_buff_len(ctx.ctx) } as usize;
    match ingress::decide(&Packet::of_xdp(ctx), len, config, &RouteMap) {
        IngressVerdict::Pass => XDP_PASS,
        IngressVerdict::Decap(decap) => unwrap(ctx, &decap),
        // Not counted: the tc program sees the same frame, comes to the same verdict and counts it.
        IngressVerdict::Punt(_) => XDP_PASS,
        IngressVerdict::Drop(reason) => {
            maps::count_drop(reason);
            XDP_DROP
        }
    }
}

#[inline(always)]
fn unwrap(ctx: &XdpContext, decap: &Decap) -> u32 {
    // The mark first: a driver may have no room for it, and then the frame is still whole for the tc program to unwrap.
    // SAFETY: the context is the one the kernel gave us.
    if unsafe { bpf_xdp_adjust_meta(ctx.ctx, -(DECAPPED_MARK.len() as i32)) } != 0 {
        maps::count_punt(PuntReason::NoRoomForMark);
        return XDP_PASS;
    }
    let Some(ethernet) = Packet::of_xdp(ctx).view::<Ethernet>(0).copied() else {
        return failed();
    };
    // SAFETY: the context is the one the kernel gave us. The metadata moves along.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, OVERHEAD as i32) } != 0 {
        return failed();
    }
    let mut packet = Packet::of_xdp(ctx);
    let Some(inner) = packet.view_mut::<Ipv4>(Ethernet::LEN) else {
        return failed();
    };
    inner.apply(decap.rewrite);
    let Some(header) = packet.view_mut::<Ethernet>(0) else {
        return failed();
    };
    *header = ethernet;
    let mut metadata = Packet::metadata_of_xdp(ctx);
    let Some(mark) = metadata.view_mut::<[u8; 8]>(0) else {
        return failed();
    };
    *mark = DECAPPED_MARK;
    maps::count_ingress(decap.inner_len);
    XDP_PASS
}

#[inline(always)]
fn failed() -> u32 {
    maps::count_drop(DropReason::DecapFailed);
    XDP_DROP
}
