//! `subnet.env`: this host's subnet for container runtimes and the flannel CNI plugin.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, ErrorKind, Write as _},
    net::Ipv4Addr,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileTypeExt as _, OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use tempfile::NamedTempFile;
use thiserror::Error;

use crate::route::{LocalNode, Subnet, parse_prefix};

/// Mode of the file: every container runtime may read it.
const MODE: u32 = 0o644;
/// Longest chain of symbolic links, as in the kernel.
const MOST_LINKS: usize = 40;

/// Why there can be no file at a path.
#[derive(Debug, Error)]
enum PathError {
    /// Something else than a file is there, which must stay.
    #[error("it is {0}, not a file")]
    Occupied(&'static str),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl PathError {
    /// Whether the path must change: space, permissions and mounts may come.
    fn is_permanent(&self) -> bool {
        match self {
            Self::Occupied(_) => true,
            Self::Io(error) => matches!(
                error.raw_os_error().map(Errno::from_raw),
                Some(Errno::ENOTDIR | Errno::ELOOP | Errno::ENAMETOOLONG)
            ),
        }
    }
}

/// Fails when `path` can never be written, because of what is there. Changes nothing.
pub(crate) fn check(path: &Path) -> Result<()> {
    match target(path) {
        Err(error) if error.is_permanent() => Err(error).with_context(|| {
            format!("the subnet file {}: choose another --subnet-file, or `none` for no file", path.display())
        }),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Writes flannel's four lines atomically. A symbolic link stays, and its target is written. With `masquerade`, the agent
/// masquerades packets that leave the overlay, and the container runtime must not. The text of an error is the same at each
/// attempt.
pub(crate) fn write(path: &Path, local: LocalNode, mtu: u32, masquerade: bool) -> Result<()> {
    let attempt = || -> Result<(), PathError> {
        let target = target(path)?;
        let temporary = temporary(directory(&target))?;
        let mut file = temporary.as_file();
        file.write_all(text(local, mtu, masquerade).as_bytes())?;
        file.set_permissions(Permissions::from_mode(MODE))?;
        file.sync_all()?;
        temporary.persist(&target).map_err(|error| error.error)?;
        Ok(())
    };
    attempt().with_context(|| format!("write the subnet file {}", path.display()))
}

/// The file to write: `path`, or what it links to. Where there is nothing, it can be created.
fn target(path: &Path) -> Result<PathBuf, PathError> {
    if path.as_os_str().as_bytes().ends_with(b"/") {
        return Err(PathError::Occupied("a directory"));
    }
    let kind = match fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(end_of_links(path)),
        Err(error) => return Err(error.into()),
    };
    match kind {
        _ if kind.is_file() => Ok(fs::canonicalize(path)?),
        _ if kind.is_dir() => Err(PathError::Occupied("a directory")),
        _ if kind.is_fifo() => Err(PathError::Occupied("a FIFO")),
        _ if kind.is_socket() => Err(PathError::Occupied("a socket")),
        _ => Err(PathError::Occupied("a device")),
    }
}

/// Follows symbolic links to a path where there is nothing.
fn end_of_links(path: &Path) -> PathBuf {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        let Ok(next) = fs::read_link(&path) else { break };
        path = directory(&path).join(next);
    }
    path
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A new file in a directory that is created if it does not exist.
fn temporary(directory: &Path) -> io::Result<NamedTempFile<File>> {
    fs::create_dir_all(directory)?;
    // Opened here: errors of the library name the file, which has another name at each attempt.
    let open = |path: &Path| OpenOptions::new().write(true).create_new(true).mode(MODE).open(path);
    tempfile::Builder::new().prefix(".subnet.env").make_in(directory, open)
}

/// The subnet in an existing file.
pub(crate) fn read_subnet(path: &Path) -> Option<Subnet> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET="))?;
    parse_prefix(line.trim()).map(Subnet::containing)
}

fn text(LocalNode { network, subnet, .. }: LocalNode, mtu: u32, masquerade: bool) -> String {
    let gateway = Ipv4Addr::from(u32::from(subnet.base()).wrapping_add(1));
    let length = subnet.prefix().prefix_len();
    format!(
        "FLANNEL_NETWORK={network}\nFLANNEL_SUBNET={gateway}/{length}\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ={masquerade}\n"
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::symlink, net::UnixListener};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    fn local() -> LocalNode {
        LocalNode {
            network: "10.5.0.0/16".parse().unwrap(),
            subnet: "10.5.34.0/24".parse().unwrap(),
            public_ip: Ipv4Addr::new(192, 168, 77, 1),
        }
    }

    fn write_to(path: &Path) -> Result<()> {
        write(path, local(), 1472, true)
    }

    #[test]
    fn the_file_has_flannels_format_and_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/flannel/subnet.env");
        assert_eq!(read_subnet(&path), None);
        write_to(&path).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
        );
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
        assert_eq!(read_subnet(&path), Some(local().subnet));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file stays");
        fs::write(&path, "FLANNEL_SUBNET=nonsense\n").unwrap();
        assert_eq!(read_subnet(&path), None);
    }

    #[test]
    fn a_link_stays_and_its_target_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("file"), "").unwrap();
        for (link, target, file) in
            [("a", "file", "file"), ("b", "a", "file"), ("c", "new/dir/file", "new/dir/file")]
        {
            symlink(target, at(link)).unwrap();
            check(&at(link)).unwrap();
            assert!(!at("new").exists(), "a check creates nothing");
            write_to(&at(link)).unwrap();
            assert_eq!(fs::read_link(at(link)).unwrap(), Path::new(target));
            assert_eq!(read_subnet(&at(file)), Some(local().subnet), "{link}");
            fs::write(at("file"), "").unwrap();
        }
    }

    #[test]
    fn whatever_is_no_file_stays_and_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("file"), "").unwrap();
        mkfifo(&at("fifo"), Mode::S_IRWXU).unwrap();
        let _socket = UnixListener::bind(at("socket")).unwrap();
        symlink("/dev/full", at("link")).unwrap();
        symlink("loop", at("loop")).unwrap();
        for (path, words) in [
            (at("fifo"), "a FIFO"),
            (at("socket"), "a socket"),
            (at("link"), "a device"),
            (at(""), "a directory"),
            (at("."), "a directory"),
            (at("new/"), "a directory"),
            (at("file/subnet.env"), "Not a directory"),
            (at("file/more/subnet.env"), "Not a directory"),
            (at("loop"), "symbolic links"),
            (at(&"x".repeat(300)), "too long"),
        ] {
            let error = format!("{:#}", check(&path).unwrap_err());
            assert!(error.contains(words) && error.contains("--subnet-file"), "{error}");
            assert!(write_to(&path).is_err(), "{}", path.display());
        }
        assert!(fs::metadata(at("fifo")).unwrap().file_type().is_fifo());
        assert!(fs::metadata(at("link")).unwrap().file_type().is_char_device());
    }

    #[test]
    fn a_file_that_may_become_writable_is_not_refused_and_fails_alike_at_each_attempt() {
        // In /proc, not even root can create a file.
        let path = Path::new("/proc/subnet.env");
        check(path).unwrap();
        let [first, second] = [(), ()].map(|()| format!("{:#}", write_to(path).unwrap_err()));
        assert!(first.contains("/proc/subnet.env: "), "{first}");
        assert_eq!(first, second, "another text would be logged as another problem");
    }
}
