//! A router between the hosts of a topology, which can carry less than they do.

use std::sync::Arc;

use anyhow::Result;

use crate::{
    netns::Netns,
    sandbox::Sandbox,
    topology::{Side, Topology, UPLINK, Underlay},
};

/// The router's address, on each of its links.
const ADDRESS: &str = "192.168.77.254";

/// A router. It lives as long as its namespace.
#[derive(Debug)]
pub struct Router {
    netns: Arc<Netns>,
}

impl Router {
    /// Replaces the link between the hosts by one from each to a new router.
    pub fn insert(sandbox: &Arc<Sandbox>, topology: &Topology, underlay: Underlay) -> Result<Self> {
        let router = Self { netns: Netns::create(sandbox, "router")? };
        router.netns.tool("sysctl -q -w net.ipv4.ip_forward=1")?;
        topology.a.host.tool(&format!("ip link delete {UPLINK}"))?;
        for side in [&topology.a, &topology.b] {
            router.connect(side, underlay)?;
        }
        Ok(router)
    }

    fn connect(&self, side: &Side, underlay: Underlay) -> Result<()> {
        let (port, host) = (port(side), &side.host);
        self.netns.tool(&format!("ip link add {port} type veth peer name {UPLINK} netns {}", host.name()))?;
        for (netns, device) in [(&self.netns, port.as_str()), (host, UPLINK)] {
            underlay.prepare(netns, device)?;
        }
        self.netns.tool(&format!("ip address add {ADDRESS}/32 dev {port}"))?;
        self.netns.tool(&format!("ip link set {port} up"))?;
        self.netns.tool(&format!("ip route add {}/32 dev {port}", side.underlay))?;
        host.tool(&format!("ip address add {}/32 dev {UPLINK}", side.underlay))?;
        host.tool(&format!("ip link set {UPLINK} up"))?;
        host.tool(&format!("ip route add {ADDRESS}/32 dev {UPLINK}"))?;
        host.tool(&format!("ip route add default via {ADDRESS}"))?;
        Ok(())
    }

    /// Lets packets of at most `mtu` bytes pass to a host; longer ones with DF are answered with ICMP.
    pub fn limit(&self, to: &Side, mtu: usize) -> Result<()> {
        self.netns.tool(&format!("ip route replace {}/32 dev {} mtu lock {mtu}", to.underlay, port(to)))?;
        Ok(())
    }
}

fn port(side: &Side) -> String {
    format!("to-{}", side.name)
}
