//! The benchmarks' entry point: parses the command line, runs one, turns an error into an exit code.

use std::process::ExitCode;

use clap::Parser;
use overlay_tests::bench::{self, Options};

fn main() -> ExitCode {
    match bench::run(&Options::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
