//! What belongs to a socket: in the kernel's storage of that socket, so that it ends with the socket and no other displaces it.
#![allow(unsafe_code, reason = "the kernel's storage of sockets")]

use core::ffi::c_void;

use aya_ebpf::{
    btf_maps::SkStorage,
    helpers::bpf_sk_storage_get,
    macros::btf_map,
    programs::{SockAddrContext, SockContext, SockOpsContext},
};
use overlay_ebpf::service::{
    abi::UDP,
    translation::{Connection, Translations},
};

use super::maps;

/// The connection of a socket.
#[btf_map]
static CONNECTED: SkStorage<Connection> = SkStorage::new();

/// Where the datagrams of an unconnected socket go.
#[btf_map]
static SENT: SkStorage<Translations> = SkStorage::new();

/// The connection of the socket, if it ever had one.
#[inline(always)]
pub(super) fn connection(ctx: &SockAddrContext) -> Option<&mut Connection> {
    // SAFETY: the context is the one the kernel gave us, and has a socket.
    let connection = unsafe { CONNECTED.get_ptr_mut(ctx) };
    // SAFETY: the storage lives as long as the socket, which is locked: no other reference exists.
    unsafe { connection.as_mut() }
}

/// The same, made if it is missing. `None` when the kernel has no memory.
#[inline(always)]
pub(super) fn make_connection(ctx: &SockAddrContext) -> Option<&mut Connection> {
    // SAFETY: the context is the one the kernel gave us, and has a socket.
    let connection = unsafe { CONNECTED.get_or_insert_ptr_mut(ctx, None) };
    // SAFETY: the storage lives as long as the socket, which is locked: no other reference exists.
    unsafe { connection.as_mut() }
}

/// Where the datagrams of the socket went, if it ever sent to a virtual address.
#[inline(always)]
pub(super) fn sent(ctx: &SockAddrContext) -> Option<&mut Translations> {
    // SAFETY: the context is the one the kernel gave us, and has a socket.
    let sent = unsafe { SENT.get_ptr_mut(ctx) };
    // SAFETY: the storage lives as long as the socket, which is locked: no other reference exists.
    unsafe { sent.as_mut() }
}

/// The same, made if it is missing. `None` when the kernel has no memory.
#[inline(always)]
pub(super) fn make_sent(ctx: &SockAddrContext) -> Option<&mut Translations> {
    // SAFETY: the context is the one the kernel gave us, and has a socket.
    let sent = unsafe { SENT.get_or_insert_ptr_mut(ctx, None) };
    // SAFETY: the storage lives as long as the socket, which is locked: no other reference exists.
    unsafe { sent.as_mut() }
}

/// The connection of a TCP socket whose state changes, if it ever had one to a virtual address.
#[inline(always)]
pub(super) fn connection_of(ctx: &SockOpsContext) -> Option<&mut Connection> {
    // SAFETY: the context is the one the kernel gave us. Volatile: the verifier refuses accesses that the compiler would merge.
    let socket = unsafe { core::ptr::read_volatile(&raw const (*ctx.ops).__bindgen_anon_2.sk) };
    if socket.is_null() {
        return None;
    }
    of_socket(socket.cast(), &CONNECTED)
}

/// Ends all connections of a socket that is closed.
#[inline(always)]
pub(super) fn release(ctx: &SockContext) {
    if let Some(connection) = of_socket(ctx.sock.cast(), &CONNECTED)
        && let Some(backend) = connection.translation.counted()
    {
        maps::closed(backend);
        // SAFETY: the context is the one the kernel gave us. Volatile: the verifier refuses accesses that the compiler would merge.
        if unsafe { core::ptr::read_volatile(&raw const (*ctx.sock).protocol) } == UDP as u32 {
            maps::withdraw(ctx);
        }
        if connection.abandon(maps::now()) {
            maps::failed(connection.service, backend);
        }
    }
    if let Some(sent) = of_socket(ctx.sock.cast(), &SENT) {
        for translation in &sent.all {
            if let Some(backend) = translation.counted() {
                maps::closed(backend);
            }
        }
    }
}

/// What a map has for a socket that is locked or closed.
#[inline(always)]
fn of_socket<'a, T>(socket: *mut c_void, map: &'static SkStorage<T>) -> Option<&'a mut T> {
    let map = core::ptr::from_ref(map).cast_mut().cast();
    // SAFETY: the socket is the context's.
    let value = unsafe { bpf_sk_storage_get(map, socket, core::ptr::null_mut(), 0) };
    // SAFETY: the storage lives as long as the socket; no other program runs for a socket that is locked or closed.
    unsafe { value.cast::<T>().as_mut() }
}
