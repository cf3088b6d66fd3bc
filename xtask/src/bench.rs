//! `cargo xtask bench`: sets up, builds, and becomes the benchmark program.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use crate::{demo, workspace};

/// Measure the agent on this machine, beside the limits that it should meet
///
/// Sets up and builds what is missing, then runs a benchmark in a network namespace of its own, as root.
#[derive(Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    which: Which,
}

#[derive(Subcommand)]
enum Which {
    Control(Control),
}

/// Examples at the end of `--help`.
const CONTROL_EXAMPLES: &str = "\
Examples:
  cargo xtask bench control                          10,000 leases, 500 changes, a table
  cargo xtask bench control --leases 50000           a network five times as large
  cargo xtask bench control --json /tmp/control.json the numbers for a script as well
  cargo xtask bench control --check                  exit code 1 when a limit is missed";

/// How fast leases in etcd become routes in the kernel, and what that costs
///
/// Fills a real etcd with leases, starts an agent beside it and watches the kernel's route map: the time from the agent's
/// start to all routes, the time from a write to etcd to the route of one change, requests to etcd, memory.
#[derive(Args)]
#[command(after_help = CONTROL_EXAMPLES)]
struct Control {
    /// Leases of other hosts in etcd
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    leases: u32,
    /// Changes to measure one after the other
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    changes: u32,
    /// Write the numbers to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Exit with 1 when a limit is missed
    #[arg(long)]
    check: bool,
}

/// Runs the command. Returns only if the benchmark cannot be started.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if !workspace::is_root() {
        bail!("the benchmarks create network namespaces and load eBPF programs: run them as root");
    }
    let Which::Control(control) = &options.which;
    if let Some(file) = &control.json {
        check_writable(file)?;
    }
    demo::become_program("bench", &control.arguments())
}

impl Control {
    /// The command line of the benchmark program.
    fn arguments(&self) -> Vec<OsString> {
        let words = ["control", "--leases", &self.leases.to_string(), "--changes", &self.changes.to_string()];
        let mut arguments: Vec<OsString> = words.map(OsString::from).into();
        if let Some(file) = &self.json {
            arguments.extend(["--json".into(), file.into()]);
        }
        if self.check {
            arguments.push("--check".into());
        }
        arguments
    }
}

/// Minutes of work would end in an error otherwise.
fn check_writable(file: &Path) -> Result<()> {
    let is_new = !file.exists();
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(file)
        .with_context(|| format!("cannot write {}: name another file for --json", file.display()))?;
    if is_new {
        fs::remove_file(file).with_context(|| format!("cannot remove {}", file.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_cannot_be_written_is_refused_and_others_are_left_alone() {
        let directory = std::env::temp_dir().join(format!("xtask-bench-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let file = directory.join("numbers.json");
        check_writable(&file).unwrap();
        assert!(!file.exists());
        fs::write(&file, "old").unwrap();
        check_writable(&file).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "old");
        let error = check_writable(&directory.join("missing/numbers.json")).unwrap_err().to_string();
        assert!(error.contains("--json"), "{error}");
        assert!(check_writable(&directory).is_err());
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn the_program_gets_what_was_asked_for() {
        let control = Control { leases: 7, changes: 9, json: Some("/tmp/x".into()), check: true };
        let words = ["control", "--leases", "7", "--changes", "9", "--json", "/tmp/x", "--check"];
        assert_eq!(control.arguments(), words);
    }
}
