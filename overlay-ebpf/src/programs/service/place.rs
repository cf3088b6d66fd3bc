//! Where the address of a call stands in the kernel's context.
#![allow(unsafe_code, reason = "fields of the kernel's context")]

use aya_ebpf::{bindings::bpf_sock_addr, programs::SockAddrContext};
use overlay_ebpf::service::abi::Address;

/// Where an IPv4 address is read and written. All accesses are volatile and 32 bits wide: the verifier refuses those that the compiler
/// would merge.
pub(super) trait Place {
    /// The IPv4 address; `None` for other addresses.
    fn ip(ctx: *mut bpf_sock_addr) -> Option<u32>;
    fn set_ip(ctx: *mut bpf_sock_addr, ip: u32);
}

/// An address of an IPv4 socket.
pub(super) struct V4;
/// An address of an IPv6 socket, v4-mapped (RFC 4291 section 2.5.5.2).
pub(super) struct V6;

/// The third word of a v4-mapped address, network byte order.
const MAPPED: u32 = 0xffff_u32.to_be();

impl Place for V4 {
    #[inline(always)]
    fn ip(ctx: *mut bpf_sock_addr) -> Option<u32> {
        // SAFETY: the context is the one the kernel gave us.
        Some(unsafe { core::ptr::read_volatile(&raw const (*ctx).user_ip4) })
    }

    #[inline(always)]
    fn set_ip(ctx: *mut bpf_sock_addr, ip: u32) {
        // SAFETY: the context is the one the kernel gave us; the hooks permit this write.
        unsafe { core::ptr::write_volatile(&raw mut (*ctx).user_ip4, ip) }
    }
}

impl Place for V6 {
    #[inline(always)]
    fn ip(ctx: *mut bpf_sock_addr) -> Option<u32> {
        // SAFETY: the context is the one the kernel gave us.
        let first = unsafe { core::ptr::read_volatile(&raw const (*ctx).user_ip6[0]) };
        // SAFETY: as above.
        let second = unsafe { core::ptr::read_volatile(&raw const (*ctx).user_ip6[1]) };
        // SAFETY: as above.
        let third = unsafe { core::ptr::read_volatile(&raw const (*ctx).user_ip6[2]) };
        if first != 0 || second != 0 || third != MAPPED {
            return None;
        }
        // SAFETY: as above.
        Some(unsafe { core::ptr::read_volatile(&raw const (*ctx).user_ip6[3]) })
    }

    #[inline(always)]
    fn set_ip(ctx: *mut bpf_sock_addr, ip: u32) {
        // SAFETY: the context is the one the kernel gave us; the hooks permit this write.
        unsafe { core::ptr::write_volatile(&raw mut (*ctx).user_ip6[3], ip) }
    }
}

/// The address and port of the call; `None` when it is no IPv4 address.
#[inline(always)]
pub(super) fn read<P: Place>(ctx: &SockAddrContext) -> Option<Address> {
    let ip = P::ip(ctx.sock_addr)?.to_ne_bytes();
    // SAFETY: the context is the one the kernel gave us.
    let port = unsafe { core::ptr::read_volatile(&raw const (*ctx.sock_addr).user_port) };
    Some(Address { ip, port: (port as u16).to_ne_bytes() })
}

/// Replaces them.
#[inline(always)]
pub(super) fn write<P: Place>(ctx: &SockAddrContext, address: Address) {
    P::set_ip(ctx.sock_addr, u32::from_ne_bytes(address.ip));
    let port = u16::from_ne_bytes(address.port) as u32;
    // SAFETY: the context is the one the kernel gave us; the hooks permit this write.
    unsafe { core::ptr::write_volatile(&raw mut (*ctx.sock_addr).user_port, port) }
}

/// The protocol of the socket.
#[inline(always)]
pub(super) fn protocol(ctx: &SockAddrContext) -> u32 {
    // SAFETY: the context is the one the kernel gave us.
    unsafe { core::ptr::read_volatile(&raw const (*ctx.sock_addr).protocol) }
}
