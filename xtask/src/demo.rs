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
    let toolchain = setup::ensure(Scope::Everything, false)?;
    let built = build::build(&toolchain)?;
    step::headline("build: the demo program (release)");
    step::stream(workspace::cargo()?.args([
        "build",
        "--release",
        "--package",
        "overlay-tests",
        "--bin",
        "demo",
    ]))?;

    step::flush();
    let demo = workspace::target_dir()?.join("release/demo");
    // In place of xtask, so that Ctrl-C and the exit code are the demo's own.
    let error = Command::new(&demo).args(&options.arguments).env("OVERLAY_AGENT", &built.agent).exec();
    Err(error).with_context(|| format!("cannot start {}", demo.display()))
}
