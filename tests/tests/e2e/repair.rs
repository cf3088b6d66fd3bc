//! Other programs change what the agent made: it notices at once and repairs it.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::Rung,
    netns::Netns,
    pair::Pair,
    sandbox::Sandbox,
    topology::{NETWORK, OVERLAY_MTU, PodOffload, Topology, Underlay},
    traffic::udp::every_size,
};

use crate::{matrix::needs, suite::Suite, wait::wait_until};

/// Changes of the overlay device. Each shows in the output of `ip` until it is repaired.
const CHANGES: [&str; 5] = [
    "ip link set ovl0 alias mine",
    "ip route delete 10.244.0.0/16",
    "ip link set ovl0 mtu 1000",
    "ip link set ovl0 down",
    "ip address flush dev ovl0",
];
/// How often each is made. All together have the time of one wait: the agent acts on the kernel's messages, and does not wait for
/// its next periodic check, of which each change would need one.
const REPEATS: usize = 3;

pub(crate) fn register(suite: &mut Suite) {
    for rung in [Rung::Tc, Rung::Tun] {
        let name = format!("repair::changes_of_the_overlay_device_are_repaired_at_once_on_{}", rung.name());
        suite.add(name, needs(rung, rung), move |sandbox| repairs(sandbox, rung));
    }
}

/// What others can change about the device and its route.
fn shown(host: &Netns) -> Result<String> {
    let link = host.tool("ip -oneline link show dev ovl0")?;
    let address = host.tool("ip -4 -oneline address show dev ovl0")?;
    let route = host.tool(&format!("ip route show {NETWORK}"))?;
    Ok(format!("{link} {address} {route}"))
}

fn repairs(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let pair = Pair::start(sandbox, topology, rung, rung)?;
    let host = &pair.topology.a.host;
    let before = shown(host)?;
    let mut changes = CHANGES.iter().cycle().take(CHANGES.len() * REPEATS);
    wait_until("all changes are repaired, one after the other", || {
        if shown(host)? != before {
            return Ok(false);
        }
        let Some(change) = changes.next() else { return Ok(true) };
        host.tool(change)?;
        ensure!(shown(host)? != before, "`{change}` changes nothing that is compared");
        Ok(false)
    })
    .with_context(|| format!("it was {before}, and is {:?}", shown(host)))?;
    let (from, to) = pair.topology.pods();
    every_size(from, to, OVERLAY_MTU)?;
    let status = pair.a.status()?;
    ensure!(status.state == "running", "{status:?}");
    let log = pair.a.site().log();
    ensure!(log.contains("another program changed this host; repaired: "), "{}", pair.a.site().log_tail());
    pair.a.stop()?;
    pair.b.stop()
}
