//! Fragmentation of inner packets that are longer than the path to their peer carries (RFC 791 section 3.2).

use overlay_ebpf::{
    checksum,
    wire::{Bytes as _, Ipv4, ipv4},
};

/// An option of one byte: end of the list, no operation.
const END: u8 = 0;
const NO_OPERATION: u8 = 1;
/// Options with this bit are copied into all fragments.
const COPIED: u8 = 0x80;

/// The fragments of `packet`, none longer than `mtu` bytes; `None` when there are none: the packet is malformed, must not be
/// fragmented, or `mtu` leaves no room.
pub fn fragments(packet: &[u8], mtu: usize) -> Option<Vec<Vec<u8>>> {
    let header = packet.view::<Ipv4>(0)?;
    let (first, payload) = packet.split_at_checked(header.header_len())?;
    let [high, low] = *packet.view::<[u8; 2]>(6)?;
    let word = u16::from_be_bytes([high, low]);
    if word & ipv4::FLAG_DF != 0 {
        return None;
    }
    let later = later_header(first)?;
    let mut fragments = Vec::new();
    let (mut rest, mut offset) = (payload, word & ipv4::FRAGMENT_OFFSET);
    while !rest.is_empty() {
        let header = if fragments.is_empty() { first } else { &later };
        let room = mtu.checked_sub(header.len())?;
        let is_last = rest.len() <= room;
        // The offset counts units of 8 bytes.
        let length = if is_last { rest.len() } else { room & !7 };
        let (part, behind) = rest.split_at_checked(length).filter(|(part, _)| !part.is_empty())?;
        let more = if is_last { word & ipv4::FLAG_MF } else { ipv4::FLAG_MF };
        // Beyond 64 KiB, it would be taken for the start of the packet.
        let place = Some(offset).filter(|offset| *offset <= ipv4::FRAGMENT_OFFSET)?;
        fragments.push(fragment(header, part, more | place)?);
        offset = offset.checked_add((length / 8) as u16)?;
        rest = behind;
    }
    (!fragments.is_empty()).then_some(fragments)
}

fn fragment(header: &[u8], part: &[u8], flags_fragment: u16) -> Option<Vec<u8>> {
    let total_len = u16::try_from(header.len() + part.len()).ok()?;
    let mut fragment = header.to_vec();
    fragment.get_mut(2..4)?.copy_from_slice(&total_len.to_be_bytes());
    fragment.get_mut(6..8)?.copy_from_slice(&flags_fragment.to_be_bytes());
    fragment.get_mut(10..12)?.fill(0);
    let sum = checksum::of_bytes(&fragment).to_be_bytes();
    fragment.get_mut(10..12)?.copy_from_slice(&sum);
    fragment.extend_from_slice(part);
    Some(fragment)
}

/// The header of all fragments but the first: with the options that are copied.
fn later_header(first: &[u8]) -> Option<Vec<u8>> {
    let (fixed, mut options) = first.split_at_checked(Ipv4::LEN)?;
    let mut later = fixed.to_vec();
    while let [kind, rest @ ..] = options {
        let length = match *kind {
            END => break,
            NO_OPERATION => 1,
            _ => usize::from(*rest.first()?),
        };
        let (option, behind) = options.split_at_checked(length).filter(|(option, _)| !option.is_empty())?;
        if kind & COPIED != 0 {
            later.extend_from_slice(option);
        }
        options = behind;
    }
    // The header counts words of 4 bytes.
    later.resize(later.len().next_multiple_of(4), END);
    *later.first_mut()? = 0x40 | (later.len() / 4) as u8;
    Some(later)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(payload: usize, flags_fragment: u16, options: &[u8]) -> Vec<u8> {
        let header = 20 + options.len();
        let mut packet = vec![0x40 | (header / 4) as u8, 0];
        packet.extend(((header + payload) as u16).to_be_bytes());
        packet.extend([0x12, 0x34]);
        packet.extend(flags_fragment.to_be_bytes());
        packet.extend([63, 17, 0, 0, 10, 244, 1, 2, 10, 244, 2, 2]);
        packet.extend(options);
        packet.extend((0..payload).map(|index| (index * 7 % 251) as u8));
        packet
    }

    /// Flags and offset in bytes of a fragment, and its payload. Its header is checked.
    fn parts(fragment: &[u8], mtu: usize) -> (u16, usize, &[u8]) {
        let header = fragment.view::<Ipv4>(0).unwrap();
        assert!(fragment.len() <= mtu && header.total_len() == fragment.len());
        assert_eq!(checksum::of_bytes(&fragment[..header.header_len()]), 0);
        assert_eq!(fragment[4..6], [0x12, 0x34]);
        let word = u16::from_be_bytes([fragment[6], fragment[7]]);
        (
            word & !ipv4::FRAGMENT_OFFSET,
            usize::from(word & ipv4::FRAGMENT_OFFSET) * 8,
            &fragment[header.header_len()..],
        )
    }

    #[test]
    fn fragments_are_the_packet_in_order() {
        for (payload, mtu) in [(1, 576), (1452, 1372), (1372, 1372), (8000, 576), (65_000, 1372), (100, 28)] {
            let whole = packet(payload, 0, &[]);
            let fragments = fragments(&whole, mtu).unwrap();
            let (mut expected, last) = (0, fragments.len() - 1);
            for (index, fragment) in fragments.iter().enumerate() {
                let (flags, offset, part) = parts(fragment, mtu);
                assert_eq!((flags, offset), (if index == last { 0 } else { ipv4::FLAG_MF }, expected));
                assert_eq!(part, &whole[20 + offset..20 + offset + part.len()]);
                expected += part.len();
            }
            assert_eq!(expected, payload);
        }
    }

    #[test]
    fn a_fragment_is_fragmented_further_where_it_stands() {
        let middle = packet(1400, ipv4::FLAG_MF | 100, &[]);
        let fragments = fragments(&middle, 1020).unwrap();
        let places: Vec<_> = fragments.iter().map(|fragment| parts(fragment, 1020)).collect();
        assert_eq!((places[0].0, places[0].1, places[0].2.len()), (ipv4::FLAG_MF, 800, 1000));
        assert_eq!((places[1].0, places[1].1, places[1].2.len()), (ipv4::FLAG_MF, 1800, 400));
    }

    #[test]
    fn only_some_options_are_copied() {
        // No operation, a timestamp (not copied) of 4 bytes, router alert (copied) of 4, end.
        let options = [1, 68, 4, 5, 0, 148, 4, 0, 0, 1, 0, 0];
        let fragments = fragments(&packet(2000, 0, &options), 1020).unwrap();
        assert_eq!(fragments[0][20..32], options);
        assert_eq!((fragments[1][0], &fragments[1][20..24]), (0x46, &[148, 4, 0, 0][..]));
        assert_eq!(parts(&fragments[1], 1020).1, parts(&fragments[0], 1020).2.len());
    }

    #[test]
    fn what_cannot_be_fragmented_is_refused() {
        assert_eq!(fragments(&packet(2000, ipv4::FLAG_DF, &[]), 1020), None);
        assert_eq!(fragments(&packet(2000, 0, &[]), 27), None, "no room for 8 bytes");
        assert_eq!(fragments(&packet(2000, 0, &[148, 0, 0, 0]), 1020), None, "an option without length");
        assert_eq!(fragments(&packet(2000, 0, &[148, 9, 0, 0]), 1020), None, "an option that is too long");
        assert_eq!(fragments(&[0x45; 10], 1020), None);
        let last = ipv4::FRAGMENT_OFFSET;
        assert!(fragments(&packet(900, last, &[]), 1020).is_some(), "it fits, for the receiver to refuse");
        assert_eq!(fragments(&packet(2000, last, &[]), 1020), None, "it ends beyond 64 KiB");
    }
}
