//! What `status`, `routes` and `counters` tell, as data. The JSON names are stable: scripts read them.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;
use overlay_ebpf::reason::{DropReason, PuntReason};
use serde::{Deserialize, Serialize};

use crate::{
    datapath::{Choice, PathCounters},
    netlink::Link,
};

/// How an agent fares.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// `running` once lease, device, datapath and first snapshot are there; `degraded` while something is wrong.
    pub state: String,
    /// What is wrong.
    pub problems: Vec<String>,
    /// Version of the agent.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// The whole overlay.
    pub network: Ipv4Net,
    /// This host's part of it.
    pub subnet: Ipv4Net,
    /// The address by which peers reach this host.
    pub public_ip: Ipv4Addr,
    /// UDP port of the network.
    pub port: u16,
    /// The overlay device.
    pub device: Device,
    /// The device that carries outer packets.
    pub underlay: Device,
    /// How inner packets leave.
    pub egress: Choice,
    /// How outer packets arrive.
    pub ingress: Choice,
    /// How many subnets of peers are routed.
    pub routes: usize,
    /// Where leases come from.
    pub store: Store,
    /// Packets discarded because something was wrong with them, on both paths.
    pub drops: u64,
}

/// A network device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Device {
    /// Name.
    pub name: String,
    /// Index.
    pub ifindex: u32,
    /// Largest packet in bytes.
    pub mtu: u32,
}

impl From<&Link> for Device {
    fn from(link: &Link) -> Self {
        Self { name: link.name.clone(), ifindex: link.index, mtu: link.mtu }
    }
}

/// Where leases come from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Store {
    /// `dir:PATH`, or `none` when all peers were given on the command line.
    pub name: String,
    /// Why it cannot be read at the moment; the routes are the last known ones then.
    pub lost: Option<String>,
}

/// Where packets go.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RouteList {
    /// Subnets of peers.
    pub routes: Vec<Route>,
    /// Records that are no routes.
    pub skipped: Vec<crate::route_table::Skipped>,
}

/// One subnet of a peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Route {
    /// The subnet.
    pub subnet: Ipv4Net,
    /// The peer's underlay address.
    pub peer: Ipv4Addr,
}

/// What was counted since the agent started. A super-packet of many segments counts once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CounterList {
    /// Packets and bytes that went through, by direction and path: `egress_fast_packets` and so on.
    pub traffic: BTreeMap<String, u64>,
    /// Packets that the fast path handed to the slow path, by reason.
    pub punts: BTreeMap<String, u64>,
    /// Packets discarded on either path, by reason.
    pub drops: BTreeMap<String, u64>,
}

impl From<PathCounters> for CounterList {
    fn from(PathCounters { fast, slow }: PathCounters) -> Self {
        let traffic = [
            ("egress_fast_packets", fast.egress_packets),
            ("egress_fast_bytes", fast.egress_bytes),
            ("ingress_fast_packets", fast.ingress_packets),
            ("ingress_fast_bytes", fast.ingress_bytes),
            ("egress_slow_packets", slow.egress_packets),
            ("egress_slow_bytes", slow.egress_bytes),
            ("ingress_slow_packets", slow.ingress_packets),
            ("ingress_slow_bytes", slow.ingress_bytes),
        ];
        let named = |(name, count): (&str, u64)| (name.to_owned(), count);
        let drops = DropReason::ALL.iter().zip(fast.drops.iter().zip(slow.drops));
        Self {
            traffic: traffic.into_iter().map(named).collect(),
            punts: PuntReason::ALL
                .iter()
                .zip(fast.punts)
                .map(|(reason, count)| named((reason.name(), count)))
                .collect(),
            drops: drops.map(|(reason, (fast, slow))| named((reason.name(), fast + slow))).collect(),
        }
    }
}

/// Packets discarded because something was wrong with them.
pub fn errors(counters: &PathCounters) -> u64 {
    let both = counters.fast.drops.iter().zip(counters.slow.drops);
    DropReason::ALL
        .iter()
        .zip(both)
        .filter(|(reason, _)| reason.is_error())
        .map(|(_, (fast, slow))| fast + slow)
        .sum()
}
