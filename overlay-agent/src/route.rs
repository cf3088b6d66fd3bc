//! Subnets, peers and routes: the vocabulary that the store, the route table and the datapath share.
//!
//! The overlay carries IPv4 only. Addresses outside of packets stand behind these types, so that another family changes them
//! and not their users.

use std::{collections::BTreeMap, fmt, net::Ipv4Addr, str::FromStr};

use ipnet::Ipv4Net;
use overlay_ebpf::abi::{NextHop, Prefix};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A prefix of the overlay that one host holds. Host bits are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Ipv4Net", into = "Ipv4Net")]
pub struct Subnet(Ipv4Net);

/// Why a text or a prefix is not a [`Subnet`].
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SubnetError {
    /// Not a prefix at all.
    #[error("expected a network such as 10.244.1.0/24")]
    NotPrefix,
    /// An address inside a subnet, not the subnet.
    #[error("host bits are set: did you mean {0}?")]
    HostBits(Subnet),
}

impl Subnet {
    /// The subnet that contains the address of `prefix`: host bits are masked.
    pub fn containing(prefix: Ipv4Net) -> Self {
        Self(prefix.trunc())
    }

    /// The subnet as a prefix.
    pub fn prefix(self) -> Ipv4Net {
        self.0
    }

    /// Its first address.
    pub fn base(self) -> Ipv4Addr {
        self.0.network()
    }

    /// Whether the two share an address. Of two prefixes that do, one contains the other.
    pub fn overlaps(self, other: Self) -> bool {
        overlaps(self.0, other.0)
    }

    /// Whether this subnet contains `other` and more.
    pub fn is_wider_than(self, other: Self) -> bool {
        other.is_part_of(self.0)
    }

    /// Whether `network` contains this subnet and more.
    pub fn is_part_of(self, network: Ipv4Net) -> bool {
        network.contains(&self.0) && self.0 != network
    }
}

/// Whether two prefixes share an address.
pub fn overlaps(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// Parses `10.244.1.0/24`. Leading zeros are refused, as Go does: some programs read such numbers as octal.
pub(crate) fn parse_prefix(text: &str) -> Option<Ipv4Net> {
    let (address, length) = text.split_once('/')?;
    let is_canonical = length == "0" || !length.starts_with(['0', '+']);
    Ipv4Net::new(address.parse().ok()?, length.parse().ok().filter(|_| is_canonical)?).ok()
}

/// A prefix in the form that maps and the packet core use.
pub fn abi_prefix(net: Ipv4Net) -> Prefix {
    Prefix::new(net.network().octets(), net.prefix_len())
}

impl TryFrom<Ipv4Net> for Subnet {
    type Error = SubnetError;

    fn try_from(prefix: Ipv4Net) -> Result<Self, SubnetError> {
        let subnet = Self::containing(prefix);
        if subnet.0 == prefix { Ok(subnet) } else { Err(SubnetError::HostBits(subnet)) }
    }
}

impl From<Subnet> for Ipv4Net {
    fn from(subnet: Subnet) -> Self {
        subnet.0
    }
}

impl FromStr for Subnet {
    type Err = SubnetError;

    fn from_str(text: &str) -> Result<Self, SubnetError> {
        parse_prefix(text).ok_or(SubnetError::NotPrefix)?.try_into()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// This host's place in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalNode {
    /// The whole overlay.
    pub network: Ipv4Net,
    /// The subnet that this host holds.
    pub subnet: Subnet,
    /// The underlay address by which peers reach this host.
    pub public_ip: Ipv4Addr,
}

/// Another host of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peer {
    /// Its underlay address.
    pub address: Ipv4Addr,
    /// Whether it takes unfinished packets: super-packets, and checksums that its kernel has to complete. Hosts that run this agent
    /// do; flanneld hands them to its containers as they are.
    pub takes_unfinished: bool,
}

impl From<Ipv4Addr> for Peer {
    fn from(address: Ipv4Addr) -> Self {
        Self { address, takes_unfinished: false }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}

/// Where packets for one subnet go: to a peer, or, in the datapath, by a [`NextHop`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route<T = Peer> {
    /// The destination.
    pub subnet: Subnet,
    /// Where its packets go.
    pub via: T,
}

/// All routes of a host, in order of their subnets.
pub type Routes<T = Peer> = BTreeMap<Subnet, T>;

/// All routes as the datapath has them.
pub type NextHops = Routes<NextHop>;

/// One step from one set of routes to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteChange<T = Peer> {
    /// The subnet is new, or its packets go elsewhere.
    Set(Route<T>),
    /// No peer holds the subnet any more.
    Remove(Subnet),
}

impl<T> RouteChange<T> {
    /// The step after which packets for `subnet` go to `via`.
    pub fn set(subnet: Subnet, via: T) -> Self {
        Self::Set(Route { subnet, via })
    }

    /// Makes this step in `routes`.
    pub fn make_in(self, routes: &mut Routes<T>) {
        match self {
            Self::Set(Route { subnet, via }) => drop(routes.insert(subnet, via)),
            Self::Remove(subnet) => drop(routes.remove(&subnet)),
        }
    }

    /// The same step with what `via` makes of the destination.
    pub fn map<U>(self, via: impl FnOnce(T) -> U) -> RouteChange<U> {
        match self {
            Self::Set(route) => RouteChange::set(route.subnet, via(route.via)),
            Self::Remove(subnet) => RouteChange::Remove(subnet),
        }
    }
}

/// The steps from `current` to `desired`: additions first, so that no destination is unreachable in between.
pub fn diff<T: Copy + PartialEq>(current: &Routes<T>, desired: &Routes<T>) -> Vec<RouteChange<T>> {
    let set = desired
        .iter()
        .filter(|(subnet, via)| current.get(subnet) != Some(via))
        .map(|(subnet, via)| RouteChange::set(*subnet, *via));
    let removed = current.keys().filter(|subnet| !desired.contains_key(subnet));
    set.chain(removed.map(|subnet| RouteChange::Remove(*subnet))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: Peer = Peer { address: Ipv4Addr::new(192, 168, 77, 2), takes_unfinished: true };
    const OTHER: Peer = Peer { address: Ipv4Addr::new(192, 168, 77, 3), takes_unfinished: true };

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn a_subnet_has_no_host_bits() {
        assert_eq!("10.244.1.5/24".parse::<Subnet>(), Err(SubnetError::HostBits(subnet("10.244.1.0/24"))));
        assert_eq!("10.244.1.0".parse::<Subnet>(), Err(SubnetError::NotPrefix));
        assert_eq!(Subnet::containing("10.244.1.5/24".parse().unwrap()), subnet("10.244.1.0/24"));
    }

    #[test]
    fn a_prefix_has_one_spelling() {
        assert_eq!(parse_prefix("0.0.0.0/0").map(|net| net.to_string()).as_deref(), Some("0.0.0.0/0"));
        for bad in [
            "010.244.1.0/24",
            "10.244.1.00/24",
            "10.244.1.0/024",
            "10.244.1.0/+24",
            "10.244.1/24",
            "10.1.1.0/33",
        ] {
            assert_eq!(bad.parse::<Subnet>(), Err(SubnetError::NotPrefix), "{bad}");
        }
    }

    #[test]
    fn overlap_and_containment_are_told_apart() {
        let (wide, narrow, other) = (subnet("10.1.0.0/23"), subnet("10.1.1.0/24"), subnet("10.1.2.0/24"));
        assert!(wide.overlaps(narrow) && narrow.overlaps(wide) && !wide.overlaps(other));
        assert!(narrow.is_part_of(wide.prefix()) && !wide.is_part_of(wide.prefix()));
    }

    #[test]
    fn diff_is_exactly_the_difference_and_adds_before_it_removes() {
        let [two, three, four, five] = [2, 3, 4, 5].map(|third| subnet(&format!("10.244.{third}.0/24")));
        let current = Routes::from([(two, PEER), (three, PEER), (four, PEER)]);
        let desired = Routes::from([(two, PEER), (three, OTHER), (five, PEER)]);
        let steps = [RouteChange::set(three, OTHER), RouteChange::set(five, PEER), RouteChange::Remove(four)];
        assert_eq!(diff(&current, &desired), steps);
        assert!(diff(&desired, &desired).is_empty());
        let mut routes = current;
        steps.into_iter().for_each(|step| step.make_in(&mut routes));
        assert_eq!(routes, desired);
    }
}
