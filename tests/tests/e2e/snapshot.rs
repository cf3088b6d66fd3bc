//! The configuration of a host, compared before and after an agent ran.

use anyhow::{Result, bail, ensure};
use aya::programs::{SchedClassifier, tc::TcAttachType};
use overlay_tests::{netns::Netns, topology::UPLINK};

/// Commands whose output does not change by itself. IPv6 is left out: the kernel's own address
/// configuration is at work there for seconds after a device comes up, and what an agent leaves shows in the devices.
const VIEWS: [&str; 8] = [
    "ip -details link",
    "ip -4 address",
    "ip -4 route show table all",
    "ip -4 rule",
    "tc qdisc show",
    "ethtool -k eth0",
    "sysctl net.ipv4.ip_forward net.ipv4.conf.all net.ipv4.conf.eth0",
    "ip -4 neighbour show nud permanent",
];

/// The host's configuration as text, one part per view.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Snapshot(Vec<(&'static str, String)>);

impl Snapshot {
    pub(crate) fn take(host: &Netns) -> Result<Self> {
        let mut views = Vec::new();
        for view in VIEWS {
            views.push((view, host.tool(view)?));
        }
        views.push(("tcx programs of eth0", host.run(tcx_programs)?));
        Ok(Self(views))
    }

    /// Checks that the host's configuration is the same as when this was taken.
    pub(crate) fn is_unchanged(&self, host: &Netns) -> Result<()> {
        for ((view, before), (_, now)) in self.0.iter().zip(Self::take(host)?.0) {
            let Some((before, now)) = first_difference(before, &now) else { continue };
            bail!("`{view}` is not as before: it shows `{now}` where it showed `{before}`");
        }
        Ok(())
    }

    /// Checks that the host's configuration changed, which proves that the comparison works.
    pub(crate) fn is_changed(&self, host: &Netns) -> Result<()> {
        ensure!(*self != Self::take(host)?, "an agent runs, and the host looks as if none did");
        Ok(())
    }
}

fn first_difference(before: &str, now: &str) -> Option<(String, String)> {
    let (mut before, mut now) = (before.lines(), now.lines());
    loop {
        match (before.next(), now.next()) {
            (None, None) => return None,
            (before, now) if before == now => {}
            (before, now) => {
                let line = |line: Option<&str>| line.unwrap_or("nothing").trim().to_owned();
                return Some((line(before), line(now)));
            }
        }
    }
}

/// Ids of the programs attached with tcx, which `tc` does not show. Kernels without tcx have none.
fn tcx_programs() -> String {
    let mut text = String::new();
    for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
        let Ok((_, programs)) = SchedClassifier::query_tcx(UPLINK, direction) else { continue };
        let ids: Vec<String> = programs.iter().map(|program| program.id().to_string()).collect();
        text.push_str(&format!("{direction:?}: {}\n", ids.join(" ")));
    }
    text
}
