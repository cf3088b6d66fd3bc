//! The command line of `bench restart`.

use std::path::PathBuf;

use clap::Args;

use super::event::Event;

/// Examples at the end of `--help`.
const EXAMPLES: &str = "\
Examples:
  cargo xtask bench restart                            every event on every rung, about three minutes
  cargo xtask bench restart --only kill,restart --rounds 10
  cargo xtask bench restart --json /tmp/restart.json
  cargo xtask bench restart --check                    exit code 1 when packets were lost or reordered

Each row of the table, and of `rows` in the JSON output, is one event on one rung (of both hosts):
  sent       datagrams of all flows and rounds
  lost       of these, those that did not arrive
  reordered  of these, those that arrived behind one with a higher number
  outage_ms  the longest time between two arrivals in any flow, less the time between sending the second and the one before it (1 ms,
             as bursts are sent, unless the machine keeps the sender from running)";

/// Measure what is lost when an agent is killed, restarted, upgraded or changes its rung under traffic
///
/// Four flows of 20,000 numbered datagrams per second each: between two pods and between their hosts, in both directions. The agent of one host
/// ends and starts again meanwhile. All flows share one CPU, because the kernel reorders what two CPUs send; agents run on another one.
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::bench) struct Options {
    /// Only these events
    #[arg(long, value_enum, value_delimiter = ',', value_name = "EVENT")]
    only: Vec<Event>,
    /// Rounds; each has every event on every rung once
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) rounds: u32,
    /// The agent to upgrade to; without it, a copy of the one that runs
    #[arg(long, value_name = "FILE")]
    pub(super) upgrade_to: Option<PathBuf>,
    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Exit with 1 when packets were lost or reordered where none may be
    #[arg(long)]
    pub(super) check: bool,
}

impl Options {
    /// The events that were asked for.
    pub(super) fn events(&self) -> Vec<Event> {
        let chosen = |event: &Event| self.only.is_empty() || self.only.contains(event);
        Event::ALL.into_iter().filter(chosen).collect()
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
        assert_eq!(parse("bench").unwrap().events(), Event::ALL);
        let some = parse("bench --only upgrade,kill --rounds 2").unwrap();
        assert_eq!((some.events(), some.rounds), (vec![Event::Kill, Event::Upgrade], 2));
        for line in ["bench --only reboot", "bench --rounds 0"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
