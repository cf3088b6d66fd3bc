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
    /// The sender's underlay address must hold the lease of the inner source, or have held it until a moment ago, and on another underlay device than the first, that
    /// peer must be reached through it.
    #[default]
    Strict = 0,
    /// Some peer must hold the lease of the inner source: for peers whose packets come from another address than their record
    /// says, such as behind NAT.
    Loose = 1,
    /// Any inner source, as with flannel.
    Off = 2,
}

/// The sender of an outer packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sender {
    /// Its underlay address, network byte order.
    pub address: [u8; 4],
    /// The device on which the packet arrived; 0 for the first underlay device, where packets of all peers may arrive. Others come
    /// with routes, and may lead to hosts or containers that are no peers.
    pub device: u32,
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

/// Checks an inner packet that arrived from `sender`. Returns the flags of the way back to its source, 0 without one; fails with
/// the reason to drop the packet.
#[inline(always)]
pub fn check_ingress(
    config: &Config,
    routes: &impl Routes,
    source: [u8; 4],
    sender: Sender,
) -> Result<u16, DropReason> {
    if config.subnet.contains(source) {
        return Err(DropReason::SpoofedSource);
    }
    let Some(holder) = routes.next_hop(source) else {
        return match config.source_check() {
            SourceCheck::Strict | SourceCheck::Loose => Err(DropReason::UnknownSource),
            SourceCheck::Off => Ok(0),
        };
    };
    let is_holder = holder.peer == sender.address && (sender.device == 0 || sender.device == holder.ifindex);
    match config.source_check() {
        SourceCheck::Strict if !is_holder && !was_holder(routes, &holder, sender) => {
            Err(DropReason::SpoofedSource)
        }
        SourceCheck::Strict | SourceCheck::Loose | SourceCheck::Off => Ok(holder.flags),
    }
}

/// Whether a sender that does not hold a lease by its address has just changed it.
#[inline(always)]
fn was_holder(routes: &impl Routes, holder: &NextHop, sender: Sender) -> bool {
    (holder.ifindex == sender.device || sender.device == 0)
        && routes.present_address(sender.address) == Some(holder.peer)
}
