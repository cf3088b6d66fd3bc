//! `cargo xtask demo` and `cargo xtask bench`: set up, build, and become a program of the package `tests`.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::setup::{self, Scope};
use crate::{
    build::{self, NEXT_AGENT_VARIABLE, OBJECT_VARIABLE},
    step, workspace,
};

/// The command line of the program, which parses it and prints its own help.
#[derive(Args)]
pub(crate) struct Options {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
    arguments: Vec<OsString>,
}

/// Runs the program `name`. Returns only if it cannot be started.
pub(crate) fn run(name: &str, options: &Options) -> Result<ExitCode> {
    // Help needs neither root nor an agent.
    let help = options.arguments.iter().any(|argument| argument == "--help" || argument == "-h");
    if !help && !workspace::is_root() {
        bail!("`cargo xtask {name}` creates network namespaces and loads eBPF programs: run it as root");
    }
    let mut variables = Vec::new();
    if !help {
        let toolchain = setup::ensure(Scope::Everything, false)?;
        let built = build::build(&toolchain)?;
        variables.extend([("OVERLAY_AGENT", built.agent), (OBJECT_VARIABLE, built.ebpf_object)]);
        if options.arguments.first().is_some_and(|first| first == "restart") {
            variables.push((NEXT_AGENT_VARIABLE, build::build_next(&toolchain)?));
        }
    }
    step::headline(format_args!("build: the {name} program (release)"));
    let mut cargo = workspace::cargo()?;
    cargo.args(["build", "--release", "--package", "overlay-tests", "--bin", name]).envs(variables.clone());
    step::stream(&mut cargo)?;
    step::flush();
    let program = workspace::target_dir()?.join("release").join(name);
    // In place of xtask, so that Ctrl-C and the exit code are the program's own.
    let error = Command::new(&program).args(&options.arguments).envs(variables).exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}
