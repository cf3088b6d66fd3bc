//! The checks of a connected topology, shared by the demo and the tests.

use std::{panic::resume_unwind, thread, time::Duration};

use anyhow::{Context, Result};

use crate::{
    topology::{Endpoint, OVERLAY_MTU, Topology},
    traffic::{ping::ping_with_ttl, tcp, udp},
};

/// Expected properties of a connected topology, and the amount of traffic.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// TTL that a host's ping of the other host shows.
    pub host_ttl: u8,
    /// TTL that a container's ping of the other container shows.
    pub pod_ttl: u8,
    /// Largest packet in bytes that crosses without fragments.
    pub mtu: usize,
    /// Bytes of each TCP transfer.
    pub tcp_bytes: u64,
}

impl Plan {
    /// flannel's TTLs: each overlay end and each routing host decrements the TTL once.
    pub const fn overlay(tcp_bytes: u64) -> Self {
        Self { host_ttl: 62, pod_ttl: 60, mtu: OVERLAY_MTU, tcp_bytes }
    }

    /// TTLs when only the hosts' routing decrements them.
    pub const fn plain(mtu: usize, tcp_bytes: u64) -> Self {
        Self { host_ttl: 64, pod_ttl: 62, mtu, tcp_bytes }
    }
}

/// A named check.
pub struct Check {
    /// Name in progress lines and failures.
    pub name: &'static str,
    run: fn(&Topology, &Plan) -> Result<String>,
}

impl Check {
    /// Runs the check and returns a short description of the result.
    pub fn run(&self, topology: &Topology, plan: &Plan) -> Result<String> {
        (self.run)(topology, plan)
    }
}

/// All checks, the most specific failures first.
pub const CHECKS: &[Check] = &[
    Check { name: "ping host to host", run: |topology, plan| ping(topology.hosts(), plan.host_ttl) },
    Check { name: "ping container to container", run: |topology, plan| ping(topology.pods(), plan.pod_ttl) },
    Check {
        name: "UDP of every size, host to host",
        run: |topology, plan| every_size(topology.hosts(), plan),
    },
    Check {
        name: "UDP of every size, container to container",
        run: |topology, plan| every_size(topology.pods(), plan),
    },
    Check { name: "UDP larger than the MTU, host to host", run: |topology, _| oversize(topology.hosts()) },
    Check {
        name: "UDP larger than the MTU, container to container",
        run: |topology, _| oversize(topology.pods()),
    },
    Check {
        name: "UDP segmented by the kernel, host to host",
        run: |topology, plan| segmented(topology.hosts(), plan),
    },
    Check {
        name: "UDP segmented by the kernel, container to container",
        run: |topology, plan| segmented(topology.pods(), plan),
    },
    Check { name: "TCP host to host, both ways", run: |topology, plan| transfer(topology.hosts(), plan) },
    Check {
        name: "TCP container to container, both ways",
        run: |topology, plan| transfer(topology.pods(), plan),
    },
];

fn ping((a, b): (Endpoint<'_>, Endpoint<'_>), ttl: u8) -> Result<String> {
    for (from, to) in [(a, b), (b, a)] {
        ping_with_ttl(from.netns, to.address, ttl)?;
    }
    Ok(format!("ttl={ttl}"))
}

fn every_size((a, b): (Endpoint<'_>, Endpoint<'_>), plan: &Plan) -> Result<String> {
    udp::every_size(a, b, plan.mtu).map(|count| format!("{count} sizes"))
}

fn oversize((a, b): (Endpoint<'_>, Endpoint<'_>)) -> Result<String> {
    Ok(format!("{} datagrams in fragments", udp::oversize(a, b)? + udp::oversize(b, a)?))
}

fn segmented((a, b): (Endpoint<'_>, Endpoint<'_>), plan: &Plan) -> Result<String> {
    Ok(format!("{} datagrams", udp::segmented(a, b, plan.mtu)? + udp::segmented(b, a, plan.mtu)?))
}

/// Both directions at the same time: most time is spent hashing, which two CPUs do in parallel.
fn transfer((a, b): (Endpoint<'_>, Endpoint<'_>), plan: &Plan) -> Result<String> {
    let limit = transfer_limit(plan.tcp_bytes);
    thread::scope(|scope| {
        let back = scope.spawn(|| tcp::transfer(b, a, plan.tcp_bytes, limit).context("from B to A"));
        let there = tcp::transfer(a, b, plan.tcp_bytes, limit).context("from A to B");
        let back = back.join().unwrap_or_else(|panic| resume_unwind(panic));
        let seconds = there?.max(back?).as_secs_f64();
        Ok(format!("{} MiB each way in {seconds:.1} s, digests equal", plan.tcp_bytes >> 20))
    })
}

/// Longest time that a transfer may take: at 100 Mbit/s something is wrong, hashing alone carries several times that.
pub fn transfer_limit(bytes: u64) -> Duration {
    Duration::from_secs(5) + Duration::from_secs_f64(bytes as f64 * 8.0 / 100e6)
}
