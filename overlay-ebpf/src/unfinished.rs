//! Packets that the kernel left unfinished: with a checksum still to be completed, or several in one buffer.
//!
//! On veth and virtio the kernel leaves TCP and UDP checksums to hardware that does not exist, and segmentation too. Its own
//! stack knows from the buffer's metadata; a program that sees only the bytes can tell by the checksum field, which then holds the bare
//! sum of the pseudo header (`CHECKSUM_PARTIAL`, include/linux/skbuff.h).

use crate::{
    checksum,
    wire::{
        Bytes, Ipv4,
        ipv4::{PROTOCOL_TCP, PROTOCOL_UDP},
    },
};

/// Longest TCP header with options, in bytes (RFC 9293 section 3.1).
const LONGEST_TCP_HEADER: usize = 60;
/// Length of a UDP header in bytes.
const UDP_HEADER: usize = 8;

/// Where the transport checksum stands behind the inner IPv4 header, in bytes; `None` for protocols whose checksum the kernel
/// completes itself.
#[inline(always)]
pub fn checksum_offset(protocol: u8) -> Option<usize> {
    match protocol {
        PROTOCOL_TCP => Some(16),
        PROTOCOL_UDP => Some(6),
        _ => None,
    }
}

/// Whether the transport checksum of the packet at `offset` is still to be completed. One finished checksum in 65536 looks the
/// same; a TCP or UDP header that `packet` does not show counts as unfinished.
#[inline(always)]
pub fn has_partial_checksum<P: Bytes + ?Sized>(packet: &P, offset: usize, header: &Ipv4) -> bool {
    let Some(position) = checksum_offset(header.protocol()) else { return false };
    if header.is_fragment() {
        return false;
    }
    let Some(length) = header.total_len().checked_sub(header.header_len()) else { return false };
    if length < position + 2 {
        return false;
    }
    let Some(field) = packet.view::<[u8; 2]>(offset + header.header_len() + position) else { return true };
    let field = u16::from_be_bytes(*field);
    field != 0
        && field
            == checksum::pseudo_header(
                header.source(),
                header.destination(),
                header.protocol(),
                length as u16,
            )
}

/// The length in bytes of the longest packet that the one at `offset` becomes on the wire. `gso_size` is the payload of each
/// segment in bytes, 0 for a packet that is one.
#[inline(always)]
pub fn segment_len<P: Bytes + ?Sized>(packet: &P, offset: usize, header: &Ipv4, gso_size: usize) -> usize {
    if gso_size == 0 {
        return header.total_len();
    }
    let transport = match header.protocol() {
        // Two bytes: the verifier does not follow a comparison for one.
        PROTOCOL_TCP => match packet.view::<[u8; 2]>(offset + header.header_len() + 12) {
            Some([data_offset, _]) => ((data_offset >> 4) as usize) << 2,
            None => LONGEST_TCP_HEADER,
        },
        _ => UDP_HEADER,
    };
    (header.header_len() + transport + gso_size).min(header.total_len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(total_len: u16, checksum: u16) -> Vec<u8> {
        let mut packet = vec![0x45, 0];
        packet.extend(total_len.to_be_bytes());
        packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 244, 1, 2, 10, 244, 2, 2]);
        packet.resize(usize::from(total_len), 0);
        packet[32] = 0x80;
        packet[36..38].copy_from_slice(&checksum.to_be_bytes());
        packet
    }

    fn is_partial(packet: &[u8]) -> bool {
        has_partial_checksum(packet, 0, packet.view::<Ipv4>(0).unwrap())
    }

    #[test]
    fn the_sum_of_the_pseudo_header_is_an_unfinished_checksum() {
        // 0x0af4 + 0x0102 + 0x0af4 + 0x0202 + 6 + 80.
        let partial = 0x18ec + 6 + 80;
        assert!(is_partial(&tcp(100, partial)));
        assert!(!is_partial(&tcp(100, partial + 1)) && !is_partial(&tcp(100, 0)));
        let mut fragment = tcp(100, partial);
        fragment[7] = 1;
        assert!(!is_partial(&fragment));
        // The checksum is not among the bytes that can be seen.
        assert!(is_partial(&tcp(100, 0)[..36]));
        let mut short = tcp(40, 0);
        short[3] = 30;
        assert!(!is_partial(&short[..30]), "a packet too short for a checksum has none");
        // One of 16 bytes behind its header, and what would be the sum for that length behind it.
        let mut short = tcp(40, 0x18ec + 6 + 16);
        short[3] = 36;
        assert!(!is_partial(&short), "what follows a packet is not its checksum");
    }

    #[test]
    fn segments_are_as_long_as_their_headers_and_payload() {
        let packet = tcp(60_000, 0);
        let len = |packet: &[u8], gso_size| segment_len(packet, 0, packet.view::<Ipv4>(0).unwrap(), gso_size);
        assert_eq!(len(&packet, 1400), 20 + 32 + 1400);
        assert_eq!(len(&packet, 0), 60_000);
        assert_eq!(len(&tcp(100, 0), 1400), 100, "the only segment is shorter");
        assert_eq!(len(&packet[..20], 1400), 20 + 60 + 1400, "as long as it can be");
        let mut udp = packet;
        udp[9] = PROTOCOL_UDP;
        assert_eq!(len(&udp, 1400), 20 + 8 + 1400);
    }
}
