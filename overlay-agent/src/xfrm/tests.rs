//! Which policy covers a peer: rules by example, and generated policies against the kernel's way to decide.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use overlay_ebpf::entropy::FIRST_PORT;
use proptest::prelude::*;

use super::Policies;
use super::policy::{Action, Direction, Flow, Kind, Policy, PortMatch, UDP};

const FLOW: Flow = Flow {
    local: Ipv4Addr::new(192, 168, 77, 1),
    peer: Ipv4Addr::new(192, 168, 77, 2),
    port: 8285,
    ifindex: 3,
};

/// A policy for everything.
fn policy(direction: Direction, action: Action) -> Policy {
    Policy { kind: Kind::Main, action, ..Policy::default_block(direction) }
}

fn ports(port: u16) -> PortMatch {
    PortMatch { port, mask: u16::MAX }
}

fn net(text: &str) -> Ipv4Net {
    text.parse().unwrap()
}

/// The text of the covering policy without its standard beginning.
fn covering<const N: usize>(policies: [Policy; N]) -> String {
    let policies: Policies = policies.into_iter().collect();
    let found = policies.covering(&FLOW).map(Policy::to_string).unwrap_or_default();
    found.trim_start_matches("the IPsec policy ").to_owned()
}

fn covers(policy: Policy) -> bool {
    !covering([policy]).is_empty()
}

#[test]
fn a_policy_covers_the_addresses_of_its_selector() {
    let out = policy(Direction::Out, Action::Block);
    for (local, remote, expected) in [
        ("0.0.0.0/0", "0.0.0.0/0", true),
        ("192.168.77.1/32", "192.168.77.2/32", true),
        ("192.168.77.0/24", "192.168.0.0/16", true),
        ("192.168.77.2/32", "192.168.77.1/32", false),
        ("192.168.77.1/32", "192.168.77.3/32", false),
        ("192.168.78.0/24", "0.0.0.0/0", false),
    ] {
        let both = Policy { local: net(local), remote: net(remote), ..out.clone() };
        assert_eq!(covers(both.clone()), expected, "out: {both}");
        let both = Policy { direction: Direction::In, ..both };
        assert_eq!(covers(both.clone()), expected, "{both}");
    }
}

#[test]
fn source_ports_are_the_hash_range_and_the_networks_port() {
    let with = |direction, source_port, destination_port| {
        covers(Policy { source_port, destination_port, ..policy(direction, Action::Require) })
    };
    let any = PortMatch::default();
    for (source, expected) in [(8285, true), (49152, true), (65535, true), (49151, false), (53, false)] {
        assert_eq!(with(Direction::Out, ports(source), any), expected, "sport {source}");
        assert!(with(Direction::In, ports(source), any), "a peer may send from {source}");
    }
    // 32768 to 65535, and 32768 to 49151.
    assert!(with(Direction::Out, PortMatch { port: 0x8000, mask: 0x8000 }, any));
    assert!(!with(Direction::Out, PortMatch { port: 0x8000, mask: 0xc000 }, any));
    for direction in [Direction::Out, Direction::In] {
        assert!(with(direction, any, ports(8285)) && !with(direction, any, ports(8472)));
    }
}

#[test]
fn devices_count_as_in_the_kernel() {
    let with = |direction, ifindex| covers(Policy { ifindex, ..policy(direction, Action::Block) });
    assert!(with(Direction::Out, FLOW.ifindex) && !with(Direction::Out, 4));
    // Loopback, for packets from other hosts.
    assert!(with(Direction::In, 1));
}

#[test]
fn only_what_restricts_covers() {
    assert_eq!(covering([policy(Direction::Out, Action::Allow)]), "");
    assert_eq!(
        covering([Direction::In, Direction::Out].map(|direction| policy(direction, Action::Block))),
        "out src 0.0.0.0/0 dst 0.0.0.0/0 (block)"
    );
    assert_eq!(covering([]), "");
}

#[test]
fn an_earlier_policy_that_allows_all_packets_of_the_flow_shadows_later_ones() {
    let block = Policy { priority: 10, ..policy(Direction::Out, Action::Block) };
    let allow = Policy { priority: 9, ..policy(Direction::Out, Action::Allow) };
    let flow = Policy {
        protocol: UDP,
        remote: net("192.168.77.2/32"),
        destination_port: ports(8285),
        ..allow.clone()
    };
    assert_eq!(covering([block.clone(), allow.clone()]), "");
    assert_eq!(covering([block.clone(), flow.clone()]), "");
    for (why, allow) in [
        ("of equal priority the older one counts", Policy { priority: 10, ..allow.clone() }),
        ("it is later", Policy { priority: 11, ..allow.clone() }),
        ("it is for the tun rung only", Policy { source_port: ports(8285), ..flow.clone() }),
        (
            "it is for few ports of the eBPF rungs",
            Policy { source_port: PortMatch { port: 8285, mask: !FIRST_PORT }, ..flow.clone() },
        ),
        (
            "it is for the eBPF rungs only",
            Policy { source_port: PortMatch { port: FIRST_PORT, mask: FIRST_PORT }, ..flow.clone() },
        ),
        ("it is for another peer", Policy { remote: net("192.168.77.3/32"), ..flow.clone() }),
        ("it is for the other direction", Policy { direction: Direction::In, ..allow.clone() }),
        ("it has a condition", Policy { conditional: true, ..allow.clone() }),
        ("each type is evaluated apart", Policy { kind: Kind::Sub, ..allow.clone() }),
        ("the device may be another", Policy { ifindex: FLOW.ifindex, ..allow.clone() }),
    ] {
        assert_eq!(covering([block.clone(), allow]), "out src 0.0.0.0/0 dst 0.0.0.0/0 (block)", "{why}");
    }
    let require = Policy { priority: 8, ..policy(Direction::Out, Action::Require) };
    assert!(covering([block, allow, require]).ends_with("(require)"));
}

#[test]
fn the_default_is_for_packets_that_no_policy_matches() {
    let default = Policy::default_block(Direction::In);
    assert_eq!(covering([default.clone()]), "the default IPsec policy in (block)");
    let allow = Policy { priority: u32::MAX, ..policy(Direction::In, Action::Allow) };
    assert_eq!(covering([default.clone(), allow.clone()]), "");
    assert!(covers_with(&default, Policy { source_port: ports(8285), ..allow.clone() }));
    assert!(covers_with(&default, Policy { kind: Kind::Sub, ..allow }));
}

fn covers_with(default: &Policy, other: Policy) -> bool {
    !covering([default.clone(), other]).is_empty()
}

#[test]
fn the_order_of_the_listing_makes_no_difference() {
    let [a, b] = [Action::Block, Action::Require].map(|action| policy(Direction::Out, action));
    let sets: [Policies; 2] = [[a.clone(), b.clone()], [b, a]].map(|policies| policies.into_iter().collect());
    assert_eq!(sets[0], sets[1]);
}

/// Whether the kernel restricts any packet of the flow, decided packet by packet. What is not certain restricts.
fn restricts_a_packet(policies: &[Policy], flow: &Flow) -> bool {
    [Direction::Out, Direction::In].into_iter().any(|direction| {
        // For speed: most policies match no packet.
        let policies: Vec<_> = policies
            .iter()
            .filter(|it| it.direction == direction && matches_but_source_port(it, flow))
            .collect();
        let restricts = policies.iter().any(|it| it.action != Action::Allow);
        restricts
            && source_ports(direction, flow).any(|source_port| {
                let first = |kind| {
                    let of_kind = policies.iter().filter(|it| it.kind == kind);
                    let matching = of_kind.filter(|policy| is_port(policy.source_port, source_port));
                    matching.min_by_key(|policy| (policy.priority, policy.action == Action::Allow))
                };
                let main = first(Kind::Main).or_else(|| first(Kind::Default));
                [first(Kind::Sub), main].into_iter().flatten().any(|policy| policy.action != Action::Allow)
            })
    })
}

/// As `xfrm_selector_match` of the kernel; uncertain conditions are met by policies that restrict and by no other.
fn matches_but_source_port(policy: &Policy, flow: &Flow) -> bool {
    let is_in = |net: &Ipv4Net, address: Ipv4Addr| {
        let shift = 32 - u32::from(net.prefix_len());
        (u64::from(u32::from(net.addr())) >> shift) == (u64::from(u32::from(address)) >> shift)
    };
    let may_be = policy.direction == Direction::In || policy.ifindex == flow.ifindex;
    is_in(&policy.local, flow.local)
        && is_in(&policy.remote, flow.peer)
        && (policy.protocol == 0 || policy.protocol == UDP)
        && is_port(policy.destination_port, flow.port)
        && (policy.ifindex == 0 || may_be && policy.action != Action::Allow)
        && (!policy.conditional || policy.action != Action::Allow)
}

/// The source ports of the flow's packets.
fn source_ports(direction: Direction, flow: &Flow) -> impl Iterator<Item = u16> {
    let ranges = match direction {
        Direction::Out => [FIRST_PORT..=u16::MAX, flow.port..=flow.port],
        Direction::In => [0..=flow.port, flow.port..=u16::MAX],
    };
    ranges.into_iter().flatten()
}

fn is_port(wanted: PortMatch, port: u16) -> bool {
    port & wanted.mask == wanted.port & wanted.mask
}

/// Whether the policy, alone, decides about every packet of the flow in its direction.
fn matches_every_packet(policy: &Policy, flow: &Flow) -> bool {
    matches_but_source_port(policy, flow)
        && source_ports(policy.direction, flow).all(|port| is_port(policy.source_port, port))
}

/// Few values of each field, so that policies often match, and often not by one bit.
fn any_policy() -> impl Strategy<Value = Policy> {
    let address = prop_oneof![Just(FLOW.local), Just(FLOW.peer), Just(Ipv4Addr::new(192, 168, 77, 3))];
    let net = (address, prop_oneof![9 => Just(0), 3 => Just(24), 1 => Just(31), 1 => Just(32)])
        .prop_map(|(address, length)| Ipv4Net::new(address, length).unwrap().trunc());
    let number = prop_oneof![Just(8285), Just(FIRST_PORT), Just(0x8000), Just(65535), any::<u16>()];
    let masks = [u16::MAX, FIRST_PORT, !FIRST_PORT, 0x4000, 0x00ff];
    let mask = prop_oneof![9 => Just(0), 3 => prop::sample::select(masks.to_vec()), 1 => any::<u16>()];
    let port = (number, mask).prop_map(|(port, mask)| PortMatch { port: port & mask, mask });
    let scarce = |value: u32| prop_oneof![9 => Just(0), 1 => Just(value), 1 => Just(value + 1)];
    let words = (
        prop_oneof![Just(Direction::Out), Just(Direction::In)],
        prop_oneof![3 => Just(Kind::Main), 1 => Just(Kind::Sub)],
        prop_oneof![3 => Just(Action::Allow), 1 => Just(Action::Require), 1 => Just(Action::Block)],
        prop_oneof![3 => Just(0), 3 => Just(UDP), 1 => Just(6)],
        prop_oneof![9 => Just(false), 1 => Just(true)],
    );
    (words, net.clone(), net, port.clone(), port, scarce(FLOW.ifindex), 0u32..3).prop_map(
        |(
            (direction, kind, action, protocol, conditional),
            local,
            remote,
            source,
            destination,
            ifindex,
            priority,
        )| Policy {
            direction,
            local,
            remote,
            kind,
            priority,
            protocol,
            source_port: source,
            destination_port: destination,
            ifindex,
            action,
            conditional,
        },
    )
}

fn any_policies() -> impl Strategy<Value = Vec<Policy>> {
    let defaults = prop::collection::vec(prop_oneof![Just(Direction::Out), Just(Direction::In)], 0..2);
    (prop::collection::vec(any_policy(), 0..8), defaults).prop_map(|(policies, defaults)| {
        policies.into_iter().chain(defaults.into_iter().map(Policy::default_block)).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn no_packet_that_the_kernel_restricts_bypasses_it(policies in any_policies()) {
        let set: Policies = policies.iter().cloned().collect();
        let covering = set.covering(&FLOW);
        if restricts_a_packet(&policies, &FLOW) {
            prop_assert!(covering.is_some(), "{policies:?}");
        }
    }

    #[test]
    fn a_covering_policy_matches_a_packet_and_no_earlier_one_allows_all(policies in any_policies()) {
        let set: Policies = policies.iter().cloned().collect();
        let is_before = |a: &Policy, b: &Policy| {
            a.direction == b.direction
                && match b.kind {
                    Kind::Default => a.kind == Kind::Main,
                    Kind::Sub | Kind::Main => a.kind == b.kind && a.priority < b.priority,
                }
        };
        let expected: Vec<_> = policies
            .iter()
            .filter(|it| it.action != Action::Allow && restricts_a_packet(&[(*it).clone()], &FLOW))
            .filter(|it| {
                let mut earlier = policies.iter().filter(|other| is_before(other, it));
                !earlier.any(|other| other.action == Action::Allow && matches_every_packet(other, &FLOW))
            })
            .collect();
        match set.covering(&FLOW) {
            Some(policy) => prop_assert!(expected.contains(&policy), "{policy:?} of {policies:?}"),
            None => prop_assert!(expected.is_empty(), "{expected:?} of {policies:?}"),
        }
    }
}
