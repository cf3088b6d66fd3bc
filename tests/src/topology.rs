//! The reference topology: pod A - host A - host B - pod B, four network namespaces joined by veth pairs.

use std::{net::Ipv4Addr, sync::Arc, thread, time::Duration};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{netns::Netns, sandbox::Sandbox};

/// Network of the overlay.
pub const NETWORK: &str = "10.244.0.0/16";
/// MTU of the underlay device in bytes.
pub const UNDERLAY_MTU: usize = 1500;
/// MTU of the pods and of the overlay in bytes: the underlay's less outer IPv4 and UDP headers.
pub const OVERLAY_MTU: usize = UNDERLAY_MTU - 28;
/// Name of the underlay device in a host, and of a pod's only device.
pub const UPLINK: &str = "eth0";
/// Name of the device in a host that leads to its pod.
pub const POD_LINK: &str = "veth0";

/// The link between the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Underlay {
    /// All offloads on: unsegmented packets without checksums cross whole, as between the VMs of one machine.
    Virtual,
    /// Frames of MTU size with finished checksums, as a cable carries them.
    Wire,
}

impl Underlay {
    /// Name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Virtual => "virtual",
            Self::Wire => "wire",
        }
    }

    /// Sets the offloads of one end of a link between hosts.
    pub fn prepare(self, netns: &Netns, device: &str) -> Result<()> {
        if self == Self::Wire {
            netns.tool(&format!(
                "ethtool -K {device} tx off tso off gso off tx-udp-segmentation off tx-udp_tnl-segmentation off \
                 tx-udp_tnl-csum-segmentation off gro on"
            ))?;
        }
        Ok(())
    }
}

/// Offloads of the links between pods and hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodOffload {
    /// The default of veth pairs: segmentation and checksums are deferred.
    On,
    /// Pod and host segment and complete checksums before they send.
    Off,
}

/// One host with the pod behind it.
#[derive(Debug)]
pub struct Side {
    /// The host's namespace.
    pub host: Arc<Netns>,
    /// The pod's namespace.
    pub pod: Arc<Netns>,
    /// `a` or `b`.
    pub name: &'static str,
    /// The host's address on the underlay.
    pub underlay: Ipv4Addr,
    /// The host's subnet, in CIDR notation.
    pub subnet: &'static str,
    /// The host's own overlay address, the base of its subnet.
    pub host_address: Ipv4Addr,
    /// The pod's address.
    pub pod_address: Ipv4Addr,
}

/// One end of traffic: a place and its address.
#[derive(Clone, Copy, Debug)]
pub struct Endpoint<'a> {
    /// Namespace of the programs and sockets of this end.
    pub netns: &'a Netns,
    /// Its overlay address.
    pub address: Ipv4Addr,
}

/// Two hosts, connected, each with a pod. Nothing carries overlay addresses between the hosts yet.
#[derive(Debug)]
pub struct Topology {
    /// Host and pod A.
    pub a: Side,
    /// Host and pod B.
    pub b: Side,
}

impl Topology {
    /// Builds the namespaces, links, addresses and the pods' routes.
    pub fn build(sandbox: &Arc<Sandbox>, underlay: Underlay, pod_offload: PodOffload) -> Result<Self> {
        let a = Side::build(sandbox, "a", 1, pod_offload).context("build host and pod A")?;
        let b = Side::build(sandbox, "b", 2, pod_offload).context("build host and pod B")?;
        let peer = b.host.name();
        a.host.tool(&format!("ip link add {UPLINK} type veth peer name {UPLINK} netns {peer}"))?;
        for side in [&a, &b] {
            let host = &side.host;
            underlay.prepare(host, UPLINK)?;
            host.tool(&format!("ip address add {}/24 dev {UPLINK}", side.underlay))?;
            host.tool(&format!("ip link set {UPLINK} mtu {UNDERLAY_MTU} up"))?;
        }
        for side in [&a, &b] {
            for (netns, device) in [(&side.host, UPLINK), (&side.host, POD_LINK), (&side.pod, UPLINK)] {
                wait_for_carrier(netns, device)?;
            }
        }
        Ok(Self { a, b })
    }

    /// The containers, A first.
    pub fn pods(&self) -> (Endpoint<'_>, Endpoint<'_>) {
        (self.a.pod(), self.b.pod())
    }

    /// The hosts with their overlay addresses, A first.
    pub fn hosts(&self) -> (Endpoint<'_>, Endpoint<'_>) {
        (self.a.host(), self.b.host())
    }
}

impl Side {
    fn build(sandbox: &Arc<Sandbox>, name: &'static str, number: u8, offload: PodOffload) -> Result<Self> {
        let host = Netns::create(sandbox, &format!("host{name}"))?;
        let pod = Netns::create(sandbox, &format!("pod{name}"))?;
        // Strict reverse path filtering, which every rung must survive, in force before there is a device.
        host.tool("sysctl -q -w net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.default.rp_filter=1")?;
        let side = Self {
            host,
            pod,
            name,
            underlay: Ipv4Addr::new(192, 168, 77, number),
            subnet: if number == 1 { "10.244.1.0/24" } else { "10.244.2.0/24" },
            host_address: Ipv4Addr::new(10, 244, number, 0),
            pod_address: Ipv4Addr::new(10, 244, number, 2),
        };
        let gateway = Ipv4Addr::new(10, 244, number, 1);
        let (host, pod) = (&side.host, &side.pod);
        host.tool(&format!("ip link add {POD_LINK} type veth peer name {UPLINK} netns {}", pod.name()))?;
        if offload == PodOffload::Off {
            host.tool(&format!("ethtool -K {POD_LINK} tx off tso off gso off"))?;
            pod.tool(&format!("ethtool -K {UPLINK} tx off tso off gso off"))?;
        }
        host.tool(&format!("ip address add {gateway}/24 dev {POD_LINK}"))?;
        host.tool(&format!("ip link set {POD_LINK} mtu {OVERLAY_MTU} up"))?;
        pod.tool(&format!("ip address add {}/24 dev {UPLINK}", side.pod_address))?;
        pod.tool(&format!("ip link set {UPLINK} mtu {OVERLAY_MTU} up"))?;
        pod.tool(&format!("ip route add default via {gateway}"))?;
        Ok(side)
    }

    /// The pod as an end of traffic.
    pub fn pod(&self) -> Endpoint<'_> {
        Endpoint { netns: &self.pod, address: self.pod_address }
    }

    /// The host as an end of overlay traffic.
    pub fn host(&self) -> Endpoint<'_> {
        Endpoint { netns: &self.host, address: self.host_address }
    }
}

/// Waits for the carrier: the kernel reports a link as up a moment after its other end.
fn wait_for_carrier(netns: &Netns, device: &str) -> Result<()> {
    for _ in 0..500 {
        if netns.tool(&format!("ip -oneline link show {device}"))?.contains(" state UP ") {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(10));
    }
    bail!("{device} in {} has no carrier after 5 seconds", netns.name())
}
