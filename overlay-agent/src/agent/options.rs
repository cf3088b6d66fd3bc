//! Options of an agent.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use ipnet::Ipv4Net;

use crate::{
    datapath::{BypassRequest, Pauses, Policy, Request, ebpf::TcAttach},
    route::{Routes, Subnet},
    run_record::RunRecord,
    service::LbRequest,
    store::etcd::{EtcdOptions, RENEW_MARGIN},
    underlay,
};

/// The store of the leases.
#[derive(Clone, Debug)]
pub enum StoreOption {
    /// No store: all peers are given on the command line.
    None,
    /// A directory.
    Dir(PathBuf),
    /// etcd.
    Etcd(Box<EtcdOptions>),
}

/// Options of an agent.
#[derive(Clone, Debug)]
pub struct Options {
    /// The store of the leases.
    pub store: StoreOption,
    /// The whole overlay, when it is not taken from the store.
    pub network: Option<Ipv4Net>,
    /// The subnet to take.
    pub subnet: Option<Subnet>,
    /// Routes to peers that need no record.
    pub peers: Routes,
    /// Selects the device that carries the outer packets, and the address by which peers reach this host.
    pub underlay: underlay::Selector,
    /// Name of the overlay device.
    pub device: String,
    /// UDP port, when it is not taken from the store.
    pub port: Option<u16>,
    /// The requested rung.
    pub datapath: Request,
    /// When [`Request::Auto`] attempts again what was refused.
    pub rung_pauses: Pauses,
    /// Log failures inside the eBPF programs.
    pub datapath_log: bool,
    /// Choices that the packet core follows.
    pub policy: Policy,
    /// Which packets skip the host's stack.
    pub bypass: BypassRequest,
    /// Names of the devices that lead to containers, where not those that the subnet's routes and addresses show.
    pub container_ifaces: Vec<String>,
    /// How tc programs are attached.
    pub tc_attach: TcAttach,
    /// Path of `subnet.env`.
    pub subnet_file: Option<PathBuf>,
    /// Directory of the control socket and of the record of this run.
    pub run_dir: PathBuf,
    /// Directory of what has to survive a reboot.
    pub state_dir: PathBuf,
    /// Whether the records in etcd are kept there for a start without etcd.
    pub snapshot: bool,
    /// Firewall, routes and health server.
    pub host: HostOptions,
    /// Services on this node.
    pub services: ServiceOptions,
    /// What SIGTERM leaves.
    pub on_exit: OnExit,
    /// Whether to take over from the agent that runs.
    pub take_over: bool,
}

/// Services on this node, in a network whose config has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceOptions {
    /// How connections to virtual addresses reach an endpoint.
    pub lb: LbRequest,
    /// Name of the device that holds the virtual addresses.
    pub device: String,
    /// The cgroup whose processes can connect to virtual addresses; `None` for the root.
    pub cgroup: Option<PathBuf>,
    /// DNS servers for names that are none of services; empty for those of `/etc/resolv.conf`.
    pub dns_upstreams: Vec<SocketAddr>,
    /// Whether `/etc/resolv.conf` is replaced while the agent runs.
    pub manage_resolv_conf: bool,
    /// Name of this node, a DNS label.
    pub node: String,
    /// The zone in which it is.
    pub zone: Option<String>,
    /// Directory of files of services and of this node's endpoints.
    pub files: Option<PathBuf>,
}

/// What the end of the agent leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnExit {
    /// Device, programs, routes and firewall rules stay: the eBPF rungs go on with the last routes, services by eBPF with the last endpoints
    #[default]
    Keep,
    /// All that the agent made is removed
    Remove,
}

/// Changes to the host beside the datapath.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostOptions {
    /// Masquerade packets that leave the overlay, as flannel's ip-masq.
    pub masquerade: bool,
    /// Choose the ports of masqueraded connections at random.
    pub fully_random: bool,
    /// Accept forwarded packets of the overlay where the host's policy drops.
    pub forward_rules: bool,
    /// Interval of checks of the firewall rules.
    pub resync: Duration,
    /// Drop packets for addresses of this host's subnet that no container has.
    pub blackhole_route: bool,
    /// Address of the health server.
    pub healthz: Option<SocketAddr>,
}

impl Options {
    /// The file of the snapshot.
    pub(super) fn snapshot_file(&self) -> PathBuf {
        self.state_dir.join(format!("{}.snapshot", self.device))
    }

    /// The file of the record of this run.
    pub(super) fn record_file(&self) -> PathBuf {
        RunRecord::path(&self.run_dir, &self.device)
    }

    /// The file in which this agent remembers the services that it wrote.
    pub(super) fn services_file(&self) -> PathBuf {
        self.state_dir.join(format!("{}.services", self.device))
    }

    /// With less than this left, a lease that cannot be renewed is about to be lost. At most flannel's default margin: an
    /// earlier renewal is not an earlier danger.
    pub(super) fn lease_margin(&self) -> Duration {
        match &self.store {
            StoreOption::Etcd(etcd) => etcd.renew_margin.min(RENEW_MARGIN),
            StoreOption::Dir(_) | StoreOption::None => RENEW_MARGIN,
        }
    }
}
