//! `subnet.env`: this host's subnet for container runtimes and the flannel CNI plugin.

use std::{fs::Permissions, io::Write as _, net::Ipv4Addr, os::unix::fs::PermissionsExt as _, path::Path};

use anyhow::{Context as _, Result, anyhow};
use tempfile::NamedTempFile;

use crate::route::{LocalNode, Subnet};

/// Fails when the file cannot be written; does not write it.
pub(crate) fn check(path: &Path) -> Result<()> {
    let attempt = match temporary(path) {
        Ok(_) if path.is_dir() => Err(anyhow!("it is a directory")),
        attempt => attempt.map(drop),
    };
    attempt.with_context(|| format!("the subnet file {}: choose another --subnet-file", path.display()))
}

/// Writes flannel's four lines atomically, with mode 0644. With `masquerade`, the agent masquerades packets that leave the
/// overlay, and the container runtime must not.
pub(crate) fn write(path: &Path, local: LocalNode, mtu: u32, masquerade: bool) -> Result<()> {
    let attempt = || -> Result<()> {
        let mut file = temporary(path)?;
        file.write_all(text(local, mtu, masquerade).as_bytes())?;
        file.as_file().set_permissions(Permissions::from_mode(0o644))?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    attempt().with_context(|| format!("write the subnet file {}", path.display()))
}

/// A new file beside `path`, in a directory that is created if it does not exist.
fn temporary(path: &Path) -> Result<NamedTempFile> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = parent.unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory)?;
    Ok(tempfile::Builder::new().prefix(".subnet.env").tempfile_in(directory)?)
}

/// The subnet in an existing file.
pub(crate) fn read_subnet(path: &Path) -> Option<Subnet> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET="))?;
    line.trim().parse().ok().map(Subnet::containing)
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
    use super::*;

    #[test]
    fn the_file_has_flannels_format_and_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/flannel/subnet.env");
        let subnet: Subnet = "10.5.34.0/24".parse().unwrap();
        let public_ip = Ipv4Addr::new(192, 168, 77, 1);
        assert_eq!(read_subnet(&path), None);
        let local = LocalNode { network: "10.5.0.0/16".parse().unwrap(), subnet, public_ip };
        write(&path, local, 1472, true).unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
        );
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(read_subnet(&path), Some(subnet));
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file stays");
        std::fs::write(&path, "FLANNEL_SUBNET=nonsense\n").unwrap();
        assert_eq!(read_subnet(&path), None);
    }

    #[test]
    fn an_unwritable_file_is_detected_by_the_check() {
        let directory = tempfile::tempdir().unwrap();
        check(&directory.path().join("run/subnet.env")).unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        for path in [file.join("subnet.env"), directory.path().join("run")] {
            let error = format!("{:#}", check(&path).unwrap_err());
            assert!(error.contains("--subnet-file"), "{error}");
        }
    }
}
