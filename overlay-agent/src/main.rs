//! Wires the command line to the agent.

use std::process::ExitCode;

fn main() -> ExitCode {
    overlay_agent::cli::main()
}
