//! A tcx link as the kernel sees it. Everything here is read through the link's own descriptor: listing the programs of a
//! device and looking up what they are, as the library does, needs CAP_SYS_ADMIN.

use std::fs;

use anyhow::{Context as _, Result};
use aya::programs::links::FdLink;

/// The descriptors of this process.
const DESCRIPTORS: &str = "/proc/self/fdinfo";

/// Whether `link` still runs the program with the id `program` on the device `ifindex`: anybody with CAP_SYS_ADMIN can detach
/// a link, or replace its program, while we hold it.
pub(super) fn runs(link: &FdLink, program: u32, ifindex: u32) -> Result<bool> {
    let info = link.info().context("read the state of a tcx link")?;
    Ok(info.program_id() == program && device(info.id())? == ifindex)
}

/// Index of the device of a link that this process holds; 0 when the link is detached. The library's description of a link
/// lacks it.
fn device(link: u32) -> Result<u32> {
    let descriptors = fs::read_dir(DESCRIPTORS).with_context(|| format!("list {DESCRIPTORS}"))?;
    // Other threads may close theirs meanwhile.
    let texts = descriptors.flatten().filter_map(|entry| fs::read_to_string(entry.path()).ok());
    let mut found = texts.filter(|text| number(text, "link_id") == Some(link));
    let device = found.next().and_then(|text| number(&text, "ifindex"));
    device.with_context(|| format!("{DESCRIPTORS} does not show the device of the tcx link {link}"))
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
