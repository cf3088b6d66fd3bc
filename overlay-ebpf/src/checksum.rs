//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).

/// The checksum of `old_checksum`'s data after one 16-bit word changed from `old` to `new`.
///
/// RFC 1624 equation 3, `HC' = ~(~HC + ~m + m')`; equation 4 and RFC 1141 are wrong when the sum becomes zero. All in
/// host byte order.
#[inline(always)]
pub fn update(old_checksum: u16, old: u16, new: u16) -> u16 {
    !fold(!old_checksum as u32 + !old as u32 + new as u32)
}

/// The checksum of `words`, host byte order.
#[inline(always)]
pub fn of<const N: usize>(words: [u16; N]) -> u16 {
    !sum(words)
}

/// The checksum of `bytes`, host byte order. An odd last byte counts as if a zero followed (RFC 1071 section 4.1).
pub fn of_bytes(bytes: &[u8]) -> u16 {
    let mut sum: u64 = 0;
    for pair in bytes.chunks(2) {
        let word = match *pair {
            [high, low] => u16::from_be_bytes([high, low]),
            [high] => u16::from_be_bytes([high, 0]),
            _ => 0,
        };
        sum += u64::from(word);
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The folded, not complemented sum of a TCP or UDP pseudo header (RFC 9293 section 3.1, RFC 768).
///
/// The kernel leaves exactly this in the checksum field of a packet whose checksum is still to be completed
/// (`CHECKSUM_PARTIAL`): over veth or virtio it may never be.
#[inline(always)]
pub fn pseudo_header(source: [u8; 4], destination: [u8; 4], protocol: u8, length: u16) -> u16 {
    let [s0, s1, s2, s3] = source;
    let [d0, d1, d2, d3] = destination;
    sum([
        u16::from_be_bytes([s0, s1]),
        u16::from_be_bytes([s2, s3]),
        u16::from_be_bytes([d0, d1]),
        u16::from_be_bytes([d2, d3]),
        protocol as u16,
        length,
    ])
}

/// The ones-complement sum of up to 65536 words.
#[inline(always)]
fn sum<const N: usize>(words: [u16; N]) -> u16 {
    let mut sum = 0;
    for word in words {
        sum += word as u32;
    }
    fold(sum)
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

    #[test]
    fn bytes_sum_like_words_and_an_odd_one_is_padded() {
        assert_eq!(of_bytes(&[0x12, 0x34, 0xab, 0xcd]), of([0x1234, 0xabcd]));
        assert_eq!(of_bytes(&[0xff, 0xff, 0xff]), of([0xffff, 0xff00]));
        assert_eq!(of_bytes(&[]), 0xffff);
    }

    proptest! {
        #[test]
        fn update_equals_recomputing(words: [u16; 9], word in 0usize..9, new: u16) {
            let mut changed = words;
            changed[word] = new;
            let updated = update(of(words), words[word], new);
            // Zero and all ones are the same sum.
            prop_assert_eq!(updated % 0xffff, of(changed) % 0xffff);
        }
    }
}
