//! Pins of network namespaces that are gone. They would keep maps in memory until the next boot.
//!
//! A namespace is named by its number, which the kernel gives to another one when it is gone. So a number proves little: pins are
//! removed only when no agent uses them, none of their links is attached to a device (the kernel detaches links from the devices of a
//! namespace that ends), and no process is seen in a namespace of this number.

use std::{
    collections::BTreeSet,
    fs::{self, File, TryLockError},
    io::{self, ErrorKind},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use tracing::{debug, info};

use super::{
    Pins, TcxLinks,
    pins::{directory_of_all, make_directory, pinned_link},
};

/// The number of the first PID namespace, whose processes are all there are: `PROC_PID_INIT_INO` (linux/proc_ns.h).
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";

/// Held by a process that uses pins. The kernel gives it back when the process ends.
#[derive(Debug)]
pub(crate) struct InUse {
    _directory: File,
}

impl Pins {
    /// Keeps other agents from removing these pins. Makes the directory again if one has just done so.
    /// Fails when the directory cannot be made or locked.
    pub(crate) fn claim(&self) -> Result<InUse> {
        let context = || format!("lock {}", self.0.display());
        loop {
            make_directory(&self.0)?;
            let directory = match File::open(&self.0) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                directory => directory.with_context(context)?,
            };
            directory.lock_shared().with_context(context)?;
            let locked = directory.metadata().with_context(context)?.ino();
            if fs::metadata(&self.0).is_ok_and(|present| present.ino() == locked) {
                return Ok(InUse { _directory: directory });
            }
        }
    }

    /// Removes the pins when all of their links are detached: their devices are gone, perhaps with a network namespace that had the
    /// number of this one.
    pub(crate) fn discard_detached(&self) -> Result<()> {
        if Links::of(self)? == Links::Detached && self.remove()? {
            info!("removed {}: the devices of its programs are gone", self.0.display());
        }
        Ok(())
    }
}

/// Removes pins of network namespaces that are gone, and returns their directories. What cannot be decided stays.
/// Fails when the file system of pins cannot be listed.
pub(crate) fn sweep() -> Result<Vec<PathBuf>> {
    let Some(all) = directory_of_all() else { return Ok(Vec::new()) };
    let entries = match fs::read_dir(&all) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("list {}", all.display()))?,
    };
    let own = fs::metadata("/proc/self/ns/net").context("look up this network namespace")?.ino();
    let (mut removed, mut namespaces) = (Vec::new(), None);
    for path in entries.flatten().map(|entry| entry.path()) {
        let Some(namespace) = namespace_of(&path).filter(|namespace| *namespace != own) else { continue };
        match remove_if_unused(&path, namespace, &mut namespaces) {
            Ok(true) => removed.push(path),
            Ok(false) => {}
            Err(error) => debug!("{} stays: {error:#}", path.display()),
        }
    }
    Ok(removed)
}

/// The number of the network namespace in the name of a directory of pins; `None` for other names.
fn namespace_of(path: &Path) -> Option<u64> {
    let (_, number) = path.file_name()?.to_str()?.rsplit_once(':')?;
    number.parse().ok()
}

fn remove_if_unused(path: &Path, namespace: u64, namespaces: &mut Option<Namespaces>) -> Result<bool> {
    let pins = Pins(path.to_owned());
    let directory = File::open(path)?;
    match directory.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(false),
        Err(TryLockError::Error(error)) => return Err(error).context("lock it"),
    }
    let links = Links::of(&pins)?;
    if links == Links::Attached {
        return Ok(false);
    }
    let namespaces = namespaces.get_or_insert_with(Namespaces::look);
    if namespaces.seen.contains(&namespace) {
        return Ok(false);
    }
    // Without a link, only the absence of the namespace tells.
    if links == Links::None && !namespaces.is_complete {
        bail!("not all processes can be seen");
    }
    pins.remove()
}

/// The links of some pins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Links {
    None,
    /// All are detached from their devices.
    Detached,
    /// At least one is attached, or leads to something else than a device.
    Attached,
}

impl Links {
    fn of(pins: &Pins) -> Result<Self> {
        let paths = pins.links()?;
        let opened = paths.iter().map(|path| pinned_link(path)).collect::<Result<Vec<_>>>()?;
        let (links, all) = (TcxLinks::read()?, &opened);
        let mut state = Self::None;
        for link in all.iter().flatten() {
            match links.device(link)? {
                Some(0) => state = Self::Detached,
                Some(_) | None => return Ok(Self::Attached),
            }
        }
        Ok(state)
    }
}

/// The network namespaces in which processes are, or that processes, mounts and descriptors hold.
#[derive(Debug, Default)]
struct Namespaces {
    seen: BTreeSet<u64>,
    /// Whether no process was hidden.
    is_complete: bool,
}

impl Namespaces {
    fn look() -> Self {
        let mut found = Self {
            seen: BTreeSet::new(),
            is_complete: fs::read_link("/proc/self/ns/pid")
                .is_ok_and(|namespace| namespace.as_os_str() == FIRST_PID_NAMESPACE),
        };
        let mut mounts = BTreeSet::new();
        for process in found.list(Path::new("/proc")) {
            let is_process = process
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit));
            if !is_process {
                continue;
            }
            for thread in found.list(&process.join("task")) {
                let link = fs::read_link(thread.join("ns/net"));
                found.add(link);
            }
            for descriptor in found.list(&process.join("fd")) {
                let link = fs::read_link(descriptor);
                found.add(link);
            }
            // Most processes share their mounts.
            if fs::read_link(process.join("ns/mnt")).is_ok_and(|namespace| !mounts.insert(namespace)) {
                continue;
            }
            if let Some(table) = found.note(fs::read_to_string(process.join("mountinfo"))) {
                found.seen.extend(table.lines().filter_map(mounted));
            }
        }
        found
    }

    fn list(&mut self, directory: &Path) -> Vec<PathBuf> {
        let entries = self.note(fs::read_dir(directory)).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    fn add(&mut self, link: io::Result<PathBuf>) {
        let link = self.note(link);
        self.seen.extend(link.as_deref().and_then(Path::to_str).and_then(number));
    }

    /// Processes end meanwhile; other errors hide something.
    fn note<T>(&mut self, result: io::Result<T>) -> Option<T> {
        if let Err(error) = &result {
            let has_ended = error.kind() == ErrorKind::NotFound
                || error.raw_os_error() == Some(nix::libc::ESRCH)
                // A zombie's mounts are gone.
                || error.kind() == ErrorKind::InvalidInput;
            self.is_complete &= has_ended;
        }
        result.ok()
    }
}

/// The namespace in a line of `/proc/PID/mountinfo`: the root of such a mount is the namespace (`man 5 proc`).
fn mounted(line: &str) -> Option<u64> {
    number(line.split(' ').nth(3)?)
}

/// The number in `net:[4026531840]`.
fn number(text: &str) -> Option<u64> {
    text.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_directories_end_with_the_number_of_a_namespace() {
        let number = |name: &str| namespace_of(&Path::new("/sys/fs/bpf/overlay-agent").join(name));
        assert_eq!(number("ovl0:4026532289"), Some(4_026_532_289));
        assert_eq!(number("a%b:7"), Some(7));
        for other in ["ovl0", "ovl0:", "ovl0:7x", ":", "somebody:elses:pins"] {
            assert_eq!(number(other), None, "{other}");
        }
    }

    #[test]
    fn namespaces_are_read_from_links_and_mounts() {
        let line = "512 25 0:4 net:[4026532289] /run/netns/blue rw shared:210 - nsfs nsfs rw";
        assert_eq!(mounted(line), Some(4_026_532_289));
        for other in [
            "25 30 0:23 / /run rw,nosuid shared:5 - tmpfs tmpfs rw,mode=755",
            "513 25 0:4 mnt:[4026532290] /run/m rw - nsfs nsfs rw",
            "net:[1]",
            "",
        ] {
            assert_eq!(mounted(other), None, "{other}");
        }
        assert_eq!(number("socket:[77]"), None);
    }

    #[test]
    fn the_namespace_of_this_process_is_seen() {
        let own = fs::metadata("/proc/self/ns/net").unwrap().ino();
        assert!(Namespaces::look().seen.contains(&own));
    }
}
