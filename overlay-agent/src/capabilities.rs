//! The Linux capabilities that the agent needs, each with its purpose. The user id does not matter.

use std::fmt;

use anyhow::{Context as _, Result};
use rustix::thread::{CapabilitySet, capabilities};

/// What every agent needs, and what `down` needs.
pub(crate) const NETWORK: &[Capability] = &[Capability {
    name: "CAP_NET_ADMIN",
    purpose: "devices, routes and firewall rules",
    granted_by: CapabilitySet::NET_ADMIN,
}];

/// What the eBPF rungs need besides. Kernels before 5.8 ask for `CAP_SYS_ADMIN` instead, and later ones take it, too.
pub(crate) const EBPF: &[Capability] = &[
    Capability {
        name: "CAP_BPF",
        purpose: "eBPF maps and programs",
        granted_by: CapabilitySet::BPF.union(CapabilitySet::SYS_ADMIN),
    },
    Capability {
        name: "CAP_PERFMON",
        purpose: "pointer arithmetic in eBPF programs",
        granted_by: CapabilitySet::PERFMON.union(CapabilitySet::SYS_ADMIN),
    },
];

/// A capability and its purpose here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Capability {
    name: &'static str,
    purpose: &'static str,
    /// Each of these is enough.
    granted_by: CapabilitySet,
}

/// Capabilities that this process lacks, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Missing(Vec<Capability>);

impl std::error::Error for Missing {}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list: Vec<_> =
            self.0.iter().map(|Capability { name, purpose, .. }| format!("{name} (for {purpose})")).collect();
        write!(
            f,
            "the process lacks {}: start it as root with all capabilities, or grant these (AmbientCapabilities= and \
             CapabilityBoundingSet= of a systemd unit, cap_add of a container)",
            list.join(" and ")
        )
    }
}

/// Fails with [`Missing`] when an effective capability of `needed` is missing.
pub(crate) fn check(needed: &[Capability]) -> Result<()> {
    let effective = capabilities(None).context("read the capabilities of this process")?.effective;
    Ok(lacking(effective, needed).map_or(Ok(()), Err)?)
}

fn lacking(effective: CapabilitySet, needed: &[Capability]) -> Option<Missing> {
    let missing = needed.iter().filter(|capability| !effective.intersects(capability.granted_by));
    let missing: Vec<_> = missing.copied().collect();
    (!missing.is_empty()).then_some(Missing(missing))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(effective: CapabilitySet, needed: &[Capability]) -> Vec<&'static str> {
        lacking(effective, needed)
            .map_or_else(Vec::new, |missing| missing.0.iter().map(|it| it.name).collect())
    }

    #[test]
    fn each_missing_capability_is_named_with_its_purpose_and_the_remedy() {
        let text = lacking(CapabilitySet::NET_ADMIN, EBPF).unwrap().to_string();
        for part in ["CAP_BPF (for eBPF maps", " and CAP_PERFMON (for ", "root", "AmbientCapabilities="] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(names(CapabilitySet::BPF, EBPF), ["CAP_PERFMON"]);
        assert_eq!(names(CapabilitySet::BPF | CapabilitySet::PERFMON, EBPF), [""; 0]);
        assert_eq!(names(CapabilitySet::BPF | CapabilitySet::PERFMON, NETWORK), ["CAP_NET_ADMIN"]);
    }

    #[test]
    fn sys_admin_replaces_those_for_ebpf_and_no_other() {
        assert_eq!(names(CapabilitySet::SYS_ADMIN, EBPF), [""; 0]);
        assert_eq!(names(CapabilitySet::SYS_ADMIN, NETWORK), ["CAP_NET_ADMIN"]);
    }
}
