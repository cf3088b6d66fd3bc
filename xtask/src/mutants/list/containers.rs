//! Changes of the agent: the containers of this host.

use super::super::change::{Change, Tests};

const FIND: &str = "overlay-agent/src/containers/mod.rs";
const GATEWAYS: &str = "overlay-agent/src/containers/gateways.rs";
const FACTS: &str = "overlay-agent/src/containers/facts.rs";
const WATCH: &str = "overlay-agent/src/containers/watch.rs";

const UNIT: Tests = Tests::Agent("containers::tests");
const REAL: Tests = Tests::EndToEnd("containers::");

/// See [`Change`].
pub(super) const CHANGES: &[Change] = &[
    Change {
        name: "containers-route-ignored",
        file: FIND,
        from: "routes.device(*address) == Some(*device)",
        to: "routes.device(*address).is_some()",
        wrong: "A container gets the packets of an address that is not routed to it.",
        tests: &[UNIT],
        reason: None,
    },
    Change {
        name: "containers-metric-ignored",
        file: FIND,
        from: "if route.metric < kept.metric {",
        to: "if route.metric > kept.metric {",
        wrong: "The worst of several routes decides.",
        tests: &[UNIT],
        reason: None,
    },
    Change {
        name: "containers-port-without-carrier",
        file: FIND,
        from: "link.up && link.carrier",
        to: "link.up",
        wrong: "Packets are handed to a device whose other end is down.",
        tests: &[UNIT],
        reason: None,
    },
    Change {
        name: "containers-veth-of-this-host",
        file: GATEWAYS,
        from: "link.kind.as_deref() == Some(\"veth\") && link.leads_elsewhere",
        to: "link.kind.as_deref() == Some(\"veth\")",
        wrong: "A veth whose other end is in this namespace counts as a container.",
        tests: &[UNIT],
        reason: None,
    },
    Change {
        name: "containers-port-taken-for-device",
        file: FACTS,
        from: "message.header.interface_family == AddressFamily::Bridge",
        to: "false",
        wrong: "A bridge's message about a port is taken for one about the device.",
        tests: &[UNIT],
        reason: None,
    },
    Change {
        name: "containers-silent-removal-of-routes",
        file: FACTS,
        from: "Some(before) if before.up != up => Effect::Routes",
        to: "Some(before) if before.up != up => Effect::Changed",
        wrong: "Routes that the kernel removes with a device that goes down stay known.",
        tests: &[UNIT],
        reason: None,
    },
    Change {
        name: "containers-lost-messages",
        file: WATCH,
        from: "Some(NetlinkPayload::Overrun(_)) => Work::List",
        to: "Some(NetlinkPayload::Overrun(_)) => Work::None",
        wrong: "Changes in messages that the kernel dropped are found half a minute later.",
        tests: &[REAL],
        reason: None,
    },
];
