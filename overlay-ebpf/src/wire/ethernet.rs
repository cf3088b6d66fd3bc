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

    /// Whether a device with the hardware address `own` receives the frame: it is addressed to that device, or to a group
    /// (IEEE 802-2014 section 8.2.2: the lowest bit of the first byte). A promiscuous device shows others as well.
    #[inline(always)]
    pub fn is_for(&self, own: [u8; 6]) -> bool {
        let [first, ..] = self.0;
        self.is_to(own) || first & 1 == 1
    }

    /// A header with these addresses that announces IPv4.
    #[inline(always)]
    pub fn ipv4(destination: [u8; 6], source: [u8; 6]) -> Self {
        let [a, b, c, d, e, f] = destination;
        let [g, h, i, j, k, l] = source;
        Self([a, b, c, d, e, f, g, h, i, j, k, l, 0x08, 0x00])
    }

    /// Whether the destination is exactly this address.
    #[inline(always)]
    pub fn is_to(&self, address: [u8; 6]) -> bool {
        let [a, b, c, d, e, f, ..] = self.0;
        [a, b, c, d, e, f] == address
    }

    /// Whether the source is this address.
    #[inline(always)]
    pub fn is_from(&self, address: [u8; 6]) -> bool {
        let [_, _, _, _, _, _, a, b, c, d, e, f, _, _] = self.0;
        [a, b, c, d, e, f] == address
    }

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
    fn a_device_receives_its_own_frames_and_those_for_groups() {
        let own = [2, 0, 0, 0, 0, 1];
        let to = |destination: [u8; 6]| {
            let mut frame = [0; 14];
            frame[..6].copy_from_slice(&destination);
            Ethernet(frame).is_for(own)
        };
        assert!(to(own) && to([0xff; 6]) && to([1, 0, 0x5e, 0, 0, 1]));
        assert!(!to([2, 0, 0, 0, 0, 3]) && !to([0; 6]) && !to([2, 1, 0, 0, 0, 1]));
    }

    #[test]
    fn ethertype_is_the_last_two_bytes() {
        let arp = Ethernet([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x08, 0x06]);
        assert_eq!(arp.ethertype(), 0x0806);
        assert_eq!(Ethernet::UNRESOLVED_IPV4.ethertype(), ETHERTYPE_IPV4);
    }
}
