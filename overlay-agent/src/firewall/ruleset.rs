//! The rules as text, from what they are for. Pure.

use std::fmt::Write as _;

use ipnet::Ipv4Net;
use serde_json::Value;
use thiserror::Error;

/// iptables' chain for forwarded packets, as nftables knows it: table and chain of family ip.
pub(super) const FORWARD_CHAIN: (&str, &str) = ("filter", "FORWARD");

/// Begins the names of our tables and the comments on our rules.
const MARK: &str = "overlay-agent";

/// What the firewall is to do for one overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The overlay device; tells the rules of several overlays on one host apart.
    pub device: String,
    /// The whole overlay.
    pub network: Ipv4Net,
    /// This host's part of it.
    pub subnet: Ipv4Net,
    /// Give packets that leave the overlay, or enter it from this host, an address of this host.
    pub masquerade: bool,
    /// Choose the ports of masqueraded connections at random: two connections at once cannot collide then.
    pub fully_random: bool,
    /// Accept packets from and to the overlay where iptables' FORWARD policy would drop them.
    pub forward: bool,
}

/// The overlay device's name cannot be part of a table's.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "the device name {0:?} cannot be part of an nftables name: choose a --device of letters, digits, '-', '_' and '.'"
)]
pub struct BadName(String);

/// What our table and our rules elsewhere are called.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) table: String,
    pub(super) comment: String,
}

impl Names {
    pub(super) fn of(device: &str) -> Result<Self, BadName> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        match !device.is_empty() && device.bytes().all(fits) {
            true => Ok(Self { table: format!("{MARK}-{device}"), comment: format!("{MARK} {device}") }),
            false => Err(BadName(device.to_owned())),
        }
    }
}

impl Rules {
    /// Whether there is nothing to do.
    pub(super) const fn is_empty(&self) -> bool {
        !self.masquerade && !self.forward
    }

    /// The script that puts the rules in the place of what is there. `forward` are our rules in iptables' FORWARD chain, if
    /// that is there.
    pub(super) fn script(&self, names: &Names, forward: Option<&[Value]>) -> String {
        let mut script = removal(names, forward.unwrap_or_default());
        if self.masquerade {
            self.masquerading(names, &mut script);
        }
        if self.forward && forward.is_some() {
            let ((table, chain), network, comment) = (FORWARD_CHAIN, self.network, &names.comment);
            for side in ["saddr", "daddr"] {
                let _ = writeln!(
                    script,
                    "add rule ip {table} {chain} ip {side} {network} accept comment \"{comment}\""
                );
            }
        }
        script
    }

    /// flannel's rules, in its order.
    fn masquerading(&self, names: &Names, script: &mut String) {
        let Self { network, subnet, .. } = self;
        let masquerade = if self.fully_random { "masquerade fully-random" } else { "masquerade" };
        let chain = format!("ip {} postrouting", names.table);
        let rules = [
            // kube-proxy's mark: it masquerades these itself.
            "meta mark & 0x4000 == 0x4000 return".to_owned(),
            // Within the overlay, addresses stay as they are.
            format!("ip saddr {subnet} ip daddr {network} return"),
            format!("ip saddr {network} ip daddr {subnet} return"),
            // Packets that other hosts or this one send straight to our containers keep their source.
            format!("ip saddr != {network} ip daddr {subnet} return"),
            // Out of the overlay, unless to a multicast group.
            format!("ip saddr {network} ip daddr != 224.0.0.0/4 {masquerade}"),
            // Into the overlay, to containers of other hosts.
            format!("ip saddr != {network} ip daddr {network} {masquerade}"),
        ];
        // Writing to a string cannot fail.
        let _ = writeln!(script, "add table ip {}", names.table);
        let _ = writeln!(
            script,
            "add chain {chain} {{ type nat hook postrouting priority 100; policy accept; }}"
        );
        for rule in rules {
            let _ = writeln!(script, "add rule {chain} {rule}");
        }
    }
}

/// The script that removes our table, if it is there, and our rules in iptables' FORWARD chain.
pub(super) fn removal(names: &Names, forward: &[Value]) -> String {
    let table = &names.table;
    // Deleting fails where there is nothing to delete; adding never does.
    let mut script = format!("add table ip {table}\ndelete table ip {table}\n");
    let (table, chain) = FORWARD_CHAIN;
    for handle in forward.iter().filter_map(|rule| rule.get("handle")).filter_map(Value::as_u64) {
        let _ = writeln!(script, "delete rule ip {table} {chain} handle {handle}");
    }
    script
}

/// How many rules a script makes.
pub(super) fn count(script: &str) -> usize {
    script.lines().filter(|line| line.starts_with("add rule ")).count()
}

/// Whether a rule that nft lists is ours.
pub(super) fn is_marked(rule: &Value, names: &Names) -> bool {
    rule.get("comment").and_then(Value::as_str) == Some(names.comment.as_str())
}

/// The chains among those that nft lists whose policy drops forwarded IPv4 packets, other than iptables'.
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
    fn the_script_is_one_replacement_of_everything_that_is_ours() {
        let names = Names::of("ovl0").unwrap();
        let there = [json!({ "handle": 7, "comment": "overlay-agent ovl0" })];
        let script = rules().script(&names, Some(&there));
        assert_eq!(count(&script), 8);
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
             add rule ip filter FORWARD ip saddr 10.244.0.0/16 accept comment \"overlay-agent ovl0\"\n\
             add rule ip filter FORWARD ip daddr 10.244.0.0/16 accept comment \"overlay-agent ovl0\"\n"
        );
    }

    #[test]
    fn what_is_not_asked_for_is_not_there() {
        let names = Names::of("ovl0").unwrap();
        let plain = Rules { fully_random: false, forward: false, ..rules() }.script(&names, Some(&[]));
        assert!(plain.contains(" masquerade\n") && !plain.contains("random") && !plain.contains("FORWARD"));
        let forward = Rules { masquerade: false, ..rules() }.script(&names, Some(&[]));
        assert!(!forward.contains("masquerade") && forward.contains("FORWARD"));
        // Without iptables' chain nothing of iptables' drops.
        assert!(!rules().script(&names, None).contains("FORWARD"));
    }

    #[test]
    fn only_names_that_nft_reads_as_one_word_are_taken() {
        assert_eq!(Names::of("ovl-0.a_b").unwrap().table, "overlay-agent-ovl-0.a_b");
        for name in ["", "a;b", "a\"b", "a b", "a{", "ä"] {
            assert_eq!(Names::of(name).unwrap_err(), BadName(name.to_owned()));
        }
    }

    #[test]
    fn chains_of_others_that_drop_are_named() {
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
