//! `cargo xtask`: every development command of this repository. This file only wires.

mod bench;
mod build;
mod ci;
mod demo;
mod interrupt;
mod scan;
mod setup;
mod step;
mod test;
mod tidy;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Development commands of overlay-agent
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Setup(setup::Options),
    Build(build::Options),
    Demo(demo::Options),
    Bench(bench::Options),
    Test(test::Options),
    /// Check the rules of this repository that the compiler does not check
    Tidy,
    /// Run everything that must hold before a merge: format, clippy, tidy, docs, tests
    Ci,
}

fn main() -> ExitCode {
    let code = match dispatch(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    };
    interrupt::exit_code().unwrap_or(code)
}

fn dispatch(command: Command) -> Result<ExitCode> {
    interrupt::watch()?;
    match command {
        Command::Setup(options) => setup::run(&options),
        Command::Build(options) => build::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Tidy => tidy::run(),
        Command::Ci => ci::run(),
    }
}
