//! The messages of ctnetlink (include/uapi/linux/netfilter/nfnetlink_conntrack.h), as far as they are needed here.

use nix::libc::{AF_INET, NFNL_SUBSYS_CTNETLINK, NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR};
use overlay_ebpf::flow::FlowKey;

/// Length of `struct nlmsghdr` in bytes.
const HEADER: usize = 16;
/// `IPCTNL_MSG_CT_NEW`: without `NLM_F_CREATE`, a change.
const CHANGE: u16 = 0;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

// Of `enum ctattr_type`, `ctattr_tuple`, `ctattr_ip`, `ctattr_l4proto`, `ctattr_protoinfo` and `ctattr_protoinfo_tcp`.
const TUPLE_ORIGINAL: u16 = 1;
const PROTOCOL_INFO: u16 = 4;
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
    let [s0, s1, d0, d1] = flow.ports;
    let addresses =
        [attribute(IPV4_SOURCE, &flow.source), attribute(IPV4_DESTINATION, &flow.destination)].concat();
    let protocol = [
        attribute(PROTOCOL_NUMBER, &[flow.protocol]),
        attribute(SOURCE_PORT, &[s0, s1]),
        attribute(DESTINATION_PORT, &[d0, d1]),
    ]
    .concat();
    let tuple = [nested(TUPLE_IP, &addresses), nested(TUPLE_PROTOCOL, &protocol)].concat();
    let flags = [attribute(TCP_FLAGS_ORIGINAL, &LENIENT), attribute(TCP_FLAGS_REPLY, &LENIENT)].concat();
    let body = [nested(TUPLE_ORIGINAL, &tuple), nested(PROTOCOL_INFO, &nested(INFO_TCP, &flags))].concat();
    // `struct nfgenmsg`: family, version, resource.
    request(sequence, &[&[AF_INET as u8, 0, 0, 0], &body[..]].concat())
}

fn request(sequence: u32, payload: &[u8]) -> Vec<u8> {
    let kind = (NFNL_SUBSYS_CTNETLINK as u16) << 8 | CHANGE;
    let mut message = Vec::with_capacity(HEADER + payload.len());
    message.extend(((HEADER + payload.len()) as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(((NLM_F_REQUEST | NLM_F_ACK) as u16).to_ne_bytes());
    message.extend(sequence.to_ne_bytes());
    message.extend(0_u32.to_ne_bytes());
    message.extend(payload);
    message
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

/// The sequence number and the error number of an answer: 0, or a negative `errno`. `None` for another message.
pub(super) fn answer(message: &[u8]) -> Option<(u32, i32)> {
    let number = |at: usize| message.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes);
    let kind = u16::from_ne_bytes(*message.get(4..)?.first_chunk()?);
    (i32::from(kind) == NLMSG_ERROR).then_some(())?;
    Some((number(8)?, number(HEADER)? as i32))
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
    fn only_whole_answers_are_read() {
        let mut message = vec![36, 0, 0, 0, 2, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0];
        message.extend((-2_i32).to_ne_bytes());
        assert_eq!(answer(&message), Some((9, -2)));
        for length in 0..message.len() {
            assert_eq!(answer(&message[..length]), None);
        }
        message[4] = 3;
        assert_eq!(answer(&message), None);
    }
}
