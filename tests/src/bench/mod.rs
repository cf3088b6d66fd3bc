//! Benchmarks of the agent: its control plane beside the limits that it has to meet, its datapath beside the alternatives.

mod control;
mod datapath;
mod limit;
mod metrics;
mod network;
mod route_map;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

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
}

/// Runs a benchmark. The exit code is 1 when a measurement fails, and with `--check` when a limit is missed.
pub fn run(options: &Options) -> Result<ExitCode> {
    match &options.benchmark {
        Benchmark::Control(options) => control::run(options),
        Benchmark::Datapath(options) => datapath::run(options),
    }
}
