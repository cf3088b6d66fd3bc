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
    agent(build_ebpf(toolchain)?)
}

/// Builds the agent with the eBPF programs of this object.
pub(crate) fn agent(ebpf_object: PathBuf) -> Result<Built> {
    let start = Instant::now();
    step::headline("build: overlay-agent (release)");
    let mut cargo = workspace::cargo()?;
    cargo.args(["build", "--release", "--package", "overlay-agent"]).env(OBJECT_VARIABLE, &ebpf_object);
    step::stream(&mut cargo)?;
    let agent = workspace::target_dir()?.join("release/overlay-agent");
    report(&agent, start)?;
    Ok(Built { ebpf_object, agent })
}

/// Builds the eBPF programs. Returns the path of the overlay's object.
pub(crate) fn build_ebpf(toolchain: &Toolchain) -> Result<PathBuf> {
    let start = Instant::now();
    step::headline(format_args!("build: eBPF programs ({})", toolchain.compiler));
    // A separate directory: another compiler with other flags would invalidate the main one each time.
    let target = workspace::target_dir()?.join("bpf");
    let (commands, object) = ebpf_builds(toolchain, &target)?;
    for mut cargo in commands {
        step::stream(&mut cargo)?;
    }
    report(&object, start)?;
    report(&object.with_file_name(SERVICE_OBJECT), start)?;
    Ok(object)
}

/// The object of virtual service addresses, beside the other one.
const SERVICE_OBJECT: &str = "service-ebpf";

/// The commands that build the eBPF programs in the directory `target`, and the path of the overlay's object that they make; the
/// object of virtual service addresses is beside it.
pub(crate) fn ebpf_builds(toolchain: &Toolchain, target: &Path) -> Result<(Vec<Command>, PathBuf)> {
    let build = |binary: &str, flags: &[&str]| {
        let mut cargo = toolchain.compiler.cargo(&toolchain.linker)?;
        cargo.args(["rustc", "--release", "--package", "overlay-ebpf", "--bin", binary]);
        cargo.args(["--target", "bpfel-unknown-none", "-Zbuild-std=core", "--target-dir"]).arg(target);
        cargo.arg("--").args(flags);
        Ok::<_, anyhow::Error>(cargo)
    };
    // The third version of the instructions (Linux 5.12) has atomic operations that return the former value, which counters of turns
    // need. These programs need a newer kernel anyway.
    let commands = vec![build("overlay-ebpf", &[])?, build(SERVICE_OBJECT, &["-Ctarget-cpu=v3"])?];
    Ok((commands, target.join("bpfel-unknown-none/release/overlay-ebpf")))
}

fn report(path: &Path, start: Instant) -> Result<()> {
    let size = std::fs::metadata(path)
        .with_context(|| format!("cargo succeeded, but {} is not there", path.display()))?
        .len();
    println!("built {} ({} KiB, {})", path.display(), size.div_ceil(1024), elapsed(start));
    step::flush();
    Ok(())
}
