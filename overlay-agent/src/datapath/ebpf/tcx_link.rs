//! A tcx link as the kernel sees it. Everything here is read through the link's own descriptor: listing the programs of a
//! device and looking up what they are, as the library does, needs CAP_SYS_ADMIN.

use std::{collections::BTreeMap, fs};

use anyhow::{Context as _, Result};
use aya::programs::links::FdLink;

/// The descriptors of this process.
const DESCRIPTORS: &str = "/proc/self/fdinfo";

/// Whether `link` runs the program with the id `program`: anybody with CAP_SYS_ADMIN can replace it while we hold the link.
pub(super) fn runs(link: &FdLink, program: u32) -> Result<bool> {
    Ok(link.info().context("read the state of a tcx link")?.program_id() == program)
}

/// The devices of all tcx links that this process holds, by the id of the link; 0 for one that is detached, which anybody with
/// CAP_SYS_ADMIN can do. The library's description of a link lacks the device.
#[derive(Debug)]
pub(crate) struct TcxLinks(BTreeMap<u32, u32>);

impl TcxLinks {
    /// Reads them. Fails when the kernel does not show this process's descriptors.
    pub(crate) fn read() -> Result<Self> {
        let descriptors = fs::read_dir(DESCRIPTORS).with_context(|| format!("list {DESCRIPTORS}"))?;
        // Other threads may close theirs meanwhile.
        let texts = descriptors.flatten().filter_map(|entry| fs::read_to_string(entry.path()).ok());
        let links = texts.filter_map(|text| Some((number(&text, "link_id")?, number(&text, "ifindex")?)));
        Ok(Self(links.collect()))
    }

    /// Whether `link` is attached to the device `ifindex`.
    pub(super) fn has(&self, link: &FdLink, ifindex: u32) -> Result<bool> {
        let device = self.device(link)?;
        Ok(device.with_context(|| format!("{DESCRIPTORS} does not show a tcx link"))? == ifindex)
    }

    /// The device that `link` is attached to, 0 when it is detached; `None` for a link that leads to something else than a device.
    pub(super) fn device(&self, link: &FdLink) -> Result<Option<u32>> {
        let id = link.info().context("read the state of a tcx link")?.id();
        Ok(self.0.get(&id).copied())
    }
}

/// The number in the line `name`.
fn number(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_of_a_link_are_found_by_name() {
        let text = "pos:\t0\nlink_type:\ttcx\nlink_id:\t27\nprog_tag:\t5c\nprog_id:\t162\nifindex:\t2\nattach_type:\t46 (ingress)\n";
        let numbers = ["link_id", "prog_id", "ifindex", "link", "attach_type"].map(|name| number(text, name));
        assert_eq!(numbers, [Some(27), Some(162), Some(2), None, None]);
    }
}
