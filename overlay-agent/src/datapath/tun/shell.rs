//! The tun rung without its I/O: applies the packet core's verdicts to packets in user space.

use overlay_ebpf::{
    abi::{Config, NextHop},
    egress,
    hop::Rewrite,
    ingress,
    reason::DropReason,
    rejection::Rejection,
    route::Routes,
    source::Sender,
    verdict::{EgressVerdict, Encap, InnerVerdict},
    wire::Ipv4,
};

/// Where to send the inner packet that is now in the buffer, as the payload of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The way to the peer.
    pub next_hop: NextHop,
    /// TOS of the outer header; the kernel sets the other fields.
    pub tos: u8,
    /// Whether the packet is longer than the path carries: its fragments have to be sent.
    pub fragment: bool,
}

/// Why a packet is discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Without telling the sender.
    Drop(DropReason),
    /// The sender is to be told; the packet is as it was.
    Reject(Rejection),
}

impl Refusal {
    /// The reason under which the packet is counted.
    pub fn reason(self) -> DropReason {
        match self {
            Self::Drop(reason) => reason,
            Self::Reject(rejection) => rejection.reason(),
        }
    }
}

impl From<DropReason> for Refusal {
    fn from(reason: DropReason) -> Self {
        Self::Drop(reason)
    }
}

/// Decides about an inner packet read from the overlay device, which is no super-packet, and rewrites it in place.
pub fn egress(packet: &mut [u8], config: &Config, routes: &impl Routes) -> Result<Destination, Refusal> {
    let (encap, fragment) = match egress::decide(packet, 0, packet.len(), 0, config, routes) {
        EgressVerdict::Encap(encap) | EgressVerdict::SlowEncap(_, encap) => (encap, false),
        EgressVerdict::Fragment(encap) => (encap, true),
        EgressVerdict::TooLong => return Err(DropReason::TooLong.into()),
        EgressVerdict::Reject(rejection) => return Err(Refusal::Reject(rejection)),
        EgressVerdict::Drop(reason) => return Err(reason.into()),
    };
    let Encap { outer, rewrite, next_hop } = encap;
    apply(packet, rewrite)?;
    Ok(Destination { next_hop, tos: outer.ipv4.tos(), fragment })
}

/// Decides about the payload of a datagram from `sender` with `tos` in its outer header, and rewrites it in place for the
/// overlay device.
pub fn ingress(
    payload: &mut [u8],
    sender: Sender,
    tos: u8,
    config: &Config,
    routes: &impl Routes,
) -> Result<(), Refusal> {
    match ingress::decide_inner(payload, 0, payload.len(), sender, tos, config, routes) {
        InnerVerdict::Decap(decap) => Ok(apply(payload, decap.rewrite)?),
        InnerVerdict::TrailingBytes => Err(DropReason::TrailingBytes.into()),
        InnerVerdict::Reject(rejection) => Err(Refusal::Reject(rejection)),
        InnerVerdict::Drop(reason) => Err(reason.into()),
    }
}

fn apply(packet: &mut [u8], rewrite: Rewrite) -> Result<(), DropReason> {
    let header = packet.get_mut(..Ipv4::LEN).ok_or(DropReason::Truncated)?;
    let header: &mut Ipv4 = bytemuck::try_from_bytes_mut(header).map_err(|_| DropReason::Truncated)?;
    rewrite.apply(header);
    Ok(())
}
