//! Longest-prefix-match lookup in user space, for the tun rung.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;
use overlay_ebpf::{abi::NextHop, route};

use crate::route::{NextHops, Route, RouteChange, Subnet};

/// Longest-prefix-match lookup in a set of routes.
#[derive(Debug)]
pub struct Lookup {
    pub(super) routes: NextHops,
    /// The prefix lengths that occur or have occurred, longest first.
    lengths: BTreeSet<Reverse<u8>>,
    /// The present addresses of peers by their former ones.
    pub(super) former: BTreeMap<Ipv4Addr, Ipv4Addr>,
}

impl Lookup {
    /// Prepares `routes` for lookups.
    pub fn new(routes: &NextHops) -> Self {
        let lengths = routes.keys().map(|subnet| Reverse(subnet.prefix().prefix_len())).collect();
        Self { routes: routes.clone(), lengths, former: BTreeMap::new() }
    }

    /// Makes `changes`, in order.
    pub(super) fn apply(&mut self, changes: &[RouteChange<NextHop>]) {
        for change in changes {
            match *change {
                RouteChange::Set(Route { subnet, via }) => {
                    self.lengths.insert(Reverse(subnet.prefix().prefix_len()));
                    self.routes.insert(subnet, via);
                }
                RouteChange::Remove(subnet) => drop(self.routes.remove(&subnet)),
            }
        }
    }
}

impl route::Routes for Lookup {
    fn next_hop(&self, address: [u8; 4]) -> Option<NextHop> {
        self.lengths.iter().find_map(|Reverse(length)| {
            let prefix = Ipv4Net::new(address.into(), *length).ok()?;
            self.routes.get(&Subnet::containing(prefix)).copied()
        })
    }

    fn present_address(&self, former: [u8; 4]) -> Option<[u8; 4]> {
        self.former.get(&Ipv4Addr::from(former)).map(Ipv4Addr::octets)
    }
}

#[cfg(test)]
mod tests {
    use overlay_ebpf::route::Routes as _;

    use super::*;

    #[test]
    fn lookup_prefers_the_longest_prefix() {
        let hop = |last| NextHop { peer: [192, 168, 77, last], ifindex: 2, mtu: 1472, ..NextHop::default() };
        let (far, near) = (hop(2), hop(4));
        let routes = [("10.244.128.0/17", far), ("10.244.200.0/24", near)]
            .map(|(subnet, hop)| (subnet.parse().unwrap(), hop));
        let mut lookup = Lookup::new(&NextHops::from(routes));
        assert_eq!(lookup.next_hop([10, 244, 200, 7]), Some(near));
        assert_eq!(lookup.next_hop([10, 244, 201, 7]), Some(far));
        assert_eq!(lookup.next_hop([10, 244, 1, 7]), None);
        lookup.apply(
            &[("10.244.1.0/25", near), ("10.244.200.0/24", far)]
                .map(|(subnet, hop)| RouteChange::set(subnet.parse().unwrap(), hop)),
        );
        assert_eq!(lookup.next_hop([10, 244, 1, 7]), Some(near));
        assert_eq!(lookup.next_hop([10, 244, 200, 7]), Some(far));
        lookup.apply(&[RouteChange::Remove("10.244.1.0/25".parse().unwrap())]);
        assert_eq!(lookup.next_hop([10, 244, 1, 7]), None);
    }
}
