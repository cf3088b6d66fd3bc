//! The messages of ctnetlink (include/uapi/linux/netfilter/nfnetlink_conntrack.h), as far as they are needed here.

use nix::{
    errno::Errno,
    libc::{AF_INET, NFNL_SUBSYS_CTNETLINK, NLM_F_ACK, NLMSG_ERROR},
};
use overlay_ebpf::flow::FlowKey;

use crate::netlink_frame::{self, HEADER, kind_of_answer, number};

/// `IPCTNL_MSG_CT_NEW`: without `NLM_F_CREATE`, a change. An answer has the same type.
const CHANGE: u16 = 0;
/// `IPCTNL_MSG_CT_GET`.
const GET: u16 = 1;
/// Length of `struct nfgenmsg` in bytes: family, version, resource.
const FAMILY: usize = 4;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

// Of `enum ctattr_type`, `ctattr_tuple`, `ctattr_ip`, `ctattr_l4proto`, `ctattr_protoinfo` and `ctattr_protoinfo_tcp`.
const TUPLE_ORIGINAL: u16 = 1;
const PROTOCOL_INFO: u16 = 4;
const HELPER: u16 = 5;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const IPV4_SOURCE: u16 = 1;
const IPV4_DESTINATION: u16 = 2;
const PROTOCOL_NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
const INFO_TCP: u16 = 1;
const TCP_FLAGS_ORIGINAL: u16 = 4;
const TCP_FLAGS_REPLY: u16 = 5;

/// `IP_CT_TCP_FLAG_BE_LIBERAL`, with itself as the mask (`struct nf_ct_tcp_flags`).
const LENIENT: [u8; 2] = [8, 8];

/// The request to end the checks of windows in both directions of a connection, one of which is `flow`.
pub(super) fn lenient(flow: &FlowKey, sequence: u32) -> Vec<u8> {
    let flags = [attribute(TCP_FLAGS_ORIGINAL, &LENIENT), attribute(TCP_FLAGS_REPLY, &LENIENT)].concat();
    let body = [tuple(flow), nested(PROTOCOL_INFO, &nested(INFO_TCP, &flags))].concat();
    request(CHANGE, NLM_F_ACK, sequence, &body)
}

/// The request to describe a connection, one of whose directions is `flow`.
pub(super) fn get(flow: &FlowKey, sequence: u32) -> Vec<u8> {
    request(GET, 0, sequence, &tuple(flow))
}

/// The attribute that names a connection by one of its directions.
fn tuple(flow: &FlowKey) -> Vec<u8> {
    let [s0, s1, d0, d1] = flow.ports;
    let addresses =
        [attribute(IPV4_SOURCE, &flow.source), attribute(IPV4_DESTINATION, &flow.destination)].concat();
    let protocol = [
        attribute(PROTOCOL_NUMBER, &[flow.protocol]),
        attribute(SOURCE_PORT, &[s0, s1]),
        attribute(DESTINATION_PORT, &[d0, d1]),
    ]
    .concat();
    nested(TUPLE_ORIGINAL, &[nested(TUPLE_IP, &addresses), nested(TUPLE_PROTOCOL, &protocol)].concat())
}

fn request(kind: u16, flags: i32, sequence: u32, body: &[u8]) -> Vec<u8> {
    let kind = (NFNL_SUBSYS_CTNETLINK as u16) << 8 | kind;
    netlink_frame::request(kind, flags, sequence, &[&[AF_INET as u8, 0, 0, 0], body].concat())
}

fn nested(kind: u16, content: &[u8]) -> Vec<u8> {
    attribute(NESTED | kind, content)
}

/// An attribute: length and kind, then the content, padded to a multiple of four bytes.
fn attribute(kind: u16, content: &[u8]) -> Vec<u8> {
    let mut attribute = Vec::with_capacity(4 + content.len().next_multiple_of(4));
    attribute.extend((4 + content.len() as u16).to_ne_bytes());
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(content);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

/// An answer of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// A connection.
    Connection {
        /// Whether a helper reads what it carries.
        has_helper: bool,
    },
    /// The request was carried out.
    Done,
    /// It was not.
    Error(Errno),
}

/// The answer to the request with this number in the message `message`. `None` for another message.
pub(super) fn answer(message: &[u8], sequence: u32) -> Option<Answer> {
    let kind = kind_of_answer(message, sequence)?;
    if i32::from(kind) == NLMSG_ERROR {
        return Some(match number(message, HEADER)? as i32 {
            0 => Answer::Done,
            code => Answer::Error(Errno::from_raw(code.saturating_neg())),
        });
    }
    let is_connection = kind == (NFNL_SUBSYS_CTNETLINK as u16) << 8 | CHANGE;
    let attributes = message.get(HEADER + FAMILY..number(message, 0)? as usize).filter(|_| is_connection)?;
    Some(Answer::Connection { has_helper: has_attribute(attributes, HELPER) })
}

/// Whether one of `attributes` is of this kind. What cannot be read counts as if it were.
fn has_attribute(mut attributes: &[u8], wanted: u16) -> bool {
    while let [l0, l1, k0, k1, ..] = *attributes {
        let (length, kind) = (usize::from(u16::from_ne_bytes([l0, l1])), u16::from_ne_bytes([k0, k1]));
        if kind & !NESTED == wanted || length < 4 {
            return true;
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_names_the_connection_and_the_flag() {
        let flow = FlowKey::new([10, 244, 1, 2], [10, 244, 2, 3], [0x12, 0x34, 0, 80], 6);
        let message = lenient(&flow, 7);
        assert_eq!(message.len(), u32::from_ne_bytes(*message.first_chunk().unwrap()) as usize);
        assert_eq!(message[4..6], 0x0100_u16.to_ne_bytes());
        let hex: String = message[16..].iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = [
            "02000000",
            // The tuple: addresses, protocol, ports.
            "34000180 14000180 080001000af40102 080002000af40203",
            "1c000280 0500010006000000 0600020012340000 0600030000500000",
            // TCP: flags and mask of both directions.
            "18000480 14000180 0600040008080000 0600050008080000",
        ];
        assert_eq!(hex, expected.concat().replace(' ', ""));
    }

    #[test]
    fn only_whole_answers_to_the_request_are_read() {
        let mut message = vec![36, 0, 0, 0, 2, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0];
        message.extend((-2_i32).to_ne_bytes());
        assert_eq!(answer(&message, 9), Some(Answer::Error(Errno::ENOENT)));
        assert_eq!(answer(&message, 8), None);
        for length in 0..message.len() {
            assert_eq!(answer(&message[..length], 9), None);
        }
        message[16..20].fill(0);
        assert_eq!(answer(&message, 9), Some(Answer::Done));
        message[4] = 3;
        assert_eq!(answer(&message, 9), None);
    }

    #[test]
    fn a_helper_is_seen_among_the_attributes() {
        let describe = |attributes: &[Vec<u8>]| {
            let mut message = request(CHANGE, 0, 9, &attributes.concat());
            message[6..8].fill(0);
            answer(&message, 9)
        };
        let (status, helper) = (attribute(3, &[0; 4]), nested(HELPER, &attribute(1, b"ftp\0")));
        let seen = |has_helper| Some(Answer::Connection { has_helper });
        assert_eq!(describe(&[status.clone(), attribute(7, &[1])]), seen(false));
        assert_eq!(describe(&[status.clone(), helper.clone()]), seen(true));
        assert_eq!(describe(&[helper, status.clone()]), seen(true));
        assert_eq!(describe(&[status, vec![0, 0, 1, 0]]), seen(true), "what cannot be read");
        assert_eq!(describe(&[]), seen(false));
    }
}
