//! The demo's command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Parser, ValueEnum};

use crate::{agent::Rung, topology::Underlay};

/// Examples at the end of `--help`.
const EXAMPLES: &str = "\
Examples:
  cargo xtask demo                         every rung and every mix of rungs, about two minutes
  cargo xtask demo --quick --rungs tc      one pair, less data, a few seconds
  cargo xtask demo --underlay wire         frames of MTU size between the hosts, as on a cable
  cargo xtask demo --rungs tc,xdp/tun      both hosts on tc; then host A on xdp and host B on tun
  cargo xtask demo --keep                  leave two hosts on tc up afterwards, for inspection
  cargo xtask demo --remove                remove what --keep left";

/// Builds two hosts with a container behind each in network namespaces of this machine, joins them with overlay-agent on
/// every rung, verifies the traffic and compares its rates with plain routing and the kernel's VXLAN. Needs root. Removes
/// everything at the end.
#[derive(Clone, Debug, Parser)]
#[command(name = "cargo xtask demo", bin_name = "cargo xtask demo", after_help = EXAMPLES)]
pub struct Options {
    /// Underlay between the two hosts
    #[arg(long, value_enum, default_value = "virtual")]
    pub underlay: Underlay,
    /// Run only these pairs: a rung for both hosts (tc), or for host A and host B (xdp/tun)
    #[arg(long, value_delimiter = ',', value_name = "PAIR", value_parser = parse_pair)]
    pub rungs: Vec<RungPair>,
    /// Less data, one round of measurements
    #[arg(long)]
    pub quick: bool,
    /// Leave two hosts on tc running, and print how to enter and remove them
    #[arg(long)]
    pub keep: bool,
    /// Only remove what earlier runs with --keep left
    #[arg(long)]
    pub remove: bool,
    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Serve HTTP in a container: the demo starts itself with this
    #[arg(long, hide = true, value_name = "ADDRESS:PORT")]
    pub(super) serve: Option<SocketAddr>,
    /// What that server answers
    #[arg(long, hide = true, default_value = "")]
    pub(super) serve_name: String,
}

/// The rungs of two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RungPair {
    /// Host A's.
    pub a: Rung,
    /// Host B's.
    pub b: Rung,
}

/// Every pair, in the order of the table.
const ALL: [RungPair; 6] = [
    RungPair { a: Rung::Xdp, b: Rung::Xdp },
    RungPair { a: Rung::Tc, b: Rung::Tc },
    RungPair { a: Rung::Tun, b: Rung::Tun },
    RungPair { a: Rung::Xdp, b: Rung::Tc },
    RungPair { a: Rung::Xdp, b: Rung::Tun },
    RungPair { a: Rung::Tc, b: Rung::Tun },
];

impl Options {
    /// The pairs to show.
    pub fn pairs(&self) -> Vec<RungPair> {
        if self.rungs.is_empty() { ALL.into() } else { self.rungs.clone() }
    }

    /// Bytes of each verified TCP transfer.
    pub const fn tcp_bytes(&self) -> u64 {
        if self.quick { 16 << 20 } else { 256 << 20 }
    }

    /// Number of measurements of each rate.
    pub const fn rounds(&self) -> usize {
        if self.quick { 1 } else { 3 }
    }
}

fn parse_pair(text: &str) -> Result<RungPair, String> {
    let (a, b) = text.split_once('/').unwrap_or((text, text));
    let rung =
        |name| Rung::from_str(name, true).map_err(|_| format!("`{name}` is not a rung: use xdp, tc or tun"));
    Ok(RungPair { a: rung(a)?, b: rung(b)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rung_is_for_both_hosts() {
        assert_eq!(parse_pair("tc"), Ok(RungPair { a: Rung::Tc, b: Rung::Tc }));
        assert_eq!(parse_pair("xdp/tun"), Ok(RungPair { a: Rung::Xdp, b: Rung::Tun }));
        assert!(parse_pair("xdp/fast").unwrap_err().contains("`fast` is not a rung"));
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Options::command().debug_assert();
        let options = Options::parse_from(["demo", "--rungs", "tc,xdp/tun"]);
        assert_eq!(options.pairs().len(), 2);
        assert_eq!(Options::parse_from(["demo"]).pairs().len(), 6);
    }
}
