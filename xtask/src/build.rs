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
    /// Build only the agent with another layout of maps that tests of upgrades start (name it to them in OVERLAY_NEXT_AGENT)
    #[arg(long, conflicts_with = "ebpf")]
    next_abi: bool,
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
    if options.next_abi {
        build_next(&toolchain)?;
    } else if options.ebpf {
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

/// The feature with which maps have another version and layout.
const NEXT_ABI: &str = "next-abi";
/// The environment variable that names the agent with that feature to the tests.
pub(crate) const NEXT_AGENT_VARIABLE: &str = "OVERLAY_NEXT_AGENT";

/// Builds an agent whose maps have another version and layout, with its programs, for tests of upgrades: what the tests' own build has
/// compiled is used.
pub(crate) fn build_next(toolchain: &Toolchain) -> Result<PathBuf> {
    let start = Instant::now();
    step::headline("build: overlay-agent with another layout of maps (for tests of upgrades)");
    let directory = workspace::target_dir()?.join(NEXT_ABI);
    std::fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    let copy = |from: &Path, name: &str| {
        let to = directory.join(name);
        std::fs::copy(from, &to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
        anyhow::Ok(to)
    };
    // The same place for both kinds, so that the standard library is built once. What is there afterwards are the programs as they are.
    let target = ebpf_directory()?;
    let mut cargo = toolchain.compiler.cargo(&toolchain.linker)?;
    ebpf_build(&mut cargo, OBJECT, &target, &["--features", NEXT_ABI], &[]);
    step::stream(&mut cargo)?;
    let (commands, built) = ebpf_builds(toolchain, &target)?;
    let object = copy(&built, OBJECT)?;
    for mut cargo in commands {
        step::stream(&mut cargo)?;
    }
    copy(&built.with_file_name(SERVICE_OBJECT), SERVICE_OBJECT)?;
    let mut cargo = workspace::cargo()?;
    cargo.args(["build", "--workspace", "--bin", "overlay-agent", "--features", "overlay-agent/next-abi"]);
    step::stream(cargo.env(OBJECT_VARIABLE, &object))?;
    let agent = copy(&workspace::target_dir()?.join("debug/overlay-agent"), "overlay-agent")?;
    report(&agent, start)?;
    Ok(agent)
}

/// A separate directory: another compiler with other flags would invalidate the main one each time.
fn ebpf_directory() -> Result<PathBuf> {
    Ok(workspace::target_dir()?.join("bpf"))
}

/// Builds the eBPF programs. Returns the path of the overlay's object.
pub(crate) fn build_ebpf(toolchain: &Toolchain) -> Result<PathBuf> {
    let start = Instant::now();
    step::headline(format_args!("build: eBPF programs ({})", toolchain.compiler));
    let (commands, object) = ebpf_builds(toolchain, &ebpf_directory()?)?;
    for mut cargo in commands {
        step::stream(&mut cargo)?;
    }
    report(&object, start)?;
    report(&object.with_file_name(SERVICE_OBJECT), start)?;
    Ok(object)
}

/// The overlay's object.
const OBJECT: &str = "overlay-ebpf";
/// The object of virtual service addresses, beside the other one.
const SERVICE_OBJECT: &str = "service-ebpf";

/// The commands that build the eBPF programs in the directory `target`, and the path of the overlay's object that they make; the
/// object of virtual service addresses is beside it.
pub(crate) fn ebpf_builds(toolchain: &Toolchain, target: &Path) -> Result<(Vec<Command>, PathBuf)> {
    let build = |binary: &str, flags: &[&str]| {
        let mut cargo = toolchain.compiler.cargo(&toolchain.linker)?;
        ebpf_build(&mut cargo, binary, target, &[], flags);
        Ok::<_, anyhow::Error>(cargo)
    };
    // The third version of the instructions (Linux 5.12) has atomic operations that return the former value, which counters of turns
    // need. These programs need a newer kernel anyway.
    let commands = vec![build(OBJECT, &[])?, build(SERVICE_OBJECT, &["-Ctarget-cpu=v3"])?];
    Ok((commands, target.join("bpfel-unknown-none/release").join(OBJECT)))
}

fn ebpf_build(cargo: &mut Command, binary: &str, target: &Path, options: &[&str], flags: &[&str]) {
    cargo.args(["rustc", "--release", "--package", "overlay-ebpf", "--bin", binary]).args(options);
    cargo.args(["--target", "bpfel-unknown-none", "-Zbuild-std=core", "--target-dir"]).arg(target);
    cargo.arg("--").args(flags);
}

fn report(path: &Path, start: Instant) -> Result<()> {
    let size = std::fs::metadata(path)
        .with_context(|| format!("cargo succeeded, but {} is not there", path.display()))?
        .len();
    println!("built {} ({} KiB, {})", path.display(), size.div_ceil(1024), elapsed(start));
    step::flush();
    Ok(())
}
