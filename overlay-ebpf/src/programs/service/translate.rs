//! What the programs do at each hook.
#![allow(unsafe_code, reason = "a kernel helper that aya does not wrap")]

use aya_ebpf::{helpers::bpf_set_retval, programs::SockAddrContext};
use overlay_ebpf::service::{
    abi::{Address, Backend, ServiceEntry, ServiceKey, TCP, UDP},
    select::{member, select},
    translation::{Connection, Translation},
};

use super::{
    maps::{self, Maps},
    place::{self, Place},
    sockets,
};

/// The call goes on.
pub(super) const ALLOW: i32 = 1;
/// The call fails.
const REFUSE: i32 = 0;

/// Errors of calls (asm-generic/errno.h).
const ENOMEM: i32 = 12;
const ECONNREFUSED: i32 = 111;

/// A socket connects.
#[inline(always)]
pub(super) fn connect<P: Place>(ctx: &SockAddrContext) -> i32 {
    let is_udp = place::protocol(ctx) == UDP as u32;
    // Whatever it was connected to, it is no more.
    if let Some(former) = sockets::connection(ctx)
        && let Some(backend) = former.translation.counted()
    {
        maps::closed(backend);
        *former = Connection::default();
        if is_udp {
            maps::withdraw(ctx);
        }
    }
    let Some((address, entry)) = service::<P>(ctx) else { return ALLOW };
    let Some(backend) = choose(ctx, &entry) else { return refuse_for(&entry) };
    let Some(connection) = sockets::make_connection(ctx) else { return refuse(ENOMEM) };
    *connection = Connection::new(address, &backend, entry.service);
    if is_udp {
        maps::publish(ctx, &connection.translation);
    }
    maps::opened(backend.id);
    maps::picked(entry.service, backend.id);
    place::write::<P>(ctx, backend.address);
    ALLOW
}

/// A UDP socket sends to an address that is given with the datagram.
#[inline(always)]
pub(super) fn send<P: Place>(ctx: &SockAddrContext) -> i32 {
    let Some((address, entry)) = service::<P>(ctx) else { return ALLOW };
    if let Some(sent) = sockets::sent(ctx)
        && let Some(current) = sent.current(address)
    {
        if member(&entry, current.to, &Maps).is_some() {
            place::write::<P>(ctx, current.to);
            return ALLOW;
        }
        sent.retire(address);
    }
    let Some(backend) = choose(ctx, &entry) else { return refuse_for(&entry) };
    let Some(sent) = sockets::make_sent(ctx) else { return refuse(ENOMEM) };
    if let Some(forgotten) = sent.add(Translation::new(address, &backend)).counted() {
        maps::closed(forgotten);
    }
    maps::opened(backend.id);
    maps::picked(entry.service, backend.id);
    place::write::<P>(ctx, backend.address);
    ALLOW
}

/// A UDP socket receives a datagram and asks for its source.
#[inline(always)]
pub(super) fn receive<P: Place>(ctx: &SockAddrContext) {
    let Some(source) = place::read::<P>(ctx) else { return };
    let from_connection = sockets::connection(ctx).and_then(|connection| connection.translation.back(source));
    let from = match from_connection {
        Some(from) => Some(from),
        None => sockets::sent(ctx).and_then(|sent| sent.back(source)),
    };
    if let Some(from) = from {
        place::write::<P>(ctx, from);
    }
}

/// A program asks for the peer of its connection.
#[inline(always)]
pub(super) fn peer<P: Place>(ctx: &SockAddrContext) {
    let Some(peer) = place::read::<P>(ctx) else { return };
    if let Some(from) = sockets::connection(ctx).and_then(|connection| connection.translation.back(peer)) {
        place::write::<P>(ctx, from);
    }
}

/// The virtual address of the call, and its service.
#[inline(always)]
fn service<P: Place>(ctx: &SockAddrContext) -> Option<(Address, ServiceEntry)> {
    let address = place::read::<P>(ctx)?;
    let protocol = match place::protocol(ctx) {
        protocol if protocol == TCP as u32 => TCP,
        protocol if protocol == UDP as u32 => UDP,
        _ => return None,
    };
    let entry = maps::service(ServiceKey::new(address, protocol))?;
    Some((address, entry))
}

#[inline(always)]
fn choose(ctx: &SockAddrContext, entry: &ServiceEntry) -> Option<Backend> {
    select(entry, maps::client(ctx), &Maps)
}

/// There is no usable endpoint.
#[inline(always)]
fn refuse_for(entry: &ServiceEntry) -> i32 {
    maps::refused(entry.service);
    refuse(ECONNREFUSED)
}

#[inline(always)]
fn refuse(error: i32) -> i32 {
    // SAFETY: a helper with plain numbers.
    unsafe { bpf_set_retval(-error) };
    REFUSE
}
