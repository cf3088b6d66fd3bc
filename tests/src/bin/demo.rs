//! The demo's entry point: parses the command line, runs the demo, turns an error into an exit code.

use std::process::ExitCode;

use clap::Parser;
use overlay_tests::demo::{self, Options};

fn main() -> ExitCode {
    match demo::run(&Options::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
