//! Longest-prefix-match lookup in user space, for the tun datapath.

use std::{cmp::Reverse, collections::BTreeMap};

use overlay_ebpf::route;

use crate::route::{RouteChange, Routes};

/// Longest-prefix-match lookup in a fixed set of routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lookup {
    /// One level per prefix length that occurs, longest first.
    levels: Vec<(u32, Level)>,
}

/// Networks and their peers, in order, of one prefix length.
type Level = Vec<(u32, [u8; 4])>;

impl Lookup {
    /// Prepares `routes` for lookups.
    pub fn new(routes: &Routes) -> Self {
        let all: Vec<_> = routes.iter().map(|(subnet, peer)| RouteChange::set(*subnet, *peer)).collect();
        Self::default().changed(&all)
    }

    /// The same routes after `changes`, made in order.
    #[must_use]
    pub fn changed(&self, changes: &[RouteChange]) -> Self {
        let mut edits: BTreeMap<_, BTreeMap<u32, Option<[u8; 4]>>> = BTreeMap::new();
        for change in changes {
            let (subnet, peer) = match change {
                RouteChange::Set(route) => (route.subnet, Some(route.peer.address.octets())),
                RouteChange::Remove(subnet) => (*subnet, None),
            };
            let level = edits.entry(Reverse(u32::from(subnet.prefix().netmask()))).or_default();
            level.insert(u32::from(subnet.base()), peer);
        }
        let mut levels: BTreeMap<_, Level> =
            self.levels.iter().map(|(mask, level)| (Reverse(*mask), level.clone())).collect();
        for (mask, edits) in edits {
            let level = levels.entry(mask).or_default();
            level.retain(|(network, _)| !edits.contains_key(network));
            level.extend(edits.into_iter().filter_map(|(network, peer)| Some((network, peer?))));
            // Two sorted runs: a stable sort merges them.
            level.sort_by_key(|(network, _)| *network);
        }
        levels.retain(|_, level| !level.is_empty());
        Self { levels: levels.into_iter().map(|(Reverse(mask), level)| (mask, level)).collect() }
    }
}

impl route::Routes for Lookup {
    fn peer_of(&self, address: [u8; 4]) -> Option<[u8; 4]> {
        let address = u32::from_be_bytes(address);
        self.levels.iter().find_map(|(mask, level)| {
            let found = level.binary_search_by_key(&(address & mask), |(network, _)| *network).ok()?;
            level.get(found).map(|(_, peer)| *peer)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use overlay_ebpf::route::Routes as _;

    use super::*;
    use crate::route::{Peer, Subnet};

    const PEER: Peer = Peer { address: Ipv4Addr::new(192, 168, 77, 2) };
    const NEAR: Peer = Peer { address: Ipv4Addr::new(192, 168, 77, 4) };

    fn net(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn lookup_prefers_the_longest_prefix() {
        let lookup =
            Lookup::new(&Routes::from([(net("10.244.128.0/17"), PEER), (net("10.244.200.0/24"), NEAR)]));
        assert_eq!(lookup.peer_of([10, 244, 200, 7]), Some(NEAR.address.octets()));
        assert_eq!(lookup.peer_of([10, 244, 201, 7]), Some(PEER.address.octets()));
        assert_eq!(lookup.peer_of([10, 244, 1, 7]), None);
        assert_eq!(Lookup::default().peer_of([10, 244, 1, 7]), None);
    }

    #[test]
    fn changes_lead_to_what_all_routes_at_once_are() {
        let before = Routes::from([
            (net("10.244.1.0/24"), PEER),
            (net("10.244.3.0/24"), PEER),
            (net("10.244.128.0/17"), PEER),
        ]);
        let changes = [
            RouteChange::set(net("10.244.2.0/24"), NEAR),
            RouteChange::set(net("10.244.3.0/24"), NEAR),
            RouteChange::set(net("10.244.9.0/30"), NEAR),
            RouteChange::set(net("10.244.5.0/24"), NEAR),
            RouteChange::Remove(net("10.244.5.0/24")),
            RouteChange::Remove(net("10.244.128.0/17")),
        ];
        let after = Routes::from([
            (net("10.244.1.0/24"), PEER),
            (net("10.244.2.0/24"), NEAR),
            (net("10.244.3.0/24"), NEAR),
            (net("10.244.9.0/30"), NEAR),
        ]);
        assert_eq!(Lookup::new(&before).changed(&changes), Lookup::new(&after));
    }
}
