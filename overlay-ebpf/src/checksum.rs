//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).

use crate::wire::{Ipv4, ipv4};

/// The checksum of `old_checksum`'s data after one 16-bit word changed from `old` to `new`.
///
/// RFC 1624 equation 3, `HC' = ~(~HC + ~m + m')`; equation 4 and RFC 1141 are wrong when the sum becomes zero. All in
/// host byte order.
#[inline(always)]
pub fn update(old_checksum: u16, old: u16, new: u16) -> u16 {
    !fold(!old_checksum as u32 + !old as u32 + new as u32)
}

/// The checksum that an IPv4 header without options should carry, whatever it carries now. Host byte order.
#[inline(always)]
pub fn of_header(header: &Ipv4) -> u16 {
    let [w0, w1, w2, w3, w4, _checksum, w6, w7, w8, w9] = header.words();
    let sum = w0 as u32 + w1 as u32 + w2 as u32 + w3 as u32 + w4 as u32;
    !fold(sum + w6 as u32 + w7 as u32 + w8 as u32 + w9 as u32)
}

/// Whether the checksum of an IPv4 header without options is right (RFC 791: zero and all ones are the same sum).
#[inline(always)]
pub fn header_is_valid(header: &Ipv4) -> bool {
    let right = of_header(header);
    header.checksum() == right || (right == 0 && header.checksum() == 0xffff)
}

/// The folded, not complemented sum of a TCP or UDP pseudo header (RFC 9293 section 3.1, RFC 768).
///
/// The kernel leaves exactly this in the checksum field of a packet whose checksum is still to be completed
/// (`CHECKSUM_PARTIAL`): over veth or virtio it may never be.
#[inline(always)]
pub fn pseudo_header(source: [u8; 4], destination: [u8; 4], protocol: u8, length: u16) -> u16 {
    let [s0, s1, s2, s3] = source;
    let [d0, d1, d2, d3] = destination;
    let addresses = u16::from_be_bytes([s0, s1]) as u32
        + u16::from_be_bytes([s2, s3]) as u32
        + u16::from_be_bytes([d0, d1]) as u32
        + u16::from_be_bytes([d2, d3]) as u32;
    fold(addresses + protocol as u32 + length as u32)
}

/// Where a transport protocol keeps its checksum: bytes from the start of its header. `None` for protocols that the
/// kernel never leaves partial.
pub fn transport_offset(protocol: u8) -> Option<usize> {
    match protocol {
        ipv4::PROTOCOL_TCP => Some(16),
        ipv4::PROTOCOL_UDP => Some(6),
        _ => None,
    }
}

/// Adds the carries of a ones-complement sum back in, twice, which is enough for any 32-bit sum.
#[inline(always)]
fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rfc_1624_section_4_example() {
        // "HC = 0xDD2F, m = 0x5555, m' = 0x3285: HC' = 0x0000", which RFC 1141 gets as 0xFFFF.
        assert_eq!(update(0xdd2f, 0x5555, 0x3285), 0x0000);
    }

    #[test]
    fn pseudo_header_of_a_captured_partial_udp_datagram() {
        // 10.244.1.2 -> 10.244.2.2, UDP, 12 bytes: 0x0af4 + 0x0102 + 0x0af4 + 0x0202 + 0x11 + 0x0c.
        assert_eq!(pseudo_header([10, 244, 1, 2], [10, 244, 2, 2], 17, 12), 0x1909);
    }

    proptest! {
        #[test]
        fn update_equals_recomputing(bytes: [u8; 20], word in 0usize..10, new: u16) {
            prop_assume!(word != 5);
            let mut header: Ipv4 = bytemuck::cast(bytes);
            let right = of_header(&header);
            let old = header.words()[word];
            let updated = update(right, old, new);
            let mut changed = bytes;
            changed[word * 2..word * 2 + 2].copy_from_slice(&new.to_be_bytes());
            changed[10..12].copy_from_slice(&updated.to_be_bytes());
            header = bytemuck::cast(changed);
            prop_assert!(header_is_valid(&header));
        }
    }
}
