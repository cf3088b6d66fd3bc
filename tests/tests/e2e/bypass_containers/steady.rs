//! Nothing changes: containers of one host reach the peer's, each other, their gateway and the outside.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::Rung,
    pair::check_counters,
    sandbox::Sandbox,
    topology::{OVERLAY_MTU, Underlay},
    traffic::{ping::ping_with_ttl, tcp, udp},
    verify::{CHECKS, Plan},
};

use super::place::{Kind, Place, skipped};

const TCP_BYTES: u64 = 4 << 20;
const LIMIT: Duration = Duration::from_secs(20);

pub(super) fn everything(
    sandbox: &Arc<Sandbox>,
    kind: Kind,
    bypass: &str,
    (rung, underlay): (Rung, Underlay),
) -> Result<()> {
    let place = Place::start_with(sandbox, kind, (rung, underlay), &["--bypass", bypass])?;
    let plan = Plan::overlay(TCP_BYTES);
    let (first, second) = (place.first(), place.add(3)?);
    for check in CHECKS {
        check.run(&place.pair.topology, &plan).with_context(|| place.diagnosis(check.name))?;
    }
    let remote = place.remote();
    for (from, to) in [(second.end(), remote), (remote, second.end())] {
        ping_with_ttl(from.netns, to.address, plan.pod_ttl)?;
        tcp::transfer(from, to, TCP_BYTES, LIMIT)?;
        udp::segmented(from, to, OVERLAY_MTU)?;
        udp::oversize(from, to)?;
    }
    place.settles(2)?;
    place.skips(&first)?;
    place.skips(&second)?;

    // What is not for the overlay.
    let is_bridge = kind == Kind::Bridge;
    let hops = if is_bridge { 64 } else { 63 };
    for (from, to, ttl) in
        [(&first, second.end(), hops), (&second, first.end(), hops), (&first, place.outside(), 63)]
    {
        ping_with_ttl(&from.netns, to.address, ttl)?;
        tcp::transfer(from.end(), to, TCP_BYTES, LIMIT)?;
        tcp::transfer(to, from.end(), TCP_BYTES, LIMIT)?;
        udp::every_size(from.end(), to, 200)?;
    }
    if is_bridge {
        ping_with_ttl(&first.netns, "10.244.1.1".parse()?, 64)?;
    }
    ping_with_ttl(&first.netns, place.pair.topology.a.host_address, 64)?;
    ping_with_ttl(&first.netns, place.pair.topology.a.underlay, 64)?;

    let [a, b] = place.pair.counters()?;
    check_counters(&a, rung, rung, "A")?;
    check_counters(&b, rung, rung, "B")?;
    for (counters, name) in [(&a, "A"), (&b, "B")] {
        let [out, into] = skipped(counters);
        let traffic = &counters.traffic;
        let enough = out * 50 >= traffic.egress_fast_packets && into * 50 >= traffic.ingress_fast_packets;
        ensure!(
            enough && out > 0 && into > 0,
            "only {out} and {into} packets have skipped the stack of {name}: {traffic:?}"
        );
    }
    place.no_strays([&first, &second])?;
    place.runs()
}
