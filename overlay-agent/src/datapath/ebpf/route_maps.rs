//! The kernel's route maps: a hash for the subnets of the usual length, a trie for the others.
//!
//! A program finds the subnet of an address in the hash with one lookup, because it knows the length: that of this host's own
//! subnet. Other lengths are rare (reservations); only while there are some do programs ask the trie as well, and prefer the longer
//! prefix.

use std::{collections::BTreeSet, io::ErrorKind, net::Ipv4Addr, path::Path};

use anyhow::{Context as _, Result, bail};
use aya::maps::{HashMap, LpmTrie, MapData, MapError, lpm_trie::Key};
use ipnet::Ipv4Net;
use overlay_ebpf::abi::{Config, DEFAULT_ROUTES, MAX_ROUTES, NextHop, Prefix, PrefixRoute};

use super::{ProgramSet, pinned_state::open_map};
use crate::route::{NextHops, Route, RouteChange, Subnet, abi_prefix, diff};

// aya moves map keys and values as plain bytes, so that the types need not implement its marker trait.
type PrefixBytes = [u8; size_of::<Prefix>()];
type NextHopBytes = [u8; size_of::<NextHop>()];
type PrefixRouteBytes = [u8; size_of::<PrefixRoute>()];

type Exact = HashMap<MapData, PrefixBytes, NextHopBytes>;
type Trie = LpmTrie<MapData, [u8; 4], PrefixRouteBytes>;

/// Fewest entries of the hash.
const SMALLEST: u32 = 256;

/// How many routes the maps hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capacity {
    /// In the hash. The kernel allocates 16 bytes for each in advance, and the rest with the routes.
    exact: u32,
    /// In both maps. The trie allocates nothing in advance.
    all: u32,
}

impl Default for Capacity {
    fn default() -> Self {
        Self { exact: DEFAULT_ROUTES, all: DEFAULT_ROUTES }
    }
}

impl Capacity {
    /// For all subnets of a network, as long as there are not more than [`MAX_ROUTES`].
    pub(super) fn of(config: &Config) -> Self {
        let bits = config.subnet.length().saturating_sub(config.network.length());
        let subnets = 1u32.checked_shl(u32::from(bits)).unwrap_or(MAX_ROUTES);
        let exact = subnets.clamp(SMALLEST, MAX_ROUTES);
        Self { exact, all: exact.max(DEFAULT_ROUTES) }
    }

    /// The number of entries of each map.
    pub(super) fn sizes(self) -> [(&'static str, u32); 2] {
        [("ROUTES", self.exact), ("PREFIXES", self.all)]
    }
}

/// Changes of routes that were made in the maps. A route that moves from one map to the other counts as none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RouteWrites {
    /// Routes that were written: new ones, and others with another peer, device, MTU or path.
    pub(crate) written: u64,
    /// Of other routes, only the link-layer addresses were written.
    pub(crate) readdressed: u64,
    /// Routes that were removed.
    pub(crate) removed: u64,
}

/// The maps, and what was written to them.
pub(super) struct RouteMaps {
    exact: Exact,
    trie: Trie,
    capacity: Capacity,
    /// This host's subnet: the hash has routes of its length.
    own: Prefix,
    /// All routes.
    routes: NextHops,
    /// Those in the trie.
    in_trie: BTreeSet<Subnet>,
    pub(super) writes: RouteWrites,
}

impl RouteMaps {
    pub(super) fn take(programs: &mut ProgramSet, capacity: Capacity) -> Result<Self> {
        Ok(Self {
            exact: programs.take_map("ROUTES")?,
            trie: programs.take_map("PREFIXES")?,
            capacity,
            own: Prefix::default(),
            routes: NextHops::new(),
            in_trie: BTreeSet::new(),
            writes: RouteWrites::default(),
        })
    }

    /// Takes over what the maps hold, of a host with the subnet `own`.
    pub(super) fn adopt(&mut self, own: Prefix) -> Result<()> {
        self.own = own;
        self.check().map(drop)
    }

    /// Whether the trie has routes.
    pub(super) fn has_other_lengths(&self) -> bool {
        !self.in_trie.is_empty()
    }

    /// Writes all routes to the trie as well, where programs find them whatever length they expect in the hash.
    pub(super) fn copy_to_trie(&mut self) -> Result<()> {
        for (subnet, via) in &self.routes {
            if !self.in_trie.contains(subnet) {
                insert_in_trie(&mut self.trie, *subnet, *via)?;
                self.in_trie.insert(*subnet);
            }
        }
        Ok(())
    }

    /// After [`Self::copy_to_trie`]: moves what has the length of `own`, this host's subnet, to the hash. Programs know already that
    /// they find this length there.
    pub(super) fn settle(&mut self, own: Prefix) -> Result<()> {
        let length = self.own.length();
        self.own = own;
        for subnet in self.routes.keys().filter(|subnet| subnet.prefix().prefix_len() == length) {
            remove_from_hash(&mut self.exact, *subnet)?;
        }
        let routes: Vec<_> = self.routes.iter().map(|(subnet, via)| (*subnet, *via)).collect();
        routes.into_iter().try_for_each(|(subnet, via)| self.set_route(Route { subnet, via }))
    }

    /// See [`super::OverlaySet::set_routes`].
    pub(super) fn set(&mut self, desired: &NextHops) -> Result<()> {
        self.apply(&diff(&self.routes, desired))
    }

    /// See [`super::OverlaySet::apply_routes`].
    pub(super) fn apply(&mut self, changes: &[RouteChange<NextHop>]) -> Result<()> {
        // Additions come first, so full maps take some of them only after others have been removed.
        let mut waiting = Vec::new();
        for change in changes {
            match *change {
                RouteChange::Set(route) if self.is_full_for(route.subnet) => waiting.push(route),
                RouteChange::Set(route) => self.set_route(route)?,
                RouteChange::Remove(subnet) => self.remove_route(subnet)?,
            }
        }
        let mut left = 0;
        for route in waiting {
            match self.is_full_for(route.subnet) {
                true => left += 1,
                false => self.set_route(route)?,
            }
        }
        if left > 0 {
            bail!(
                "the kernel's map holds {} routes and is full: {left} more are not in it and packets to them are \
                 dropped; use larger subnets, or --datapath tun",
                self.capacity.all
            );
        }
        Ok(())
    }

    pub(super) fn is_full(&self) -> bool {
        self.routes.len() >= self.capacity.all as usize
    }

    fn is_full_for(&self, subnet: Subnet) -> bool {
        self.is_full() && !self.routes.contains_key(&subnet)
    }

    /// Whether a route belongs into the hash, and has room there.
    fn is_exact(&self, subnet: Subnet) -> bool {
        let is_there = self.routes.contains_key(&subnet) && !self.in_trie.contains(&subnet);
        let used = self.routes.len().saturating_sub(self.in_trie.len());
        subnet.prefix().prefix_len() == self.own.length() && (is_there || used < self.capacity.exact as usize)
    }

    fn set_route(&mut self, Route { subnet, via }: Route<NextHop>) -> Result<()> {
        let written = match self.is_exact(subnet) {
            true => {
                let key = bytemuck::cast::<Prefix, PrefixBytes>(abi_prefix(subnet.prefix()));
                let value = bytemuck::cast::<NextHop, NextHopBytes>(via);
                let written = self.exact.insert(key, value, 0).map_err(anyhow::Error::new);
                if written.is_ok() && self.in_trie.contains(&subnet) {
                    remove_from_trie(&mut self.trie, subnet)?;
                    self.in_trie.remove(&subnet);
                }
                written
            }
            false => {
                let written = insert_in_trie(&mut self.trie, subnet, via);
                if written.is_ok() {
                    self.in_trie.insert(subnet);
                }
                written
            }
        };
        written.with_context(|| format!("write the route {subnet} via {}", Ipv4Addr::from(via.peer)))?;
        match self.routes.insert(subnet, via) {
            Some(before) if before == via => {}
            Some(before) if without_link(before) == without_link(via) => self.writes.readdressed += 1,
            Some(_) | None => self.writes.written += 1,
        }
        Ok(())
    }

    fn remove_route(&mut self, subnet: Subnet) -> Result<()> {
        // One that did not fit is not in the maps.
        if !self.routes.contains_key(&subnet) {
            return Ok(());
        }
        let context = || format!("remove the route {subnet}");
        // A copy in the trie may have been made of one that is in the hash.
        remove_from_hash(&mut self.exact, subnet).with_context(context)?;
        if self.in_trie.contains(&subnet) {
            remove_from_trie(&mut self.trie, subnet).with_context(context)?;
        }
        self.routes.remove(&subnet);
        self.in_trie.remove(&subnet);
        self.writes.removed += 1;
        Ok(())
    }

    /// The routes in the kernel's maps.
    pub(super) fn read(&self) -> Result<NextHops> {
        read_both(&self.exact, &self.trie)
    }

    /// Reads the maps, and returns how many of their routes are not as they were written. The next [`Self::set`] repairs them.
    pub(super) fn check(&mut self) -> Result<usize> {
        let (trie, hash) = (read_trie(&self.trie)?, read_hash(&self.exact)?);
        let mut foreign = 0;
        // What is in the wrong map, or in both, is removed; `set` writes it again.
        let misplaced = |subnet: &&Subnet| subnet.prefix().prefix_len() != self.own.length();
        let in_hash: Vec<Subnet> = hash.keys().filter(misplaced).copied().collect();
        let in_trie: Vec<Subnet> = trie.keys().filter(|subnet| hash.contains_key(subnet)).copied().collect();
        for subnet in &in_hash {
            remove_from_hash(&mut self.exact, *subnet)?;
            foreign += usize::from(!self.routes.contains_key(subnet) || trie.contains_key(subnet));
        }
        for subnet in in_trie.iter().filter(|subnet| !in_hash.contains(subnet)) {
            remove_from_trie(&mut self.trie, *subnet)?;
            foreign += 1;
        }
        let mut found = trie;
        self.in_trie = found
            .keys()
            .filter(|subnet| in_hash.contains(subnet) || !hash.contains_key(subnet))
            .copied()
            .collect();
        found.extend(hash.into_iter().filter(|(subnet, _)| !in_hash.contains(subnet)));
        foreign += diff(&self.routes, &found).len();
        self.routes = found;
        Ok(foreign)
    }
}

/// The routes in the maps that an agent has pinned in a directory.
pub(super) fn pinned(directory: &Path) -> Result<NextHops> {
    read_both(&open_map(directory, "ROUTES")?, &open_map(directory, "PREFIXES")?)
}

fn read_both(exact: &Exact, trie: &Trie) -> Result<NextHops> {
    let mut routes = read_trie(trie)?;
    routes.extend(read_hash(exact)?);
    Ok(routes)
}

fn read_hash(exact: &Exact) -> Result<NextHops> {
    let entries = exact.iter().map(|entry| {
        let (key, via) = entry.context("read the map ROUTES")?;
        let key = bytemuck::cast::<PrefixBytes, Prefix>(key);
        let prefix = Ipv4Net::new(key.address().into(), key.length())?;
        Ok((Subnet::containing(prefix), bytemuck::cast::<NextHopBytes, NextHop>(via)))
    });
    entries.collect()
}

fn read_trie(trie: &Trie) -> Result<NextHops> {
    let entries = trie.iter().map(|entry| {
        let (key, value) = entry.context("read the map PREFIXES")?;
        let prefix = Ipv4Net::new(key.data().into(), u8::try_from(key.prefix_len())?)?;
        let value = bytemuck::cast::<PrefixRouteBytes, PrefixRoute>(value);
        // A value that names another prefix than its key is none that we wrote.
        let is_right = value.prefix == abi_prefix(prefix);
        Ok((Subnet::containing(prefix), if is_right { value.next_hop } else { NextHop::default() }))
    });
    entries.collect()
}

/// A next hop without what follows from the kernel's neighbours.
fn without_link(hop: NextHop) -> NextHop {
    NextHop { flags: hop.flags & !NextHop::RESOLVED, mac: [0; 6], source_mac: [0; 6], ..hop }
}

fn insert_in_trie(trie: &mut Trie, subnet: Subnet, next_hop: NextHop) -> Result<()> {
    let value = PrefixRoute { prefix: abi_prefix(subnet.prefix()), next_hop };
    Ok(trie.insert(&key(subnet), bytemuck::cast::<PrefixRoute, PrefixRouteBytes>(value), 0)?)
}

fn remove_from_trie(trie: &mut Trie, subnet: Subnet) -> Result<()> {
    if_present(trie.remove(&key(subnet)))
}

fn remove_from_hash(exact: &mut Exact, subnet: Subnet) -> Result<()> {
    if_present(exact.remove(&bytemuck::cast::<Prefix, PrefixBytes>(abi_prefix(subnet.prefix()))))
}

/// An entry that another process removed is no error.
pub(super) fn if_present(removed: Result<(), MapError>) -> Result<()> {
    match removed {
        Err(MapError::SyscallError(error)) if error.io_error.kind() == ErrorKind::NotFound => Ok(()),
        removed => Ok(removed?),
    }
}

fn key(subnet: Subnet) -> Key<[u8; 4]> {
    Key::new(u32::from(subnet.prefix().prefix_len()), subnet.base().octets())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capacity(network: u8, subnet: u8) -> Capacity {
        let prefix = |length| Prefix::new([10, 0, 0, 0], length);
        Capacity::of(&Config::new([0; 4], prefix(network), prefix(subnet), 8285))
    }

    #[test]
    fn the_hash_has_room_for_the_subnets_of_the_network() {
        assert_eq!(capacity(16, 24), Capacity { exact: 256, all: 65_536 });
        assert_eq!(capacity(8, 24), Capacity { exact: 65_536, all: 65_536 });
        assert_eq!(capacity(8, 26), Capacity { exact: 262_144, all: 262_144 });
        assert_eq!(capacity(1, 30), Capacity { exact: MAX_ROUTES, all: MAX_ROUTES });
        assert_eq!(capacity(24, 28), Capacity { exact: 256, all: 65_536 });
        assert_eq!(capacity(24, 8), Capacity { exact: 256, all: 65_536 });
    }
}
