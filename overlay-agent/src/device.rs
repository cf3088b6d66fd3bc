//! The overlay device: a persistent tun device that is recognisably ours.

use anyhow::{Context as _, Result, bail};
use ipnet::Ipv4Net;
use tun_rs::{DeviceBuilder, Layer, SyncDevice};

use crate::netlink::{Link, Netlink};

/// Begins the alias of every device that an agent made, so that no agent touches one that another made.
const ALIAS: &str = "overlay-agent";

/// The device's alias: whose it is, and what `down` must know of an agent that is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// The whole overlay.
    pub network: Ipv4Net,
    /// UDP port of the network.
    pub port: u16,
    /// Name of the underlay device.
    pub underlay: String,
}

impl std::fmt::Display for Note {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{ALIAS} {} {} {}", self.network, self.port, self.underlay)
    }
}

impl Note {
    /// Reads an alias; `None` when it is not one of ours.
    pub fn parse(alias: &str) -> Option<Self> {
        let mut words = alias.strip_prefix(ALIAS)?.split_whitespace();
        let (network, port, underlay) = (words.next()?, words.next()?, words.next()?);
        Some(Self { network: network.parse().ok()?, port: port.parse().ok()?, underlay: underlay.to_owned() })
    }
}

/// The overlay device of one network.
pub struct OverlayDevice {
    /// Name.
    pub name: String,
    /// Index.
    pub index: u32,
    /// Largest inner packet in bytes.
    pub mtu: u32,
    /// The agent's end of it.
    pub fd: SyncDevice,
}

/// Whether an agent made the device.
pub fn is_ours(link: &Link) -> bool {
    link.kind.as_deref() == Some("tun") && link.alias.as_deref().and_then(Note::parse).is_some()
}

/// Checks, without changing anything, that the device can be made: its name is free or an earlier agent's, and nothing else
/// routes the network.
///
/// # Errors
///
/// Names what is in the way and what to do about it.
pub async fn preflight(netlink: &Netlink, name: &str, network: Ipv4Net) -> Result<()> {
    if name.is_empty() || name.len() > 15 || name.contains(['/', ' ', '%', ':']) {
        bail!(
            "{name:?} cannot be a device name: --device takes 1 to 15 characters without '/', ':', '%' or spaces"
        );
    }
    let own = netlink.link(name).await?;
    if let Some(link) = &own
        && !is_ours(link)
    {
        bail!(
            "a device {name} exists that overlay-agent did not make: remove it (ip link delete {name}) or choose another --device"
        );
    }
    let own = own.map(|link| link.index);
    for route in netlink.routes().await? {
        if route.destination == network && Some(route.index) != own {
            let other = netlink.links().await?.into_iter().find(|link| link.index == route.index);
            let other = other.map_or_else(|| format!("device {}", route.index), |link| link.name);
            bail!(
                "the network {network} is already routed through {other}: stop what uses it, or choose another network"
            );
        }
    }
    Ok(())
}

impl OverlayDevice {
    /// Makes the device, or takes over the one that an earlier agent left, and gives it address, MTU and route.
    ///
    /// # Errors
    ///
    /// When another process holds it or the kernel refuses.
    pub async fn create(
        netlink: &Netlink,
        name: &str,
        note: &Note,
        subnet: Ipv4Net,
        mtu: u32,
    ) -> Result<Self> {
        let fd = open(name)?;
        let configure = async {
            let link = netlink.link(name).await?.with_context(|| format!("the device {name} vanished"))?;
            netlink.set_alias(link.index, &note.to_string()).await?;
            forbid_ipv6(name);
            netlink.set_only_address(link.index, address(subnet)).await?;
            netlink.set_up(link.index, mtu).await?;
            netlink.add_route(note.network, link.index, subnet.network()).await?;
            // Last: until here the device goes with its descriptor, whatever happens to us.
            fd.persist().context("make the device persistent")?;
            anyhow::Ok(link.index)
        };
        let index = configure.await.with_context(|| format!("set up the overlay device {name}"))?;
        Ok(Self { name: name.to_owned(), index, mtu, fd })
    }
}

/// Puts back what someone took from the device while the agent runs, and says what it was. A device that is gone is for
/// the slow path to notice, whose descriptor dies with it.
///
/// # Errors
///
/// When the kernel refuses.
pub async fn restore(
    netlink: &Netlink,
    name: &str,
    network: Ipv4Net,
    subnet: Ipv4Net,
    mtu: u32,
) -> Result<Vec<&'static str>> {
    let mut restored = Vec::new();
    let Some(link) = netlink.link(name).await?.filter(is_ours) else {
        return Ok(restored);
    };
    if !netlink.addresses().await?.contains(&(link.index, address(subnet))) {
        netlink.set_only_address(link.index, address(subnet)).await?;
        restored.push("address");
    }
    if !link.up || link.mtu != mtu {
        netlink.set_up(link.index, mtu).await?;
        restored.push("state and MTU");
    }
    let routed = |route: &crate::netlink::Route| route.destination == network && route.index == link.index;
    if !netlink.routes().await?.iter().any(routed) {
        netlink.add_route(network, link.index, subnet.network()).await?;
        restored.push("route");
    }
    Ok(restored)
}

/// The device's address: the subnet's first, which no container has.
fn address(subnet: Ipv4Net) -> Ipv4Net {
    Ipv4Net::from(subnet.network())
}

/// Removes the device if an agent made it; its addresses, routes and programs go with it. `false` when there is none.
///
/// # Errors
///
/// When the device is not ours or the kernel refuses.
pub async fn remove(netlink: &Netlink, name: &str) -> Result<bool> {
    let Some(link) = netlink.link(name).await? else {
        return Ok(false);
    };
    if !is_ours(&link) {
        bail!("overlay-agent did not make the device {name}: it stays");
    }
    netlink.delete_link(link.index).await.with_context(|| format!("remove the overlay device {name}"))?;
    Ok(true)
}

fn open(name: &str) -> Result<SyncDevice> {
    if !std::fs::exists("/dev/net/tun").unwrap_or(false) {
        bail!(
            "there is no /dev/net/tun: load the kernel module tun (modprobe tun), or give the container the device"
        );
    }
    let device = DeviceBuilder::new()
        .name(name)
        .layer(Layer::L3)
        .with(|builder| {
            // The virtio header in front of each packet lets partial checksums and super-packets cross, both ways.
            builder.offload(true);
        })
        .build_sync();
    match device {
        Ok(device) => Ok(device),
        Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => {
            bail!(
                "another process holds the device {name}: is an overlay-agent running on this network already? (overlay-agent status)"
            )
        }
        Err(error) => Err(error).with_context(|| format!("open the tun device {name}")),
    }
}

/// The overlay carries no IPv6; without this the kernel sends router solicitations into the device for ever. Where the
/// kernel has no IPv6 there is nothing to forbid.
fn forbid_ipv6(name: &str) {
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_says_whose_a_device_is() {
        let note =
            Note { network: "10.244.0.0/16".parse().unwrap(), port: 8285, underlay: "eth0".to_owned() };
        assert_eq!(Note::parse(&note.to_string()), Some(note));
        assert_eq!(Note::parse("my own tunnel"), None);
        assert_eq!(Note::parse("overlay-agent"), None);
    }
}
