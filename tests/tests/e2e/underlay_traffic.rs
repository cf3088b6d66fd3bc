//! Changes of the underlay's address and MTU under traffic: nothing is lost, nothing overtakes.

use std::{net::Ipv4Addr, sync::Arc, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use overlay_tests::{
    agent::{Agent, DEVICE, Rung},
    cpu::OneCpu,
    pair::Pair,
    sandbox::Sandbox,
    topology::{PodOffload, Topology, UPLINK, Underlay},
    traffic::{numbered, stream::Stream},
};

use crate::{datapath::attached, matrix::needs, suite::Suite, wait::wait_until};

/// The second address of host A.
const OTHER: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 11);
/// Longer than a host sends from its former address when its peers can know the new one (1 s).
const SETTLED: Duration = Duration::from_millis(1500);

pub(crate) fn register(suite: &mut Suite) {
    for (rung, bypass) in [(Rung::Xdp, "flows"), (Rung::Tc, "off")] {
        let name = format!("underlay_traffic::changes_of_address_and_mtu_lose_nothing_on_{}", rung.name());
        suite.add(name, needs(rung, rung), move |sandbox| changes(sandbox, rung, bypass));
    }
}

/// One topology, agents that are never started again and programs that are never attached again, for all cases.
fn changes(sandbox: &Arc<Sandbox>, rung: Rung, bypass: &str) -> Result<()> {
    let _one = OneCpu::enter()?;
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let pair = Pair::start_with(sandbox, topology, rung, rung, &["--bypass", bypass])?;
    let (a, b) = (&pair.topology.a, &pair.topology.b);
    let programs = [attached(a)?, attached(b)?];
    let (from, to) = pair.topology.pods();
    let stream = Stream::start(from, to)?;

    a.host.tool(&format!("ip address add {OTHER}/24 dev {UPLINK}"))?;
    // Without this, removing the first address would remove the second of the same network.
    a.host.tool(&format!("sysctl -q -w net.ipv4.conf.{UPLINK}.promote_secondaries=1"))?;
    let first = a.underlay;
    without_loss(&pair, "another address", || {
        a.host.tool(&format!("ip address delete {first}/24 dev {UPLINK}"))?;
        await_address(&pair, a.subnet, OTHER)?;
        stream.advance(1 << 20)
    })?;
    without_loss(&pair, "the first address again", || {
        a.host.tool(&format!("ip address add {first}/24 dev {UPLINK}"))?;
        await_address(&pair, a.subnet, first)?;
        stream.advance(1 << 20)
    })?;

    for mtu in [1400, 1500, 9000, 1500] {
        without_loss(&pair, &format!("MTU {mtu}"), || {
            for side in [a, b] {
                side.host.tool(&format!("ip link set {UPLINK} mtu {mtu}"))?;
            }
            for agent in [&pair.a, &pair.b] {
                wait_until("the device follows", || Ok(device_mtu(agent)? == mtu - 28))?;
            }
            stream.advance(1 << 20)?;
            thread::sleep(Duration::from_millis(200));
            Ok(())
        })?;
    }
    stream.finish()?;
    ensure!([attached(a)?, attached(b)?] == programs, "programs were attached again: {programs:?}");
    ensure!(pair.a.status()?.state == "running", "{:?}", pair.a.status()?);
    Ok(())
}

/// Numbered datagrams between the pods and between the hosts, in both directions.
fn without_loss(pair: &Pair, what: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let ((pod_a, pod_b), (host_a, host_b)) = (pair.topology.pods(), pair.topology.hosts());
    let ends = [(pod_a, pod_b), (pod_b, pod_a), (host_a, host_b), (host_b, host_a)];
    let ((), flows) = numbered::flows(&ends, work).with_context(|| what.to_owned())?;
    let names = ["pod A to pod B", "pod B to pod A", "host A to host B", "host B to host A"];
    for (name, flow) in names.into_iter().zip(flows) {
        ensure!(
            flow.lost() == 0 && flow.reordered == 0,
            "{what}: {name}: {} lost, {flow:?}; counters of A and B: {:?}",
            flow.lost(),
            pair.counters()?
        );
    }
    Ok(())
}

/// Waits until both agents use an address of host A, and for a while, in which host A begins to send from it.
fn await_address(pair: &Pair, subnet: &str, address: Ipv4Addr) -> Result<()> {
    pair.b.wait_for_routes(&format!("a route by {address}"), |routes| {
        routes.routes.iter().any(|route| route.subnet == subnet && route.peer == address)
    })?;
    thread::sleep(SETTLED);
    let status = pair.a.status()?;
    ensure!(status.public_ip == address && status.state == "running", "{status:?}");
    Ok(())
}

fn device_mtu(agent: &Agent) -> Result<usize> {
    let side = agent.site().netns().tool(&format!("ip -o link show {DEVICE}"))?;
    let mtu = side.split_whitespace().skip_while(|word| *word != "mtu").nth(1);
    mtu.and_then(|mtu| mtu.parse().ok()).with_context(|| format!("read the MTU in {side}"))
}
