//! What the packet core decides about one packet.

use bytemuck::{Pod, Zeroable};

use crate::{
    abi::NextHop,
    hop::Rewrite,
    reason::{DropReason, PuntReason},
    rejection::Rejection,
    wire::{Ipv4, Udp},
};

/// What to do with an inner packet that was routed to the overlay device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EgressVerdict {
    /// Encapsulate it and send it to a peer.
    Encap(Encap),
    /// As [`EgressVerdict::Encap`], but on the slow path: a program punts it for this reason.
    SlowEncap(PuntReason, Encap),
    /// Longer than the path carries, and it may be fragmented: a program punts it, and the slow path fragments and encapsulates
    /// it.
    Fragment(Encap),
    /// Longer than one outer packet can be: a program punts it, and the slow path receives it in segments.
    TooLong,
    /// Discard and count it, and tell its sender: a program punts it, and the slow path does that.
    Reject(Rejection),
    /// Discard and count it.
    Drop(DropReason),
}

/// What to do with a packet that arrived on the underlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IngressVerdict {
    /// Not addressed to this overlay: leave it alone.
    Pass,
    /// Decapsulate it and deliver the inner packet.
    Decap(Decap),
    /// Hand it to the slow path.
    Punt(PuntReason),
    /// Discard and count it, and tell its sender: a program punts it, and the slow path does that.
    Reject(Rejection),
    /// Discard and count it.
    Drop(DropReason),
}

/// What to do with the payload of a datagram that was addressed to this overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InnerVerdict {
    /// Deliver the inner packet.
    Decap(Decap),
    /// Bytes follow the inner packet: datagrams that the kernel merged, which its socket separates, or a malformed one.
    TrailingBytes,
    /// Discard and count it, and tell its sender.
    Reject(Rejection),
    /// Discard and count it.
    Drop(DropReason),
}

/// How to encapsulate an inner packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encap {
    /// The headers to put in front of it.
    pub outer: Outer,
    /// The inner header's new fields.
    pub rewrite: Rewrite,
    /// The way to the peer.
    pub next_hop: NextHop,
}

/// Outer IPv4 and UDP header as they go on the wire: 28 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Outer {
    /// IPv4 header.
    pub ipv4: Ipv4,
    /// UDP header.
    pub udp: Udp,
}

/// How to decapsulate a packet: remove the bytes in front of the inner header and apply `rewrite` to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decap {
    /// The inner header's new fields.
    pub rewrite: Rewrite,
    /// Length of the inner packet in bytes.
    pub inner_len: usize,
    /// Protocol of the inner packet's payload.
    pub protocol: u8,
    /// Whether a program leaves the packet to the slow path ([`NextHop::SLOW_PATH`]).
    pub is_slow: bool,
}
