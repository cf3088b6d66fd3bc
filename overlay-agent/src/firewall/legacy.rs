//! iptables-legacy, whose rules `nft` neither lists nor changes.

use std::fs;

use ipnet::Ipv4Net;

/// The tables of iptables-legacy in this thread's network namespace, one per line (net/netfilter/x_tables.c). Exists only when
/// the kernel supports them.
const TABLES: &str = "/proc/thread-self/net/ip_tables_names";

/// A warning, with the remedy, that iptables-legacy may drop packets of `network`; `None` when it has no FORWARD chain. Its
/// policy cannot be read.
pub fn legacy_warning(network: Ipv4Net) -> Option<String> {
    has_filter(&fs::read_to_string(TABLES).unwrap_or_default()).then(|| remedy(network))
}

/// The table "filter" has the FORWARD chain.
fn has_filter(tables: &str) -> bool {
    tables.lines().any(|table| table == "filter")
}

fn remedy(network: Ipv4Net) -> String {
    format!(
        "this host has a FORWARD chain of iptables-legacy, which nft neither lists nor changes: if it drops packets of the \
         overlay, run `iptables-legacy -A FORWARD -s {network} -j ACCEPT` and `iptables-legacy -A FORWARD -d {network} \
         -m conntrack --ctstate ESTABLISHED,RELATED,DNAT -j ACCEPT`; --iptables-forward-rules=false disables this warning"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_filter_table_is_considered() {
        assert!(has_filter("filter\n") && has_filter("nat\nfilter\n"));
        for tables in ["", "nat\nmangle\n", "filter6\n", "myfilter\n"] {
            assert!(!has_filter(tables), "{tables:?}");
        }
    }

    #[test]
    fn the_remedy_is_a_command() {
        let remedy = remedy("10.244.0.0/16".parse().unwrap());
        for rule in ["-s 10.244.0.0/16", "-d 10.244.0.0/16 -m conntrack --ctstate ESTABLISHED,RELATED,DNAT"] {
            let command = format!("`iptables-legacy -A FORWARD {rule} -j ACCEPT`");
            assert!(remedy.contains(&command), "{remedy}");
        }
    }
}
