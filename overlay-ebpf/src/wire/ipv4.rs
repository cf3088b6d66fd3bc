//! IPv4 header (RFC 791 section 3.1), the 20 bytes without options.

use bytemuck::{Pod, Zeroable};

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
    tos: u8,
    total_length: [u8; 2],
    identification: [u8; 2],
    flags_fragment: [u8; 2],
    ttl: u8,
    protocol: u8,
    checksum: [u8; 2],
    source: [u8; 4],
    destination: [u8; 4],
}

impl Ipv4 {
    /// Length in bytes, without options.
    pub const LEN: usize = 20;

    /// A header without options, identification 0 and flags DF (an atomic datagram, RFC 6864), TTL 64. The checksum is
    /// complete.
    #[inline(always)]
    pub fn outer(tos: u8, total_length: u16, source: [u8; 4], destination: [u8; 4]) -> Self {
        let mut header = Self {
            version_ihl: 0x45,
            tos,
            total_length: total_length.to_be_bytes(),
            identification: [0; 2],
            flags_fragment: FLAG_DF.to_be_bytes(),
            ttl: 64,
            protocol: PROTOCOL_UDP,
            checksum: [0; 2],
            source,
            destination,
        };
        header.checksum = crate::checksum::of_header(&header).to_be_bytes();
        header
    }

    /// IP version: 4 in a valid header.
    #[inline(always)]
    pub fn version(&self) -> u8 {
        self.version_ihl >> 4
    }

    /// Header length in bytes with options, 0 to 60; valid from 20.
    #[inline(always)]
    pub fn header_len(&self) -> usize {
        ((self.version_ihl & 0x0f) as usize) << 2
    }

    /// Type of service: DSCP in the upper six bits, ECN in the lower two.
    #[inline(always)]
    pub fn tos(&self) -> u8 {
        self.tos
    }

    /// Length of header and payload in bytes, as the header says.
    #[inline(always)]
    pub fn total_len(&self) -> usize {
        u16::from_be_bytes(self.total_length) as usize
    }

    /// Whether this packet is a piece of a larger one: MF set or offset not 0.
    #[inline(always)]
    pub fn is_fragment(&self) -> bool {
        u16::from_be_bytes(self.flags_fragment) & (FLAG_MF | FRAGMENT_OFFSET) != 0
    }

    /// Whether this is a fragment other than the first: it has no transport header.
    #[inline(always)]
    pub fn is_later_fragment(&self) -> bool {
        u16::from_be_bytes(self.flags_fragment) & FRAGMENT_OFFSET != 0
    }

    /// Time to live, in hops.
    #[inline(always)]
    pub fn ttl(&self) -> u8 {
        self.ttl
    }

    /// Protocol number of the payload.
    #[inline(always)]
    pub fn protocol(&self) -> u8 {
        self.protocol
    }

    /// Header checksum.
    #[inline(always)]
    pub fn checksum(&self) -> u16 {
        u16::from_be_bytes(self.checksum)
    }

    /// Source address, network byte order.
    #[inline(always)]
    pub fn source(&self) -> [u8; 4] {
        self.source
    }

    /// Destination address, network byte order.
    #[inline(always)]
    pub fn destination(&self) -> [u8; 4] {
        self.destination
    }

    /// The header as ten 16-bit words in host byte order, for checksums.
    #[inline(always)]
    pub fn words(&self) -> [u16; 10] {
        let bytes: &[u8; 20] = bytemuck::cast_ref(self);
        let pairs: &[[u8; 2]; 10] = bytemuck::cast_ref(bytes);
        pairs.map(u16::from_be_bytes)
    }

    /// Replaces what an overlay end changes in an inner header. The addresses and lengths stay.
    #[inline(always)]
    pub fn apply(&mut self, rewrite: Rewrite) {
        self.tos = rewrite.tos;
        self.ttl = rewrite.ttl;
        self.checksum = rewrite.checksum.to_be_bytes();
    }
}

/// The fields of an inner header after an overlay end: TTL one less, ECN perhaps marked, checksum updated to match
/// (RFC 1624, so a wrong checksum stays wrong and the receiver discards the packet).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// Type of service.
    pub tos: u8,
    /// Time to live, in hops.
    pub ttl: u8,
    /// Header checksum, host byte order.
    pub checksum: u16,
}

impl Rewrite {
    /// One hop on: TTL one less, `tos` as given. The caller has checked that the TTL is at least 1.
    #[inline(always)]
    pub fn next_hop(header: &Ipv4, tos: u8) -> Self {
        let ttl = header.ttl.wrapping_sub(1);
        let [old_tos_word, _, _, _, old_ttl_word, ..] = header.words();
        let new_tos_word = u16::from_be_bytes([header.version_ihl, tos]);
        let new_ttl_word = u16::from_be_bytes([ttl, header.protocol]);
        let checksum = crate::checksum::update(header.checksum(), old_ttl_word, new_ttl_word);
        let checksum = if tos == header.tos {
            checksum
        } else {
            crate::checksum::update(checksum, old_tos_word, new_tos_word)
        };
        Self { tos, ttl, checksum }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum;

    /// An ICMP echo request, TTL 64, DF; the checksum 0x21be worked out by hand.
    const ECHO_REQUEST: [u8; 20] = [
        0x45, 0x00, 0x00, 0x54, 0x00, 0x00, 0x40, 0x00, 0x40, 0x01, 0x21, 0xbe, 10, 244, 1, 2, 10, 244, 2, 2,
    ];

    fn echo_request() -> Ipv4 {
        bytemuck::cast(ECHO_REQUEST)
    }

    #[test]
    fn accessors_read_the_fields_of_rfc_791() {
        let header = echo_request();
        assert_eq!((header.version(), header.header_len(), header.total_len()), (4, 20, 84));
        assert_eq!((header.ttl(), header.protocol(), header.checksum()), (64, 1, 0x21be));
        assert!(!header.is_fragment());
        assert_eq!(header.source(), [10, 244, 1, 2]);
        assert_eq!(header.destination(), [10, 244, 2, 2]);
    }

    #[test]
    fn next_hop_keeps_the_checksum_right_for_every_ttl_and_tos() {
        for ttl in 1..=255 {
            for tos in 0..=255 {
                let mut header = echo_request();
                header.ttl = ttl;
                header.checksum = checksum::of_header(&header).to_be_bytes();
                header.apply(Rewrite::next_hop(&header, tos));
                assert_eq!((header.ttl(), header.tos()), (ttl - 1, tos));
                assert!(checksum::header_is_valid(&header), "ttl {ttl} tos {tos}");
            }
        }
    }

    #[test]
    fn a_wrong_checksum_stays_wrong() {
        let mut header = echo_request();
        header.checksum = [0x12, 0x34];
        header.apply(Rewrite::next_hop(&header, header.tos()));
        assert!(!checksum::header_is_valid(&header));
    }

    #[test]
    fn outer_header_is_an_atomic_datagram_with_a_valid_checksum() {
        let header = Ipv4::outer(0xb8, 1500, [192, 168, 77, 1], [192, 168, 77, 2]);
        assert!(checksum::header_is_valid(&header));
        assert_eq!((header.tos(), header.total_len(), header.ttl(), header.protocol()), (0xb8, 1500, 64, 17));
        assert!(!header.is_fragment());
    }
}
