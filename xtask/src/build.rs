//! `cargo xtask build`: builds the eBPF programs and the release binary of the agent that contains them.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;

use crate::setup::{self, Scope, Toolchain};
use crate::step::{self, elapsed};
use crate::workspace;

/// Build the release binary of overlay-agent with the eBPF programs inside
#[derive(Args)]
pub(crate) struct Options {
    /// Build only the eBPF programs
    #[arg(long)]
    ebpf: bool,
}

/// Absolute paths of the build's results.
pub(crate) struct Built {
    /// The object file of the eBPF programs.
    pub(crate) ebpf_object: PathBuf,
    /// The agent, with the object inside.
    pub(crate) agent: PathBuf,
}

/// The environment variable that names the object to the agent's build script and to the tests.
pub(crate) const OBJECT_VARIABLE: &str = "OVERLAY_EBPF_OBJECT";

/// Runs the command.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let toolchain = setup::ensure(Scope::Build, false)?;
    if options.ebpf {
        build_ebpf(&toolchain)?;
    } else {
        build(&toolchain)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds the eBPF programs and the agent; cargo does only what has changed.
pub(crate) fn build(toolchain: &Toolchain) -> Result<Built> {
    let ebpf_object = build_ebpf(toolchain)?;
    let start = Instant::now();
    step::headline("build: overlay-agent (release)");
    let mut cargo = workspace::cargo()?;
    cargo.args(["build", "--release", "--package", "overlay-agent"]).env(OBJECT_VARIABLE, &ebpf_object);
    step::stream(&mut cargo)?;
    let agent = workspace::target_dir()?.join("release/overlay-agent");
    report(&agent, start)?;
    Ok(Built { ebpf_object, agent })
}

fn build_ebpf(toolchain: &Toolchain) -> Result<PathBuf> {
    let start = Instant::now();
    step::headline(format_args!("build: eBPF programs ({})", toolchain.compiler));
    // A separate directory: another compiler with other flags would invalidate the main one each time.
    let target = workspace::target_dir()?.join("bpf");
    let (mut cargo, object) = ebpf_build(toolchain, &target)?;
    step::stream(&mut cargo)?;
    report(&object, start)?;
    Ok(object)
}

/// The command that builds the eBPF programs in the directory `target`, and the path of the object that it makes.
pub(crate) fn ebpf_build(toolchain: &Toolchain, target: &Path) -> Result<(Command, PathBuf)> {
    let mut cargo = toolchain.compiler.cargo(&toolchain.linker)?;
    cargo.args(["build", "--release", "--package", "overlay-ebpf", "--bin", "overlay-ebpf"]);
    cargo.args(["--target", "bpfel-unknown-none", "-Zbuild-std=core", "--target-dir"]).arg(target);
    Ok((cargo, target.join("bpfel-unknown-none/release/overlay-ebpf")))
}

fn report(path: &Path, start: Instant) -> Result<()> {
    let size = std::fs::metadata(path)
        .with_context(|| format!("cargo succeeded, but {} is not there", path.display()))?
        .len();
    println!("built {} ({} KiB, {})", path.display(), size.div_ceil(1024), elapsed(start));
    step::flush();
    Ok(())
}
