//! Changes of virtual service addresses.

use super::super::change::{Change, Tests};

const MAPS: &str = "overlay-ebpf/src/programs/service/maps.rs";
const SOCKETS: &str = "overlay-ebpf/src/programs/service/sockets.rs";
const TRANSLATE: &str = "overlay-ebpf/src/programs/service/translate.rs";
const SELECT: &str = "overlay-ebpf/src/service/select.rs";
const TRANSLATION: &str = "overlay-ebpf/src/service/translation.rs";
const SLOTS: &str = "overlay-agent/src/service/slots.rs";
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
    Change {
        name: "service-select-expired-affinity",
        file: SELECT,
        from: ".filter(|kept| kept.is_valid(entry.affinity_ttl_s, now))",
        to: ".filter(|kept| kept.is_valid(entry.affinity_ttl_s, 0))",
        wrong: "The affinity of a client never ends.",
        tests: &[Tests::Core],
        reason: None,
    },
    Change {
        name: "service-select-affinity-not-renewed",
        file: SELECT,
        from: "    state.keep(key, Affinity::new(backend.address, now));\n",
        to: "    if kept.is_none() {\n        state.keep(key, Affinity::new(backend.address, now));\n    }\n",
        wrong: "The affinity of a client ends while the client connects all the time.",
        tests: &[Tests::Core],
        reason: None,
    },
    Change {
        name: "service-select-one-slot-compared",
        file: SELECT,
        from: "if offset >= entry.slots {",
        to: "if offset >= 1 {",
        wrong: "The endpoint with the fewest connections is the next one in turn.",
        tests: &[Tests::Core],
        reason: None,
    },
    Change {
        name: "service-select-without-weight",
        file: SELECT,
        from: "connections.wrapping_mul(best.weight as u64) < fewest.wrapping_mul(backend.weight as u64)",
        to: "best.weight == 0 || connections < fewest",
        wrong: "Endpoints of more weight get no more connections.",
        tests: &[Tests::Core],
        reason: None,
    },
    Change {
        name: "service-translation-retired-is-current",
        file: TRANSLATION,
        from: "self.state == Self::CURRENT && self.from == from",
        to: "self.state != Self::NONE && self.from == from",
        wrong: "Datagrams go on to an endpoint that has left.",
        tests: &[Tests::Core],
        reason: None,
    },
    Change {
        name: "service-translation-first-instead-of-last",
        file: TRANSLATION,
        from: "        if last.is_some() {\n",
        to: "        if false {\n",
        wrong: "Of two services with one endpoint, replies come from the one that was not asked.",
        tests: &[Tests::Core],
        reason: None,
    },
    Change {
        name: "service-slots-not-spread",
        file: SLOTS,
        from: "            *credit -= total;\n",
        to: "            *credit -= 1;\n",
        wrong: "An endpoint of more weight gets its connections one after the other, and more than its share.",
        tests: &[Tests::Agent("slots")],
        reason: None,
    },
    Change {
        name: "service-slots-weights-not-reduced",
        file: SLOTS,
        from: "let divisor = weights().fold(0, greatest_common_divisor).max(1);",
        to: "let divisor = 1;",
        wrong: "Equal weights of 256 take 256 slots for each endpoint.",
        tests: &[Tests::Agent("slots")],
        reason: None,
    },
    Change {
        name: "service-slots-maglev-ignores-weights",
        file: SLOTS,
        from: "if free == 0 || order.credit < heaviest {",
        to: "if free == 0 {",
        wrong: "With Maglev, endpoints of less weight get as many clients.",
        tests: &[Tests::Agent("slots")],
        reason: None,
    },
];
