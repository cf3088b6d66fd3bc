//! A link of a program to a cgroup, opened from its pin, whose program is replaced in one step: the library does that for links of devices
//! alone.
#![allow(unsafe_code, reason = "two commands of bpf(2) that the library does not offer for these links")]

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
};

use anyhow::{Context as _, Result};
use nix::libc;

/// Commands of bpf(2) (`enum bpf_cmd` in linux/bpf.h).
const OBJ_GET: libc::c_int = 7;
const LINK_UPDATE: libc::c_int = 29;

/// The part of `union bpf_attr` (linux/bpf.h) for [`OBJ_GET`].
#[repr(C)]
struct ObjGet {
    /// Address of the path, which ends with a zero byte.
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// The part of `union bpf_attr` for [`LINK_UPDATE`].
#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// An open link.
#[derive(Debug)]
pub(super) struct CgroupLink(OwnedFd);

impl CgroupLink {
    /// Opens what is pinned at `pin`; `None` when nothing is. Fails when the kernel refuses.
    pub(super) fn open(pin: &Path) -> Result<Option<Self>> {
        let context = || format!("open the pinned link {}", pin.display());
        let path = CString::new(pin.as_os_str().as_bytes()).with_context(context)?;
        let attributes =
            ObjGet { pathname: path.as_ptr().expose_provenance() as u64, bpf_fd: 0, file_flags: 0 };
        match bpf(OBJ_GET, &attributes) {
            Ok(descriptor) => {
                // SAFETY: the kernel has just opened this descriptor for us, and nothing else has it.
                Ok(Some(Self(unsafe { OwnedFd::from_raw_fd(descriptor) })))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(context),
        }
    }

    /// The number of the cgroup that the link is attached to, which is the inode number of its directory; `None` when this is no link of
    /// a cgroup, or the cgroup is gone.
    pub(super) fn cgroup(&self) -> Result<Option<u64>> {
        let path = format!("/proc/self/fdinfo/{}", self.0.as_raw_fd());
        let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        Ok(cgroup_id(&text))
    }

    /// Lets the link run another program of the same type. Every event runs the former or this one (`cgroup_bpf_replace` in
    /// kernel/bpf/cgroup.c). Fails when the cgroup is gone, or the type is another.
    pub(super) fn replace(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let attributes = LinkUpdate {
            link_fd: self.0.as_raw_fd().cast_unsigned(),
            new_prog_fd: program.as_raw_fd().cast_unsigned(),
            flags: 0,
            old_prog_fd: 0,
        };
        bpf(LINK_UPDATE, &attributes).map(drop)
    }
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    let (attributes, size) = (ptr::from_ref(attributes), size_of::<T>());
    // SAFETY: the kernel copies `size` bytes from `attributes`, which are valid during the call, and checks addresses in them; these two
    // commands write nothing back.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size) };
    match RawFd::try_from(result) {
        Ok(value) if value >= 0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The cgroup in the description of a link (`bpf_cgroup_link_show_fdinfo` in kernel/bpf/cgroup.c): 0 once the cgroup is gone.
fn cgroup_id(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("cgroup_id:"))?;
    line.trim().parse().ok().filter(|id| *id != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_is_found_while_it_is_there() {
        let text = |id: &str| {
            format!(
                "pos:\t0\nlink_type:\tcgroup\nlink_id:\t5\nprog_id:\t9\ncgroup_id:\t{id}\nattach_type:\t10\n"
            )
        };
        assert_eq!(cgroup_id(&text("4294967297")), Some(4_294_967_297));
        for other in
            [text("0"), text(""), text("x"), "link_type:\ttcx\nifindex:\t2\n".to_owned(), String::new()]
        {
            assert_eq!(cgroup_id(&other), None, "{other}");
        }
    }

    #[test]
    fn what_is_not_pinned_is_no_link() {
        assert!(CgroupLink::open(Path::new("/sys/fs/bpf/no/such/pin")).is_ok_and(|link| link.is_none()));
    }
}
