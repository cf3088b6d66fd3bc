//! Benchmarks of the agent: its control plane beside the limits that it has to meet, its datapath beside the alternatives, and what its
//! restarts cost.

#[cfg(test)]
mod command_line;
mod control;
mod datapath;
mod kernel_map;
mod limit;
mod lone_host;
mod metrics;
mod network;
mod programs;
mod restart;
mod route_map;
mod services;
mod spread;

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    path::Path,
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use serde::Serialize;

/// Measures the agent on this machine, in network namespaces. Needs root.
#[derive(Clone, Debug, Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
pub struct Options {
    #[command(subcommand)]
    benchmark: Benchmark,
}

#[derive(Clone, Debug, Subcommand)]
enum Benchmark {
    Control(control::Options),
    Datapath(datapath::Options),
    Programs(programs::Options),
    Restart(restart::Options),
    Services(services::Options),
}

/// Runs a benchmark. The exit code is 1 when a measurement fails, and with `--check` when a limit is missed.
pub fn run(options: &Options) -> Result<ExitCode> {
    match &options.benchmark {
        Benchmark::Control(options) => control::run(options),
        Benchmark::Datapath(options) => datapath::run(options),
        Benchmark::Programs(options) => programs::run(options),
        Benchmark::Restart(options) => restart::run(options),
        Benchmark::Services(options) => services::run(options),
    }
}

/// Opens the file of `--json`, so that one that cannot be written fails before the measurement.
fn open_json(path: &Path) -> Result<File> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
    file.with_context(|| format!("write {}: name another file for --json", path.display()))
}

/// Writes the results to the file of `--json`.
fn write_json(mut file: File, report: &impl Serialize) -> Result<()> {
    file.set_len(0).context("truncate the file of --json")?;
    writeln!(file, "{}", serde_json::to_string(report)?).context("write the file of --json")
}
