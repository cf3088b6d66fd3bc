//! Tests of the harness: every check passes without an agent, so other failures are the agent's.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    comparison::Comparison,
    sandbox::Sandbox,
    topology::{PodOffload, Topology, Underlay},
    traffic::rate::{forwarding, highest_rate, request_latency, small_packets, tcp_throughput},
    verify::{CHECKS, Plan},
};

use crate::{machine::Need, suite::Suite};

const TCP_BYTES: u64 = 16 << 20;

pub(crate) fn register(suite: &mut Suite) {
    for comparison in [Comparison::Routed, Comparison::Vxlan] {
        for underlay in [Underlay::Virtual, Underlay::Wire] {
            for (offload, name) in [(PodOffload::On, "offload"), (PodOffload::Off, "no_offload")] {
                let name = format!(
                    "comparison::{}_{}_{name}_passes_every_check",
                    comparison.name(),
                    underlay.name()
                );
                suite.add(name, needs(comparison), move |sandbox| {
                    every_check(sandbox, comparison, underlay, offload)
                });
            }
        }
    }
    suite.add("comparison::rates_are_measured", needs(Comparison::Routed), rates_are_measured);
}

const fn needs(comparison: Comparison) -> &'static [Need] {
    match comparison {
        Comparison::Routed => &[],
        Comparison::Vxlan => &[Need::Vxlan],
    }
}

fn every_check(
    sandbox: &Arc<Sandbox>,
    comparison: Comparison,
    underlay: Underlay,
    offload: PodOffload,
) -> Result<()> {
    let topology = Topology::build(sandbox, underlay, offload)?;
    comparison.install(&topology)?;
    let plan = Plan::plain(comparison.mtu(), TCP_BYTES);
    CHECKS.iter().try_for_each(|check| check.run(&topology, &plan).map(drop).context(check.name))
}

fn rates_are_measured(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    Comparison::Routed.install(&topology)?;
    let (a, b) = topology.pods();
    let tcp = tcp_throughput(a, b, Duration::from_secs(1))?;
    ensure!(tcp > 1e8, "TCP carries {tcp} bit/s between two namespaces");
    let small = small_packets(a, b, Duration::from_millis(200))?;
    ensure!(small > 1e3, "{small} small packets per second between two namespaces");
    let highest = highest_rate(a, b, Duration::from_millis(100))?;
    ensure!(highest > 1e3, "{highest} small packets per second without loss between two namespaces");
    let forwarded = forwarding(a, b, Duration::from_millis(200))?;
    ensure!(
        forwarded.rate() > 1e3 && forwarded.received <= forwarded.sent + 100 && forwarded.cpu_seconds > 0.0,
        "forwarded between two namespaces: {forwarded:?}"
    );
    let latency = request_latency(a, b, Duration::from_millis(100))?;
    ensure!(
        latency.p50 < Duration::from_millis(5) && latency.p50 <= latency.p99 && latency.p99 <= latency.p999,
        "requests between two namespaces take {latency:?}"
    );
    Ok(())
}
