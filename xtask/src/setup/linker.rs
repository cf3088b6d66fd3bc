//! Finds or builds bpf-linker for one LLVM, in one directory per LLVM. A bpf-linker that the user installed may be built for
//! another LLVM, and is neither used nor overwritten.

use std::env;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::step::{self, elapsed};
use crate::workspace;

/// The LLVM major versions that this bpf-linker can be built against.
pub(super) const SUPPORTED_LLVM: RangeInclusive<u32> = 21..=23;

/// The release series of bpf-linker.
const SERIES: &str = "0.13";

/// The Debian packages that building the linker for `llvm` needs.
pub(super) fn packages(llvm: u32) -> [String; 2] {
    [format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev")]
}

/// Whether the environment names an LLVM to build against, in place of Debian's.
pub(super) fn custom_llvm() -> bool {
    env::var_os("LLVM_PREFIX").is_some()
}

/// The path of a bpf-linker for `llvm` that runs and is of the right series.
pub(super) fn find(llvm: u32) -> Option<PathBuf> {
    let linker = root(llvm).ok()?.join("bin/bpf-linker");
    if !linker.exists() {
        return None;
    }
    // It does not start without its shared LLVM library.
    let version = step::output(Command::new(&linker).arg("--version")).ok()?;
    is_of_series(&version).then_some(linker)
}

/// Builds and installs a bpf-linker for `llvm`.
pub(super) fn install(llvm: u32) -> Result<PathBuf> {
    let start = Instant::now();
    let root = root(llvm)?;
    let prefix = env::var_os("LLVM_PREFIX")
        .map_or_else(|| PathBuf::from(format!("/usr/lib/llvm-{llvm}")), PathBuf::from);
    // Kept until the installation succeeds, so that an interrupted one can resume.
    let build = root.with_file_name(format!("build-llvm-{llvm}"));
    let mut cargo = command(llvm, &root, &prefix, &build);
    let manual = format!("LLVM_PREFIX={} {}", prefix.display(), step::display(&cargo));
    let label = format!("bpf-linker: cargo install for LLVM {llvm}, about a minute");
    step::condense(&label, &mut cargo).with_context(|| {
        format!(
            "cannot install bpf-linker {SERIES}: if there is no network, run `{manual}` where there is and copy {} here; \
             it needs the packages {}",
            root.display(),
            packages(llvm).join(" "),
        )
    })?;
    // Only disk space is lost if this fails.
    let _ = std::fs::remove_dir_all(&build);
    println!("done     bpf-linker {SERIES} for LLVM {llvm} in {} ({})", root.display(), elapsed(start));
    let Some(linker) = find(llvm) else {
        bail!(
            "the bpf-linker just built does not run: run {} to see why",
            root.join("bin/bpf-linker").display()
        );
    };
    Ok(linker)
}

/// The `cargo install` that builds the linker.
fn command(llvm: u32, root: &Path, prefix: &Path, build: &Path) -> Command {
    let mut cargo = Command::new(workspace::cargo_program());
    cargo.args(["install", "bpf-linker", "--version", &format!("^{SERIES}"), "--locked", "--force"]);
    cargo.args(["--no-default-features", "--features", &format!("llvm-{llvm}"), "--root"]).arg(root);
    cargo.env("LLVM_PREFIX", prefix).env("CARGO_TARGET_DIR", build);
    // LLVM does the work, and it is compiled already: an optimised linker takes three times as long to build, and links
    // the programs in the same second.
    cargo.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0");
    // The workspace's configuration and flags are for the product, not for this tool.
    cargo.current_dir("/");
    for variable in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET", "RUSTC_WORKSPACE_WRAPPER"]
    {
        cargo.env_remove(variable);
    }
    cargo
}

/// The installation root of the linker for `llvm`.
fn root(llvm: u32) -> Result<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    let cache =
        cache.context("neither HOME nor XDG_CACHE_HOME is set: set one, bpf-linker is kept below it")?;
    Ok(cache.join(format!("overlay-agent/tools/llvm-{llvm}")))
}

/// Whether the output of `bpf-linker --version` names our series.
fn is_of_series(version: &str) -> bool {
    let release = version.trim().strip_prefix("bpf-linker ").and_then(|rest| rest.strip_prefix(SERIES));
    release.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_series_is_accepted() {
        assert!(is_of_series("bpf-linker 0.13.0\n"));
        assert!(is_of_series("bpf-linker 0.13.7"));
        assert!(!is_of_series("bpf-linker 0.12.9"));
        assert!(!is_of_series("bpf-linker 0.130.0"));
        assert!(!is_of_series(""));
    }

    #[test]
    fn packages_follow_the_llvm_version() {
        assert_eq!(packages(22), ["llvm-22-dev", "libpolly-22-dev"]);
    }
}
