//! Tests of the harness: every check passes without an agent, so other failures are the agent's.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    comparison::Comparison,
    sandbox::Sandbox,
    topology::{PodOffload, Topology, Underlay},
    traffic::rate::{round_trip, small_packets, tcp_throughput},
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
    let trip = round_trip(a, b, Duration::from_millis(100))?;
    ensure!(trip < Duration::from_millis(5), "a round trip between two namespaces takes {trip:?}");
    Ok(())
}
