//! Entry points: one per hook. `egress` on the overlay device, `ingress` and `xdp` on the underlay.
#![allow(unsafe_code, reason = "the kernel finds programs, maps and licence by exported symbols")]

mod egress;
mod ingress;
mod maps;
mod memory;
mod xdp;

use aya_ebpf::{
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};

/// tcx or clsact egress of the overlay device: wraps inner packets.
#[classifier]
fn ovl_egress(ctx: TcContext) -> i32 {
    egress::run(&ctx)
}

/// tcx or clsact ingress of the underlay: delivers what XDP unwrapped, unwraps the rest.
#[classifier]
fn ovl_ingress(ctx: TcContext) -> i32 {
    ingress::run(&ctx)
}

/// Native XDP of the underlay: unwraps packets before the kernel allocates a socket buffer.
#[xdp(frags)]
fn ovl_xdp(ctx: XdpContext) -> u32 {
    xdp::run(&ctx)
}

/// What the kernel's GPL-only helpers ask for.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // The core never panics (ARCHITECTURE.md, invariant 1): the linker removes this, and the verifier would refuse it.
    loop {}
}
