//! References for comparison: the same topology connected by plain routes, and by the kernel's VXLAN.

use anyhow::Result;

use crate::topology::{OVERLAY_MTU, Side, Topology, UNDERLAY_MTU, UPLINK};

/// VXLAN's overhead in bytes: outer IPv4, UDP and VXLAN headers and the inner Ethernet header.
const VXLAN_OVERHEAD: usize = 50;

/// A way to connect the pods without the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// Routes over the underlay, no overlay at all. The pods keep the overlay's MTU, so that packets are equal.
    Routed,
    /// A VXLAN device with static forwarding and neighbour entries, as flannel's VXLAN backend sets it up.
    Vxlan,
}

impl Comparison {
    /// Name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Routed => "routed",
            Self::Vxlan => "vxlan",
        }
    }

    /// Largest packet in bytes that crosses without fragments.
    pub const fn mtu(self) -> usize {
        match self {
            Self::Routed => OVERLAY_MTU,
            Self::Vxlan => UNDERLAY_MTU - VXLAN_OVERHEAD,
        }
    }

    /// Connects the topology.
    ///
    /// # Errors
    ///
    /// When one of the commands fails; for VXLAN also when the kernel does not have it.
    pub fn install(self, topology: &Topology) -> Result<()> {
        for (side, peer) in [(&topology.a, &topology.b), (&topology.b, &topology.a)] {
            match self {
                Self::Routed => routed(side, peer)?,
                Self::Vxlan => vxlan(side, peer)?,
            }
        }
        Ok(())
    }
}

fn routed(side: &Side, peer: &Side) -> Result<()> {
    let host = &side.host;
    host.tool(&format!("ip address add {}/32 dev lo", side.host_address))?;
    host.tool(&format!("ip route add {} via {} src {}", peer.subnet, peer.underlay, side.host_address))?;
    Ok(())
}

fn vxlan(side: &Side, peer: &Side) -> Result<()> {
    let mtu = Comparison::Vxlan.mtu();
    let host = &side.host;
    host.tool(&format!(
        "ip link add vxlan0 address {} mtu {mtu} type vxlan id 1 local {} dev {UPLINK} dstport 8472 nolearning",
        mac(side),
        side.underlay
    ))?;
    host.tool(&format!("ip address add {}/32 dev vxlan0", side.host_address))?;
    host.tool("ip link set vxlan0 up")?;
    host.tool(&format!("bridge fdb append {} dev vxlan0 dst {}", mac(peer), peer.underlay))?;
    host.tool(&format!(
        "ip neighbour add {} lladdr {} dev vxlan0 nud permanent",
        peer.host_address,
        mac(peer)
    ))?;
    host.tool(&format!(
        "ip route add {} via {} dev vxlan0 onlink src {}",
        peer.subnet, peer.host_address, side.host_address
    ))?;
    // The pods' devices keep their MTU; what they may send is what crosses the tunnel.
    let [first, second, third, _] = side.host_address.octets();
    let gateway = format!("{first}.{second}.{third}.1");
    side.pod.tool(&format!("ip route replace default via {gateway} mtu {mtu}"))?;
    Ok(())
}

/// The hardware address of a side's VXLAN device: made from the subnet, so both sides know it.
fn mac(side: &Side) -> String {
    let [_, _, subnet, _] = side.host_address.octets();
    format!("02:00:0a:f4:{subnet:02x}:00")
}
