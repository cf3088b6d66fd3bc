//! Files that are replaced whole or not at all, also when the process is killed or the machine loses its power.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// Replaces `path` by what `write` writes: a temporary file beside it, fsync, rename, and fsync of the directory. The directory is
/// created if it is missing; it and the file are for this user only. One process at a time may replace a path: what a killed one
/// left of the temporary file is removed.
/// Fails when the file or its directory cannot be written; `path` is then as it was.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    swap(path, write, true)
}

/// As [`replace`], for what counts until the next boot only: it does not wait for the disk.
pub(crate) fn replace_until_reboot(
    path: &Path,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    swap(path, write, false)
}

fn swap(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>, sync: bool) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let temporary = temporary(path);
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    write(&mut file)?;
    if !sync {
        return fs::rename(&temporary, path);
    }
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    // The new name must survive a crash, too.
    File::open(directory)?.sync_all()
}

/// The name of the file while it is written.
pub(crate) fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_belongs_to_its_user() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state/ovl0.snapshot");
        replace(&path, |file| file.write_all(b"first")).unwrap();
        // What a killed process left is longer than what comes.
        fs::write(temporary(&path), "something else that is longer").unwrap();
        replace(&path, |file| file.write_all(b"second")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        let failed = replace(&path, |file| {
            file.write_all(b"half")?;
            Err(io::Error::other("the disk is full"))
        });
        assert_eq!(
            (failed.unwrap_err().to_string().as_str(), &fs::read(&path).unwrap()[..]),
            ("the disk is full", &b"second"[..])
        );
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
    }
}
