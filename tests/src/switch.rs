//! Many hosts without containers on one switch, a bridge in a namespace that can also run servers.

use std::{net::Ipv4Addr, sync::Arc};

use anyhow::{Context, Result};

use crate::{
    netns::Netns,
    sandbox::Sandbox,
    topology::{UNDERLAY_MTU, UPLINK},
};

/// The switch's own address on the underlay.
pub const HUB: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 254);

/// One host.
#[derive(Debug)]
pub struct Host {
    /// Its namespace.
    pub netns: Arc<Netns>,
    /// Its address on the underlay.
    pub underlay: Ipv4Addr,
}

/// The hosts and their switch.
#[derive(Debug)]
pub struct Switch {
    /// `192.168.77.1` and on.
    pub hosts: Vec<Host>,
    /// The switch's namespace.
    pub hub: Arc<Netns>,
}

impl Switch {
    /// Builds the namespaces, links and underlay addresses.
    pub fn build(sandbox: &Arc<Sandbox>, hosts: u8) -> Result<Self> {
        let hub = Netns::create(sandbox, "hub")?;
        hub.tool("ip link add switch type bridge")?;
        hub.tool(&format!("ip address add {HUB}/24 dev switch"))?;
        hub.tool(&format!("ip link set switch mtu {UNDERLAY_MTU} up"))?;
        let hosts = (1..=hosts)
            .map(|number| Host::build(sandbox, &hub, number).with_context(|| format!("build host {number}")));
        Ok(Self { hosts: hosts.collect::<Result<_>>()?, hub })
    }
}

impl Host {
    fn build(sandbox: &Arc<Sandbox>, hub: &Netns, number: u8) -> Result<Self> {
        let netns = Netns::create(sandbox, &format!("host{number}"))?;
        let underlay = Ipv4Addr::new(192, 168, 77, number);
        hub.tool(&format!("ip link add port{number} type veth peer name {UPLINK} netns {}", netns.name()))?;
        hub.tool(&format!("ip link set port{number} master switch mtu {UNDERLAY_MTU} up"))?;
        netns.tool("sysctl -q -w net.ipv4.ip_forward=1")?;
        netns.tool(&format!("ip address add {underlay}/24 dev {UPLINK}"))?;
        netns.tool(&format!("ip link set {UPLINK} mtu {UNDERLAY_MTU} up"))?;
        Ok(Self { netns, underlay })
    }
}
