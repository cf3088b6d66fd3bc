//! Ethernet II header (IEEE 802.3, without VLAN tag).

use bytemuck::{Pod, Zeroable};

/// EtherType of IPv4 (RFC 894).
pub const ETHERTYPE_IPV4: u16 = 0x0800;

/// The 14 bytes in front of a packet on an Ethernet device: destination, source, EtherType.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Ethernet([u8; 14]);

impl Ethernet {
    /// Length in bytes.
    pub const LEN: usize = 14;

    /// A header with zero addresses that announces IPv4: what a packet needs so that the kernel's
    /// `bpf_redirect_neigh` can replace it by the resolved neighbour's.
    pub const UNRESOLVED_IPV4: Self = Self([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x08, 0x00]);

    /// EtherType, host byte order.
    #[inline(always)]
    pub fn ethertype(&self) -> u16 {
        let [.., high, low] = self.0;
        u16::from_be_bytes([high, low])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ethertype_is_the_last_two_bytes() {
        let arp = Ethernet([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x08, 0x06]);
        assert_eq!(arp.ethertype(), 0x0806);
        assert_eq!(Ethernet::UNRESOLVED_IPV4.ethertype(), ETHERTYPE_IPV4);
    }
}
