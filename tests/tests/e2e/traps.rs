//! Packets with unfinished checksums, unsegmented or merged, between different rungs.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::Rung,
    pair::Pair,
    sandbox::Sandbox,
    topology::{OVERLAY_MTU, PodOffload, Topology, UPLINK, Underlay},
    traffic::{rate::tcp_throughput, tcp, udp},
    verify::transfer_limit,
};

use crate::{
    matrix::{diagnosis, needs},
    suite::Suite,
};

const TCP_BYTES: u64 = 32 << 20;
/// Bits per second that show that packets flow, not only retransmissions: a fraction of what the slowest rung carries.
const AT_SPEED: f64 = 300e6;

pub(crate) fn register(suite: &mut Suite) {
    for rung in [Rung::Xdp, Rung::Tc] {
        let word = rung.name();
        // The inner checksum is unfinished when the outer packet reaches a socket, and nothing else completes it.
        suite.add(
            format!("traps::partial_inner_checksum_from_{word}_reaches_tun_host"),
            needs(rung, Rung::Tun),
            move |sandbox| {
                let pair = start(sandbox, Underlay::Virtual, PodOffload::On, rung, Rung::Tun)?;
                verified_at_speed(&pair)
            },
        );
        // The outer checksum is unfinished when the program removes the outer headers; on the link to the pod, the host then
        // completes a checksum at the old offset.
        suite.add(
            format!("traps::partial_outer_checksum_from_tun_host_survives_{word}_decap"),
            needs(rung, Rung::Tun),
            move |sandbox| {
                let pair = start(sandbox, Underlay::Virtual, PodOffload::Off, Rung::Tun, rung)?;
                verified_at_speed(&pair)
            },
        );
        // The receiving host merges several datagrams of the tun host into one packet before the program sees it.
        suite.add(
            format!("traps::merged_outer_datagrams_from_tun_host_reach_{word}_host"),
            needs(rung, Rung::Tun),
            move |sandbox| {
                let topology = Topology::build(sandbox, Underlay::Wire, PodOffload::On)?;
                topology.b.host.tool(&format!("ethtool -K {UPLINK} rx-udp-gro-forwarding on gro on"))?;
                let pair = Pair::start(sandbox, topology, Rung::Tun, rung)?;
                verified_at_speed(&pair)
            },
        );
        // An unsegmented packet is decapped and must be segmented, with checksums, on its way to the pod: the pods leave that to
        // others, and the hosts do it.
        suite.add(
            format!("traps::unsegmented_packet_is_segmented_after_{word}_decap"),
            needs(rung, rung),
            move |sandbox| {
                let pair = start(sandbox, Underlay::Virtual, PodOffload::Off, rung, rung)?;
                for pod in [&pair.topology.a.pod, &pair.topology.b.pod] {
                    pod.tool(&format!("ethtool -K {UPLINK} tx on tso on gso on"))?;
                }
                verified_at_speed(&pair)
            },
        );
    }
}

fn start(sandbox: &Arc<Sandbox>, underlay: Underlay, offload: PodOffload, a: Rung, b: Rung) -> Result<Pair> {
    Pair::start(sandbox, Topology::build(sandbox, underlay, offload)?, a, b)
}

/// Sends TCP and segmented UDP both ways between the containers and between the hosts, without loss and at speed.
fn verified_at_speed(pair: &Pair) -> Result<()> {
    let topology = &pair.topology;
    let (pods, hosts) = (topology.pods(), topology.hosts());
    let paths = [
        ("container A to B", pods.0, pods.1),
        ("container B to A", pods.1, pods.0),
        ("host A to B", hosts.0, hosts.1),
        ("host B to A", hosts.1, hosts.0),
    ];
    for (path, from, to) in paths {
        udp::segmented(from, to, OVERLAY_MTU).with_context(|| diagnosis(pair, path))?;
        tcp::transfer(from, to, TCP_BYTES, transfer_limit(TCP_BYTES))
            .with_context(|| diagnosis(pair, path))?;
        let rate = tcp_throughput(from, to, Duration::from_secs(1)).with_context(|| diagnosis(pair, path))?;
        ensure!(
            rate > AT_SPEED,
            "{path}: TCP arrives at {:.0} Mbit/s; {}",
            rate / 1e6,
            diagnosis(pair, path)
        );
    }
    for (role, counters) in ["A", "B"].iter().zip(pair.counters()?) {
        let drops = counters.wrong_drops();
        ensure!(drops.is_empty(), "agent {role} dropped packets: {drops:?}");
    }
    Ok(())
}
