//! Source validation: who may send a packet from which overlay address (BCP 38 for the overlay).

use crate::{abi::Config, reason::DropReason, route::Routes};

/// Checks an inner packet that leaves this host. Fails with the reason to drop it.
///
/// Its source may be an address of our own subnet, or one outside the overlay, such as the host's own: the receiver
/// decides whether to accept that. An overlay address that another host holds is spoofed.
#[inline(always)]
pub fn check_egress(config: &Config, source: [u8; 4]) -> Result<(), DropReason> {
    match config.subnet.contains(source) || !config.network.contains(source) {
        true => Ok(()),
        false => Err(DropReason::SpoofedSource),
    }
}

/// Checks an inner packet that arrived from `peer`: that host must hold the lease of the inner source. Fails with the reason
/// to drop it.
#[inline(always)]
pub fn check_ingress(
    config: &Config,
    routes: &impl Routes,
    source: [u8; 4],
    peer: [u8; 4],
) -> Result<(), DropReason> {
    if config.subnet.contains(source) {
        return Err(DropReason::SpoofedSource);
    }
    match routes.peer_of(source) {
        Some(holder) if holder == peer => Ok(()),
        Some(_) => Err(DropReason::SpoofedSource),
        None => Err(DropReason::UnknownSource),
    }
}
