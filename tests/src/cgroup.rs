//! cgroups of tests and benchmarks: eBPF programs attached to one translate the sockets of the processes in it, and of no others.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context as _, Result};
use overlay_agent::service::cgroup::root;

const PREFIX: &str = "overlay-test-";

/// A cgroup (v2) below the root. Dropped, this process leaves it, and it is removed.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes a cgroup for `role` without processes, after removing what killed runs left.
    pub fn create(role: &str) -> Result<Self> {
        let root = root()?;
        remove_leftovers(&root);
        let path = root.join(format!("{PREFIX}{}-{role}", process::id()));
        fs::create_dir(&path).with_context(|| format!("create the cgroup {}", path.display()))?;
        Ok(Self(path))
    }

    /// Makes a cgroup that this process is in until it is dropped.
    pub fn enter() -> Result<Self> {
        let cgroup = Self::create("own")?;
        cgroup.join()?;
        Ok(cgroup)
    }

    /// Moves this process into the cgroup, with the programs that it starts from now on.
    pub fn join(&self) -> Result<()> {
        move_to(&self.0)
    }

    /// Moves this process back to the root.
    pub fn leave(&self) -> Result<()> {
        move_to(&root()?)
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let removed = self.leave().and_then(|()| Ok(fs::remove_dir(&self.0)?));
        if let Err(error) = removed {
            eprintln!("error: leave the cgroup {}: {error:#}", self.0.display());
        }
    }
}

fn move_to(path: &Path) -> Result<()> {
    fs::write(path.join("cgroup.procs"), process::id().to_string())
        .with_context(|| format!("enter the cgroup {}", path.display()))
}

/// A killed process cannot remove its cgroups.
fn remove_leftovers(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(owner);
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Fails, as intended, while other processes are in it.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// The process that made a cgroup; `None` for foreign ones.
fn owner(name: &str) -> Option<&str> {
    let (pid, _) = name.strip_prefix(PREFIX)?.split_once('-')?;
    (!pid.is_empty() && pid.bytes().all(|byte| byte.is_ascii_digit())).then_some(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_their_owner() {
        assert_eq!(owner("overlay-test-77-own"), Some("77"));
        for foreign in ["overlay-test-77", "overlay-test-x-own", "overlay-test--own", "system.slice"] {
            assert_eq!(owner(foreign), None, "{foreign}");
        }
    }
}
