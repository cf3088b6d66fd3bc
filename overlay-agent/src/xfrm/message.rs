//! The kernel's messages about IPsec policies, in and out.
#![allow(clippy::wildcard_enum_match_arm, reason = "the kernel adds attributes; only a few are read")]

use std::convert::Infallible;

use anyhow::{Context as _, Result, ensure};
use ipnet::Ipv4Net;
use netlink_packet_xfrm::{
    AF_INET6, Address, Mark, Selector, UserPolicyDefault, UserPolicyDefaultBuffer, UserPolicyIdBuffer,
    UserPolicyInfoBuffer, XFRM_POLICY_ALLOW, XFRM_POLICY_BLOCK, XFRM_POLICY_IN, XFRM_POLICY_OUT,
    XFRM_POLICY_TYPE_MAIN, XFRM_POLICY_TYPE_SUB, XFRM_USERPOLICY_BLOCK, XfrmAttrs, policy::ModifyMessage,
};
use rtnetlink::packet_core::{
    NetlinkDeserializable, NetlinkHeader, NetlinkPayload, NetlinkSerializable, Parseable as _,
};

use super::policy::{Action, Direction, Kind, Policy, PortMatch, UDP};

/// A message, not parsed: the connection discards, with a line in the log, what it cannot parse, and a policy must not get lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    /// One of `XFRM_MSG_*`.
    pub(super) kind: u16,
    pub(super) body: Vec<u8>,
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.body.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.body);
    }
}

impl NetlinkDeserializable for Message {
    type Error = Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Infallible> {
        Ok(Self { kind: header.message_type, body: payload.to_vec() })
    }
}

impl From<Message> for NetlinkPayload<Message> {
    fn from(message: Message) -> Self {
        Self::InnerMessage(message)
    }
}

/// The body of a request for all policies.
pub(super) fn all_policies() -> Vec<u8> {
    vec![0; size_of::<UserPolicyIdBuffer>()]
}

/// The body of a request for the default policies.
pub(super) fn default_policies() -> Vec<u8> {
    vec![0; size_of::<UserPolicyDefaultBuffer>()]
}

/// The default policies in the kernel's answer.
pub(super) fn read_defaults(body: &[u8]) -> Result<Vec<Policy>> {
    let defaults = UserPolicyDefault::parse(body).context("parse the default IPsec policies")?;
    let block = [(Direction::Out, defaults.output), (Direction::In, defaults.input)];
    let block = block.into_iter().filter(|(_, action)| *action == XFRM_USERPOLICY_BLOCK);
    Ok(block.map(|(direction, _)| Policy::default_block(direction)).collect())
}

/// The policy of one message of the list; `None` when it can match no IPv4 UDP packet without mark of this host.
pub(super) fn read_policy(body: &[u8]) -> Result<Option<Policy>> {
    // The library does not check this.
    ensure!(body.len() >= size_of::<UserPolicyInfoBuffer>(), "the message is too short for an IPsec policy");
    let message = ModifyMessage::parse(body).context("parse an IPsec policy")?;
    let info = &message.user_policy_info;
    // Others are for forwarded packets and, above those, for single sockets.
    let direction = match info.direction {
        XFRM_POLICY_OUT => Direction::Out,
        XFRM_POLICY_IN => Direction::In,
        _ => return Ok(None),
    };
    let selector = &info.selector;
    if selector.family == AF_INET6 || ![0, UDP].contains(&selector.proto) {
        return Ok(None);
    }
    let mut action = match info.action {
        XFRM_POLICY_ALLOW => Action::Allow,
        XFRM_POLICY_BLOCK => Action::Block,
        other => return Err(anyhow::anyhow!("an IPsec policy has the unknown action {other}")),
    };
    let (mut kind, mut conditional) = (Kind::Main, false);
    for attribute in &message.nlas {
        match attribute {
            // Optional ones too: with a state, packets are transformed.
            XfrmAttrs::Template(templates) if !templates.is_empty() && action == Action::Allow => {
                action = Action::Require;
            }
            XfrmAttrs::PolicyType(policy_type) => match policy_type.ptype {
                XFRM_POLICY_TYPE_MAIN => kind = Kind::Main,
                XFRM_POLICY_TYPE_SUB => kind = Kind::Sub,
                other => return Err(anyhow::anyhow!("an IPsec policy has the unknown type {other}")),
            },
            // The mark of outer packets is 0.
            XfrmAttrs::Mark(Mark { value, mask }) if value & mask != 0 => return Ok(None),
            // The kernel compares the whole value, so this one matches no packet at all.
            XfrmAttrs::Mark(Mark { value, .. }) => conditional |= *value != 0,
            // Only for packets of an xfrm device, which applies it itself.
            XfrmAttrs::IfId(id) if *id != 0 => return Ok(None),
            XfrmAttrs::SecurityContext(_) => conditional = true,
            _ => {}
        }
    }
    let Selector { saddr, prefixlen_s, daddr, prefixlen_d, .. } = selector;
    let (source, destination) = (net(*saddr, *prefixlen_s)?, net(*daddr, *prefixlen_d)?);
    let (local, remote) = match direction {
        Direction::Out => (source, destination),
        Direction::In => (destination, source),
    };
    Ok(Some(Policy {
        direction,
        local,
        remote,
        kind,
        priority: info.priority,
        protocol: selector.proto,
        source_port: ports(selector.sport, selector.sport_mask),
        destination_port: ports(selector.dport, selector.dport_mask),
        ifindex: selector.ifindex.unsigned_abs(),
        action,
        conditional,
    }))
}

fn net(address: Address, length: u8) -> Result<Ipv4Net> {
    let net = Ipv4Net::new(address.to_ipv4(), length);
    Ok(net.with_context(|| format!("an IPsec policy has the prefix length {length}"))?.trunc())
}

fn ports(port: u16, mask: u16) -> PortMatch {
    PortMatch { port: port & mask, mask }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `ip xfrm policy add src 192.168.77.1/32 dst 192.168.77.0/24 proto udp dport 8285 dir out priority 7 mark 0 mask 0xff tmpl src
    /// 192.168.77.1 dst 192.168.77.2 proto esp mode transport reqid 1`, as Linux 6.18 lists it: the policy, then its attributes.
    const REQUIRE: [&str; 2] = [
        "c0a84d00000000000000000000000000c0a84d01000000000000000000000000205dffff000000000200182011000000\
         0000000000000000ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff0000000000000000\
         000000000000000000000000000000000000000000000000000000000000000000000000000000004e20086b00000000\
         000000000000000007000000010000000100000000000000",
        "44000500c0a84d02000000000000000000000000000000003200000002000000c0a84d01000000000000000000000000\
         0100000000000000ffffffffffffffffffffffff0a00100000000000000000000c00150000000000ff000000",
    ];
    /// `ip xfrm policy add dir in action block ptype sub priority 3`, in the same way.
    const BLOCK: [&str; 2] = [
        "000000000000000000000000000000000000000000000000000000000000000000000000000000000200000000000000\
         0000000000000000ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff0000000000000000\
         000000000000000000000000000000000000000000000000000000000000000000000000000000004e20086b00000000\
         000000000000000003000000080000000001000000000000",
        "0a0010000100000000000000",
    ];
    const DIRECTION: usize = 160;
    const ACTION: usize = 161;

    fn bytes(parts: [&str; 2]) -> Vec<u8> {
        let text = parts.concat();
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    fn with(mut body: Vec<u8>, at: usize, byte: u8) -> Vec<u8> {
        body[at] = byte;
        body
    }

    /// An attribute of two words.
    fn attribute(kind: u16, words: [u32; 2]) -> Vec<u8> {
        let words = words.map(u32::to_ne_bytes).concat();
        [12u16.to_ne_bytes(), kind.to_ne_bytes()].concat().into_iter().chain(words).collect()
    }

    fn block_with(attribute: Vec<u8>) -> Result<Option<Policy>> {
        read_policy(&[bytes(BLOCK), attribute].concat())
    }

    #[test]
    fn policies_of_the_kernel_are_read() {
        let require = read_policy(&bytes(REQUIRE)).unwrap().unwrap();
        let text =
            "the IPsec policy out src 192.168.77.1/32 dst 192.168.77.0/24 proto udp dport 8285 (require)";
        assert_eq!(require.to_string(), text);
        assert_eq!((require.kind, require.priority, require.conditional), (Kind::Main, 7, false));
        let block = read_policy(&bytes(BLOCK)).unwrap().unwrap();
        assert_eq!(block.to_string(), "the IPsec policy in src 0.0.0.0/0 dst 0.0.0.0/0 (block)");
        assert_eq!((block.kind, block.priority), (Kind::Sub, 3));
    }

    #[test]
    fn an_allowing_policy_without_templates_lets_packets_pass() {
        let require = read_policy(&bytes([REQUIRE[0], ""])).unwrap().unwrap();
        assert_eq!((require.action, require.kind), (Action::Allow, Kind::Main));
        let block = read_policy(&with(bytes(REQUIRE), ACTION, XFRM_POLICY_BLOCK)).unwrap().unwrap();
        assert_eq!(block.action, Action::Block);
    }

    #[test]
    fn forwarding_sockets_other_families_and_protocols_are_left_out() {
        let family = 40;
        let protocol = 44;
        for (at, byte) in [(DIRECTION, 2), (DIRECTION, 3), (DIRECTION, 4), (family, 10), (protocol, 6)] {
            assert_eq!(read_policy(&with(bytes(REQUIRE), at, byte)).unwrap(), None, "{byte} at {at}");
        }
    }

    #[test]
    fn marks_and_interface_ids_that_outer_packets_lack_are_left_out() {
        const MARK: u16 = 21;
        const IF_ID: u16 = 31;
        assert_eq!(block_with(attribute(MARK, [0x10, 0xf0])).unwrap(), None);
        let id = |id: u32| [[8, 0].as_slice(), &IF_ID.to_ne_bytes(), &id.to_ne_bytes()].concat();
        assert_eq!(block_with(id(7)).unwrap(), None);
        assert!(block_with(id(0)).unwrap().is_some());
        for (mark, conditional) in [([0, 0xf0], false), ([0, 0], false), ([0x01, 0xf0], true)] {
            let policy = block_with(attribute(MARK, mark)).unwrap().unwrap();
            assert_eq!(policy.conditional, conditional, "{mark:?}");
        }
    }

    #[test]
    fn an_unreadable_policy_is_an_error() {
        for body in [
            bytes(BLOCK)[..100].to_vec(),
            with(bytes(BLOCK), ACTION, 9),
            // A prefix of 33 bits; an attribute longer than the message.
            with(bytes(BLOCK), 42, 33),
            with(bytes(BLOCK), 168, 200),
        ] {
            assert!(read_policy(&body).is_err(), "{body:?}");
        }
        assert!(read_defaults(&[]).is_err());
    }

    #[test]
    fn defaults_are_policies_only_where_they_block() {
        let read = |body: [u8; 3]| {
            let policies = read_defaults(&body).unwrap();
            policies.iter().map(Policy::to_string).collect::<Vec<_>>().join(", ")
        };
        let (block, accept) = (XFRM_USERPOLICY_BLOCK, 2);
        assert_eq!(read([accept, block, accept]), "");
        assert_eq!(read([accept, accept, block]), "the default IPsec policy out (block)");
        assert_eq!(
            read([block, accept, block]),
            "the default IPsec policy out (block), the default IPsec policy in (block)"
        );
    }
}
