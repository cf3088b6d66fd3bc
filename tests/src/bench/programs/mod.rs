//! The eBPF programs: time per packet and verified instructions, by kind of packet and number of routes.

mod packet;
mod stopwatch;
mod subject;

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Serialize;
use tokio::runtime::Runtime;

use super::{open_json, spread::Spread, write_json};
use crate::{
    progress::Progress,
    table::{self, Row},
};
use packet::Kind;
use stopwatch::Stopwatch;
use subject::{PROGRAMS, Subject};

/// Examples at the end of `--help`.
const EXAMPLES: &str = "\
Examples:
  cargo xtask bench programs                       1, 100, 10,000 and 100,000 routes, a table
  cargo xtask bench programs --quick               a fifth of the repetitions
  cargo xtask bench programs --routes 1,60000      other numbers of routes
  cargo xtask bench programs --json /tmp/p.json    the results for scripts as well

Method:
  A packet that a program leaves as it is runs in the kernel's loop of BPF_PROG_TEST_RUN, for up to 8 destinations one after
  the other. A packet that a program changes runs once for each call, for up to 64 destinations in turn, and the kernel's run
  statistics (BPF_ENABLE_STATS) say how long; the cost of their clock, measured with a packet that is not changed, is
  subtracted. Such runs meet colder caches.
  Each value is the median of rounds, and each round measures all numbers of routes.";

/// Repetitions of everything.
const ROUNDS: usize = 15;
const QUICK_ROUNDS: usize = 3;

/// Measure the time per packet of the eBPF programs and the instructions that the verifier walks through
///
/// Loads the programs with route maps of several sizes and runs them on packets made for it. Nothing is sent, and nothing is
/// attached.
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Options {
    /// Numbers of routes
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_values_t = [1, 100, 10_000, 100_000],
          value_parser = clap::value_parser!(u32).range(1..=subject::MOST_ROUTES))]
    routes: Vec<u32>,
    /// Fewer repetitions: rough numbers
    #[arg(long)]
    quick: bool,
    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// The output of `--json`.
#[derive(Serialize)]
struct Report {
    rows: Vec<Measured>,
}

/// One program with one kind of packet and one number of routes.
#[derive(Clone, Debug, Serialize)]
struct Measured {
    program: &'static str,
    kind: &'static str,
    routes: u32,
    ns_per_packet: f64,
    verified_insns: u32,
}

/// Position in [`PROGRAMS`], kind, number of routes.
type Case = (usize, Kind, u32);

pub(super) fn run(options: &Options) -> Result<ExitCode> {
    let json = options.json.as_deref().map(open_json).transpose()?;
    let progress = Progress::start();
    // The programs of the bypass come with a task.
    let runtime = Runtime::new().context("start a runtime")?;
    let _inside = runtime.enter();
    let mut subjects = Vec::new();
    for routes in &options.routes {
        subjects.push(Subject::load(*routes)?);
        progress.line(&format!("loaded the programs with {routes} routes"));
    }
    let rounds = if options.quick { QUICK_ROUNDS } else { ROUNDS };
    let mut samples: BTreeMap<Case, Vec<f64>> = BTreeMap::new();
    for round in 1..=rounds {
        measure(&mut subjects, &mut samples)?;
        progress.line(&format!("round {round} of {rounds}"));
    }
    let rows = samples.into_iter().map(|((index, kind, routes), times)| {
        let program = PROGRAMS.get(index).context("a program of the list")?;
        let subject = subjects.iter_mut().find(|subject| subject.routes == routes).context("a loaded set")?;
        let median = Spread::of(times).context("a sample of each case")?.median;
        Ok(Measured {
            program: program.name,
            kind: kind.name(),
            routes,
            ns_per_packet: (median * 10.0).round() / 10.0,
            verified_insns: subject.verified_instructions(program)?,
        })
    });
    let report = Report { rows: rows.collect::<Result<_>>()? };
    println!("{}", render(&report.rows, &options.routes));
    if let Some(file) = json {
        write_json(file, &report)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// One round: first what the kernel's loop measures, then what its run statistics measure.
fn measure(subjects: &mut [Subject], samples: &mut BTreeMap<Case, Vec<f64>>) -> Result<()> {
    for (index, program) in PROGRAMS.iter().enumerate() {
        let mut note = |kind: Kind, routes, nanoseconds| {
            samples.entry((index, kind, routes)).or_default().push(nanoseconds);
        };
        let (unchanged, changed): (Vec<Kind>, Vec<Kind>) =
            program.kinds.iter().partition(|kind| !kind.is_carried());
        for kind in unchanged {
            for subject in &mut *subjects {
                note(kind, subject.routes, subject.time_in_loop(program, kind)?);
            }
        }
        let mut stopwatch = Stopwatch::default();
        for subject in &mut *subjects {
            stopwatch.calibrate(subject, program)?;
            for kind in &changed {
                note(*kind, subject.routes, stopwatch.time_once_each(subject, program, *kind)?);
            }
        }
    }
    Ok(())
}

/// One row per program and kind, one column per number of routes.
fn render(measured: &[Measured], routes: &[u32]) -> String {
    let columns: Vec<_> = routes.iter().map(|routes| format!("ns, {routes} routes")).collect();
    let mut titles = vec!["program", "packet"];
    titles.extend(columns.iter().map(String::as_str));
    titles.push("verified instructions");
    let mut rows: Vec<Row> = Vec::new();
    let mut last = None;
    for one in measured {
        if last != Some((one.program, one.kind)) {
            last = Some((one.program, one.kind));
            let same = |other: &&Measured| (other.program, other.kind) == (one.program, one.kind);
            let time = |routes: &u32| {
                let found = measured.iter().filter(same).find(|other| other.routes == *routes);
                found.map_or_else(String::new, |found| format!("{:.1}", found.ns_per_packet))
            };
            let mut cells = vec![one.program.to_owned(), one.kind.to_owned()];
            cells.extend(routes.iter().map(time));
            cells.push(one.verified_insns.to_string());
            rows.push(Row { cells });
        }
    }
    table::render(&titles, &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_one_time_for_each_number_of_routes() {
        let one = |kind, routes, ns_per_packet| Measured {
            program: "xdp",
            kind,
            routes,
            ns_per_packet,
            verified_insns: 1234,
        };
        let text = render(&[one("tcp", 1, 10.0), one("tcp", 9, 20.5), one("udp", 1, 30.0)], &[1, 9]);
        let row = |kind| text.lines().find(|line| line.contains(kind)).unwrap().to_owned();
        assert!(row("tcp").contains("10.0") && row("tcp").contains("20.5") && row("tcp").contains("1234"));
        assert!(row("udp").contains("30.0") && !row("udp").contains("20.5"));
    }
}
