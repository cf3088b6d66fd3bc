//! The device of the virtual addresses: a dummy device through which the whole pool belongs to this host, so that its addresses can
//! be bound, connected to and pinged on every node.

use anyhow::{Result, bail};
use ipnet::Ipv4Net;

use crate::netlink::{Link, Netlink};

/// Its name.
pub const DEVICE: &str = "svc0";
/// Its hardware address, of the locally administered ones, by which an agent knows that an agent made it: the kernel takes it in the
/// same step in which it makes the device.
const MAC: [u8; 6] = [0x02, b'o', b'v', b's', b'v', b'c'];
/// The kind of the device.
const KIND: &str = "dummy";

/// Whether an agent made the device.
fn is_ours(link: &Link) -> bool {
    link.kind.as_deref() == Some(KIND) && link.mac == Some(MAC)
}

/// Makes the device with the addresses of `pool`, unless it is there. An earlier agent's is replaced. Returns whether something was
/// done. Fails when another program's device has the name, or the kernel refuses.
pub async fn reconcile(netlink: &Netlink, pool: Ipv4Net) -> Result<bool> {
    let pool = pool.trunc();
    match netlink.link(DEVICE).await? {
        Some(link) if !is_ours(&link) => bail!(
            "a device {DEVICE} exists that overlay-agent did not make: rename it (ip link set {DEVICE} name NAME), or remove it if \
             nothing uses it; until then services have no virtual addresses on this node"
        ),
        Some(link) if link.up && netlink.local_routes(link.index).await? == [pool] => return Ok(false),
        Some(link) => netlink.delete_link(link.index).await?,
        None => {}
    }
    netlink.add_dummy(DEVICE, MAC).await?;
    let Some(link) = netlink.link(DEVICE).await? else { bail!("the device {DEVICE} vanished") };
    // It sends nothing: without this, the kernel would send router solicitations. Fails where the kernel has no IPv6.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{DEVICE}/disable_ipv6"), "1");
    netlink.add_local_route(pool, link.index).await?;
    Ok(true)
}

/// Removes the device, if an agent made it. `false` when there is none of ours.
/// Fails when the kernel refuses.
pub async fn remove(netlink: &Netlink) -> Result<bool> {
    match netlink.link(DEVICE).await?.filter(is_ours) {
        Some(link) => netlink.delete_link(link.index).await.map(|()| true),
        None => Ok(false),
    }
}
