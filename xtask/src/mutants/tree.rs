//! The copy of the repository in which changes are made.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::change::Change;
use crate::{step, workspace};

/// A copy of all files that git knows or would add.
pub(super) struct Tree {
    root: PathBuf,
}

impl Tree {
    /// Brings the copy at `root` up to date. Only files that differ are written, so that cargo builds no more than it has to.
    pub(super) fn copy_to(root: PathBuf) -> Result<Self> {
        let original = workspace::root()?;
        let mut git = Command::new("git");
        git.current_dir(&original).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
        let listed = step::output(&mut git).context("list the files to copy")?;
        let files: BTreeSet<&str> =
            listed.split('\0').filter(|file| !file.is_empty() && original.join(file).is_file()).collect();
        for file in &files {
            let (from, to) = (original.join(file), root.join(file));
            let text = fs::read(&from).with_context(|| format!("cannot read {}", from.display()))?;
            if fs::read(&to).ok().as_ref() != Some(&text) {
                let directory = to.parent().context("a file without a directory")?;
                fs::create_dir_all(directory)
                    .with_context(|| format!("cannot make {}", directory.display()))?;
                fs::write(&to, text).with_context(|| format!("cannot write {}", to.display()))?;
            }
        }
        remove_others(&root, &root, &files)?;
        Ok(Self { root })
    }

    /// The top directory of the copy.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Fails when the change cannot be made.
    pub(super) fn check(&self, change: &Change) -> Result<()> {
        let text = self.read(change)?;
        match text.matches(change.from).count() {
            1 => Ok(()),
            count => {
                bail!("{}: `{}` occurs {count} times in {}, not once", change.name, change.from, change.file)
            }
        }
    }

    /// Makes the change until what is returned is dropped.
    pub(super) fn apply(&self, change: &Change) -> Result<Applied> {
        let original = self.read(change)?;
        let path = self.root.join(change.file);
        write(&path, &original.replacen(change.from, change.to, 1))?;
        Ok(Applied { path, original })
    }

    fn read(&self, change: &Change) -> Result<String> {
        let path = self.root.join(change.file);
        fs::read_to_string(&path).with_context(|| format!("{}: cannot read {}", change.name, path.display()))
    }
}

/// A change in the copy.
pub(super) struct Applied {
    path: PathBuf,
    original: String,
}

impl Drop for Applied {
    fn drop(&mut self) {
        // With the time of now, not of before: cargo would take what it built of the change for newer.
        if let Err(error) = write(&self.path, &self.original) {
            eprintln!("warning: the copy stays changed until the next run: {error:#}");
        }
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Removes files from the copy that are no longer in the original.
fn remove_others(root: &Path, directory: &Path, files: &BTreeSet<&str>) -> Result<()> {
    let context = || format!("cannot list {}", directory.display());
    for entry in fs::read_dir(directory).with_context(context)? {
        let path = entry.with_context(context)?.path();
        let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy();
        if path.is_dir() {
            remove_others(root, &path, files)?;
        } else if !files.contains(name.as_ref()) {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}
