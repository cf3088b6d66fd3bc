//! Changes of the agent and the programs: link-layer addresses of next hops.

use super::super::change::{Change, Tests};

const ABI: &str = "overlay-ebpf/src/abi.rs";
const PROGRAM: &str = "overlay-ebpf/src/programs/egress.rs";
const ENTRY: &str = "overlay-agent/src/neighbour.rs";
const TABLE: &str = "overlay-agent/src/path/neighbours.rs";
const WATCH: &str = "overlay-agent/src/path/neighbour_watch.rs";
const QUERY: &str = "overlay-agent/src/path/query.rs";
const PATH: &str = "overlay-agent/src/path/mod.rs";
const NEXT_HOPS: &str = "overlay-agent/src/agent/next_hops.rs";

const UNIT: Tests = Tests::Agent("path::");

/// See [`Change`].
pub(super) const CHANGES: &[Change] = &[
    Change {
        name: "neighbours-addresses-swapped",
        file: ABI,
        from: "Ethernet::ipv4(self.mac, self.source_mac)",
        to: "Ethernet::ipv4(self.source_mac, self.mac)",
        wrong: "Frames are addressed to the device that sends them.",
        tests: &[Tests::Core, Tests::Programs("the_link_layer_header")],
        reason: None,
    },
    Change {
        name: "neighbours-header-not-written",
        file: PROGRAM,
        from: "= encap.next_hop.ethernet();",
        to: "= Ethernet::UNRESOLVED_IPV4;",
        wrong: "Frames go to no address although the kernel adds none.",
        tests: &[Tests::Programs("the_link_layer_header")],
        reason: None,
    },
    Change {
        name: "neighbours-never-left-to-the-kernel",
        file: PROGRAM,
        from: "match encap.next_hop.has(NextHop::RESOLVED) && heartbeat::is_agent_alive() {",
        to: "match true {",
        wrong: "Packets to a neighbour that is not known are lost.",
        tests: &[Tests::EndToEnd("neighbours::a_flushed")],
        reason: None,
    },
    Change {
        name: "neighbours-stale-counts",
        file: ENTRY,
        from: "self.mac.filter(|_| self.is_checked())",
        to: "self.mac()",
        wrong: "Programs send to a neighbour that the kernel does not check any more.",
        tests: &[UNIT],
        reason: None,
    },
    Change {
        name: "neighbours-groups-count",
        file: TABLE,
        from: "first & 1 == 0",
        to: "true",
        wrong: "Packets are sent to a group of hosts.",
        tests: &[UNIT],
        reason: None,
    },
    Change {
        name: "neighbours-own-address-not-followed",
        file: TABLE,
        from: "if before != mac {",
        to: "if before != mac && before.is_none() {",
        wrong: "Frames have an old source address.",
        tests: &[UNIT],
        reason: None,
    },
    Change {
        name: "neighbours-not-asked-again",
        file: WATCH,
        from: "self.list_at.get_or_insert(at);",
        to: "let _ = at;",
        wrong: "After each doubt of the kernel, five seconds of packets take its way.",
        tests: &[Tests::EndToEnd("neighbours::a_busy")],
        reason: None,
    },
    Change {
        name: "neighbours-gateway-ignored",
        file: QUERY,
        from: "neighbour = Some(*gateway),",
        to: "drop(gateway.octets()),",
        wrong: "A distant peer is taken for a neighbour.",
        tests: &[UNIT],
        reason: None,
    },
    Change {
        name: "neighbours-unusual-routes-count",
        file: QUERY,
        from: "is_plain = false",
        to: "is_plain = true",
        wrong: "Packets by an encapsulating or an IPv6 route get a link-layer header.",
        tests: &[UNIT],
        reason: None,
    },
    Change {
        name: "neighbours-of-slow-peers",
        file: PATH,
        from: "hop.ifindex != 0 && !hop.has(NextHop::SLOW_PATH)",
        to: "hop.ifindex != 0",
        wrong: "Addresses are known where no program may use them.",
        tests: &[UNIT],
        reason: None,
    },
    Change {
        name: "neighbours-reroute-waits",
        file: NEXT_HOPS,
        from: "self.stale |= self.paths.ask_again(&rerouted).is_err();",
        to: "self.stale = true;",
        wrong: "Packets go to the old gateway until the next regular look at the routes.",
        tests: &[Tests::EndToEnd("neighbours::another_gateway")],
        reason: None,
    },
];
