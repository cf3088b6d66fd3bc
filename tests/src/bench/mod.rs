//! Benchmarks of the agent beside the demo's rates, each with the limits that it should meet.

mod control;
mod limit;
mod metrics;
mod network;
mod route_map;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Benchmarks of overlay-agent. `cargo xtask bench` builds what they need, runs them and explains their options.
#[derive(Clone, Debug, Parser)]
#[command(name = "bench")]
pub struct Options {
    #[command(subcommand)]
    which: Which,
}

#[derive(Clone, Debug, Subcommand)]
enum Which {
    Control(control::Options),
}

/// Runs a benchmark. The exit code says whether it could be measured and, when that was asked for, whether its limits are met.
///
/// # Errors
///
/// When nothing can be measured: no root, no agent, no tools.
pub fn run(options: &Options) -> Result<ExitCode> {
    match &options.which {
        Which::Control(options) => control::run(options),
    }
}
