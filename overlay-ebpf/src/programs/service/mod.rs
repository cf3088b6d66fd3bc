//! Entry points, one per hook of a cgroup: they replace virtual addresses when a socket connects or sends, and restore them when it
//! receives or asks for its peer. All others pass. One more counts what becomes of TCP connections.
//!
//! The kernel calls each with the socket locked, except at the release of a socket, when no other thread has it.
#![allow(unsafe_code, reason = "the kernel finds programs, maps and licence by exported symbols")]

mod maps;
mod outcomes;
mod place;
mod sockets;
mod translate;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, sock_ops},
    programs::{SockAddrContext, SockContext, SockOpsContext},
};

use place::{V4, V6};

#[cgroup_sock_addr(connect4)]
fn svc_connect4(ctx: SockAddrContext) -> i32 {
    translate::connect::<V4>(&ctx)
}

/// Of an IPv6 socket, to a v4-mapped address.
#[cgroup_sock_addr(connect6)]
fn svc_connect6(ctx: SockAddrContext) -> i32 {
    translate::connect::<V6>(&ctx)
}

/// UDP to an address that is given with the datagram.
#[cgroup_sock_addr(sendmsg4)]
fn svc_sendmsg4(ctx: SockAddrContext) -> i32 {
    translate::send::<V4>(&ctx)
}

/// The same of an IPv6 socket. Linux 6.18 hands v4-mapped addresses to the IPv4 hook alone (`udpv6_sendmsg` in net/ipv6/udp.c); this
/// one is here so that no translation depends on that.
#[cgroup_sock_addr(sendmsg6)]
fn svc_sendmsg6(ctx: SockAddrContext) -> i32 {
    translate::send::<V6>(&ctx)
}

#[cgroup_sock_addr(recvmsg4)]
fn svc_recvmsg4(ctx: SockAddrContext) -> i32 {
    translate::receive::<V4>(&ctx);
    translate::ALLOW
}

#[cgroup_sock_addr(recvmsg6)]
fn svc_recvmsg6(ctx: SockAddrContext) -> i32 {
    translate::receive::<V6>(&ctx);
    translate::ALLOW
}

#[cgroup_sock_addr(getpeername4)]
fn svc_peername4(ctx: SockAddrContext) -> i32 {
    translate::peer::<V4>(&ctx);
    translate::ALLOW
}

#[cgroup_sock_addr(getpeername6)]
fn svc_peername6(ctx: SockAddrContext) -> i32 {
    translate::peer::<V6>(&ctx);
    translate::ALLOW
}

/// Ends the connections of a socket in the endpoints' numbers of connections.
#[cgroup_sock(sock_release)]
fn svc_release(ctx: SockContext) -> i32 {
    sockets::release(&ctx);
    translate::ALLOW
}

/// Counts what becomes of TCP connections to virtual addresses.
#[sock_ops]
fn svc_outcomes(ctx: SockOpsContext) -> u32 {
    outcomes::observe(&ctx);
    outcomes::CONTINUE
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
