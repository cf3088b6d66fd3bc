//! The parts of the agent's JSON output that tests and the demo read.

use std::{collections::BTreeMap, net::Ipv4Addr};

use serde::Deserialize;

/// The part of `overlay-agent status -o json` that every agent reports.
#[derive(Clone, Debug, Deserialize)]
pub struct State {
    /// `running` when the agent is ready.
    pub state: String,
    /// Problems.
    pub problems: Vec<String>,
    /// The process that answers.
    pub pid: u32,
}

impl State {
    /// Whether the only problem is that this machine's nft, or its kernel, cannot guard the peers.
    pub fn lacks_only_nft(&self) -> bool {
        let guard = |problem: &String| problem.contains("packets that peers take for ours");
        self.state == "degraded" && self.problems.iter().all(guard)
    }
}

/// `overlay-agent status -o json` of an agent that has started.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// `running` when the agent is ready.
    pub state: String,
    /// Problems.
    pub problems: Vec<String>,
    /// The agent's subnet, in CIDR notation.
    pub subnet: String,
    /// The underlay address that peers send to.
    pub public_ip: Ipv4Addr,
    /// UDP port of the network.
    pub port: u16,
    /// The overlay device.
    pub device: Device,
    /// Egress.
    pub egress: Path,
    /// Ingress.
    pub ingress: Path,
    /// Number of routes.
    pub routes: usize,
    /// What skips the host's stack.
    pub bypass: Option<Bypass>,
    /// The agent's process.
    pub pid: u32,
}

/// The bypass of the host's stack.
#[derive(Clone, Debug, Deserialize)]
pub struct Bypass {
    /// `off`, `flows` or `all`.
    pub mode: String,
    /// Devices of containers with programs, once for each program.
    pub devices: usize,
    /// Containers that the programs know.
    pub containers: usize,
    /// What takes the host's stack, and why.
    pub skipped: Vec<String>,
}

/// A network device.
#[derive(Clone, Debug, Deserialize)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: usize,
}

/// The datapath of one direction.
#[derive(Clone, Debug, Deserialize)]
pub struct Path {
    /// `xdp`, `tc` or `tun`.
    pub rung: String,
    /// Why this one.
    pub why: String,
}

/// `overlay-agent routes -o json`.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Routes {
    /// Every route.
    pub routes: Vec<Route>,
    /// Records that were skipped.
    pub skipped: Vec<Skipped>,
}

/// A route to a peer.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Route {
    /// The subnet, in CIDR notation.
    pub subnet: String,
    /// The peer's underlay address.
    pub peer: Ipv4Addr,
    /// The device through which it is reached.
    pub device: Option<String>,
    /// Largest inner packet in bytes that the path carries.
    pub mtu: Option<usize>,
    /// Why its packets take the slow path.
    pub slow_path: Option<String>,
    /// The hardware address to which the fast path sends.
    pub link_address: Option<String>,
}

/// A skipped record.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Skipped {
    /// Its name.
    pub record: String,
    /// Why it was skipped.
    pub why: String,
}

/// `overlay-agent counters -o json`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Counters {
    /// Packets and bytes per path.
    pub traffic: Traffic,
    /// Packets that the fast path handed to the slow path, by reason.
    pub punts: BTreeMap<String, u64>,
    /// Packets discarded, by reason.
    pub drops: BTreeMap<String, u64>,
    /// Packets dropped by the kernel's queues around both paths.
    pub kernel: BTreeMap<String, u64>,
    /// Changes of the rungs.
    #[serde(default)]
    pub rungs: BTreeMap<String, u64>,
    /// Changes of routes that the agent has made in the kernel's map.
    #[serde(default)]
    pub route_changes: BTreeMap<String, u64>,
}

/// Packets per direction and path. A super-packet of many segments counts once.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Traffic {
    /// Inner packets encapsulated by eBPF.
    pub egress_fast_packets: u64,
    /// Inner packets decapsulated by eBPF.
    pub ingress_fast_packets: u64,
    /// Of the encapsulated ones, those that came straight from a container.
    #[serde(default)]
    pub egress_bypass_packets: u64,
    /// Of the decapsulated ones, those that went straight to a container.
    #[serde(default)]
    pub ingress_bypass_packets: u64,
    /// Inner packets encapsulated by the agent.
    pub egress_slow_packets: u64,
    /// Inner packets decapsulated by the agent.
    pub ingress_slow_packets: u64,
}

impl Traffic {
    /// Packets that eBPF carried.
    pub fn fast(&self) -> u64 {
        self.egress_fast_packets + self.ingress_fast_packets
    }

    /// Packets that the agent carried.
    pub fn slow(&self) -> u64 {
        self.egress_slow_packets + self.ingress_slow_packets
    }
}

impl Counters {
    /// Drops that mean that something is wrong, with their counts. The kernel itself sends IPv6 router solicitations into
    /// every device, so discarded IPv6 packets are none.
    pub fn wrong_drops(&self) -> BTreeMap<&str, u64> {
        let counted = self.drops.iter().filter(|(reason, count)| **count > 0 && reason.as_str() != "ipv6");
        counted.map(|(reason, count)| (reason.as_str(), *count)).collect()
    }

    /// Every counter of lost packets.
    pub fn losses(&self) -> impl Iterator<Item = (&str, u64)> {
        self.drops.iter().chain(&self.kernel).map(|(reason, count)| (reason.as_str(), *count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discarded_ipv6_is_not_wrong() {
        let text = r#"{"traffic": {"egress_fast_packets": 7, "egress_fast_bytes": 1, "ingress_fast_packets": 2,
            "ingress_fast_bytes": 1, "egress_slow_packets": 1, "egress_slow_bytes": 1, "ingress_slow_packets": 0,
            "ingress_slow_bytes": 0}, "punts": {"outer_gro": 1}, "drops": {"ipv6": 9, "no_route": 0, "truncated": 2},
            "kernel": {"device_queue_full": 5}}"#;
        let counters: Counters = serde_json::from_str(text).unwrap();
        assert_eq!(counters.wrong_drops(), BTreeMap::from([("truncated", 2)]));
        assert_eq!(counters.losses().map(|(_, count)| count).sum::<u64>(), 16);
        assert_eq!((counters.traffic.fast(), counters.traffic.slow()), (9, 1));
    }
}
