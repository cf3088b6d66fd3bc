//! A router between the hosts of a topology, which can carry less than they do.

use std::sync::Arc;

use anyhow::Result;

use crate::{
    netns::Netns,
    sandbox::Sandbox,
    topology::{Side, Topology, UPLINK, Underlay},
};

/// The router's address, on each of its links.
pub const ADDRESS: &str = "192.168.77.254";
/// The address of a second gateway.
pub const SECOND_ADDRESS: &str = "192.168.77.253";
/// The router's device on a link that it shares with a second gateway.
pub const BRIDGE: &str = "shared";

/// A router. It lives as long as its namespace.
#[derive(Debug)]
pub struct Router {
    /// Its namespace.
    pub netns: Arc<Netns>,
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

    /// Puts a second gateway on the link of a host. It passes everything on to the router. Returns its namespace, where its device is
    /// [`UPLINK`].
    pub fn add_second_gateway(&self, sandbox: &Arc<Sandbox>, side: &Side) -> Result<Arc<Netns>> {
        let (second, port) = (Netns::create(sandbox, "second")?, port(side));
        for line in [
            format!("ip link add {BRIDGE} address 02:00:5e:00:77:01 type bridge"),
            format!("ip link add to-second type veth peer name {UPLINK} netns {}", second.name()),
            format!("ip address delete {ADDRESS}/32 dev {port}"),
            format!("ip link set {port} master {BRIDGE}"),
            format!("ip link set to-second master {BRIDGE} up"),
            format!("ip address add {ADDRESS}/32 dev {BRIDGE}"),
            format!("ip link set {BRIDGE} up"),
            format!("ip route replace {}/32 dev {BRIDGE}", side.underlay),
            format!("ip route add {SECOND_ADDRESS}/32 dev {BRIDGE}"),
        ] {
            self.netns.tool(&line)?;
        }
        for line in [
            "sysctl -q -w net.ipv4.ip_forward=1 net.ipv4.conf.all.send_redirects=0".to_owned(),
            format!("sysctl -q -w net.ipv4.conf.{UPLINK}.send_redirects=0"),
            format!("ip address add {SECOND_ADDRESS}/32 dev {UPLINK}"),
            format!("ip link set {UPLINK} up"),
            format!("ip route add {ADDRESS}/32 dev {UPLINK}"),
            format!("ip route add {}/32 dev {UPLINK}", side.underlay),
            format!("ip route add default via {ADDRESS}"),
        ] {
            second.tool(&line)?;
        }
        Ok(second)
    }
}

/// The router's device that leads to a host.
pub fn port(side: &Side) -> String {
    format!("to-{}", side.name)
}
