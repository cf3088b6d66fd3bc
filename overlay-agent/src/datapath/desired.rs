//! What a datapath should be, and what it reports.

use anyhow::Result;
use clap::ValueEnum as _;
use overlay_ebpf::{
    abi::{Config, Counters, SourceCheck, TosRule},
    bypass::Bypass,
};
use serde::{Deserialize, Serialize};

use super::{KernelDrops, RungChanges, ebpf::TcAttach, plan::Plan};
use crate::{
    containers::Containers,
    device::DeviceSpec,
    netlink::Link,
    route::{NextHops, abi_prefix},
};

/// What `--datapath` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Request {
    /// The best rung that this host can have, for each direction
    #[default]
    Auto,
    /// Native XDP on the underlay, tc on the overlay device
    Xdp,
    /// tc in both directions
    Tc,
    /// No eBPF: every packet through the agent
    Tun,
}

impl Request {
    /// As on the command line.
    pub(crate) fn flag(self) -> String {
        format!("--datapath {self}")
    }
}

impl std::fmt::Display for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.to_possible_value().map_or(Ok(()), |value| f.write_str(value.get_name()))
    }
}

/// One of the ways to move packets, the fastest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rung {
    /// Native XDP.
    Xdp,
    /// tcx or clsact.
    Tc,
    /// User space.
    Tun,
}

impl std::fmt::Display for Rung {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Xdp => "xdp",
            Self::Tc => "tc",
            Self::Tun => "tun",
        })
    }
}

/// The rung of one direction, and why it is that one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// The rung.
    pub rung: Rung,
    /// One sentence.
    pub why: String,
}

/// A device that carries outer packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnderlayDevice {
    /// The device.
    pub link: Link,
    /// Its address: outer packets come from and to it.
    pub local_ip: std::net::Ipv4Addr,
}

/// Choices of the operator that the packet core follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// How the outer TOS follows from the inner one.
    pub tos: TosRule,
    /// Which sources of inner packets are accepted.
    pub source_check: SourceCheck,
}

/// What `--bypass` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum BypassRequest {
    /// Every packet takes the host's stack
    Off,
    /// Packets of flows that the host's stack lets through unchanged skip it; one packet of each flow and second checks that it still
    /// does
    #[default]
    Flows,
    /// All packets between containers and peers skip the host's stack: its firewall, NAT and connection tracking
    All,
}

impl From<BypassRequest> for Bypass {
    fn from(request: BypassRequest) -> Self {
        match request {
            BypassRequest::Off => Self::Off,
            BypassRequest::Flows => Self::Flows,
            BypassRequest::All => Self::All,
        }
    }
}

/// What a datapath should be.
#[derive(Clone, Copy, Debug)]
pub struct Desired<'a> {
    /// The overlay device, with network, port and subnet.
    pub device: &'a DeviceSpec,
    /// The devices on which outer packets arrive and through which they leave, at least one. All have the first one's address as
    /// far as the overlay is concerned.
    pub underlays: &'a [UnderlayDevice],
    /// The source of outer packets of the programs.
    pub source: std::net::Ipv4Addr,
    /// Another address to which peers may send, or the same.
    pub other_ip: std::net::Ipv4Addr,
    /// How the packet core decides where operators may choose.
    pub policy: Policy,
    /// Whether all arriving packets take the slow path: IPsec policies may cover senders that no route names.
    pub slow_ingress: bool,
    /// Which rung.
    pub request: Request,
    /// How tc programs are attached.
    pub tc_attach: TcAttach,
    /// Which packets skip the host's stack.
    pub bypass: Bypass,
    /// The containers of this host, for the bypass.
    pub containers: &'a Containers,
    /// Where packets go.
    pub routes: &'a NextHops,
    /// Whether the eBPF programs log failures.
    pub log: bool,
}

impl Desired<'_> {
    /// The configuration of the packet core for an overlay device with this index.
    pub(super) fn config(&self, overlay_ifindex: u32) -> Result<Config> {
        let (network, subnet) = (self.device.alias.network, self.device.subnet.prefix());
        let source = self.source.octets();
        let config = Config::new(source, abi_prefix(network), abi_prefix(subnet), self.device.alias.port);
        Ok(config
            .with_other_ip(self.other_ip.octets())
            .with_policy(self.policy.tos, self.policy.source_check)
            .with_slow_ingress(self.slow_ingress)
            .with_device(overlay_ifindex))
    }

    pub(super) fn plan(&self, overlay_ifindex: u32) -> Plan {
        Plan {
            request: self.request,
            mode: self.tc_attach.mode(self.device.alias.port),
            underlays: self.underlays.iter().map(|underlay| underlay.link.identity()).collect(),
            overlay_ifindex,
            bypass: self.bypass,
            log: self.log,
        }
    }
}

/// What a reconciliation did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Steps that the desired state asked for, such as "ovl_xdp attached".
    pub made: Vec<String>,
    /// What others had changed and is as desired again, such as "route of ovl0".
    pub repaired: Vec<String>,
    /// Why packets of peers behind other underlay devices than the first do not reach the slow path.
    pub refused: Vec<String>,
    /// Why programs stay attached that should have been replaced.
    pub kept: Option<String>,
    /// Why the kernel's map lacks routes that the slow path has. [`super::Datapath::apply_routes`] and the next
    /// reconciliation try again.
    pub routes_behind: Option<String>,
    /// Why packets of a container take the host's stack although they should bypass it.
    pub no_bypass: Vec<String>,
    /// What of other programs keeps packets for peers away from the overlay device, with the remedy.
    pub diverted: Vec<String>,
}

impl Report {
    pub(super) fn add(&mut self, repaired: bool, step: String) {
        if repaired { self.repaired.push(step) } else { self.made.push(step) }
    }
}

/// Counters of both paths, of the kernel's queues around them, and of the rungs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathCounters {
    /// The eBPF programs'.
    pub fast: Counters,
    /// The agent's.
    pub slow: Counters,
    /// The kernel's.
    pub kernel: KernelDrops,
    /// Changes of the rungs.
    pub rungs: RungChanges,
}

impl PathCounters {
    /// All counters at zero.
    pub const ZERO: Self = Self {
        fast: Counters::ZERO,
        slow: Counters::ZERO,
        kernel: KernelDrops::ZERO,
        rungs: RungChanges::ZERO,
    };
}
