//! Entry points, one per hook: egress on the overlay device, ingress and XDP on the underlay.
#![allow(unsafe_code, reason = "the kernel finds programs, maps and licence by exported symbols")]

mod egress;
mod flows;
mod from_local;
mod heartbeat;
mod ingress;
mod log;
mod maps;
mod memory;
mod to_local;
mod xdp;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use overlay_ebpf::{
    reason::{DropReason, PuntReason},
    rejection::Rejection,
    wire::Ethernet,
};

/// tcx or clsact egress of the overlay device, whose packets have no link-layer header: encapsulates inner packets.
#[classifier]
fn ovl_egress(ctx: TcContext) -> i32 {
    egress::run::<0>(&ctx)
}

/// The same for devices whose packets have an Ethernet header, as in test runs.
#[classifier]
fn ovl_egress_ethernet(ctx: TcContext) -> i32 {
    egress::run::<{ Ethernet::LEN }>(&ctx)
}

/// tcx or clsact ingress of the underlay: delivers packets that XDP decapsulated, decapsulates the others.
#[classifier]
fn ovl_ingress(ctx: TcContext) -> i32 {
    ingress::run(&ctx)
}

/// tcx or clsact ingress of a device that leads to a container: encapsulates at once what the host's stack need not see.
#[classifier]
fn ovl_from_local(ctx: TcContext) -> i32 {
    from_local::run(&ctx)
}

/// tcx or clsact egress of a device that leads to containers: observes which flows the host's stack lets through.
#[classifier]
fn ovl_to_local(ctx: TcContext) -> i32 {
    to_local::run(&ctx)
}

/// Attached to no device: the agent runs it to show that it is alive.
#[classifier]
fn ovl_heartbeat(_ctx: TcContext) -> i32 {
    heartbeat::beat();
    TC_ACT_UNSPEC
}

/// Native XDP of the underlay: decapsulates packets before the kernel allocates a socket buffer.
#[xdp(frags)]
fn ovl_xdp(ctx: XdpContext) -> u32 {
    xdp::run(&ctx)
}

/// Leaves a packet alone: it continues with the next program and then as without one. From the overlay device that is the
/// agent, on the underlay the kernel's stack, where the agent's socket is.
const TO_THE_SLOW_PATH: i32 = TC_ACT_UNSPEC;

#[inline(always)]
fn punt(reason: PuntReason) -> i32 {
    maps::count(|counters| counters.punt(reason));
    TO_THE_SLOW_PATH
}

/// Hands a rejected packet to the slow path, which tells its sender; discards it when there are too many.
#[inline(always)]
fn reject(rejection: Rejection) -> i32 {
    match maps::is_rejection_due(rejection) {
        true => punt(PuntReason::Rejected),
        false => discard(rejection.reason()),
    }
}

#[inline(always)]
fn discard(reason: DropReason) -> i32 {
    maps::count(|counters| counters.drop(reason));
    TC_ACT_SHOT
}

/// The licence that the kernel's GPL-only helpers require.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // The core never panics (ARCHITECTURE.md, invariant 1): the linker removes this, and the verifier would refuse it.
    loop {}
}
