//! Longest-prefix-match lookup in user space, for the tun rung.

use std::{cmp::Reverse, collections::BTreeSet};

use ipnet::Ipv4Net;
use overlay_ebpf::route;

use crate::route::{Route, RouteChange, Routes, Subnet};

/// Longest-prefix-match lookup in a set of routes.
#[derive(Debug)]
pub struct Lookup {
    pub(super) routes: Routes,
    /// The prefix lengths that occur or have occurred, longest first.
    lengths: BTreeSet<Reverse<u8>>,
}

impl Lookup {
    /// Prepares `routes` for lookups.
    pub fn new(routes: &Routes) -> Self {
        let lengths = routes.keys().map(|subnet| Reverse(subnet.prefix().prefix_len())).collect();
        Self { routes: routes.clone(), lengths }
    }

    /// Makes `changes`, in order.
    pub(super) fn apply(&mut self, changes: &[RouteChange]) {
        for change in changes {
            match *change {
                RouteChange::Set(Route { subnet, peer }) => {
                    self.lengths.insert(Reverse(subnet.prefix().prefix_len()));
                    self.routes.insert(subnet, peer);
                }
                RouteChange::Remove(subnet) => drop(self.routes.remove(&subnet)),
            }
        }
    }
}

impl route::Routes for Lookup {
    fn peer_of(&self, address: [u8; 4]) -> Option<[u8; 4]> {
        self.lengths.iter().find_map(|Reverse(length)| {
            let prefix = Ipv4Net::new(address.into(), *length).ok()?;
            self.routes.get(&Subnet::containing(prefix)).map(|peer| peer.address.octets())
        })
    }
}

#[cfg(test)]
mod tests {
    use overlay_ebpf::route::Routes as _;

    use super::*;

    #[test]
    fn lookup_prefers_the_longest_prefix() {
        let (far, near) = ([192, 168, 77, 2], [192, 168, 77, 4]);
        let routes = [("10.244.128.0/17", far), ("10.244.200.0/24", near)]
            .map(|(subnet, peer)| (subnet.parse().unwrap(), std::net::Ipv4Addr::from(peer).into()));
        let mut lookup = Lookup::new(&Routes::from(routes));
        assert_eq!(lookup.peer_of([10, 244, 200, 7]), Some(near));
        assert_eq!(lookup.peer_of([10, 244, 201, 7]), Some(far));
        assert_eq!(lookup.peer_of([10, 244, 1, 7]), None);
        let changes = [("10.244.1.0/25", near), ("10.244.200.0/24", far)].map(|(subnet, peer)| {
            RouteChange::set(subnet.parse().unwrap(), std::net::Ipv4Addr::from(peer).into())
        });
        lookup.apply(&changes);
        assert_eq!(lookup.peer_of([10, 244, 1, 7]), Some(near));
        assert_eq!(lookup.peer_of([10, 244, 200, 7]), Some(far));
        lookup.apply(&[RouteChange::Remove("10.244.1.0/25".parse().unwrap())]);
        assert_eq!(lookup.peer_of([10, 244, 1, 7]), None);
    }
}
