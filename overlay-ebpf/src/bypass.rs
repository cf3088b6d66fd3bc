//! Bypass: which packets go straight between a container and the underlay, past the host's stack.
//!
//! The host's stack would forward such a packet unchanged but for its TTL. So a program may do that only for what it recognises beyond
//! doubt: a plain IPv4 packet between a known container and a peer. Everything else is left to the stack, which also tells
//! senders about errors.

use crate::{
    abi::{Config, Endpoint},
    wire::{Ethernet, Ipv4},
};

/// The containers of this host.
pub trait Endpoints {
    /// The container with this address; `None` if it is not known.
    fn endpoint(&self, address: [u8; 4]) -> Option<Endpoint>;
}

/// What the kernel was told by `--bypass`: a constant of the loaded programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Bypass {
    /// No packet bypasses the host's stack.
    #[default]
    Off = 0,
    /// Packets of flows that the stack has let through unchanged a moment ago.
    Flows = 1,
    /// All packets between known containers and peers.
    All = 2,
}

/// Whether a frame that arrived on the device `ifindex` comes from the container that holds its source address, and asks its gateway
/// to forward it to another host: `ethernet` and `header` are its headers.
#[inline(always)]
pub fn leaves_container(
    ethernet: &Ethernet,
    header: &Ipv4,
    ifindex: u32,
    config: &Config,
    endpoints: &impl Endpoints,
) -> bool {
    if !is_plain(ethernet, header) || !is_to_peer(header, config) {
        return false;
    }
    let Some(endpoint) = endpoints.endpoint(header.source()) else { return false };
    endpoint.ifindex == ifindex
        && ethernet.is_from(endpoint.mac)
        && ethernet.is_to(endpoint.gateway_mac)
        // This host's stack and the overlay device decrement it.
        && header.ttl() > 2
}

/// The container to which a decapsulated packet with the inner `header` can be handed at once, `None` when the stack has to
/// forward it.
#[inline(always)]
pub fn enters_container(header: &Ipv4, endpoints: &impl Endpoints) -> Option<Endpoint> {
    if header.header_len() != Ipv4::LEN || header.ttl() <= 1 {
        return None;
    }
    endpoints.endpoint(header.destination())
}

/// Whether a frame is IPv4 without options, which routers may have to act on (RFC 791 section 3.1).
#[inline(always)]
fn is_plain(ethernet: &Ethernet, header: &Ipv4) -> bool {
    ethernet.ethertype() == crate::wire::ethernet::ETHERTYPE_IPV4
        && header.version() == 4
        && header.header_len() == Ipv4::LEN
}

#[inline(always)]
fn is_to_peer(header: &Ipv4, config: &Config) -> bool {
    config.network.contains(header.destination()) && !config.subnet.contains(header.destination())
}
