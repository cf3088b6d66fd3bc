//! The inputs that once violated a check, and some that are made to be difficult: files of `tests/fuzz/regressions`, one directory
//! for each target. `cargo xtask fuzz` adds those that it finds.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::Target;

/// The directory of a target's inputs.
pub fn directory(target: Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions").join(target.name())
}

/// A target's inputs, in order of their names. Fails when the directory cannot be read.
pub fn files(target: Target) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory(target))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    #[test]
    fn every_input_that_once_failed_passes() {
        let mut failures = Vec::new();
        for target in Target::ALL {
            let files = files(*target).unwrap();
            assert!(!files.is_empty(), "{target:?} has no inputs");
            for file in files {
                let input = fs::read(&file).unwrap();
                // The panic's message is in the output.
                if catch_unwind(|| target.check(&input)).is_err() {
                    failures.push(file.display().to_string());
                }
            }
        }
        assert!(failures.is_empty(), "inputs that fail:\n{}", failures.join("\n"));
    }

    #[test]
    fn every_directory_belongs_to_a_target() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions");
        for entry in fs::read_dir(root).unwrap() {
            let name = entry.unwrap().file_name();
            assert!(Target::ALL.iter().any(|target| name == target.name()), "{name:?} is no target");
        }
    }
}
