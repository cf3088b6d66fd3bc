//! Every mix of rungs on both kinds of underlay passes every check, drops nothing, takes the expected path and counts every loss.

use std::sync::Arc;

use anyhow::{Context, Result};
use overlay_tests::{
    agent::Rung,
    balance::flood_both_ways,
    pair::{Pair, check_counters},
    sandbox::Sandbox,
    topology::{PodOffload, Topology, Underlay},
    verify::{CHECKS, Plan},
};

use crate::{machine::Need, suite::Suite};

const TCP_BYTES: u64 = 32 << 20;
/// Datagrams of which each arrives or is in a counter.
const DATAGRAMS: u64 = 5000;

/// Every mix in one order, because all checks send both ways.
pub(crate) const PAIRS: [(Rung, Rung); 6] = [
    (Rung::Xdp, Rung::Xdp),
    (Rung::Tc, Rung::Tc),
    (Rung::Tun, Rung::Tun),
    (Rung::Xdp, Rung::Tc),
    (Rung::Xdp, Rung::Tun),
    (Rung::Tc, Rung::Tun),
];

pub(crate) fn register(suite: &mut Suite) {
    for (a, b) in PAIRS {
        for underlay in [Underlay::Virtual, Underlay::Wire] {
            let name = format!("matrix::{}_{}_{}", a.name(), b.name(), underlay.name());
            suite.add(name, needs(a, b), move |sandbox| every_check(sandbox, a, b, underlay));
        }
    }
}

/// Requirements of agents on these rungs.
pub(crate) const fn needs(a: Rung, b: Rung) -> &'static [Need] {
    if a.is_fast() || b.is_fast() { &[Need::Tun, Need::Ebpf] } else { &[Need::Tun] }
}

fn every_check(sandbox: &Arc<Sandbox>, rung_a: Rung, rung_b: Rung, underlay: Underlay) -> Result<()> {
    let topology = Topology::build(sandbox, underlay, PodOffload::On)?;
    let pair = Pair::start(sandbox, topology, rung_a, rung_b)?;
    let plan = Plan::overlay(TCP_BYTES);
    for check in CHECKS {
        check.run(&pair.topology, &plan).with_context(|| diagnosis(&pair, check.name))?;
    }
    let [a, b] = pair.counters()?;
    check_counters(&a, rung_a, rung_b, "A")?;
    check_counters(&b, rung_b, rung_a, "B")?;
    flood_both_ways(&pair, DATAGRAMS).with_context(|| diagnosis(&pair, "flood"))?;
    let Pair { a, b, topology: _topology, .. } = pair;
    a.stop()?;
    b.stop()
}

/// Context for a failed check: the counters and logs of both agents.
pub(crate) fn diagnosis(pair: &Pair, step: &str) -> String {
    let counters = match pair.counters() {
        Ok(counters) => format!("{counters:?}"),
        Err(error) => format!("{error:#}"),
    };
    let [a, b] = [&pair.a, &pair.b].map(|agent| agent.site().log_tail());
    format!("{step}; counters of A and B: {counters}; log of A:\n{a}\nlog of B:\n{b}\n")
}
