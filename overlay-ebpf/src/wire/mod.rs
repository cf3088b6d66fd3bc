//! Typed views of packet headers: one header per file, network byte order inside, host byte order at the accessors.
//!
//! A view is a plain byte array with alignment 1, so it can be laid over packet memory at any address. [`Bytes::view`]
//! checks once that the bytes are there; after that no accessor can fail.

/// Declares accessors that turn fields of a header (network byte order) into plain values (host byte order).
macro_rules! accessors {
    ($header:ident: $($(#[$doc:meta])+ $name:ident -> $type:ty { $value:expr })+) => {$(
        $(#[$doc])+
        #[inline(always)]
        pub fn $name(&self) -> $type {
            let $header = self;
            $value
        }
    )+};
}

pub mod ethernet;
pub mod ipv4;
pub mod udp;

pub use ethernet::Ethernet;
pub use ipv4::Ipv4;
pub use udp::Udp;

use bytemuck::Pod;

/// Bytes that encapsulation adds in front of an inner packet: outer IPv4 (20) and UDP (8).
pub const OVERHEAD: usize = Ipv4::LEN + Udp::LEN;

/// Read access to the bytes of one packet.
///
/// Two implementations: a byte slice (user space, tests) and a bounds-checked packet pointer (the eBPF programs).
pub trait Bytes {
    /// The header `T` at `offset` bytes from the start, or `None` when it does not lie whole inside the packet.
    fn view<T: Pod>(&self, offset: usize) -> Option<&T>;
}

impl Bytes for [u8] {
    fn view<T: Pod>(&self, offset: usize) -> Option<&T> {
        let end = offset.checked_add(size_of::<T>())?;
        bytemuck::try_from_bytes(self.get(offset..end)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_past_the_end_does_not_exist() {
        let packet = [0u8; 20];
        assert!(packet.view::<Ipv4>(0).is_some());
        assert!(packet.view::<Ipv4>(1).is_none());
        assert!(packet.view::<Ipv4>(usize::MAX).is_none());
        assert!([].as_slice().view::<u8>(0).is_none());
    }
}
