//! Pins: maps and links of an overlay device's programs in the BPF file system, where they outlive the agent.
//!
//! `/sys/fs/bpf/overlay-agent/<device>:<network namespace>/` has the links, and below it the maps of each generation
//! (see [`super::generation`]). A program is detached when the pin of its link is removed and no process holds the link, so removing the directory of an agent that is gone
//! removes its programs. What services have is in the directory `services` below, in the same form.

use std::{
    fs::{self, DirBuilder},
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::programs::links::{FdLink, PinnedLink};
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use overlay_ebpf::{abi::ABI_VERSION, service::abi::SERVICE_ABI_VERSION};

/// Where the BPF file system is, by convention (Documentation/bpf/bpf_devel_QA.rst, systemd).
const FILE_SYSTEM: &str = "/sys/fs/bpf";
/// The directory of all agents.
const DIRECTORY: &str = "overlay-agent";
/// The directory of what belongs to services, below that of the device: it stays when the datapath takes another rung.
const SERVICES: &str = "services";
/// Only root reads and writes pins.
const MODE: u32 = 0o700;

/// The directory of an overlay device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pins(pub(super) PathBuf);

impl Pins {
    /// Opens the directory of the overlay device `device` in this network namespace, and mounts the file system if it is missing.
    /// Fails when the kernel has no such file system, or this process may not write there.
    pub fn open(device: &str) -> Result<Self> {
        if !is_mounted() {
            mount(Some("bpf"), FILE_SYSTEM, Some("bpf"), MsFlags::empty(), Some("mode=0700")).with_context(
                || format!("mount the BPF file system at {FILE_SYSTEM} (mount -t bpf bpf {FILE_SYSTEM})"),
            )?;
        }
        let pins = Self::of(device)?;
        make_directory(&pins.0)?;
        Ok(pins)
    }

    /// The directory of a device, if there is one.
    pub fn find(device: &str) -> Result<Option<Self>> {
        let pins = Self::of(device)?;
        let exists =
            is_mounted() && fs::exists(&pins.0).with_context(|| format!("look for {}", pins.0.display()))?;
        Ok(exists.then_some(pins))
    }

    fn of(device: &str) -> Result<Self> {
        // Devices of two network namespaces may have one name. The file system allows no dots in names (kernel/bpf/inode.c), and
        // names of devices have neither colons nor percent signs.
        let namespace =
            fs::metadata("/proc/thread-self/ns/net").context("look up this network namespace")?.ino();
        Ok(Self(
            Path::new(FILE_SYSTEM).join(DIRECTORY).join(format!("{}:{namespace}", device.replace('.', "%"))),
        ))
    }

    /// The directory of services, which may be missing.
    pub(crate) fn services(&self) -> Self {
        Self(self.0.join(SERVICES))
    }

    /// The version of the maps that this agent pins there.
    pub(super) fn version(&self) -> u16 {
        if self.0.ends_with(SERVICES) { SERVICE_ABI_VERSION } else { ABI_VERSION }
    }

    /// The directory itself.
    pub(super) fn directory(&self) -> &Path {
        &self.0
    }

    /// The directory of the maps of this version, if there is one.
    pub(super) fn present_maps(&self) -> Option<PathBuf> {
        Some(self.0.join(format!("v{}", self.version()))).filter(|directory| directory.is_dir())
    }

    /// Whether a map of this name is pinned, of any version.
    pub(crate) fn has_map(&self, name: &str) -> bool {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).any(|path| path.is_dir() && path.join(name).exists())
    }

    /// Where the link of a program on the device with this index is pinned.
    pub(crate) fn link(&self, program: &str, ifindex: u32) -> PathBuf {
        self.0.join(format!("{program}:{ifindex}"))
    }

    /// Where the link of a program of services is pinned.
    pub(super) fn service_link(&self, program: &str) -> PathBuf {
        self.0.join(program)
    }

    /// The pins of all links, those of XDP first: what XDP passes on needs the program behind it.
    pub(crate) fn links(&self) -> Result<Vec<PathBuf>> {
        let mut paths = files(&self.0)?;
        let is_xdp =
            |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().contains("_xdp:"));
        paths.sort_by_key(|path| (!is_xdp(path), path.clone()));
        Ok(paths)
    }

    /// Whether programs are attached by pinned links.
    pub(crate) fn has_links(&self) -> bool {
        self.links().is_ok_and(|links| !links.is_empty())
    }

    /// Whether programs with this name are attached by pinned links.
    pub(crate) fn has_links_of(&self, program: &str) -> Result<bool> {
        let start = format!("{program}:");
        let links = self.links().with_context(|| format!("list {}", self.0.display()))?;
        let names = links.iter().filter_map(|link| link.file_name());
        Ok(names.into_iter().any(|name| name.to_string_lossy().starts_with(&start)))
    }

    /// As [`Self::remove`], without what services have.
    pub(crate) fn remove_datapath(&self) -> Result<()> {
        let context = || format!("remove {}", self.0.display());
        for link in self.links().with_context(context)? {
            unpin(&link)?;
        }
        for version in self.generations()? {
            fs::remove_dir_all(version).with_context(context)?;
        }
        match fs::remove_dir(&self.0) {
            Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty) => {
                Err(error).with_context(context)
            }
            _ => Ok(()),
        }
    }

    /// Removes links, then maps, then the directory. Programs are detached unless a process holds their links. Returns whether there was
    /// something.
    pub(crate) fn remove(&self) -> Result<bool> {
        let context = || format!("remove {}", self.0.display());
        for link in self.links().with_context(context)? {
            fs::remove_file(link).with_context(context)?;
        }
        match fs::remove_dir_all(&self.0) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).with_context(context),
        }
    }
}

/// What is pinned as a link at `path`; `None` when nothing is.
pub(super) fn pinned_link(path: &Path) -> Result<Option<FdLink>> {
    if !fs::exists(path).with_context(|| format!("look for {}", path.display()))? {
        return Ok(None);
    }
    let link =
        PinnedLink::from_pin(path).with_context(|| format!("open the pinned link {}", path.display()))?;
    Ok(Some(link.into()))
}

/// Pins a link.
pub(super) fn pin_link(link: FdLink, path: &Path) -> Result<FdLink> {
    Ok(link.pin(path).with_context(|| format!("pin a link as {}", path.display()))?.into())
}

/// Removes a pin; that there is none is no error.
pub(crate) fn unpin(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove the pin {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// The directory of all agents, if the file system is there.
pub(super) fn directory_of_all() -> Option<PathBuf> {
    is_mounted().then(|| Path::new(FILE_SYSTEM).join(DIRECTORY))
}

fn is_mounted() -> bool {
    statfs(FILE_SYSTEM).is_ok_and(|state| state.filesystem_type() == BPF_FS_MAGIC)
}

pub(super) fn make_directory(path: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(MODE).create(path);
    made.with_context(|| format!("make the directory {}", path.display()))
}

/// The files of a directory; none if it is missing.
fn files(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            paths.push(entry.path());
        }
    }
    Ok(paths)
}
