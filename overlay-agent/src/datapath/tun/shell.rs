//! The tun rung without its I/O: applies the packet core's verdicts to packets in user space. An error is the reason to drop
//! the packet.

use overlay_ebpf::{
    abi::Config,
    egress,
    hop::Rewrite,
    ingress,
    reason::DropReason,
    route::Routes,
    verdict::{EgressVerdict, InnerVerdict},
    wire::Ipv4,
};

/// Where to send the inner packet that is now in the buffer, as the payload of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Underlay address of the peer.
    pub peer: [u8; 4],
    /// TOS of the outer header; the kernel sets the other fields.
    pub tos: u8,
}

/// Decides about an inner packet read from the overlay device, and rewrites it in place.
pub fn egress(packet: &mut [u8], config: &Config, routes: &impl Routes) -> Result<Destination, DropReason> {
    match egress::decide(packet, 0, packet.len(), config, routes) {
        EgressVerdict::Encap(encap) => {
            apply(packet, encap.rewrite)?;
            Ok(Destination { peer: encap.peer, tos: encap.outer.ipv4.tos() })
        }
        EgressVerdict::TooLong => Err(DropReason::TooLong),
        EgressVerdict::Drop(reason) => Err(reason),
    }
}

/// Decides about the payload of a datagram from `peer` with `tos` in its outer header, and rewrites it in place for the
/// overlay device.
pub fn ingress(
    payload: &mut [u8],
    peer: [u8; 4],
    tos: u8,
    config: &Config,
    routes: &impl Routes,
) -> Result<(), DropReason> {
    match ingress::decide_inner(payload, 0, payload.len(), peer, tos, config, routes) {
        InnerVerdict::Decap(decap) => apply(payload, decap.rewrite),
        InnerVerdict::TrailingBytes => Err(DropReason::TrailingBytes),
        InnerVerdict::Drop(reason) => Err(reason),
    }
}

fn apply(packet: &mut [u8], rewrite: Rewrite) -> Result<(), DropReason> {
    let header = packet.get_mut(..Ipv4::LEN).ok_or(DropReason::Truncated)?;
    let header: &mut Ipv4 = bytemuck::try_from_bytes_mut(header).map_err(|_| DropReason::Truncated)?;
    rewrite.apply(header);
    Ok(())
}
