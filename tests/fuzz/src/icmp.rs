//! What must be true of ICMP errors: as the agent builds them about inner packets, and as it reads them about outer ones.

use overlay_agent::icmp::{self, Problem, Report};
use overlay_ebpf::rejection::Rejection;

use crate::{
    raw::{self, Packet},
    rejection,
};

/// The device on which errors arrive.
const IFINDEX: u32 = 7;

/// Checks one input: the kind of an error, two bytes of MTU, then the packet that the error is about.
pub(crate) fn check(input: &[u8]) {
    let Some(([kind, mtu0, mtu1], packet)) = input.split_first_chunk::<3>() else { return };
    let rejection = match kind % 4 {
        0 => Rejection::MtuExceeded(u16::from_be_bytes([*mtu0, *mtu1])),
        1 => Rejection::PeerUnreachable,
        2 => Rejection::NoRoute,
        _ => Rejection::TtlExpired,
    };
    // The packet as what a raw socket receives.
    judge_report(packet);
    let Some(message) = judge_message(packet, rejection) else { return };
    let received = with_header(&message);
    judge_report(&received);
    let report = Report::parse(&received, IFINDEX);
    let Some(outer) = Packet::new(packet).filter(|packet| is_outer(*packet)) else {
        assert_eq!(report, None, "an error about a packet that this host does not send");
        return;
    };
    let quote = &packet[..packet.len().min(548)];
    let expected = match rejection {
        Rejection::TtlExpired => None,
        Rejection::NoRoute | Rejection::PeerUnreachable => Some(Problem::Unreachable(quote[28..].to_vec())),
        // A router that names none: the reader chooses.
        Rejection::MtuExceeded(0) => return,
        Rejection::MtuExceeded(mtu) => {
            (usize::from(mtu) < outer.total_len()).then_some(Problem::TooLong(mtu))
        }
    };
    assert_eq!(report.map(|report| report.problem), expected);
}

/// Builds the error about a packet and checks it.
fn judge_message(packet: &[u8], rejection: Rejection) -> Option<Vec<u8>> {
    let message = icmp::error_message(packet, rejection);
    let may_be_told = Packet::new(packet).is_some_and(rejection::may_be_told);
    assert_eq!(message.is_some(), may_be_told, "who is told");
    let message = message?;
    let (kind, code, mtu) = match rejection {
        Rejection::TtlExpired => (11, 0, 0),
        Rejection::NoRoute => (3, 0, 0),
        Rejection::PeerUnreachable => (3, 1, 0),
        Rejection::MtuExceeded(mtu) => (3, 4, mtu),
    };
    assert_eq!(
        (message[0], message[1], raw::word(&message, 4), raw::word(&message, 6)),
        (kind, code, 0, mtu)
    );
    assert_eq!(raw::sum(&message), 0xffff, "the checksum is wrong");
    assert!(message.len() + 20 <= 576, "the error is too long");
    assert!(packet.starts_with(&message[8..]), "the quote is not the packet");
    assert!(message.len() - 8 >= packet.len().min(28), "the quote lacks the header or 8 bytes behind it");
    Some(message)
}

/// Checks what is read from an IP packet that a raw socket received.
fn judge_report(received: &[u8]) {
    let Some(report) = Report::parse(received, IFINDEX) else { return };
    let header = Packet::new(received).expect("a message has a header");
    let icmp = &received[header.header_len()..header.total_len().min(received.len())];
    assert_eq!((icmp[0], raw::sum(icmp)), (3, 0xffff), "type, checksum");
    let outer =
        Packet::new(&icmp[8..]).filter(|outer| is_outer(*outer)).expect("it is about an outer packet");
    assert_eq!(report.ifindex, IFINDEX);
    let named = (report.source.octets(), report.peer.octets(), report.port);
    assert_eq!(named, (outer.source(), outer.destination(), raw::word(outer.transport(), 2)));
    match report.problem {
        Problem::TooLong(mtu) => {
            assert!(icmp[1] == 4 && mtu > 0, "another code, or no MTU");
            assert!(usize::from(mtu) < outer.total_len(), "the packet would have fitted");
        }
        Problem::Unreachable(inner) => assert!(icmp[1] != 4 && inner == icmp[36..]),
    }
}

/// Whether this agent or its programs could have sent this packet.
fn is_outer(packet: Packet<'_>) -> bool {
    packet.version() == 4
        && packet.header_len() == 20
        && packet.protocol() == 17
        && packet.dont_fragment()
        && !packet.is_fragment()
        && packet.transport().len() >= 8
        && (raw::word(packet.transport(), 0) >= 49152
            || raw::word(packet.transport(), 0) == raw::word(packet.transport(), 2))
}

/// The message with an IP header in front, as a raw socket shows it.
fn with_header(message: &[u8]) -> Vec<u8> {
    let [high, low] = u16::try_from(20 + message.len()).expect("at most 576 bytes").to_be_bytes();
    let mut packet = vec![0x45, 0, high, low, 0, 0, 0, 0, 64, 1, 0, 0, 10, 0, 0, 1, 192, 168, 77, 1];
    packet.extend_from_slice(message);
    packet
}
