//! Finds the root of the cgroup v2 hierarchy, whose programs run for every socket of the machine.

use std::{ffi::OsString, fs, os::unix::ffi::OsStringExt as _, path::PathBuf};

use anyhow::{Context as _, Result};

/// The mounts that this process sees.
const MOUNTS: &str = "/proc/self/mountinfo";

/// Where the root of the hierarchy is mounted. Fails when it is not, with the remedy.
pub fn root() -> Result<PathBuf> {
    let mounts = fs::read(MOUNTS).with_context(|| format!("read {MOUNTS}"))?;
    find(&mounts).with_context(|| {
        format!(
            "{MOUNTS} has no mount of the root of cgroup v2, which virtual service addresses need: mount it \
             (mount -t cgroup2 none /sys/fs/cgroup/unified); in a container, mount the host's /sys/fs/cgroup and keep the host's \
             cgroup namespace"
        )
    })
}

/// The mount point of the first whole hierarchy of cgroup v2 (proc_pid_mountinfo(5)).
fn find(mounts: &[u8]) -> Option<PathBuf> {
    mounts.split(|byte| *byte == b'\n').find_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        let root = fields.nth(3)?;
        let point = fields.next()?;
        // Optional fields end with a hyphen.
        let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
        (kind == b"cgroup2" && root == b"/").then(|| unescaped(point).into())
    })
}

/// Spaces, tabs, line breaks and backslashes are written as a backslash with three octal digits.
fn unescaped(path: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.first_chunk::<3>().filter(|_| *first == b'\\');
        let code = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        plain.push(code.unwrap_or(*first));
        rest = if code.is_some() { after.get(3..).unwrap_or_default() } else { after };
    }
    OsString::from_vec(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_found_beside_other_mounts() {
        let mounts = b"22 1 0:21 / /proc rw shared:5 - proc proc rw
30 22 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
31 22 0:27 /kubepods/a /mnt/part rw - cgroup2 cgroup rw
32 22 0:27 / /sys/fs/my\\040cgroups\\134 rw,nosuid shared:9 master:1 - cgroup2 cgroup2 rw
33 22 0:27 / /other rw - cgroup2 cgroup2 rw
";
        assert_eq!(find(mounts), Some(PathBuf::from("/sys/fs/my cgroups\\")));
    }

    #[test]
    fn damaged_lines_are_skipped() {
        for mounts in ["", "\n\n", "1 2 3", "31 22 0:27 / /x rw -", "31 22 0:27 / /x rw cgroup2 - ext4 a b"] {
            assert_eq!(find(mounts.as_bytes()), None, "{mounts}");
        }
        assert_eq!(find(b"1 2 3 / /a\\0 rw - cgroup2 c"), Some(PathBuf::from("/a\\0")));
        assert_eq!(find(b"1 2 3 / /a\\999 rw - cgroup2 c"), Some(PathBuf::from("/a\\999")));
    }
}
