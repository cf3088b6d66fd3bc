//! Verifies the checksums of IPv4 packets (RFC 1071), independently of the packet core.

use anyhow::{Context, Result, bail, ensure};

/// What a packet's checksums cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verified {
    /// IPv4 header and TCP segment.
    Tcp,
    /// IPv4 header and UDP datagram.
    Udp,
    /// IPv4 header and ICMP message.
    Icmp,
    /// Only the IPv4 header: a fragment.
    Fragment,
}

/// Verifies the checksums of an IPv4 packet, from its first byte on. Bytes behind it are ignored.
///
/// # Errors
///
/// When a checksum is wrong, the packet is shorter than it says, or UDP has no checksum, which Linux never sends.
pub fn verify(packet: &[u8]) -> Result<Verified> {
    let header_len = usize::from(packet.first().context("no byte")? & 0xf) * 4;
    ensure!(packet.first().is_some_and(|byte| byte >> 4 == 4), "not IPv4");
    let total_len = usize::from(word(packet, 2)?);
    let header = packet.get(..header_len).filter(|header| header.len() >= 20).context("no whole header")?;
    let payload = packet.get(header_len..total_len).context("not the whole packet")?;
    ensure!(sum([header]) == 0xffff, "the checksum of the IPv4 header is wrong");
    // More fragments, or an offset.
    if word(packet, 6)? & 0x3fff != 0 {
        return Ok(Verified::Fragment);
    }
    let protocol = header.get(9).copied().unwrap_or_default();
    let length = u16::try_from(payload.len()).context("the payload is too long")?.to_be_bytes();
    let pseudo = [header.get(12..20).unwrap_or_default(), &[0, protocol], &length].concat();
    let (verified, covered) = match protocol {
        1 => (Verified::Icmp, sum([payload])),
        6 => (Verified::Tcp, sum([&pseudo, payload])),
        17 => {
            ensure!(usize::from(word(payload, 4)?) == payload.len(), "the UDP length is wrong");
            ensure!(word(payload, 6)? != 0, "the UDP datagram has no checksum");
            (Verified::Udp, sum([&pseudo, payload]))
        }
        other => bail!("protocol {other}"),
    };
    ensure!(covered == 0xffff, "the {verified:?} checksum is wrong");
    Ok(verified)
}

fn word(bytes: &[u8], at: usize) -> Result<u16> {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk()).context("too short")?;
    Ok(u16::from_be_bytes(*word))
}

/// The ones' complement sum of parts of which only the last may have an odd length.
pub fn sum<const PARTS: usize>(parts: [&[u8]; PARTS]) -> u16 {
    let mut sum = 0u32;
    for pair in parts.iter().flat_map(|part| part.chunks(2)) {
        sum += match pair {
            [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
            [high] => u32::from(*high) << 8,
            _ => 0,
        };
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Captured between two containers without offloads: one byte over UDP, an echo request, a SYN. tcpdump finds their checksums
    /// correct.
    const PACKETS: [(Verified, &str); 3] = [
        (Verified::Udp, "4500001ddfc54000401143200af401010af40102afa700090009c04078"),
        (Verified::Icmp, "45000025478a40004001db630af401010af401020800cfa4144a0001000102030405060708"),
        (
            Verified::Tcp,
            "4500003cd01f4000400652b20af401010af40102804c0009c334167600000000a002faf0f2dc0000020405b40402080a528a95ba000000000103030a",
        ),
    ];

    fn bytes(hex: &str) -> Vec<u8> {
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        hex.as_bytes().chunks(2).map(byte).collect()
    }

    #[test]
    fn correct_checksums_pass_and_every_changed_bit_fails() {
        for (kind, hex) in PACKETS {
            let packet = bytes(hex);
            assert_eq!(verify(&packet).unwrap(), kind);
            for bit in 0..packet.len() * 8 {
                let mut changed = packet.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                // Changes of the protocol or of fragmentation break the header's checksum as well.
                assert!(verify(&changed).is_err(), "{kind:?}: bit {bit}");
            }
        }
    }

    #[test]
    fn an_unfinished_checksum_is_wrong() {
        let (_, hex) = PACKETS[0];
        let mut packet = bytes(hex);
        let length = (packet.len() as u16 - 20).to_be_bytes();
        let pseudo = sum([&packet[12..20], &[0, 17], &length]);
        packet[26..28].copy_from_slice(&pseudo.to_be_bytes());
        assert!(verify(&packet).unwrap_err().to_string().contains("Udp checksum"));
    }

    #[test]
    fn a_fragment_has_only_its_headers_checksum() {
        let mut packet = bytes(PACKETS[0].1);
        packet[6] = 0x20;
        packet[10..12].copy_from_slice(&[0, 0]);
        let checksum = !sum([&packet[..20]]);
        packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        assert_eq!(verify(&packet).unwrap(), Verified::Fragment);
    }
}
