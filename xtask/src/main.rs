//! `cargo xtask`: the development commands of this repository.

mod build;
mod ci;
mod fuzz;
mod interrupt;
mod mutants;
mod program;
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
    /// Set up, build and run the demo in network namespaces, as root; `--help` lists its options
    #[command(disable_help_flag = true)]
    Demo(program::Options),
    /// Set up, build and run a benchmark in a network namespace, as root; `--help` lists them
    #[command(disable_help_flag = true)]
    Bench(program::Options),
    Test(test::Options),
    Fuzz(fuzz::Options),
    Mutants(mutants::Options),
    /// Check conventions of this repository that the compiler does not check
    Tidy,
    /// Run all checks and tests that a change has to pass: format, clippy, docs, tidy, tests
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
        Command::Demo(options) => program::run("demo", &options),
        Command::Bench(options) => program::run("bench", &options),
        Command::Test(options) => test::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Mutants(options) => mutants::run(&options),
        Command::Tidy => tidy::run(),
        Command::Ci => ci::run(),
    }
}
