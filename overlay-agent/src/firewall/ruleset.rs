//! Generates `nft` scripts. Pure.

use std::fmt::Write as _;

use ipnet::Ipv4Net;
use serde_json::Value;
use thiserror::Error;

/// Table and chain of iptables' FORWARD chain in nftables, family ip.
pub(super) const FORWARD_CHAIN: (&str, &str) = ("filter", "FORWARD");

/// Bit of a packet's mark, set only around iptables' FORWARD chain: its rules accept the packet. kube-proxy uses 0x4000 and 0x8000,
/// CNI's portmap 0x2000, Calico and Tailscale the upper half.
const ACCEPT: u32 = 0x1000;

/// Prefix of the names of tables and of the comments on rules.
const MARK: &str = "overlay-agent";

/// Prefix of the names of the guards' tables: another one, because a device may be called `guard-ovl0`.
const GUARD_MARK: &str = "overlay-guard";

/// The desired rules of one overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The overlay device, which distinguishes the rules of several agents on one host.
    pub device: String,
    /// Network of the overlay.
    pub network: Ipv4Net,
    /// Subnet of this host.
    pub subnet: Ipv4Net,
    /// Masquerade packets that leave the overlay, or enter it from this host.
    pub masquerade: bool,
    /// Randomize the source ports of masqueraded connections, which avoids collisions of simultaneous ones.
    pub fully_random: bool,
    /// Accept packets of the overlay in iptables' FORWARD chain.
    pub forward: bool,
}

/// The name of the overlay device cannot be part of a table name.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "the device name {0:?} cannot be part of an nftables name: choose a --device of letters, digits, '-', '_' and '.'"
)]
pub struct BadName(String);

/// Names of the agent's tables, and comment on its rules in other tables.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) table: String,
    pub(super) guard: String,
    pub(super) comment: String,
}

impl Names {
    pub(super) fn of(device: &str) -> Result<Self, BadName> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        match !device.is_empty() && device.bytes().all(fits) {
            true => Ok(Self {
                table: format!("{MARK}-{device}"),
                guard: format!("{GUARD_MARK}-{device}"),
                comment: format!("{MARK} {device}"),
            }),
            false => Err(BadName(device.to_owned())),
        }
    }
}

impl Rules {
    pub(super) const fn is_empty(&self) -> bool {
        !self.masquerade && !self.forward
    }

    /// The script that replaces the agent's rules. `forward` are its rules in iptables' FORWARD chain, if the chain exists.
    pub(super) fn script(&self, names: &Names, forward: Option<&[Value]>) -> String {
        let mut script = removal(names, forward.unwrap_or_default());
        let forward = self.forward && forward.is_some();
        if self.masquerade || forward {
            // Writing to a string cannot fail.
            let _ = writeln!(script, "add table ip {}", names.table);
        }
        if self.masquerade {
            self.masquerading(names, &mut script);
        }
        if forward {
            self.forwarding(names, &mut script);
        }
        script
    }

    /// Accepts what containers send and what answers them, as far as iptables' FORWARD chain decides: packets with an address of
    /// the network that arrive on the device through which this host reaches it (so not forged ones from the underlay), replies,
    /// and connections to ports that this host publishes by DNAT. New connections to containers are left to the chain's policy.
    ///
    /// One expression that `iptables` cannot print, such as the state of a connection, would make `iptables -S` and
    /// `iptables-save` refuse the whole table. So a chain of our own decides and marks the packets, and the rules in the FORWARD
    /// chain test the mark, which `iptables` can print.
    fn forwarding(&self, names: &Names, script: &mut String) {
        let (network, own, comment) = (self.network, &names.table, &names.comment);
        let mut chain = |name: &str, priority: i8, rules: &[String]| {
            let hook = format!("type filter hook forward priority {priority}; policy accept;");
            let _ = writeln!(script, "add chain ip {own} {name} {{ {hook} }}");
            for rule in rules {
                let _ = writeln!(script, "add rule ip {own} {name} {rule}");
            }
        };
        let clear = ["saddr", "daddr"]
            .map(|side| format!("ip {side} {network} meta mark set meta mark & {:#x}", !ACCEPT));
        let accept = [
            format!("ip saddr {network} fib saddr . iif oif exists"),
            format!("ip daddr {network} ct state established,related"),
            format!("ip daddr {network} ct status dnat"),
        ];
        let accept = accept.map(|condition| format!("{condition} meta mark set meta mark | {ACCEPT:#x}"));
        chain("before-forward", -5, &[clear.as_slice(), &accept].concat());
        chain("after-forward", 5, &clear);
        let (table, chain) = FORWARD_CHAIN;
        for side in ["saddr", "daddr"] {
            let rule = format!("ip {side} {network} meta mark & {ACCEPT:#x} == {ACCEPT:#x} accept");
            let _ = writeln!(script, "add rule ip {table} {chain} {rule} comment \"{comment}\"");
        }
    }

    /// flannel's rules, in its order.
    fn masquerading(&self, names: &Names, script: &mut String) {
        let Self { network, subnet, .. } = self;
        let masquerade = if self.fully_random { "masquerade fully-random" } else { "masquerade" };
        let chain = format!("ip {} postrouting", names.table);
        let rules = [
            // kube-proxy's mark: it masquerades these itself.
            "meta mark & 0x4000 == 0x4000 return".to_owned(),
            // Do not masquerade within the overlay.
            format!("ip saddr {subnet} ip daddr {network} return"),
            format!("ip saddr {network} ip daddr {subnet} return"),
            // Do not masquerade packets from outside to this host's containers.
            format!("ip saddr != {network} ip daddr {subnet} return"),
            // Masquerade packets that leave the overlay, except multicast.
            format!("ip saddr {network} ip daddr != 224.0.0.0/4 {masquerade}"),
            // Masquerade packets from outside to containers of other hosts.
            format!("ip saddr != {network} ip daddr {network} {masquerade}"),
        ];
        let hook = "type nat hook postrouting priority 100; policy accept;";
        let _ = writeln!(script, "add chain {chain} {{ {hook} }}");
        for rule in rules {
            let _ = writeln!(script, "add rule {chain} {rule}");
        }
    }
}

/// The script that removes the agent's table, if it exists, and its rules in iptables' FORWARD chain.
pub(super) fn removal(names: &Names, forward: &[Value]) -> String {
    let table = &names.table;
    // Deleting a missing table fails, adding an existing one does not.
    let mut script = format!("add table ip {table}\ndelete table ip {table}\n");
    let (table, chain) = FORWARD_CHAIN;
    for handle in forward.iter().filter_map(|rule| rule.get("handle")).filter_map(Value::as_u64) {
        let _ = writeln!(script, "delete rule ip {table} {chain} handle {handle}");
    }
    script
}

/// Number of rules that a script adds.
pub(super) fn count(script: &str) -> usize {
    script.lines().filter(|line| line.starts_with("add rule ")).count()
}

/// Whether a listed rule has the agent's comment.
pub(super) fn is_marked(rule: &Value, names: &Names) -> bool {
    rule.get("comment").and_then(Value::as_str) == Some(names.comment.as_str())
}

/// The listed chains, other than iptables', whose policy drops forwarded IPv4 packets.
pub(super) fn other_drops(chains: &Value) -> Vec<String> {
    let chains = chains.as_array().into_iter().flatten().filter_map(|object| object.get("chain"));
    let drops = chains.filter_map(|chain| {
        let text = |key| chain.get(key).and_then(Value::as_str);
        let (family, table, name) = (text("family")?, text("table")?, text("name")?);
        let dropping = text("hook") == Some("forward") && text("policy") == Some("drop");
        let ours = family == "ip" && (table, name) == FORWARD_CHAIN;
        (dropping && !ours && matches!(family, "ip" | "inet"))
            .then(|| format!("the chain {name} in the table {family} {table}"))
    });
    drops.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rules() -> Rules {
        Rules {
            device: "ovl0".to_owned(),
            network: "10.244.0.0/16".parse().unwrap(),
            subnet: "10.244.1.0/24".parse().unwrap(),
            masquerade: true,
            fully_random: true,
            forward: true,
        }
    }

    #[test]
    fn the_script_replaces_the_agents_rules() {
        let names = Names::of("ovl0").unwrap();
        let existing = [json!({ "handle": 7, "comment": "overlay-agent ovl0" })];
        let script = rules().script(&names, Some(&existing));
        assert_eq!(count(&script), 15);
        assert_eq!(
            script,
            "add table ip overlay-agent-ovl0\n\
             delete table ip overlay-agent-ovl0\n\
             delete rule ip filter FORWARD handle 7\n\
             add table ip overlay-agent-ovl0\n\
             add chain ip overlay-agent-ovl0 postrouting { type nat hook postrouting priority 100; policy accept; }\n\
             add rule ip overlay-agent-ovl0 postrouting meta mark & 0x4000 == 0x4000 return\n\
             add rule ip overlay-agent-ovl0 postrouting ip saddr 10.244.1.0/24 ip daddr 10.244.0.0/16 return\n\
             add rule ip overlay-agent-ovl0 postrouting ip saddr 10.244.0.0/16 ip daddr 10.244.1.0/24 return\n\
             add rule ip overlay-agent-ovl0 postrouting ip saddr != 10.244.0.0/16 ip daddr 10.244.1.0/24 return\n\
             add rule ip overlay-agent-ovl0 postrouting ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random\n\
             add rule ip overlay-agent-ovl0 postrouting ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random\n\
             add chain ip overlay-agent-ovl0 before-forward { type filter hook forward priority -5; policy accept; }\n\
             add rule ip overlay-agent-ovl0 before-forward ip saddr 10.244.0.0/16 meta mark set meta mark & 0xffffefff\n\
             add rule ip overlay-agent-ovl0 before-forward ip daddr 10.244.0.0/16 meta mark set meta mark & 0xffffefff\n\
             add rule ip overlay-agent-ovl0 before-forward ip saddr 10.244.0.0/16 fib saddr . iif oif exists meta mark set meta mark | 0x1000\n\
             add rule ip overlay-agent-ovl0 before-forward ip daddr 10.244.0.0/16 ct state established,related meta mark set meta mark | 0x1000\n\
             add rule ip overlay-agent-ovl0 before-forward ip daddr 10.244.0.0/16 ct status dnat meta mark set meta mark | 0x1000\n\
             add chain ip overlay-agent-ovl0 after-forward { type filter hook forward priority 5; policy accept; }\n\
             add rule ip overlay-agent-ovl0 after-forward ip saddr 10.244.0.0/16 meta mark set meta mark & 0xffffefff\n\
             add rule ip overlay-agent-ovl0 after-forward ip daddr 10.244.0.0/16 meta mark set meta mark & 0xffffefff\n\
             add rule ip filter FORWARD ip saddr 10.244.0.0/16 meta mark & 0x1000 == 0x1000 accept comment \"overlay-agent ovl0\"\n\
             add rule ip filter FORWARD ip daddr 10.244.0.0/16 meta mark & 0x1000 == 0x1000 accept comment \"overlay-agent ovl0\"\n"
        );
    }

    #[test]
    fn disabled_rules_are_absent() {
        let names = Names::of("ovl0").unwrap();
        let plain = Rules { fully_random: false, forward: false, ..rules() }.script(&names, Some(&[]));
        assert!(plain.contains(" masquerade\n") && !plain.contains("random") && !plain.contains("FORWARD"));
        let forward = Rules { masquerade: false, ..rules() }.script(&names, Some(&[]));
        assert!(!forward.contains("masquerade") && forward.contains("FORWARD"));
        let no_chain = rules().script(&names, None);
        assert!(!no_chain.contains("FORWARD") && !no_chain.contains("hook forward"), "{no_chain}");
    }

    #[test]
    fn only_names_that_nft_parses_as_one_word_are_accepted() {
        assert_eq!(Names::of("ovl-0.a_b").unwrap().table, "overlay-agent-ovl-0.a_b");
        for name in ["", "a;b", "a\"b", "a b", "a{", "ä"] {
            assert_eq!(Names::of(name).unwrap_err(), BadName(name.to_owned()));
        }
    }

    #[test]
    fn foreign_chains_that_drop_are_listed() {
        let chain = |family, table, hook, policy| json!({ "chain": { "family": family, "table": table, "name": "FORWARD", "hook": hook, "policy": policy } });
        let chains = json!([
            chain("ip", "filter", "forward", "drop"),
            chain("inet", "mine", "forward", "drop"),
            chain("inet", "open", "forward", "accept"),
            chain("inet", "local", "input", "drop"),
            chain("ip6", "six", "forward", "drop"),
            { "chain": { "family": "ip", "table": "x", "name": "plain" } },
        ]);
        assert_eq!(other_drops(&chains), ["the chain FORWARD in the table inet mine"]);
    }
}
