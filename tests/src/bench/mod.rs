//! Benchmarks of the agent, each with the limits that it has to meet.

mod control;
mod limit;
mod metrics;
mod network;
mod route_map;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measures the agent on this machine, in a network namespace, and compares the results with their limits. Needs root.
#[derive(Clone, Debug, Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
pub struct Options {
    #[command(subcommand)]
    benchmark: Benchmark,
}

#[derive(Clone, Debug, Subcommand)]
enum Benchmark {
    Control(control::Options),
}

/// Runs a benchmark. With `--check`, the exit code is 1 when a limit is missed.
pub fn run(options: &Options) -> Result<ExitCode> {
    match &options.benchmark {
        Benchmark::Control(options) => control::run(options),
    }
}
