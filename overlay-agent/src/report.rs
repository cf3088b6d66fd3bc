//! Answers of `status`, `routes` and `counters`. The JSON names are stable: scripts read them.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    time::SystemTime,
};

use ipnet::Ipv4Net;
use overlay_ebpf::reason::{DropReason, PuntReason};
use serde::{Deserialize, Serialize};

use crate::{
    datapath::{Choice, KernelDrops, PathCounters, Request, RungChanges, ebpf::RouteWrites},
    netlink::Link,
    route::Subnet,
    service::record::Protocol,
};

/// State of an agent. Parts that are missing, because the agent starts or lost them, are `null`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Status {
    /// `absent` when no agent runs; `starting`; `running` once lease, device, datapath and first snapshot are there; `degraded` while there are problems that
    /// do not affect packets yet; `unhealthy` when packets are or will be lost, and `/healthz` answers 503.
    pub(crate) state: String,
    pub(crate) problems: Vec<String>,
    pub(crate) version: String,
    pub(crate) pid: u32,
    pub(crate) network: Option<Ipv4Net>,
    pub(crate) subnet: Option<Subnet>,
    pub(crate) public_ip: Option<Ipv4Addr>,
    pub(crate) port: Option<u16>,
    /// The overlay device.
    pub(crate) device: Option<Device>,
    /// The device with this host's underlay address.
    pub(crate) underlay: Option<Device>,
    /// Other devices through which peers are reached.
    pub(crate) other_underlays: Vec<Device>,
    /// Routes whose packets take the slow path for a reason of their peer, which `overlay-agent routes` names.
    pub(crate) slow_routes: usize,
    /// Rung of inner packets that leave this host.
    pub(crate) egress: Option<ActiveRung>,
    /// Rung of outer packets that arrive.
    pub(crate) ingress: Option<ActiveRung>,
    /// What was asked for of the datapath. Earlier agents do not say.
    #[serde(default)]
    pub(crate) datapath: Option<DatapathRequest>,
    /// What happens when the agent ends.
    #[serde(default)]
    pub(crate) without_agent: Option<WithoutAgent>,
    /// What skips the host's stack.
    #[serde(default)]
    pub(crate) bypass: Option<Bypass>,
    /// Services on this node; `null` when the network has none or this node ignores them.
    #[serde(default)]
    pub(crate) services: Option<Services>,
    /// Number of routes to peers.
    pub(crate) routes: usize,
    pub(crate) store: Store,
    /// Packets dropped as errors, on both paths and by the kernel's queues around them.
    pub(crate) drops: u64,
    /// `running`, or `absent` when this is what an agent that has ended left. Earlier agents do not say.
    #[serde(default)]
    pub(crate) agent: String,
    /// What goes on unattended; `null` while an agent attends to it.
    #[serde(default)]
    pub(crate) frozen: Option<Frozen>,
}

impl Status {
    /// The status of this process before any part of its agent is there.
    pub(crate) fn starting() -> Self {
        Self {
            state: "starting".to_owned(),
            agent: "running".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            ..Self::default()
        }
    }
}

/// The rung of one direction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ActiveRung {
    /// The rung, and why it is that one.
    #[serde(flatten)]
    pub(crate) choice: Choice,
    /// Since when it is that rung, in UTC. Earlier agents do not say.
    #[serde(default)]
    pub(crate) since: Option<String>,
}

/// What was asked for of the datapath, and what it lacks of that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DatapathRequest {
    /// The rung that is asked for: by the last `datapath set`, else at the start.
    pub(crate) requested: Request,
    /// The rung that the agent was started with: its next start takes that one.
    pub(crate) at_start: Request,
    /// Programs that are left out for a while.
    pub(crate) postponed: Vec<Postponed>,
}

/// A program that is left out for a while, because the kernel refuses it or others remove it again and again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Postponed {
    /// The program and its device.
    pub(crate) what: String,
    pub(crate) why: String,
    /// When it is attempted again, in UTC.
    pub(crate) next_attempt: String,
}

/// Answer of `datapath show` and `datapath set`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Datapath {
    #[serde(flatten)]
    pub(crate) request: DatapathRequest,
    /// As in [`Status`].
    pub(crate) egress: Option<ActiveRung>,
    /// As in [`Status`].
    pub(crate) ingress: Option<ActiveRung>,
}

/// The eBPF programs of an agent that has ended, which forward packets all the same. Times are RFC 3339.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Frozen {
    /// When the agent showed itself last: routes, peers and containers are those of that time. `null` when its run directory does not
    /// have the record of its run.
    pub(crate) since: Option<String>,
    /// Whether that is so long ago that programs leave neighbours to the kernel and containers to the host's stack.
    pub(crate) neighbours_stale: bool,
    /// When the lease ends, or has ended, without an agent that renews it; `null` when it has no end or that is not known.
    pub(crate) lease_ends: Option<String>,
    /// Whether that time has passed.
    pub(crate) lease_ended: bool,
    pub(crate) programs: Vec<FrozenProgram>,
}

/// A pinned program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FrozenProgram {
    pub(crate) program: String,
    /// The device for which it is pinned; `null` when that is gone.
    pub(crate) device: Option<String>,
    pub(crate) ifindex: u32,
    /// Whether the kernel still lists it there.
    pub(crate) attached: bool,
}

/// What happens when the agent ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WithoutAgent {
    /// Whether packets are forwarded all the same, by the routes of that moment.
    pub(crate) forwards: bool,
    /// Why, or why not.
    pub(crate) why: String,
}

/// The bypass of the host's stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bypass {
    /// `off`, `flows` or `all`, as it is, which may be less than was asked for.
    pub(crate) mode: String,
    /// Why it is that one.
    pub(crate) why: String,
    /// Devices of containers with programs.
    pub(crate) devices: usize,
    /// Containers that the programs know.
    pub(crate) containers: usize,
    /// What is left to the host's stack, and why.
    pub(crate) skipped: Vec<String>,
}

/// Services on a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Services {
    /// Services of the network.
    pub(crate) services: usize,
    /// Endpoints of all services.
    pub(crate) endpoints: usize,
    /// Records that are left out; `overlay-agent service list` has the reasons.
    pub(crate) skipped: usize,
    /// How connections to virtual addresses reach an endpoint, and why so.
    pub(crate) load_balancer: String,
    /// Whether they do when the agent ends.
    #[serde(default)]
    pub(crate) without_agent: Option<WithoutAgent>,
    /// Where the DNS server of the node answers.
    pub(crate) dns: Option<SocketAddr>,
    /// Endpoints of this node that do not pass their health checks, each with the reason.
    #[serde(default)]
    pub(crate) down: Vec<String>,
    /// Endpoints that get no connections of this node for a while, because those that it made failed.
    #[serde(default)]
    pub(crate) ejected: Vec<EjectedEndpoint>,
}

/// An endpoint that gets no connections of this node for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EjectedEndpoint {
    /// Its name, `shop/web/node-a/1`.
    pub(crate) endpoint: String,
    /// The address to which connections failed.
    pub(crate) address: SocketAddrV4,
    pub(crate) protocol: Protocol,
    /// Seconds until it gets connections again.
    pub(crate) left_s: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) ifindex: u32,
    pub(crate) mtu: u32,
}

impl From<&Link> for Device {
    fn from(link: &Link) -> Self {
        Self { name: link.name.clone(), ifindex: link.index, mtu: link.mtu }
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Store {
    /// `etcd at URL`, `dir:PATH`, or `none` when all peers were given on the command line.
    pub(crate) name: String,
    /// Why the store cannot be read at present; the routes are the last known ones then.
    pub(crate) lost: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RouteList {
    pub(crate) routes: Vec<Route>,
    pub(crate) skipped: Vec<crate::route_table::Skipped>,
}

/// One subnet of a peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Route {
    pub(crate) subnet: Subnet,
    /// The peer's underlay address.
    pub(crate) peer: Ipv4Addr,
    /// The device through which the kernel reaches the peer; `null` when it has no route.
    pub(crate) device: Option<String>,
    /// Largest inner packet in bytes that the path carries; `null` without a device.
    pub(crate) mtu: Option<u16>,
    /// Why packets take the slow path; `null` when they do not.
    pub(crate) slow_path: Option<String>,
    /// The hardware address to which the fast path sends; `null` while it leaves that to the kernel. Earlier agents always do.
    #[serde(default)]
    pub(crate) link_address: Option<String>,
}

/// Counters since the host booted or `overlay-agent down`. A super-packet of many segments counts once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CounterList {
    /// Forwarded packets and bytes, by direction and path: `egress_fast_packets` and so on.
    pub(crate) traffic: BTreeMap<String, u64>,
    /// Packets that the fast path punted to the slow path, by reason.
    pub(crate) punts: BTreeMap<String, u64>,
    /// Packets dropped on either path, by reason.
    pub(crate) drops: BTreeMap<String, u64>,
    /// Packets dropped by the kernel's queues around both paths, by [`KernelDrops::DESCRIPTIONS`]. Earlier agents have none.
    #[serde(default)]
    pub(crate) kernel: BTreeMap<String, u64>,
    /// Changes of the rungs, by [`RungChanges::DESCRIPTIONS`]. Earlier agents have none.
    #[serde(default)]
    pub(crate) rungs: BTreeMap<String, u64>,
    /// Changes of routes that this agent has made in the kernel's map since it loaded the programs: `written`, `removed`, and
    /// `readdressed` where only link-layer addresses changed. Empty on the tun rung.
    #[serde(default)]
    pub(crate) route_changes: BTreeMap<String, u64>,
}

impl CounterList {
    /// With the changes of routes.
    pub(crate) fn with_writes(mut self, writes: RouteWrites) -> Self {
        let RouteWrites { written, readdressed, removed } = writes;
        let counts = [("written", written), ("readdressed", readdressed), ("removed", removed)];
        self.route_changes = counts.into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
        self
    }
}

impl From<PathCounters> for CounterList {
    fn from(PathCounters { fast, slow, kernel, rungs }: PathCounters) -> Self {
        let traffic = [
            ("egress_fast_packets", fast.egress_packets),
            ("egress_fast_bytes", fast.egress_bytes),
            ("ingress_fast_packets", fast.ingress_packets),
            ("ingress_fast_bytes", fast.ingress_bytes),
            ("egress_bypass_packets", fast.egress_bypass_packets),
            ("ingress_bypass_packets", fast.ingress_bypass_packets),
            ("egress_slow_packets", slow.egress_packets),
            ("egress_slow_bytes", slow.egress_bytes),
            ("ingress_slow_packets", slow.ingress_packets),
            ("ingress_slow_bytes", slow.ingress_bytes),
        ];
        let punts = PuntReason::ALL.iter().map(|reason| reason.name()).zip(fast.punts);
        let dropped = fast.drops.iter().zip(slow.drops).map(|(fast, slow)| fast + slow);
        let drops = DropReason::ALL.iter().map(|reason| reason.name()).zip(dropped);
        let kernel = KernelDrops::DESCRIPTIONS.iter().map(|(name, _)| *name).zip(kernel.counts());
        let rungs = RungChanges::DESCRIPTIONS.iter().map(|(name, _)| *name).zip(rungs.counts());
        let named = |(name, count): (&str, u64)| (name.to_owned(), count);
        Self {
            traffic: traffic.into_iter().map(named).collect(),
            punts: punts.map(named).collect(),
            drops: drops.map(named).collect(),
            kernel: kernel.map(named).collect(),
            rungs: rungs.map(named).collect(),
            route_changes: BTreeMap::new(),
        }
    }
}

/// A time in UTC, to the second (RFC 3339).
pub(crate) fn utc(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

/// A hardware address in the usual form.
pub(crate) fn hardware_address([a, b, c, d, e, f]: [u8; 6]) -> String {
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

/// Packets dropped as errors.
pub(crate) fn errors(PathCounters { fast, slow, kernel, rungs: _ }: &PathCounters) -> u64 {
    let counts = DropReason::ALL.iter().zip(fast.drops.iter().zip(slow.drops));
    let decided = counts.filter(|(reason, _)| reason.is_error()).map(|(_, (fast, slow))| fast + slow);
    decided.chain(kernel.counts()).sum()
}
