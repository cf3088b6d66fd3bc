//! ICMP error messages about a rejected packet (RFC 792, RFC 1191, RFC 1812 section 4.3).

use overlay_ebpf::{
    checksum,
    rejection::{Rejection, may_answer},
    wire::{Bytes as _, Ipv4},
};

/// Longest message in bytes, with an IP header: RFC 1812 section 4.3.2.3.
const LONGEST: usize = 576;
/// Length of the ICMP header in bytes.
const ICMP_HEADER: usize = 8;

/// The message, from its ICMP header on, that tells the sender of `packet` why it is rejected; `None` when the sender must not be
/// told. It quotes as much of the packet as is usual.
pub fn error_message(packet: &[u8], rejection: Rejection) -> Option<Vec<u8>> {
    let header = packet.view::<Ipv4>(0)?;
    if !may_answer(packet, 0, header) {
        return None;
    }
    let (kind, code, mtu) = match rejection {
        Rejection::TtlExpired => (11, 0, 0),
        Rejection::NoRoute => (3, 0, 0),
        Rejection::PeerUnreachable => (3, 1, 0),
        Rejection::MtuExceeded(mtu) => (3, 4, mtu),
    };
    let quoted = packet.get(..packet.len().min(LONGEST - Ipv4::LEN - ICMP_HEADER))?;
    let [mtu_high, mtu_low] = mtu.to_be_bytes();
    let mut message = vec![kind, code, 0, 0, 0, 0, mtu_high, mtu_low];
    message.extend_from_slice(quoted);
    let sum = checksum::of_bytes(&message).to_be_bytes();
    message.get_mut(2..4)?.copy_from_slice(&sum);
    Some(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// UDP from 10.244.1.2 to 10.244.2.2.
    fn packet(len: usize) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 1, 17, 0, 0, 10, 244, 1, 2, 10, 244, 2, 2];
        packet.resize(len, 0xa5);
        packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        packet
    }

    #[test]
    fn messages_carry_type_code_mtu_quote_and_a_valid_checksum() {
        let cases = [
            (Rejection::TtlExpired, [11, 0, 0, 0]),
            (Rejection::NoRoute, [3, 0, 0, 0]),
            (Rejection::PeerUnreachable, [3, 1, 0, 0]),
            (Rejection::MtuExceeded(1372), [3, 4, 0x05, 0x5c]),
        ];
        for (rejection, [kind, code, high, low]) in cases {
            let message = error_message(&packet(100), rejection).unwrap();
            assert_eq!((message[0], message[1], message[6], message[7]), (kind, code, high, low));
            assert_eq!(message[8..], packet(100)[..]);
            assert_eq!(checksum::of_bytes(&message), 0, "the sum with the checksum is all ones");
        }
    }

    #[test]
    fn a_message_is_no_longer_than_576_bytes_with_its_header() {
        let message = error_message(&packet(1400), Rejection::TtlExpired).unwrap();
        assert_eq!(message.len() + Ipv4::LEN, LONGEST);
        assert_eq!(message[8..], packet(1400)[..548]);
    }

    #[test]
    fn errors_are_not_answered() {
        let mut error = packet(60);
        error[9] = 1;
        error[20] = 3;
        assert_eq!(error_message(&error, Rejection::TtlExpired), None);
        assert_eq!(error_message(&error[..10], Rejection::TtlExpired), None);
    }
}
