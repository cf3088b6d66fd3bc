//! Source validation: which overlay addresses a sender may use (BCP 38 for the overlay).

use crate::{
    abi::{Config, NextHop},
    reason::DropReason,
    route::Routes,
};

/// How strictly the sources of inner packets are checked. No mode accepts a packet from a peer with a source in our own subnet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum SourceCheck {
    /// The sender's underlay address must hold the lease of the inner source.
    #[default]
    Strict = 0,
    /// Some peer must hold the lease of the inner source: for peers whose packets come from another address than their record
    /// says, such as behind NAT.
    Loose = 1,
    /// Any inner source, as with flannel.
    Off = 2,
}

/// Checks an inner packet that leaves this host. Fails with the reason to drop it.
///
/// Its source may be an address of our own subnet, or one outside the overlay, such as the host's own: the receiver
/// decides whether to accept that. An overlay address that another host holds is spoofed.
#[inline(always)]
pub fn check_egress(config: &Config, source: [u8; 4]) -> Result<(), DropReason> {
    if config.subnet.contains(source) || !config.network.contains(source) {
        return Ok(());
    }
    match config.source_check() {
        SourceCheck::Strict | SourceCheck::Loose => Err(DropReason::SpoofedSource),
        SourceCheck::Off => Ok(()),
    }
}

/// Checks an inner packet that arrived from `peer`. Returns the way back to its source, if there is one; fails with the reason to
/// drop the packet.
#[inline(always)]
pub fn check_ingress(
    config: &Config,
    routes: &impl Routes,
    source: [u8; 4],
    peer: [u8; 4],
) -> Result<Option<NextHop>, DropReason> {
    if config.subnet.contains(source) {
        return Err(DropReason::SpoofedSource);
    }
    let holder = routes.next_hop(source);
    match (config.source_check(), &holder) {
        (SourceCheck::Strict, Some(holder)) if holder.peer != peer => Err(DropReason::SpoofedSource),
        (SourceCheck::Strict | SourceCheck::Loose, None) => Err(DropReason::UnknownSource),
        (SourceCheck::Strict | SourceCheck::Loose, Some(_)) | (SourceCheck::Off, _) => Ok(holder),
    }
}
