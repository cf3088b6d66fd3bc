//! Every datagram that is lost is in a counter, and the counters outlive what they count at.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::{DEVICE, Rung},
    balance::{Flow, flood},
    pair::Pair,
    sandbox::Sandbox,
    topology::{PodOffload, Topology, Underlay},
    traffic::ping::ping_with_ttl,
};

use crate::{
    faults::recreate_underlay,
    matrix::{diagnosis, needs},
    suite::Suite,
    wait::wait_until,
};

/// More than the overlay device's queue takes, 20,000.
const MORE_THAN_A_DEVICE_QUEUE: u64 = 22_000;
/// More than the agent's socket takes: 48 MiB with what the kernel adds, at least 768 bytes each.
const MORE_THAN_A_SOCKET_BUFFER: u64 = 75_000;

pub(crate) fn register(suite: &mut Suite) {
    for (rung, underlay) in
        [(Rung::Tc, Underlay::Virtual), (Rung::Tun, Underlay::Virtual), (Rung::Tun, Underlay::Wire)]
    {
        let name =
            format!("losses::every_datagram_of_a_flood_is_found_on_{}_{}", rung.name(), underlay.name());
        suite.add(name, needs(rung, rung), move |sandbox| flooded(sandbox, rung, underlay));
    }
    suite.add(
        "losses::what_a_busy_agent_loses_is_counted_and_outlives_device_and_socket",
        needs(Rung::Tun, Rung::Tun),
        busy_agent,
    );
    suite.add(
        "losses::packets_delivered_to_a_disabled_device_are_counted",
        needs(Rung::Tc, Rung::Tc),
        disabled_device,
    );
}

fn start(sandbox: &Arc<Sandbox>, underlay: Underlay, a: Rung, b: Rung) -> Result<Pair> {
    Pair::start(sandbox, Topology::build(sandbox, underlay, PodOffload::On)?, a, b)
}

fn flooded(sandbox: &Arc<Sandbox>, rung: Rung, underlay: Underlay) -> Result<()> {
    let pair = start(sandbox, underlay, rung, rung)?;
    let count = if rung.is_fast() { 50_000 } else { 200_000 };
    let (a, b) = (&pair.topology.a, &pair.topology.b);
    let balance = flood(&pair, a, b, count).with_context(|| diagnosis(&pair, "flood"))?;
    let overrun = balance.lost("a.device_queue_full");
    ensure!((overrun > 0) != rung.is_fast(), "the flood overruns the tun rung only: {balance:?}");
    Ok(())
}

fn busy_agent(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = start(sandbox, Underlay::Virtual, Rung::Tc, Rung::Tun)?;
    // Packets of B leave through the agent's queue, and packets for B arrive through the agent's socket.
    let (a, b) = (&pair.topology.a, &pair.topology.b);
    let overrun = |from, to, count| {
        let mut flow = Flow::start(&pair, from, to)?;
        pair.b.pause()?;
        let sent = flow.send(count);
        pair.b.resume()?;
        sent?;
        flow.settle()
    };
    let overrun_device = || -> Result<u64> {
        let balance = overrun(b, a, MORE_THAN_A_DEVICE_QUEUE)?;
        let lost = balance.lost("b.device_queue_full");
        ensure!(lost > 0, "nothing was lost: {balance:?}");
        Ok(lost)
    };
    let on_first = overrun_device().context("agent B does not read its device")?;
    b.host.tool(&format!("ip link delete {DEVICE}"))?;
    wait_until("packets cross again", || Ok(ping_with_ttl(&b.pod, a.pod_address, 60).is_ok()))?;
    let on_second = overrun_device().context("agent B does not read its new device")?;

    let balance = overrun(a, b, MORE_THAN_A_SOCKET_BUFFER).context("agent B does not read its socket")?;
    let on_socket = balance.lost("b.socket_buffer_full");
    ensure!(on_socket > 0 && balance.received > 0, "{balance:?}");
    // Another socket takes the place of the one that overflowed.
    recreate_underlay(&pair.topology)?;
    let sockets = || pair.b.site().log().matches("set up: UDP socket").count();
    wait_until("the socket is replaced", || Ok(sockets() > 1))?;

    let text = pair.b.text("counters")?;
    for (name, least) in [("device_queue_full", on_first + on_second), ("socket_buffer_full", on_socket)] {
        let count = pair.b.counters()?.kernel.get(name).copied().unwrap_or_default();
        ensure!(count >= least, "{name} is {count} after {least} losses");
        let line = text.lines().find(|line| line.contains(name));
        ensure!(line.is_some_and(|line| line.contains(&count.to_string())), "{name}: {text}");
    }
    Ok(())
}

fn disabled_device(sandbox: &Arc<Sandbox>) -> Result<()> {
    const COUNT: u64 = 300;
    let pair = start(sandbox, Underlay::Virtual, Rung::Tc, Rung::Tc)?;
    let (a, b) = (&pair.topology.a, &pair.topology.b);
    let mut flow = Flow::start(&pair, a, b)?;
    // It would enable the device at once.
    pair.b.pause()?;
    let sent = b.host.tool(&format!("ip link set {DEVICE} down")).and_then(|_| flow.send(COUNT));
    pair.b.resume()?;
    sent?;
    let balance = flow.settle()?;
    ensure!(balance.lost("b.delivery_refused") == COUNT, "{balance:?}");
    Ok(())
}
