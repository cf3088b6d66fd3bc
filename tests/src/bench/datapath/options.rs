//! The command line of `bench datapath`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::selection::Word;
use crate::topology::Underlay;

/// Examples at the end of `--help`.
const EXAMPLES: &str = "\
Examples:
  cargo xtask bench datapath                              everything on both underlays, about 15 minutes
  cargo xtask bench datapath --quick --underlay virtual   two rounds of short measurements
  cargo xtask bench datapath --only tcp1,rr_p50,tc        two metrics of tc, beside routed and VXLAN
  cargo xtask bench datapath --report docs/bench          a report with plots as well

Metrics: tcp1, tcp8 (Gbit/s); fwd64, pps64 (kpps); rr_p50, rr_p99, rr_p999 (us); cpu_per_gb, cpu_per_mpkt (CPU s).
Systems: routed, vxlan, proxy, xdp, tc, tun, xdp+flows, tc+flows, xdp+bypass, tc+bypass.";

/// Measure the datapath beside plain routing, the kernel's VXLAN and a UDP proxy
///
/// Connects two hosts with a container behind each once for every system and measures throughput, packets per second, latency
/// and CPU time from container to container. Every round measures each system once. The exit code is 1 when a measurement fails.
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::bench) struct Options {
    /// Underlay between the two hosts
    #[arg(long, value_enum, default_value = "both")]
    pub(super) underlay: Underlays,
    /// Rounds of measurements [default: 5, with --quick 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Shorter measurements
    #[arg(long)]
    pub(super) quick: bool,
    /// Only these metrics and systems, in any order; routed and vxlan join when neither is named
    #[arg(long, value_delimiter = ',', value_name = "NAME", value_parser = Word::parse)]
    pub(super) only: Vec<Word>,
    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Write a report, datapath.md with plots, to this directory
    #[arg(long, value_name = "DIR")]
    pub(super) report: Option<PathBuf>,
}

/// The value of `--underlay`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Underlays {
    /// All offloads on: unsegmented packets without checksums cross whole, as between the VMs of one machine
    Virtual,
    /// Frames of MTU size with finished checksums, as a cable carries them
    Wire,
    /// One after the other
    Both,
}

impl Options {
    pub(super) fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 2 } else { 5 })
    }

    pub(super) const fn underlays(&self) -> &'static [Underlay] {
        match self.underlay {
            Underlays::Virtual => &[Underlay::Virtual],
            Underlays::Wire => &[Underlay::Wire],
            Underlays::Both => &[Underlay::Virtual, Underlay::Wire],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{
        command_line::{self, check},
        datapath::{metric::Metric, system::System},
    };

    fn parse(line: &str) -> Result<Options, clap::Error> {
        command_line::parse(line)
    }

    #[test]
    fn the_command_line_is_consistent() {
        check::<Options>();
        let options = parse("bench --only tcp1,xdp+flows --underlay wire --rounds 3").unwrap();
        assert_eq!((options.rounds(), options.underlays()), (3, [Underlay::Wire].as_slice()));
        assert_eq!(options.only.len(), 2);
        assert_eq!(parse("bench").unwrap().rounds(), 5);
        assert_eq!(parse("bench --quick").unwrap().rounds(), 2);
        assert_eq!(parse("bench").unwrap().underlays().len(), 2);
    }

    #[test]
    fn mistakes_are_refused() {
        for line in ["bench --only tcp9", "bench --rounds 0", "bench --underlay air", "bench --only tcp1,"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn help_lists_every_name() {
        for name in Metric::ALL.map(Metric::name).into_iter().chain(System::ALL.map(System::name)) {
            assert!(EXAMPLES.contains(name), "{name}");
        }
    }
}
