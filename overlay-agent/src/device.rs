//! The overlay device: a persistent tun device, marked as ours by its alias.

use std::{io, path::Path};

use anyhow::{Context as _, Result, bail};
use ipnet::Ipv4Net;
use tracing::{debug, warn};
use tun_rs::{DeviceBuilder, Layer, SyncDevice};

use crate::{
    datapath::tun::Queue,
    netlink::{Link, Netlink, Route},
    route::Subnet,
};

/// Begins the alias of every device that an agent made, so that no agent changes any other device.
const ALIAS: &str = "overlay-agent";
/// Longest alias in bytes: `IFALIASZ` (linux/if.h) less the terminating zero.
const LONGEST_ALIAS: usize = 255;
/// Packets that wait in the device's queue: a second of 20,000 each, while one agent takes over from another. The kernel keeps packets, not
/// copies, so that it takes memory only as they come.
const QUEUE_LENGTH: u32 = 20_000;
const TUN_NODE: &str = "/dev/net/tun";

/// The alias of an overlay device: shows that an agent made it, and what `down` must know when that agent is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceAlias {
    /// The whole overlay.
    pub network: Ipv4Net,
    /// UDP port of the network.
    pub port: u16,
    /// Names of the devices that carry outer packets, at least one.
    pub underlays: Vec<String>,
}

impl std::fmt::Display for DeviceAlias {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut alias = format!("{ALIAS} {} {} ", self.network, self.port);
        for (index, name) in self.underlays.iter().enumerate() {
            // The kernel refuses a longer one. Only clsact filters on devices that are left out would stay behind.
            if alias.len() + name.len() + 1 > LONGEST_ALIAS {
                break;
            }
            if index > 0 {
                alias.push(',');
            }
            alias.push_str(name);
        }
        f.write_str(&alias)
    }
}

impl DeviceAlias {
    /// Reads an alias; `None` when it is not one of ours.
    pub(crate) fn parse(alias: &str) -> Option<Self> {
        let mut words = alias.strip_prefix(ALIAS)?.split_whitespace();
        let (network, port, underlays) = (words.next()?, words.next()?, words.next()?);
        let underlays = underlays.split(',').map(str::to_owned).collect();
        Some(Self { network: network.parse().ok()?, port: port.parse().ok()?, underlays })
    }
}

/// An overlay device as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSpec {
    /// Name.
    pub name: String,
    /// Alias, with the network that is routed through the device.
    pub alias: DeviceAlias,
    /// This host's subnet; the device has its first address, which no container has.
    pub subnet: Subnet,
    /// Largest inner packet in bytes.
    pub mtu: u32,
}

/// An open overlay device.
pub(crate) struct OverlayDevice {
    pub(crate) index: u32,
    pub(crate) queue: Queue,
}

/// Whether an agent made the device.
pub(crate) fn is_ours(link: &Link) -> bool {
    link.kind.as_deref() == Some("tun") && link.alias.as_deref().and_then(DeviceAlias::parse).is_some()
}

/// Checks, without changing anything, that the device can be made: its name is free or an earlier agent's, and nothing else
/// routes the network. An error names what is in the way and what to do about it.
pub(crate) async fn preflight(netlink: &Netlink, name: &str, network: Ipv4Net) -> Result<()> {
    if name.is_empty() || name.len() > 15 || name.contains(['/', ' ', '%', ':']) {
        bail!(
            "{name:?} cannot be a device name: --device takes 1 to 15 characters without '/', ':', '%' or spaces"
        );
    }
    let own = netlink.link(name).await?;
    if let Some(link) = own.as_ref().filter(|link| !is_ours(link)) {
        bail!("{}", foreign(link, !holders(name).is_empty()));
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

/// What to do about a device of another program. Only a tun device that no process holds may be a leftover.
fn foreign(link: &Link, is_held: bool) -> String {
    let name = &link.name;
    let is_tun = link.kind.as_deref() == Some("tun") && !link.ethernet;
    let removal = match is_tun && !is_held {
        true => format!(", or remove it if nothing uses it (ip link delete {name})"),
        false => String::new(),
    };
    format!("a device {name} exists that overlay-agent did not make: choose another --device{removal}")
}

/// The processes in this network namespace that hold the tun device `name`, as far as this process may see them.
pub(crate) fn holders(name: &str) -> Vec<i32> {
    let own_netns = std::fs::read_link("/proc/self/ns/net").ok();
    let holds = |process: &Path| {
        let descriptors = std::fs::read_dir(process.join("fdinfo")).into_iter().flatten().flatten();
        std::fs::read_link(process.join("ns/net")).ok() == own_netns
            && descriptors.filter_map(|fd| std::fs::read_to_string(fd.path()).ok()).any(|info| {
                info.lines().any(|line| line.strip_prefix("iff:").is_some_and(|device| device.trim() == name))
            })
    };
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes =
        processes.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())));
    processes.filter(|(_, process)| holds(process)).map(|(pid, _)| pid).collect()
}

/// Whether any process holds the tun device `name`, which an agent made.
pub(crate) fn is_held(name: &str) -> bool {
    // The library would create a missing node.
    std::fs::exists(TUN_NODE).unwrap_or(false) && attach(name).is_err_and(|error| is_busy(&error))
}

impl OverlayDevice {
    /// Makes the device, or takes over the one that an earlier agent left, and sets its attributes. `kept` is its queue, if that is open
    /// still. Fails when another process holds it or the kernel refuses.
    pub(crate) async fn open(netlink: &Netlink, spec: &DeviceSpec, kept: Option<Queue>) -> Result<Self> {
        let kept = match kept {
            Some(queue) if is_queue_of(netlink, &spec.name).await? => Some(queue),
            Some(_) => {
                warn!(
                    "the queue that was kept is of another device {}, in another network namespace",
                    spec.name
                );
                None
            }
            None => None,
        };
        let (queue, opened) = match kept {
            Some(queue) => (queue, None),
            None => {
                let device = open_tun(&spec.name)?;
                (Queue::of(&device).context("open the overlay device's queue")?, Some(device))
            }
        };
        let configure = async {
            let link = netlink.link(&spec.name).await?.context("the device vanished")?;
            // The overlay carries no IPv6; without this the kernel sends router solicitations into the device for ever.
            // Fails where the kernel has no IPv6, and then there is nothing to forbid.
            let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", spec.name), "1");
            reconcile(netlink, &link, std::slice::from_ref(&link), spec).await?;
            if let Some(device) = opened {
                if let Err(error) = device.set_tx_queue_len(QUEUE_LENGTH) {
                    debug!("set the length of the device's queue: {error}");
                }
                // Last: until here the kernel removes the device when its descriptor is closed, also when the agent is killed.
                device.persist().context("make the device persistent")?;
            }
            anyhow::Ok(link.index)
        };
        let index = configure.await.with_context(|| format!("set up the overlay device {}", spec.name))?;
        Ok(Self { index, queue })
    }
}

/// Whether an open queue of a device `name` is that of the agents' device in this network namespace.
async fn is_queue_of(netlink: &Netlink, name: &str) -> Result<bool> {
    Ok(netlink.link(name).await?.is_some_and(|link| is_ours(&link)) && is_held(name))
}

/// The overlay device with this index, which has this name now; `None` when it is gone or in another network namespace. A
/// descriptor knows the name of its device, whatever other programs call it.
pub(crate) fn find<'a>(links: &'a [Link], index: u32, name: &str) -> Option<&'a Link> {
    links.iter().find(|link| link.index == index && link.name == name && link.kind.as_deref() == Some("tun"))
}

/// Sets the attributes of the device `link`, one of `links`, that are not as `spec` says, and returns their names and the
/// kernel's routes as they were. Fails when another device has the name, or the kernel refuses.
pub(crate) async fn reconcile(
    netlink: &Netlink,
    link: &Link,
    links: &[Link],
    spec: &DeviceSpec,
) -> Result<(Vec<&'static str>, Vec<Route>)> {
    let (index, network, mut set) = (link.index, spec.alias.network, Vec::new());
    let mut up = link.up;
    if link.name != spec.name {
        if let Some(other) = links.iter().find(|other| other.name == spec.name) {
            bail!("it was renamed to {}, and {}", link.name, foreign(other, !holders(&spec.name).is_empty()));
        }
        if netlink.rename(index, &spec.name).await? {
            up = false;
        }
        set.push("name");
    }
    let alias = spec.alias.to_string();
    if link.alias.as_ref() != Some(&alias) {
        netlink.set_alias(index, &alias).await?;
        set.push("alias");
    }
    let wanted = Ipv4Net::from(spec.subnet.base());
    let addresses = netlink.addresses().await?;
    let addresses = addresses.iter().filter(|(device, _)| *device == index).map(|(_, address)| *address);
    let other_addresses = !addresses.eq([wanted]);
    if other_addresses {
        netlink.add_address(index, wanted).await?;
        set.push("address");
    }
    if !up || link.mtu != spec.mtu {
        netlink.set_up(index, spec.mtu).await?;
        set.push("state and MTU");
    }
    let routes = netlink.routes().await?;
    if !is_routed(&routes, network, index) {
        // One that the kernel does not take would be in the way of the other.
        netlink.remove_routes(network, index).await?;
        set.push("route");
    }
    // Before the old address is removed: the kernel removes the route that has it as its source.
    if other_addresses || set.contains(&"route") {
        netlink.add_route(network, index, spec.subnet.base()).await?;
    }
    if other_addresses {
        netlink.remove_other_addresses(index, wanted).await?;
    }
    Ok((set, routes))
}

/// Whether the kernel takes the route of `network` through the device `index`: of several, that of the lowest metric, and the
/// first of those. An operator's own metric would let any later route win.
fn is_routed(routes: &[Route], network: Ipv4Net, index: u32) -> bool {
    let taken = routes.iter().filter(|route| route.destination == network).min_by_key(|route| route.metric);
    taken.is_some_and(|route| route.index == index && route.metric == 0)
}

/// Removes the device if an agent made it; its addresses, routes and programs go with it. `false` when there is none.
/// Fails when the device is not ours or the kernel refuses.
pub(crate) async fn remove(netlink: &Netlink, name: &str) -> Result<bool> {
    let Some(link) = netlink.link(name).await? else {
        return Ok(false);
    };
    if !is_ours(&link) {
        bail!("overlay-agent did not make the device {name}: it stays");
    }
    netlink.delete_link(link.index).await.with_context(|| format!("remove the overlay device {name}"))?;
    Ok(true)
}

fn open_tun(name: &str) -> Result<SyncDevice> {
    if !std::fs::exists(TUN_NODE).unwrap_or(false) {
        bail!(
            "there is no {TUN_NODE}: load the kernel module tun (modprobe tun), or give the container the device"
        );
    }
    match attach(name) {
        Err(error) if is_busy(&error) => bail!(
            "another process holds the device {name}: is an overlay-agent running on this network already? (overlay-agent status)"
        ),
        device => device.with_context(|| format!("open the tun device {name}")),
    }
}

/// Creates the device, or attaches to an existing one that no process holds.
fn attach(name: &str) -> io::Result<SyncDevice> {
    DeviceBuilder::new()
        .name(name)
        .layer(Layer::L3)
        // The virtio header in front of each packet lets partial checksums and super-packets cross, both ways.
        .with(|builder| _ = builder.offload(true))
        .build_sync()
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::EBUSY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_shows_that_an_agent_made_the_device() {
        let network = "10.244.0.0/16".parse().unwrap();
        let underlays = vec!["eth0".to_owned(), "eth1".to_owned()];
        let alias = DeviceAlias { network, port: 8285, underlays };
        assert_eq!(DeviceAlias::parse(&alias.to_string()), Some(alias));
        let underlays: Vec<_> = (0..64).map(|number| format!("some-device-{number:02}")).collect();
        let long = DeviceAlias { network, port: 65535, underlays: underlays.clone() }.to_string();
        assert!(long.len() <= LONGEST_ALIAS, "{long}");
        assert_eq!(DeviceAlias::parse(&long).unwrap().underlays, underlays[..14]);
        assert_eq!(DeviceAlias::parse("my own tunnel"), None);
        assert_eq!(DeviceAlias::parse("overlay-agent"), None);
    }

    #[test]
    fn of_several_routes_the_kernel_takes_the_first_of_the_lowest_metric() {
        let network = "10.244.0.0/16".parse().unwrap();
        let route = |index, metric| Route { destination: network, index, metric };
        let wider = Route { destination: "10.0.0.0/8".parse().unwrap(), index: 3, metric: 0 };
        for (routes, expected) in [
            (&[][..], false),
            (&[wider.clone(), route(7, 0)], true),
            (&[route(7, 0), route(3, 0)], true),
            (&[route(3, 0), route(7, 0)], false),
            (&[route(3, 50), route(7, 0)], true),
            (&[route(7, 50)], false),
        ] {
            assert_eq!(is_routed(routes, network, 7), expected, "{routes:?}");
        }
    }

    #[test]
    fn only_an_unused_tun_device_may_be_suggested_for_removal() {
        let link = |kind: &str, ethernet| Link {
            ethernet,
            kind: Some(kind.to_owned()),
            ..Link::ethernet(7, "dev7")
        };
        assert!(foreign(&link("tun", false), false).contains("ip link delete dev7"));
        // A physical device has no kind; a tap device is of kind tun and carries Ethernet.
        let physical = Link { kind: None, ..link("", true) };
        for (link, is_held) in [(link("tun", false), true), (link("tun", true), false), (physical, false)] {
            let text = foreign(&link, is_held);
            assert!(text.contains("choose another --device") && !text.contains("delete"), "{text}");
        }
    }
}
