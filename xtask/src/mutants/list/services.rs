//! Changes of virtual service addresses.

use super::super::change::{Change, Tests};

const MAPS: &str = "overlay-ebpf/src/programs/service/maps.rs";
const SOCKETS: &str = "overlay-ebpf/src/programs/service/sockets.rs";
const TRANSLATE: &str = "overlay-ebpf/src/programs/service/translate.rs";
const SELECT: &str = "overlay-ebpf/src/service/select.rs";
const SERVICE_MAPS: &str = "overlay-agent/src/datapath/ebpf/service_maps.rs";

/// See [`Change`].
pub(super) const CHANGES: &[Change] = &[
    Change {
        name: "service-turns-not-fetched",
        file: MAPS,
        from: "AtomicOrdering::AcqRel }>",
        to: "AtomicOrdering::Relaxed }>",
        wrong: "All connections get the same turn.",
        tests: &[Tests::EndToEnd("socket_lb::tcp_connections_take_turns")],
        reason: None,
    },
    Change {
        name: "service-former-connection-not-forgotten",
        file: TRANSLATE,
        from: "        *former = Connection::default();\n",
        to: "",
        wrong: "A socket that reconnects directly to its endpoint sees the virtual address.",
        tests: &[Tests::EndToEnd("socket_lb::connected_udp_sockets_see_the_virtual_address")],
        reason: None,
    },
    Change {
        name: "service-given-up-counts-as-failed",
        file: SOCKETS,
        from: "if connection.abandon(maps::now()) {",
        to: "if connection.fail() {",
        wrong: "A connection that its program gives up at once counts as one that the endpoint did not answer.",
        tests: &[Tests::EndToEnd("socket_lb::a_silent_endpoint_fails_once_it_had_time")],
        reason: None,
    },
    Change {
        name: "service-affinity-without-members",
        file: SELECT,
        from: "let kept = kept.and_then(|kept| member(entry, kept.address, state));",
        to: "let kept = kept.map(|kept| Backend { address: kept.address, weight: 1, id: 0 });",
        wrong: "Clients with affinity go on to endpoints that have left.",
        tests: &[Tests::Core],
        reason: None,
    },
    Change {
        name: "service-members-stay",
        file: SERVICE_MAPS,
        from: "if !kept.contains(&backend.address) {",
        to: "if kept.is_empty() && !kept.contains(&backend.address) {",
        wrong: "Clients and sockets stay with endpoints that have left.",
        tests: &[Tests::EndToEnd("socket_lb::unconnected_udp_sockets_keep_an_endpoint")],
        reason: None,
    },
    Change {
        name: "service-former-slots-removed-first",
        file: SERVICE_MAPS,
        from: "            let entry = prepared.entry;\n",
        to: "            let entry = prepared.entry;\n            if let Some(former) = self.written.get(&key).map(|written| written.entry) {\n                \
             self.remove_slots(former.table, former.slots)?;\n            }\n",
        wrong: "Connections meet a table in parts.",
        tests: &[Tests::EndToEnd("socket_lb::no_connection_meets_a_table_in_parts")],
        reason: None,
    },
];
