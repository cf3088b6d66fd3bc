//! What the operator asked for.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::Ipv4Net;

use crate::{
    datapath::{Request, ebpf::TcAttach},
    store::etcd::{EtcdOptions, RENEW_MARGIN},
    underlay,
};

/// Where leases live.
#[derive(Clone, Debug)]
pub enum StoreOption {
    /// Nowhere: all peers are given on the command line.
    None,
    /// In a directory.
    Dir(PathBuf),
    /// In etcd.
    Etcd(Box<EtcdOptions>),
}

/// What the operator asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where leases live.
    pub store: StoreOption,
    /// The whole overlay, when the store need not say it.
    pub network: Option<Ipv4Net>,
    /// The subnet to take.
    pub subnet: Option<Ipv4Net>,
    /// Peers that need no record.
    pub peers: BTreeMap<Ipv4Net, Ipv4Addr>,
    /// Which device carries the outer packets, and the address by which peers reach this host.
    pub underlay: underlay::Selector,
    /// Name of the overlay device.
    pub device: String,
    /// UDP port, when the store need not say it.
    pub port: Option<u16>,
    /// Which rung.
    pub datapath: Request,
    /// How tc programs are attached.
    pub tc_attach: TcAttach,
    /// Whether the eBPF programs log failures.
    pub datapath_log: bool,
    /// Where to write `subnet.env`.
    pub subnet_file: Option<PathBuf>,
    /// Directory of the control socket.
    pub run_dir: PathBuf,
    /// What else to do on this host.
    pub host: HostOptions,
}

/// What an agent does on its host beside carrying packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostOptions {
    /// Hide the overlay's addresses from the rest of the world, as flannel's ip-masq.
    pub masquerade: bool,
    /// Choose the ports of masqueraded connections at random.
    pub fully_random: bool,
    /// Accept forwarded packets of the overlay where the host's policy drops.
    pub forward_rules: bool,
    /// How often to see that the firewall's rules are still there.
    pub resync: Duration,
    /// Drop packets for addresses of this host's subnet that no container has.
    pub blackhole_route: bool,
    /// Where to answer questions after the agent's health.
    pub healthz: Option<SocketAddr>,
}

impl Options {
    /// With less than this left, a lease that cannot be renewed is about to be lost. Not more than flannel's usual margin:
    /// who renews early is not in danger early.
    pub(super) fn lease_margin(&self) -> Duration {
        match &self.store {
            StoreOption::Etcd(etcd) => etcd.renew_margin.min(RENEW_MARGIN),
            StoreOption::Dir(_) | StoreOption::None => RENEW_MARGIN,
        }
    }
}
