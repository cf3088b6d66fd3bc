//! `cargo xtask demo`: sets up, builds, and becomes the demo program.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::setup::{self, Scope};
use crate::{build, step, workspace};

/// Show the overlay at work: two hosts with a container each, on every way of moving packets
///
/// Sets up and builds what is missing, then runs the demo in network namespaces of its own, as root. Everything after
/// `demo` is for the demo program; `cargo xtask demo -- --help` lists its options with examples.
#[derive(Args)]
pub(crate) struct Options {
    /// Options of the demo program, such as --quick, --underlay wire, --keep, --remove
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Runs the command. Returns only if the demo cannot be started.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if !workspace::is_root() {
        bail!("the demo creates network namespaces: run it as root");
    }
    become_program("demo", &options.arguments)
}

/// Sets up, builds the agent and one program of the package `tests`, and becomes that program. Returns only if it cannot.
pub(crate) fn become_program(name: &str, arguments: &[OsString]) -> Result<ExitCode> {
    let toolchain = setup::ensure(Scope::Everything, false)?;
    let built = build::build(&toolchain)?;
    step::headline(format_args!("build: the {name} program (release)"));
    step::stream(workspace::cargo()?.args([
        "build",
        "--release",
        "--package",
        "overlay-tests",
        "--bin",
        name,
    ]))?;

    step::flush();
    let program = workspace::target_dir()?.join("release").join(name);
    // In place of xtask, so that Ctrl-C and the exit code are the program's own.
    let error = Command::new(&program).args(arguments).env("OVERLAY_AGENT", &built.agent).exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}
