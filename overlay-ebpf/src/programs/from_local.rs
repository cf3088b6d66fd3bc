//! tc ingress of a device that leads to a container: encapsulates a packet for a peer at once, past the host's stack.
#![allow(unsafe_code, reason = "fields of the kernel's context")]

use aya_ebpf::programs::TcContext;
use overlay_ebpf::{
    bypass::{self, Bypass},
    egress::decide,
    verdict::EgressVerdict,
    wire::{Bytes as _, Ethernet, Ipv4},
};

use super::{
    TO_THE_SLOW_PATH, egress, flows, heartbeat,
    maps::{self, EndpointMap, RouteMap},
    memory::{self, Packet},
};

/// Leaves a packet to the host's stack: it forwards it to the overlay device, where [`egress`] decides, counts, and tells the
/// sender about errors.
const TO_THE_STACK: i32 = TO_THE_SLOW_PATH;

/// Runs on a frame of a container.
#[inline(always)]
pub(super) fn run(ctx: &TcContext) -> i32 {
    let Some(config) = maps::config() else { return TO_THE_STACK };
    memory::pull_headers(ctx, Ethernet::LEN + egress::HEADERS);
    let packet = Packet::of_skb(ctx);
    let (Some(ethernet), Some(header)) = (packet.view::<Ethernet>(0), packet.view::<Ipv4>(Ethernet::LEN))
    else {
        return TO_THE_STACK;
    };
    // SAFETY: the kernel hands the program a valid context.
    let (ifindex, vlan) = unsafe { ((*ctx.skb.skb).ifindex, (*ctx.skb.skb).vlan_present) };
    if vlan != 0
        || !heartbeat::is_agent_alive()
        || !bypass::leaves_container(ethernet, header, ifindex, config, &EndpointMap)
    {
        return TO_THE_STACK;
    }
    if maps::bypasses(Bypass::Flows) && !flows::may_bypass(&packet, Ethernet::LEN, header) {
        return TO_THE_STACK;
    }
    let len = ctx.len() as usize - Ethernet::LEN;
    match decide(&packet, Ethernet::LEN, len, memory::gso_size(ctx), config, &RouteMap(config)) {
        EgressVerdict::Encap(encap) => egress::redirect::<{ Ethernet::LEN }>(ctx, &encap, len, true),
        _ => TO_THE_STACK,
    }
}
