//! The underlay: device and address of the outer packets, selected as flannel does and watched for changes.

mod choose;
mod watch;

use std::{fmt, net::Ipv4Addr, str::FromStr};

use anyhow::{Result, ensure};
use regex::Regex;

pub use watch::{UnderlayChange, watch};

use crate::{
    lease,
    netlink::{Link, Netlink},
};

/// The device and addresses of the outer packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// The device.
    pub link: Link,
    /// The device's address: source of sent and destination of received outer packets.
    pub local_ip: Ipv4Addr,
    /// The address at which peers reach this host; differs from `local_ip` behind NAT.
    pub public_ip: Ipv4Addr,
}

/// The operator's criteria for the underlay. The first that finds a device wins, in the order of the fields. Without the first
/// three, the device that holds the public address is selected, and without that the device of the default route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// Devices, tried in order.
    pub ifaces: Vec<Iface>,
    /// Expressions for addresses or names, tried in order.
    pub patterns: Vec<Pattern>,
    /// An address that is reached through the device.
    pub can_reach: Option<Ipv4Addr>,
    /// The address at which peers reach this host.
    pub public_ip: Option<Ipv4Addr>,
}

/// A device named by the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Iface {
    /// By name.
    Name(String),
    /// By one of its addresses.
    Address(Ipv4Addr),
}

impl fmt::Display for Iface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// A regular expression for an address or name, not anchored. Rust's syntax covers Go's.
#[derive(Clone, Debug)]
pub struct Pattern(Regex);

impl FromStr for Pattern {
    type Err = regex::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Regex::new(text).map(Self)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_str().fmt(f)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for Pattern {}

impl Underlay {
    /// Finds the device and address that `selector` selects. Fails when no device matches, when other hosts cannot reach the
    /// address, or when the kernel cannot be queried.
    pub async fn find(netlink: &Netlink, selector: &Selector) -> Result<Self> {
        let host = choose::HostView {
            links: netlink.links().await?,
            addresses: netlink.addresses().await?,
            default: netlink.default_route().await?,
            reached: match selector.can_reach {
                Some(address) => netlink.route_to(address).await?,
                None => None,
            },
        };
        let found = choose::choose(selector, &host)?;
        let Self { link, local_ip, public_ip } = &found;
        ensure!(
            lease::is_host(*local_ip) && lease::is_host(*public_ip),
            "{public_ip} on {} cannot be reached by other hosts: choose another --iface or --public-ip",
            link.name
        );
        Ok(found)
    }
}
