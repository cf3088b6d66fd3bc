//! Which device and address carry the outer packets.

use std::net::Ipv4Addr;

use anyhow::{Result, bail};

use crate::{
    lease,
    netlink::{Link, Netlink},
};

/// The device and address that carry the outer packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// The device.
    pub link: Link,
    /// The device's own address: outer packets come from and to it.
    pub local_ip: Ipv4Addr,
    /// The address by which peers reach this host: the same, unless someone translates addresses on the way.
    pub public_ip: Ipv4Addr,
}

impl Underlay {
    /// Finds the underlay: `iface` by name or address, else the device that holds `public_ip`, else the default route's.
    /// `public_ip` may be one that the device does not hold (behind static NAT), if `iface` says which device to use.
    ///
    /// # Errors
    ///
    /// When there is no such device, or it has no address; the message lists what there is.
    pub async fn find(netlink: &Netlink, iface: Option<&str>, public_ip: Option<Ipv4Addr>) -> Result<Self> {
        let links = netlink.links().await?;
        let addresses = netlink.addresses().await?;
        let device_of = |address: Ipv4Addr| {
            addresses.iter().find(|(_, net)| net.addr() == address).map(|(index, _)| *index)
        };
        let known = || {
            let names = links.iter().filter(|link| link.name != "lo").map(|link| link.name.as_str());
            names.collect::<Vec<_>>().join(", ")
        };
        let by_index = |index: u32| links.iter().find(|link| link.index == index).cloned();
        let (link, asked) = match (iface, public_ip) {
            (Some(iface), _) => match iface.parse::<Ipv4Addr>() {
                Ok(address) => match device_of(address).and_then(by_index) {
                    Some(link) => (link, Some(address)),
                    None => bail!(
                        "no network device holds the address {address} of --iface; there are {}",
                        known()
                    ),
                },
                Err(_) => match links.iter().find(|link| link.name == iface) {
                    Some(link) => (link.clone(), None),
                    None => bail!("there is no network device {iface}; --iface can be one of {}", known()),
                },
            },
            (None, Some(address)) => match device_of(address).and_then(by_index) {
                Some(link) => (link, None),
                None => bail!(
                    "no network device holds the public address {address}: name the device with --iface"
                ),
            },
            (None, None) => {
                let routes = netlink.routes().await?;
                let default = routes
                    .iter()
                    .filter(|route| route.destination.prefix_len() == 0)
                    .min_by_key(|route| route.metric);
                match default.and_then(|route| by_index(route.index)) {
                    Some(link) => (link, None),
                    None => bail!(
                        "there is no default route to find the underlay by: name the device with --iface ({})",
                        known()
                    ),
                }
            }
        };
        let held = |address: &Ipv4Addr| device_of(*address) == Some(link.index);
        let first = addresses.iter().find(|(index, _)| *index == link.index).map(|(_, net)| net.addr());
        let Some(local_ip) = public_ip.filter(held).or(asked).or(first) else {
            bail!("the device {} has no IPv4 address: give it one, or choose another --iface", link.name);
        };
        let public_ip = public_ip.unwrap_or(local_ip);
        if !lease::is_host(local_ip) || !lease::is_host(public_ip) {
            bail!(
                "{public_ip} on {} cannot be reached by other hosts: choose another --iface or --public-ip",
                link.name
            );
        }
        Ok(Self { link, local_ip, public_ip })
    }
}
