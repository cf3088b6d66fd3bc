//! A router between the hosts carries less than they do: the path's MTU is learned, followed and forgotten.

use std::{panic::resume_unwind, sync::Arc, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung},
    pair::Pair,
    router::Router,
    sandbox::Sandbox,
    topology::{OVERLAY_MTU, PodOffload, Topology, Underlay},
    traffic::{tcp, udp},
    verify::transfer_limit,
};

use crate::{
    matrix::{diagnosis, needs},
    suite::Suite,
    wait::wait_until,
};

const TCP_BYTES: u64 = 8 << 20;
/// For a transfer during which the path changes.
const LONG_TCP_BYTES: u64 = 64 << 20;
/// Seconds for which the hosts remember a path MTU, instead of the usual ten minutes.
const REMEMBERED: u32 = 6;

pub(crate) fn register(suite: &mut Suite) {
    for rung in [Rung::Xdp, Rung::Tc, Rung::Tun] {
        for underlay in [Underlay::Virtual, Underlay::Wire] {
            let name =
                format!("path_mtu::a_narrow_router_is_followed_on_{}_{}", rung.name(), underlay.name());
            suite.add(name, needs(rung, rung), move |sandbox| narrow_router(sandbox, rung, underlay));
        }
    }
}

fn has_mtu(agent: &Agent, mtu: usize) -> Result<bool> {
    Ok(agent.routes()?.routes.iter().all(|route| route.mtu == Some(mtu)))
}

fn narrow_router(sandbox: &Arc<Sandbox>, rung: Rung, underlay: Underlay) -> Result<()> {
    let topology = Topology::build(sandbox, underlay, PodOffload::On)?;
    let router = Router::insert(sandbox, &topology, underlay)?;
    for side in [&topology.a, &topology.b] {
        side.host.tool(&format!("sysctl -q -w net.ipv4.route.mtu_expires={REMEMBERED}"))?;
        // Containers that do not set DF: their packets are fragmented.
        side.pod.tool("sysctl -q -w net.ipv4.ip_no_pmtu_disc=1")?;
    }
    let pair = Pair::start(sandbox, topology, rung, rung)?;
    let (a, b) = (&pair.topology.a, &pair.topology.b);
    let (from, to) = pair.topology.pods();
    let both_ways = |what: &str| -> Result<()> {
        for (from, to) in [(from, to), (to, from)] {
            tcp::transfer(from, to, TCP_BYTES, transfer_limit(TCP_BYTES))
                .with_context(|| diagnosis(&pair, what))?;
        }
        Ok(())
    };
    both_ways("before")?;
    ensure!(has_mtu(&pair.a, OVERLAY_MTU)?, "{:?}", pair.a.routes()?);
    for side in [a, b] {
        router.limit(side, 1400)?;
    }
    // UDP without DF: the first packets tell the agents, the others arrive in fragments.
    wait_until("long datagrams pass", || udp::passes(from, to, OVERLAY_MTU - 28))
        .with_context(|| diagnosis(&pair, "long datagrams"))?;
    udp::every_size(from, to, OVERLAY_MTU).with_context(|| diagnosis(&pair, "fragmented datagrams"))?;
    ensure!(
        has_mtu(&pair.a, 1372)? && has_mtu(&pair.b, 1372)?,
        "{:?} {:?}",
        pair.a.routes()?,
        pair.b.routes()?
    );
    both_ways("in fragments")?;
    for side in [a, b] {
        side.pod.tool("sysctl -q -w net.ipv4.ip_no_pmtu_disc=0")?;
    }
    // TCP with DF: the path becomes even narrower under traffic, and containers learn it from the agents.
    both_ways("with DF")?;
    thread::scope(|scope| {
        let narrows = scope.spawn(|| {
            thread::sleep(Duration::from_millis(50));
            [a, b].into_iter().try_for_each(|side| router.limit(side, 1200))
        });
        tcp::transfer(from, to, LONG_TCP_BYTES, transfer_limit(LONG_TCP_BYTES))
            .with_context(|| diagnosis(&pair, "narrower under traffic"))?;
        narrows.join().unwrap_or_else(|panic| resume_unwind(panic))
    })?;
    both_ways("with DF on the narrower path")?;
    // Not B: the container behind A already asks for short segments.
    ensure!(has_mtu(&pair.a, 1172)?, "{:?}", pair.a.routes()?);
    // A wider path, again under traffic: the agents forget.
    thread::scope(|scope| {
        let widens = scope.spawn(|| {
            thread::sleep(Duration::from_millis(50));
            [a, b].into_iter().try_for_each(|side| router.limit(side, 1500))
        });
        tcp::transfer(from, to, LONG_TCP_BYTES, transfer_limit(LONG_TCP_BYTES))
            .with_context(|| diagnosis(&pair, "wider under traffic"))?;
        widens.join().unwrap_or_else(|panic| resume_unwind(panic))
    })?;
    wait_until("both agents have the MTU of the device", || {
        Ok(has_mtu(&pair.a, OVERLAY_MTU)? && has_mtu(&pair.b, OVERLAY_MTU)?)
    })?;
    for side in [a, b] {
        side.pod.tool("ip route flush cache")?;
    }
    udp::every_size(from, to, OVERLAY_MTU).with_context(|| diagnosis(&pair, "the wide path"))?;
    both_ways("after")
}
