//! tc egress of a device that leads to containers, behind the host's stack: confirms flows from peers that may bypass it.
#![allow(unsafe_code, reason = "fields of the kernel's context")]

use aya_ebpf::programs::TcContext;
use overlay_ebpf::wire::{Bytes as _, Ethernet, Ipv4, ethernet::ETHERTYPE_IPV4};

use super::{
    TO_THE_SLOW_PATH, egress, flows, maps,
    memory::{self, Packet},
};

/// Runs on a frame for a container. It always goes on.
#[inline(always)]
pub(super) fn run(ctx: &TcContext) -> i32 {
    let Some(config) = maps::config() else { return TO_THE_SLOW_PATH };
    // SAFETY: the kernel hands the program a valid context.
    let from = unsafe { (*ctx.skb.skb).ingress_ifindex };
    if from != config.overlay_ifindex {
        return TO_THE_SLOW_PATH;
    }
    memory::pull_headers(ctx, Ethernet::LEN + egress::HEADERS);
    let packet = Packet::of_skb(ctx);
    if let (Some(ethernet), Some(header)) = (packet.view::<Ethernet>(0), packet.view::<Ipv4>(Ethernet::LEN))
        && ethernet.ethertype() == ETHERTYPE_IPV4
    {
        flows::confirm(ctx, &packet, Ethernet::LEN, header);
    }
    TO_THE_SLOW_PATH
}
