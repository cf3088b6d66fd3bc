//! Peers behind another device than the one with this host's address: the kernel's routes decide, at any time.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use overlay_tests::{
    agent::Rung,
    netns::Netns,
    pair::Pair,
    sandbox::Sandbox,
    topology::{PodOffload, Side, Topology, UPLINK, Underlay},
    traffic::tcp,
    verify::transfer_limit,
};

use crate::{
    matrix::{diagnosis, needs},
    suite::Suite,
};

const OTHER: &str = "eth1";
const TCP_BYTES: u64 = 8 << 20;
/// Frames that a transfer has at least, of the largest size.
const FRAMES: u64 = TCP_BYTES / 65536;

pub(crate) fn register(suite: &mut Suite) {
    for (a, b) in
        [(Rung::Xdp, Rung::Xdp), (Rung::Tc, Rung::Tc), (Rung::Tun, Rung::Tun), (Rung::Tc, Rung::Tun)]
    {
        let name = format!("other_underlay::routes_select_the_device_on_{}_{}", a.name(), b.name());
        suite.add(name, needs(a, b), move |sandbox| selects(sandbox, a, b));
    }
}

/// The peer's address on the other link.
fn other_address(side: &Side) -> String {
    side.underlay.to_string().replace(".77.", ".88.")
}

fn connect(topology: &Topology) -> Result<()> {
    let (a, b) = (&topology.a, &topology.b);
    a.host.tool(&format!("ip link add {OTHER} type veth peer name {OTHER} netns {}", b.host.name()))?;
    for side in [a, b] {
        side.host.tool(&format!("ip address add {}/24 dev {OTHER}", other_address(side)))?;
        side.host.tool(&format!("ip link set {OTHER} up"))?;
    }
    Ok(())
}

fn frames(host: &Netns, device: &str) -> Result<u64> {
    let count = |direction: &str| -> Result<u64> {
        let path = format!("/sys/class/net/{device}/statistics/{direction}_packets");
        Ok(host.tool(&format!("ip netns exec {} cat {path}", host.name()))?.trim().parse()?)
    };
    Ok(count("tx")? + count("rx")?)
}

fn selects(sandbox: &Arc<Sandbox>, rung_a: Rung, rung_b: Rung) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    connect(&topology)?;
    let pair = Pair::start(sandbox, topology, rung_a, rung_b)?;
    let (a, b) = (&pair.topology.a, &pair.topology.b);
    let (from, to) = pair.topology.pods();
    // Traffic both ways takes the device that both hosts' routes name.
    let uses = |device: &str, idle: &str, what: &str| -> Result<()> {
        for agent in [&pair.a, &pair.b] {
            agent.wait_for_routes(what, |routes| {
                routes.routes.iter().all(|route| route.device.as_deref() == Some(device))
            })?;
        }
        let before = [frames(&a.host, device)?, frames(&a.host, idle)?];
        for (from, to) in [(from, to), (to, from)] {
            tcp::transfer(from, to, TCP_BYTES, transfer_limit(TCP_BYTES))
                .with_context(|| diagnosis(&pair, what))?;
        }
        let after = [frames(&a.host, device)?, frames(&a.host, idle)?];
        ensure!(
            after[0] - before[0] >= FRAMES && after[1] - before[1] < FRAMES / 2,
            "{what}: {before:?} frames before, {after:?} after; {}",
            diagnosis(&pair, what)
        );
        Ok(())
    };
    uses(UPLINK, OTHER, "at first")?;
    let on_both = |line: &dyn Fn(&Side) -> String| -> Result<()> {
        for (side, peer) in [(a, b), (b, a)] {
            side.host.tool(&line(peer))?;
        }
        Ok(())
    };
    on_both(&|peer| format!("ip route add {}/32 via {} dev {OTHER}", peer.underlay, other_address(peer)))?;
    uses(OTHER, UPLINK, "a route of the main table")?;
    let status = pair.a.text("status")?;
    ensure!(status.contains("other underlay devices") && status.contains(OTHER), "{status}");
    on_both(&|peer| format!("ip route delete {}/32", peer.underlay))?;
    uses(UPLINK, OTHER, "the route is gone")?;
    // Policy routing.
    on_both(&|peer| {
        format!("ip route add {}/32 via {} dev {OTHER} table 77", peer.underlay, other_address(peer))
    })?;
    on_both(&|peer| format!("ip rule add to {} lookup 77", peer.underlay))?;
    uses(OTHER, UPLINK, "a rule")?;
    on_both(&|peer| format!("ip rule delete to {} lookup 77", peer.underlay))?;
    uses(UPLINK, OTHER, "the rule is gone")?;
    // Equal-cost routes: whichever the kernel chooses.
    on_both(&|peer| {
        format!(
            "ip route add {peer}/32 nexthop via {} dev {OTHER} nexthop via {peer} dev {UPLINK} onlink",
            other_address(peer),
            peer = peer.underlay
        )
    })?;
    tcp::transfer(from, to, TCP_BYTES, transfer_limit(TCP_BYTES))
        .with_context(|| diagnosis(&pair, "equal-cost routes"))?;
    let Pair { a: agent, topology: _topology, .. } = pair;
    agent.stop()
}
