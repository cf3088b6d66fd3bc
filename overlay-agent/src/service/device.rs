//! The device of the virtual addresses: one that leads nowhere, through which the whole pool belongs to this host, so that its addresses can
//! be bound, connected to and pinged on every node.

use anyhow::{Result, bail};
use ipnet::Ipv4Net;

use super::vip::fnv1a;
use crate::netlink::{Link, Netlink};

/// The default name.
pub const DEFAULT_NAME: &str = "svc0";
/// The kinds of the device: see [`Netlink::add_dummy`].
const KINDS: [&str; 2] = ["dummy", "bridge"];

/// The device as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceDevice {
    name: String,
    /// Locally administered, and different for each overlay device of the host. By it, an agent knows what it made: the kernel takes
    /// it in the same step in which it makes the device, so that one killed at any time leaves none that it does not know.
    mac: [u8; 6],
}

impl ServiceDevice {
    /// The device with this name of the agent with the overlay device `owner`.
    pub fn new(name: &str, owner: &str) -> Self {
        let [.., a, b, c, d] = fnv1a(owner.as_bytes()).to_be_bytes();
        Self { name: name.to_owned(), mac: [0x02, b'v', a, b, c, d] }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn is_ours(&self, link: &Link) -> bool {
        link.kind.as_deref().is_some_and(|kind| KINDS.contains(&kind)) && link.mac == Some(self.mac)
    }

    /// Makes the device with the addresses of `pool`, unless it is there and complete. Returns whether something was done.
    /// Fails when another program's device has the name, or the kernel refuses.
    pub async fn reconcile(&self, netlink: &Netlink, pool: Ipv4Net) -> Result<bool> {
        let (name, pool) = (&self.name, pool.trunc());
        match netlink.link(name).await? {
            Some(link) if !self.is_ours(&link) => bail!(
                "a device {name} exists that this agent did not make: choose another --service-device, or remove the device if \
                 nothing uses it; until then, services have no virtual addresses on this node"
            ),
            Some(link) if link.up && netlink.local_routes(link.index).await? == [pool] => return Ok(false),
            Some(link) => netlink.delete_link(link.index).await?,
            None => {}
        }
        netlink.add_dummy(name, self.mac).await?;
        let Some(link) = netlink.link(name).await? else { bail!("the device {name} vanished") };
        // It sends nothing: without this, the kernel sends router solicitations. Fails where the kernel has no IPv6.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
        netlink.add_local_route(pool, link.index).await?;
        Ok(true)
    }

    /// Removes the device, if this agent or an earlier one with the same overlay device made it. `false` when there is none.
    /// Fails when the kernel refuses.
    pub async fn remove(&self, netlink: &Netlink) -> Result<bool> {
        match netlink.link(&self.name).await?.filter(|link| self.is_ours(link)) {
            Some(link) => netlink.delete_link(link.index).await.map(|()| true),
            None => Ok(false),
        }
    }
}

/// The names of the service devices of the agent with the overlay device `owner`, whatever their names: what a killed agent left.
/// Fails when the kernel returns an error.
pub async fn left(netlink: &Netlink, owner: &str) -> Result<Vec<ServiceDevice>> {
    let of = |link: &Link| {
        let device = ServiceDevice::new(&link.name, owner);
        device.is_ours(link).then_some(device)
    };
    Ok(netlink.links().await?.iter().filter_map(of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_shows_which_agent_made_it() {
        let device = ServiceDevice::new("svc0", "ovl0");
        let link =
            Link { kind: Some("bridge".to_owned()), mac: Some(device.mac), ..Link::ethernet(7, "svc0") };
        assert!(device.is_ours(&link));
        assert!(!ServiceDevice::new("svc0", "ovl1").is_ours(&link));
        assert!(!device.is_ours(&Link { kind: None, ..link.clone() }));
        assert!(!device.is_ours(&Link { mac: Some([2; 6]), ..link }));
        assert_eq!(device.mac[0] & 3, 2, "locally administered, of one device");
    }
}
