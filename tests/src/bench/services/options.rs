//! The command line of `bench services`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// Examples at the end of `--help`.
const EXAMPLES: &str = "\
Examples:
  cargo xtask bench services                          everything, less than four minutes
  cargo xtask bench services --only traffic           connections and streams only
  cargo xtask bench services --json /tmp/services.json
  cargo xtask bench services --check                  exit code 1 when a bar is missed

Metrics of traffic: tcp1 (bits/s of one stream), connect_p50 (us: connect, one byte there and back, close), udp_rr_p50 (us),
http_rps (requests/s over eight connections that are kept). Systems: direct (the endpoint's own address), ebpf, proxy.";

/// Measure connections to services beside direct ones, the DNS server beside others, and 10,000 services
///
/// Traffic: a container connects to an endpoint on another host, through the overlay: to its own address, to the service's virtual
/// address by eBPF, and to that by the proxy. DNS: the node's server beside dnsmasq, and unbound where it is installed. Scale: an agent
/// with 10,000 services and 100,000 endpoints in a real etcd.
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::bench) struct Options {
    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PART")]
    only: Vec<Part>,
    /// Rounds of the parts traffic and DNS; each measures every system once
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) rounds: u32,
    /// Services of the part scale, each with ten endpoints
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=15_000))]
    pub(super) services: u32,
    /// Changes of the part scale to measure, one at a time
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) changes: u32,
    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Exit with 1 when a bar is missed
    #[arg(long)]
    pub(super) check: bool,
}

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Part {
    /// Connections, streams and requests to a service
    Traffic,
    /// The DNS server
    Dns,
    /// Many services
    Scale,
}

impl Options {
    /// Whether a part was asked for.
    pub(super) fn includes(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::command_line::{check, parse};

    #[test]
    fn the_command_line_is_consistent() {
        check::<Options>();
        let parse = parse::<Options>;
        let all = parse("bench").unwrap();
        assert!([Part::Traffic, Part::Dns, Part::Scale].into_iter().all(|part| all.includes(part)));
        let some = parse("bench --only dns,traffic --rounds 3").unwrap();
        assert!(some.includes(Part::Dns) && !some.includes(Part::Scale) && some.rounds == 3);
        for line in ["bench --only web", "bench --rounds 0", "bench --services 0"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
