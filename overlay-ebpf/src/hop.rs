//! One hop of an inner packet: each end of the overlay is a router to it.

use crate::{checksum, wire::Ipv4};

/// The fields of an inner header behind one end of the overlay: TTL one less, ECN perhaps marked, checksum updated to match
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
    /// The next hop: TTL one less, `tos` as given. The caller has checked that the TTL is at least 1.
    #[inline(always)]
    pub fn next_hop(header: &Ipv4, tos: u8) -> Self {
        let ttl = header.ttl().wrapping_sub(1);
        let [old_tos_word, _, _, _, old_ttl_word, ..] = header.words();
        let new_ttl_word = u16::from_be_bytes([ttl, header.protocol()]);
        let mut checksum = checksum::update(header.checksum(), old_ttl_word, new_ttl_word);
        if tos != header.tos() {
            checksum = checksum::update(checksum, old_tos_word, (old_tos_word & 0xff00) | tos as u16);
        }
        Self { tos, ttl, checksum }
    }

    /// Writes the fields. Addresses and lengths stay.
    #[inline(always)]
    pub fn apply(self, header: &mut Ipv4) {
        header.tos = self.tos;
        header.ttl = self.ttl;
        header.checksum = self.checksum.to_be_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(tos: u8, ttl: u8) -> Ipv4 {
        Ipv4::new(tos, 84, 0, ttl, 1, [10, 244, 1, 2], [10, 244, 2, 2])
    }

    #[test]
    fn next_hop_keeps_the_checksum_right_for_every_ttl_and_tos() {
        for ttl in 1..=255 {
            for tos in 0..=255 {
                let mut header = header(0, ttl);
                Rewrite::next_hop(&header, tos).apply(&mut header);
                assert_eq!((header.ttl(), header.tos()), (ttl - 1, tos));
                assert!(header.has_valid_checksum(), "ttl {ttl} tos {tos}");
            }
        }
    }

    #[test]
    fn a_wrong_checksum_stays_wrong() {
        let mut header = header(0, 64);
        header.checksum = [0x12, 0x34];
        Rewrite::next_hop(&header, 0).apply(&mut header);
        assert!(!header.has_valid_checksum());
    }
}
