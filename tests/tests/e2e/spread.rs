//! Flows spread over the receive queues of a device: a card that hashes addresses and ports sees the same addresses in all outer
//! packets, so the source port must tell flows apart.

use std::{net::UdpSocket, sync::Arc};

use anyhow::{Context as _, Result, ensure};
use overlay_tests::{
    agent::Rung,
    netns::Netns,
    pair::Pair,
    sandbox::Sandbox,
    topology::{PodOffload, Topology, UPLINK, Underlay},
};

use crate::{machine::Need, matrix::diagnosis, suite::Suite, wait::wait_until};

/// Receive queues of each end of the underlay.
const QUEUES: usize = 4;
const FLOWS: u64 = 400;
const DATAGRAMS: u64 = 5;
/// The first port of a flow.
const PORT: u16 = 20_000;

pub(crate) fn register(suite: &mut Suite) {
    suite.add("spread::flows_reach_every_queue".to_owned(), &[Need::Tun, Need::Ebpf], every_queue);
}

fn every_queue(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let (a, b) = (&topology.a, &topology.b);
    a.host.tool(&format!("ip link delete {UPLINK}"))?;
    let queues = format!("numtxqueues {QUEUES} numrxqueues {QUEUES}");
    let peer = b.host.name();
    a.host
        .tool(&format!("ip link add {UPLINK} {queues} type veth peer name {UPLINK} {queues} netns {peer}"))?;
    for side in [a, b] {
        // The driver counts what each queue receives when it polls the queues, which it does for GRO when the other
        // end sends no super-packets.
        side.host.tool(&format!("ethtool -K {UPLINK} gro on tso off"))?;
        side.host.tool(&format!("ip address add {}/24 dev {UPLINK}", side.underlay))?;
        side.host.tool(&format!("ip link set {UPLINK} up"))?;
    }
    let pair = Pair::start(sandbox, topology, Rung::Tc, Rung::Tc)?;
    let (from, to) = pair.topology.hosts();
    let sent = FLOWS * DATAGRAMS;
    let before = received(&pair.topology.b.host)?;
    let counted = pair.b.counters()?.traffic.ingress_fast_packets;
    // From the host, not from a container: what was forwarded goes to the queue on which it was received. Not connected: the hash of
    // such a socket is none that outer headers change, and the sending driver hashes the packet instead.
    from.netns.run(|| -> Result<()> {
        for port in (PORT..).take(FLOWS as usize) {
            let socket = UdpSocket::bind((from.address, port)).context("bind a flow's socket")?;
            for _ in 0..DATAGRAMS {
                socket.send_to(&[0; 64], (to.address, 9)).context("send a datagram")?;
            }
        }
        Ok(())
    })??;
    wait_until("all datagrams arrive", || {
        Ok(pair.b.counters()?.traffic.ingress_fast_packets >= counted + sent)
    })
    .with_context(|| diagnosis(&pair, "many flows"))?;
    let after = received(&pair.topology.b.host)?;
    let grown: Vec<u64> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
    ensure!(grown.len() == QUEUES && grown.iter().sum::<u64>() >= sent, "queues received {grown:?} packets");
    // A fair share is a quarter.
    ensure!(grown.iter().all(|packets| *packets > sent * 15 / 100), "uneven: {grown:?} of {sent} packets");
    Ok(())
}

/// Packets that each receive queue of the underlay has received.
fn received(host: &Netns) -> Result<Vec<u64>> {
    let statistics = host.tool(&format!("ethtool -S {UPLINK}"))?;
    let queue = |line: &str| {
        let (name, value) = line.trim().split_once(": ")?;
        (name.starts_with("rx_queue_") && name.ends_with("_xdp_packets")).then(|| value.parse().ok())?
    };
    Ok(statistics.lines().filter_map(queue).collect())
}
