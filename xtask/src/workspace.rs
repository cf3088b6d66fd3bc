//! Locates the repository root, cargo's target directory, and the cargo that runs this xtask.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::step;

/// The repository root.
pub(crate) fn root() -> Result<PathBuf> {
    // `cargo run` sets the variable; otherwise the path from the build is used.
    let manifest = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let root = Path::new(&manifest).parent().context("the xtask directory has no parent")?;
    Ok(root.to_path_buf())
}

/// The cargo that started xtask, to be run in the repository root.
pub(crate) fn cargo() -> Result<Command> {
    let mut command = Command::new(cargo_program());
    command.current_dir(root()?);
    Ok(command)
}

/// The cargo that started xtask.
pub(crate) fn cargo_program() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

/// Cargo's target directory, according to its environment variables and configuration files.
pub(crate) fn target_dir() -> Result<PathBuf> {
    let metadata = step::output(cargo()?.args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: serde_json::Value =
        serde_json::from_str(&metadata).context("cannot read the output of `cargo metadata`")?;
    let target = metadata.get("target_directory").and_then(|target| target.as_str());
    Ok(target.context("`cargo metadata` names no target directory")?.into())
}

/// Whether xtask runs as root.
pub(crate) fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    // The effective user owns /proc/self.
    std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

/// Whether one of the directories of PATH, or of root's usual PATH, has `program`.
pub(crate) fn has_program(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(usual).any(|dir| dir.join(program).is_file())
}
