//! Changes of the bypass of the host's stack: core, programs and agent.

use super::super::change::{Change, Tests};

const BYPASS: &str = "overlay-ebpf/src/bypass.rs";
const FLOW: &str = "overlay-ebpf/src/flow.rs";
const EGRESS: &str = "overlay-ebpf/src/programs/egress.rs";
const LOCAL: &str = "overlay-ebpf/src/programs/from_local.rs";
const TO_LOCAL: &str = "overlay-ebpf/src/programs/to_local.rs";
const MESSAGE: &str = "overlay-agent/src/conntrack/message.rs";
const TRACKING: &str = "overlay-agent/src/conntrack/mod.rs";
const GATEWAYS: &str = "overlay-agent/src/containers/gateways.rs";

const CORE: Tests = Tests::Core;
const PROGRAMS: Tests = Tests::Programs("bypass::");
const TRACK: Tests = Tests::Agent("conntrack::");
const FOUND: Tests = Tests::Agent("containers::tests");
const REAL: Tests = Tests::EndToEnd("bypass::connection_tracking");

/// See [`Change`].
pub(super) const CHANGES: &[Change] = &[
    Change {
        name: "bypass-device-ignored",
        file: BYPASS,
        from: "endpoint.ifindex == ifindex",
        to: "endpoint.ifindex != 0",
        wrong: "A container sends with the address of another one, past the stack.",
        tests: &[CORE],
        reason: None,
    },
    Change {
        name: "bypass-hardware-address-ignored",
        file: BYPASS,
        from: "&& ethernet.is_from(endpoint.mac)",
        to: "&& ethernet.is_from(endpoint.mac) | true",
        wrong: "A frame with another hardware address skips the stack.",
        tests: &[CORE],
        reason: None,
    },
    Change {
        name: "bypass-not-to-the-gateway",
        file: BYPASS,
        from: "&& ethernet.is_to(endpoint.gateway_mac)",
        to: "&& (ethernet.is_to(endpoint.gateway_mac) | true)",
        wrong: "A frame for another machine of the bridge is encapsulated.",
        tests: &[CORE],
        reason: None,
    },
    Change {
        name: "bypass-ttl-ends-unnoticed",
        file: BYPASS,
        from: "&& header.ttl() > 2",
        to: "&& header.ttl() > 1",
        wrong: "A packet arrives whose TTL ends at this host.",
        tests: &[CORE],
        reason: None,
    },
    Change {
        name: "bypass-own-subnet-encapsulated",
        file: BYPASS,
        from: "&& !config.subnet.contains(header.destination())",
        to: "&& !config.subnet.contains([0; 4])",
        wrong: "Packets for containers of this host skip the stack.",
        tests: &[CORE],
        reason: None,
    },
    Change {
        name: "bypass-ttl-of-arrival-ignored",
        file: BYPASS,
        from: "header.ttl() <= 1",
        to: "header.ttl() == 0",
        wrong: "A packet whose TTL ends is delivered.",
        tests: &[CORE],
        reason: None,
    },
    Change {
        name: "bypass-hop-of-the-stack-not-counted",
        file: EGRESS,
        from: "Rewrite::next_hop(inner, inner.tos()).apply(inner);",
        to: "let _ = Rewrite::next_hop(inner, inner.tos());",
        wrong: "A packet that skips the stack has another TTL than one that does not.",
        tests: &[PROGRAMS],
        reason: None,
    },
    Change {
        name: "bypass-everything-with-flows",
        file: LOCAL,
        from: "maps::bypasses(Bypass::Flows) && !flows::may_bypass",
        to: "false && !flows::may_bypass",
        wrong: "Packets of unknown flows skip the stack.",
        tests: &[PROGRAMS],
        reason: None,
    },
    Change {
        name: "flow-never-sampled",
        file: FLOW,
        from: "now.wrapping_sub(self.sampled) < SAMPLE_INTERVAL",
        to: "now.wrapping_sub(self.sampled) < u64::MAX",
        wrong: "No packet checks whether the stack still lets the flow through.",
        tests: &[CORE],
        reason: None,
    },
    Change {
        name: "flow-never-expires",
        file: FLOW,
        from: "now.wrapping_sub(self.confirmed) < LIFETIME",
        to: "now.wrapping_sub(self.confirmed) < u64::MAX",
        wrong: "A rule that drops a flow has no effect.",
        tests: &[CORE],
        reason: None,
    },
    Change {
        name: "flow-control-packets-bypass",
        file: FLOW,
        from: "flags & (SYN | FIN | RST) != 0",
        to: "flags & SYN != 0",
        wrong: "Connection tracking does not see that a connection ends.",
        tests: &[CORE],
        reason: None,
    },
    Change {
        name: "flow-unestablished-confirmed",
        file: FLOW,
        from: "if !tracking.is_established() {",
        to: "if !tracking.is_established() && now == 0 {",
        wrong: "A connection skips the stack before it is established.",
        tests: &[CORE],
        reason: None,
    },
    Change {
        name: "flow-other-connection-released",
        file: FLOW,
        from: "released.connection == connection",
        to: "released.connection != 0",
        wrong: "A connection skips tracking that checks its windows.",
        tests: &[CORE],
        reason: None,
    },
    Change {
        name: "flow-forwarded-packets-only",
        file: EGRESS,
        from: "if from != 0",
        to: "if from != u32::MAX",
        wrong: "A packet of the host itself confirms a container's flow.",
        tests: &[PROGRAMS],
        reason: None,
    },
    Change {
        name: "flow-confirmed-from-elsewhere",
        file: TO_LOCAL,
        from: "if from != config.overlay_ifindex {",
        to: "if from == u32::MAX {",
        wrong: "A packet that has not arrived through the overlay confirms a flow of it.",
        tests: &[PROGRAMS],
        reason: None,
    },
    Change {
        name: "conntrack-helper-ignored",
        file: MESSAGE,
        from: "has_helper: has_attribute(attributes, HELPER)",
        to: "has_helper: has_attribute(attributes, HELPER) && attributes.is_empty()",
        wrong: "A helper does not see what it reads.",
        tests: &[TRACK],
        reason: None,
    },
    Change {
        name: "conntrack-windows-checked",
        file: TRACKING,
        from: "if !is_free || flow.protocol != PROTOCOL_TCP {",
        to: "if is_free || flow.protocol != PROTOCOL_TCP {",
        wrong: "Connection tracking takes samples of a connection for invalid.",
        tests: &[REAL],
        reason: None,
    },
    Change {
        name: "containers-traffic-control-skipped",
        file: GATEWAYS,
        from: "let kind = kinds.find(|kind| !(selection.own_clsact && *kind == \"clsact\"))?;",
        to: "let kind = kinds.find(|kind| selection.own_clsact && *kind == \"clsact\")?;",
        wrong: "The limits that an operator set for a container do not hold.",
        tests: &[FOUND],
        reason: None,
    },
];
