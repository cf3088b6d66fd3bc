//! Which device and address carry the outer packets, chosen as flannel chooses and followed when they change.

mod choose;
mod watch;

use std::{fmt, net::Ipv4Addr, str::FromStr};

use anyhow::{Result, bail};
use regex::Regex;

pub use choose::NoUnderlay;
pub use watch::{UnderlayChange, watch};

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
    /// The address by which peers reach this host: the same, unless there is address translation in between.
    pub public_ip: Ipv4Addr,
}

/// What the operator says about the underlay. The first that finds a device decides, in the order of the fields; without
/// any of the first three it is the device that holds the public address, and without that the default route's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// Devices, tried in order.
    pub ifaces: Vec<Iface>,
    /// Expressions for an address or a name, tried in order.
    pub patterns: Vec<Pattern>,
    /// An address that the device leads to.
    pub can_reach: Option<Ipv4Addr>,
    /// The address by which peers reach this host.
    pub public_ip: Option<Ipv4Addr>,
}

/// A device as an operator names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Iface {
    /// By name.
    Name(String),
    /// By an address that it holds.
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

/// A regular expression for an address or name, found anywhere in it unless it has anchors. Go's syntax is Rust's.
#[derive(Clone, Debug)]
pub struct Pattern(Regex);

impl Pattern {
    fn is_in(&self, text: &str) -> bool {
        self.0.is_match(text)
    }
}

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
    /// Finds the underlay that the operator wishes for.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list, or with [`NoUnderlay`], which says what was tried and what there is, or when other
    /// hosts cannot reach the address.
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
        if !lease::is_host(found.local_ip) || !lease::is_host(found.public_ip) {
            bail!(
                "{} on {} cannot be reached by other hosts: choose another --iface or --public-ip",
                found.public_ip,
                found.link.name
            );
        }
        Ok(found)
    }
}
