//! IPv4 header (RFC 791 section 3.1), the 20 bytes without options.

use bytemuck::{Pod, Zeroable};

use crate::checksum;

/// Protocol number of ICMP (RFC 792).
pub const PROTOCOL_ICMP: u8 = 1;
/// Protocol number of TCP (RFC 9293).
pub const PROTOCOL_TCP: u8 = 6;
/// Protocol number of UDP (RFC 768).
pub const PROTOCOL_UDP: u8 = 17;
/// Protocol number of SCTP (RFC 9260).
pub const PROTOCOL_SCTP: u8 = 132;

/// "Don't fragment" in the flags and fragment offset field.
pub const FLAG_DF: u16 = 0x4000;
/// "More fragments" in the flags and fragment offset field.
pub const FLAG_MF: u16 = 0x2000;
/// The fragment offset, in units of 8 bytes, in the flags and fragment offset field.
pub const FRAGMENT_OFFSET: u16 = 0x1fff;

/// The two ECN bits of the TOS byte (RFC 3168 section 5).
pub const ECN_MASK: u8 = 0b11;
/// ECN codepoint: the transport does not understand ECN.
pub const ECN_NOT_ECT: u8 = 0b00;
/// ECN codepoint: ECN-capable transport, experimental use (RFC 8311).
pub const ECN_ECT1: u8 = 0b01;
/// ECN codepoint: ECN-capable transport.
pub const ECN_ECT0: u8 = 0b10;
/// ECN codepoint: congestion experienced.
pub const ECN_CE: u8 = 0b11;

/// The fixed part of an IPv4 header. Options, if any, follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Ipv4 {
    version_ihl: u8,
    pub(crate) tos: u8,
    total_length: [u8; 2],
    identification: [u8; 2],
    flags_fragment: [u8; 2],
    pub(crate) ttl: u8,
    protocol: u8,
    pub(crate) checksum: [u8; 2],
    source: [u8; 4],
    destination: [u8; 4],
}

impl Ipv4 {
    /// Length in bytes, without options.
    pub const LEN: usize = 20;

    /// A header without options, with identification 0 and a complete checksum. Arguments in the order of the fields.
    #[inline(always)]
    pub fn new(
        tos: u8,
        total_len: u16,
        flags_fragment: u16,
        ttl: u8,
        protocol: u8,
        source: [u8; 4],
        destination: [u8; 4],
    ) -> Self {
        let mut header = Self {
            version_ihl: 0x45,
            tos,
            total_length: total_len.to_be_bytes(),
            identification: [0; 2],
            flags_fragment: flags_fragment.to_be_bytes(),
            ttl,
            protocol,
            checksum: [0; 2],
            source,
            destination,
        };
        header.checksum = header.right_checksum().to_be_bytes();
        header
    }

    accessors! { ip:
        /// IP version: 4 in a valid header.
        version -> u8 { ip.version_ihl >> 4 }
        /// Header length in bytes with options, 0 to 60; valid from 20.
        header_len -> usize { ((ip.version_ihl & 0x0f) as usize) << 2 }
        /// Type of service: DSCP in the upper six bits, ECN in the lower two.
        tos -> u8 { ip.tos }
        /// Length of header and payload in bytes, as the header says.
        total_len -> usize { u16::from_be_bytes(ip.total_length) as usize }
        /// Whether this packet is a piece of a larger one: MF set or offset not 0.
        is_fragment -> bool { u16::from_be_bytes(ip.flags_fragment) & (FLAG_MF | FRAGMENT_OFFSET) != 0 }
        /// Whether routers must not fragment this packet.
        dont_fragment -> bool { u16::from_be_bytes(ip.flags_fragment) & FLAG_DF != 0 }
        /// Whether this is a fragment other than the first: it has no transport header.
        is_later_fragment -> bool { u16::from_be_bytes(ip.flags_fragment) & FRAGMENT_OFFSET != 0 }
        /// Time to live, in hops.
        ttl -> u8 { ip.ttl }
        /// Protocol number of the payload.
        protocol -> u8 { ip.protocol }
        /// Header checksum.
        checksum -> u16 { u16::from_be_bytes(ip.checksum) }
        /// Source address, network byte order.
        source -> [u8; 4] { ip.source }
        /// Destination address, network byte order.
        destination -> [u8; 4] { ip.destination }
    }

    /// The header as ten 16-bit words in host byte order, for checksums.
    #[inline(always)]
    pub(crate) fn words(&self) -> [u16; 10] {
        let bytes: &[u8; 20] = bytemuck::cast_ref(self);
        let pairs: &[[u8; 2]; 10] = bytemuck::cast_ref(bytes);
        pairs.map(u16::from_be_bytes)
    }

    /// The checksum that the header should carry if it has no options.
    #[inline(always)]
    fn right_checksum(&self) -> u16 {
        let [w0, w1, w2, w3, w4, _checksum, w6, w7, w8, w9] = self.words();
        checksum::of([w0, w1, w2, w3, w4, w6, w7, w8, w9])
    }

    /// Whether the checksum of a header without options is right (RFC 791: zero and all ones are the same sum).
    #[inline(always)]
    pub fn has_valid_checksum(&self) -> bool {
        let right = self.right_checksum();
        self.checksum() == right || (right == 0 && self.checksum() == 0xffff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ICMP echo request, TTL 64, DF; the checksum 0x21be worked out by hand.
    const ECHO_REQUEST: [u8; 20] = [
        0x45, 0x00, 0x00, 0x54, 0x00, 0x00, 0x40, 0x00, 0x40, 0x01, 0x21, 0xbe, 10, 244, 1, 2, 10, 244, 2, 2,
    ];

    #[test]
    fn accessors_read_the_fields_of_rfc_791() {
        let header: Ipv4 = bytemuck::cast(ECHO_REQUEST);
        assert_eq!((header.version(), header.header_len(), header.total_len()), (4, 20, 84));
        assert_eq!((header.ttl(), header.protocol(), header.checksum()), (64, 1, 0x21be));
        assert!(!header.is_fragment());
        assert_eq!(header.source(), [10, 244, 1, 2]);
        assert_eq!(header.destination(), [10, 244, 2, 2]);
    }

    #[test]
    fn a_new_header_has_its_fields_and_a_valid_checksum() {
        let header = Ipv4::new(0, 84, FLAG_DF, 64, 1, [10, 244, 1, 2], [10, 244, 2, 2]);
        assert_eq!(bytemuck::bytes_of(&header), ECHO_REQUEST);
        assert!(header.has_valid_checksum());
        assert!(!Ipv4 { ttl: 63, ..header }.has_valid_checksum());
        assert!(Ipv4 { ttl: 63, checksum: [0x22, 0xbe], ..header }.has_valid_checksum());
    }
}
