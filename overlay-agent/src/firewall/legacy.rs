//! iptables-legacy: rules that nftables, and with it `nft`, neither shows nor changes.

use std::fs;

use ipnet::Ipv4Net;

/// The tables of iptables-legacy in this thread's network namespace, one a line (net/netfilter/x_tables.c). The file is there
/// once the kernel has them at all.
const TABLES: &str = "/proc/thread-self/net/ip_tables_names";

/// The table that has a FORWARD chain which hosts let drop.
const FILTER: &str = "filter";

/// Why packets of `network` may be dropped where no rule of ours can stand, and what to do about it; `None` when they are not.
/// What the policy is there cannot be seen.
pub fn out_of_reach(network: Ipv4Net) -> Option<String> {
    // Without the file there are no such tables.
    has_filter(&fs::read_to_string(TABLES).unwrap_or_default()).then(|| remedy(network))
}

fn has_filter(tables: &str) -> bool {
    tables.lines().any(|table| table == FILTER)
}

fn remedy(network: Ipv4Net) -> String {
    format!(
        "this host has a FORWARD chain of iptables-legacy, which nft neither shows nor changes: if it drops packets of the \
         overlay, type `iptables-legacy -A FORWARD -s {network} -j ACCEPT` and `iptables-legacy -A FORWARD -d {network} \
         -j ACCEPT`; --iptables-forward-rules=false ends this message"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_table_filter_counts() {
        assert!(has_filter("filter\n"));
        assert!(has_filter("nat\nfilter\n"));
        for tables in ["", "nat\nmangle\n", "filter6\n", "myfilter\n"] {
            assert!(!has_filter(tables), "{tables:?}");
        }
    }

    #[test]
    fn the_remedy_can_be_typed() {
        let remedy = remedy("10.244.0.0/16".parse().unwrap());
        for command in [
            "`iptables-legacy -A FORWARD -s 10.244.0.0/16 -j ACCEPT`",
            "`iptables-legacy -A FORWARD -d 10.244.0.0/16 -j ACCEPT`",
        ] {
            assert!(remedy.contains(command), "{remedy}");
        }
    }
}
