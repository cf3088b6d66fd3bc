//! Generates the `nft` scripts of the guard's table. Pure.

use std::{collections::BTreeSet, fmt::Write as _, net::Ipv4Addr};

use serde_json::Value;

use super::ruleset::Names;

/// The set of the peers' addresses in the guard's table.
pub(super) const PEERS: &str = "peers";
/// The chain for forwarded packets to the port of a peer.
const TO_PEERS: &str = "to_peers";

/// The script that replaces the guard's table.
///
/// Only forwarded packets pass the hook: neither the agent's own datagrams nor those that the eBPF programs redirect. A host may
/// forward packets between its peers, so those that arrive on the device through which the host reaches their source are
/// accepted. A container's packet with a peer's address arrives on another device.
pub(super) fn replacement(names: &Names, port: u16, peers: &BTreeSet<Ipv4Addr>) -> String {
    let table = &names.guard;
    let mut script = removal(names);
    // Writing to a string cannot fail.
    let _ = writeln!(script, "add table ip {table}");
    let _ = writeln!(script, "add set ip {table} {PEERS} {{ type ipv4_addr; }}");
    elements(&mut script, "add", names, peers.iter());
    // A chain of its own, so that packets that are none for peers, which are nearly all, meet a single rule.
    let _ = writeln!(script, "add chain ip {table} {TO_PEERS}");
    for rule in [&format!("ip saddr @{PEERS} fib saddr . iif oif exists accept"), "counter drop"] {
        let _ = writeln!(script, "add rule ip {table} {TO_PEERS} {rule}");
    }
    // Before the usual filters, so that none of their rules accepts the packets first.
    let hook = "type filter hook forward priority -10; policy accept;";
    let _ = writeln!(script, "add chain ip {table} forward {{ {hook} }}");
    let to_peers = format!("meta l4proto udp udp dport {port} ip daddr @{PEERS} goto {TO_PEERS}");
    let _ = writeln!(script, "add rule ip {table} forward {to_peers}");
    script
}

/// The script that makes the set `wanted` when it is `present`; `None` when nothing differs.
pub(super) fn update(
    names: &Names,
    present: &BTreeSet<Ipv4Addr>,
    wanted: &BTreeSet<Ipv4Addr>,
) -> Option<String> {
    let mut script = String::new();
    elements(&mut script, "add", names, wanted.difference(present));
    elements(&mut script, "delete", names, present.difference(wanted));
    (!script.is_empty()).then_some(script)
}

/// The script that removes the guard's table, if it exists.
pub(super) fn removal(names: &Names) -> String {
    let table = &names.guard;
    // Deleting a missing table fails, adding an existing one does not.
    format!("add table ip {table}\ndelete table ip {table}\n")
}

fn elements<'a>(
    script: &mut String,
    verb: &str,
    names: &Names,
    addresses: impl Iterator<Item = &'a Ipv4Addr>,
) {
    let mut addresses = addresses.peekable();
    if addresses.peek().is_none() {
        return;
    }
    let _ = write!(script, "{verb} element ip {} {PEERS} {{ ", names.guard);
    for address in addresses {
        let _ = write!(script, "{address}, ");
    }
    script.push_str("}\n");
}

/// The addresses in a listed set; `None` when it has other elements too.
pub(super) fn listed(set: &Value) -> Option<BTreeSet<Ipv4Addr>> {
    let set = set.as_array()?.iter().find_map(|object| object.get("set"))?;
    let elements = set.get("elem").and_then(Value::as_array).into_iter().flatten();
    elements.map(|element| element.as_str()?.parse().ok()).collect()
}

/// A listing without the elements of sets, which old versions of nft do not leave out of JSON.
pub(super) fn without_elements(mut table: Value) -> Value {
    for set in table.as_array_mut().into_iter().flatten().filter_map(|object| object.get_mut("set")) {
        if let Some(set) = set.as_object_mut() {
            set.remove("elem");
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn peers(last: impl IntoIterator<Item = u8>) -> BTreeSet<Ipv4Addr> {
        last.into_iter().map(|last| Ipv4Addr::new(192, 168, 77, last)).collect()
    }

    #[test]
    fn the_script_replaces_the_table() {
        let names = Names::of("ovl0").unwrap();
        assert_eq!(
            replacement(&names, 8285, &peers([2, 3])),
            "add table ip overlay-guard-ovl0\n\
             delete table ip overlay-guard-ovl0\n\
             add table ip overlay-guard-ovl0\n\
             add set ip overlay-guard-ovl0 peers { type ipv4_addr; }\n\
             add element ip overlay-guard-ovl0 peers { 192.168.77.2, 192.168.77.3, }\n\
             add chain ip overlay-guard-ovl0 to_peers\n\
             add rule ip overlay-guard-ovl0 to_peers ip saddr @peers fib saddr . iif oif exists accept\n\
             add rule ip overlay-guard-ovl0 to_peers counter drop\n\
             add chain ip overlay-guard-ovl0 forward { type filter hook forward priority -10; policy accept; }\n\
             add rule ip overlay-guard-ovl0 forward meta l4proto udp udp dport 8285 ip daddr @peers goto to_peers\n"
        );
        assert!(!replacement(&names, 8285, &peers([])).contains("element"), "nft refuses an empty list");
    }

    #[test]
    fn an_update_names_only_the_difference_and_adds_first() {
        let names = Names::of("ovl0").unwrap();
        let many = peers(2..=250);
        assert_eq!(update(&names, &many, &many), None);
        assert_eq!(
            update(&names, &many, &peers((3..=252).filter(|last| *last != 9))).unwrap(),
            "add element ip overlay-guard-ovl0 peers { 192.168.77.251, 192.168.77.252, }\n\
             delete element ip overlay-guard-ovl0 peers { 192.168.77.2, 192.168.77.9, }\n"
        );
        assert_eq!(
            update(&names, &peers([2]), &peers([])).unwrap(),
            "delete element ip overlay-guard-ovl0 peers { 192.168.77.2, }\n"
        );
    }

    #[test]
    fn a_listed_set_is_read_back() {
        let set =
            |elements: Value| json!([{ "metainfo": {} }, { "set": { "name": "peers", "elem": elements } }]);
        assert_eq!(listed(&set(json!(["192.168.77.2", "192.168.77.3"]))), Some(peers([2, 3])));
        assert_eq!(listed(&json!([{ "set": { "name": "peers" } }])), Some(peers([])));
        assert_eq!(listed(&set(json!([{ "elem": { "val": "192.168.77.2", "timeout": 5 } }]))), None);
        assert_eq!(listed(&json!([])), None);
        assert_eq!(
            without_elements(set(json!(["192.168.77.2"]))),
            json!([{ "metainfo": {} }, { "set": { "name": "peers" } }])
        );
    }
}
