//! A host whose underlay leads nowhere, for measurements of one agent.

use std::sync::Arc;

use anyhow::Result;

use crate::{netns::Netns, sandbox::Sandbox, topology::UPLINK};

/// Builds a host. No peer is connected: no packet is sent.
pub(super) fn build(sandbox: &Arc<Sandbox>, role: &str) -> Result<Arc<Netns>> {
    let host = Netns::create(sandbox, role)?;
    host.tool(&format!("ip link add {UPLINK} type veth peer name behind"))?;
    host.tool("ip link set behind up")?;
    host.tool(&format!("ip address add 192.168.77.1/24 dev {UPLINK}"))?;
    host.tool(&format!("ip link set {UPLINK} up"))?;
    host.tool("ip route add default via 192.168.77.254")?;
    host.tool("sysctl -q -w net.ipv4.ip_forward=1")?;
    Ok(host)
}
