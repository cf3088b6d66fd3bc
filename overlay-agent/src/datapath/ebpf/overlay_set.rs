//! The overlay's set of programs: hooks, and maps as typed values.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, MapData, PerCpuArray};
use overlay_ebpf::abi::{Config, Counters, NextHop, UnderlayValue};

use super::{
    Hook, HookKind, ProgramSet,
    route_maps::{Capacity, RouteMaps},
};
use crate::route::{NextHops, RouteChange};

/// tc egress of the overlay device.
pub const EGRESS: Hook = Hook { program: "ovl_egress", kind: HookKind::TcEgress };
/// tc egress of a device with an Ethernet header, as in test runs.
pub const EGRESS_ETHERNET: Hook = Hook { program: "ovl_egress_ethernet", kind: HookKind::TcEgress };
/// tc ingress of an underlay device.
pub const INGRESS: Hook = Hook { program: "ovl_ingress", kind: HookKind::TcIngress };
/// XDP of an underlay device; needs [`INGRESS`] behind it.
pub const XDP: Hook = Hook { program: "ovl_xdp", kind: HookKind::Xdp };

// aya moves map values as plain bytes, so that the types need not implement its marker trait.
type ConfigBytes = [u8; size_of::<Config>()];
type CountersBytes = [u8; size_of::<Counters>()];
type UnderlayBytes = [u8; size_of::<UnderlayValue>()];

/// The underlay devices, by index.
pub type Underlays = BTreeMap<u32, UnderlayValue>;

/// The loaded programs and their maps.
pub struct OverlaySet {
    /// The programs.
    pub programs: ProgramSet,
    config: Array<MapData, ConfigBytes>,
    /// What was written there, without what follows from other maps.
    written: Config,
    /// The first underlay device, as it is in `UNDERLAYS`.
    first: (u32, [u8; 6]),
    routes: RouteMaps,
    underlay_map: HashMap<MapData, u32, UnderlayBytes>,
    counters: PerCpuArray<MapData, CountersBytes>,
}

impl OverlaySet {
    /// Loads the maps, with room for the routes of any but the largest networks; see [`ProgramSet::load`].
    pub fn load(object: &[u8], log: bool) -> Result<Self> {
        Self::load_with(object, log, Capacity::default())
    }

    /// As [`Self::load`], with room for the routes of the network of `config`.
    pub fn load_for(object: &[u8], log: bool, config: &Config) -> Result<Self> {
        Self::load_with(object, log, Capacity::of(config))
    }

    fn load_with(object: &[u8], log: bool, capacity: Capacity) -> Result<Self> {
        let mut programs = ProgramSet::load("overlay", object, log, &capacity.sizes())?;
        Ok(Self {
            config: programs.take_map("CONFIG")?,
            written: Config::default(),
            first: (0, [0; 6]),
            routes: RouteMaps::take(&mut programs, capacity)?,
            underlay_map: programs.take_map("UNDERLAYS")?,
            counters: programs.take_map("COUNTERS")?,
            programs,
        })
    }

    /// Writes this host's configuration. When its subnet has another length than before, routes move between maps; no destination
    /// is unreachable meanwhile.
    pub fn set_config(&mut self, config: &Config) -> Result<()> {
        let moves = config.subnet.length() != self.written.subnet.length();
        if moves {
            self.routes.copy_to_trie()?;
        }
        self.written = *config;
        self.write_config()?;
        if moves {
            self.routes.settle(config.subnet)?;
            self.write_config()?;
        }
        Ok(())
    }

    fn write_config(&mut self) -> Result<()> {
        let config = bytemuck::cast::<Config, ConfigBytes>(self.complete_config());
        self.config.set(0, config, 0).context("write the map CONFIG")
    }

    /// What the map should hold: what was written, and what follows from other maps.
    fn complete_config(&self) -> Config {
        let (ifindex, mac) = self.first;
        let config = self.written.with_other_lengths(self.routes.has_other_lengths());
        config.with_first_underlay(ifindex, mac)
    }

    /// Reads the kernel's map and returns the configuration that was written; the default when others changed it.
    pub fn config(&self) -> Result<Config> {
        let config = self.config.get(&0, 0).context("read the map CONFIG")?;
        let is_ours = bytemuck::cast::<ConfigBytes, Config>(config) == self.complete_config();
        Ok(if is_ours { self.written } else { Config::default() })
    }

    /// Makes the map of underlay devices hold exactly `desired`.
    pub fn set_underlays(&mut self, desired: &Underlays) -> Result<()> {
        let present = self.underlays()?;
        for (index, value) in desired.iter().filter(|(index, value)| present.get(*index) != Some(value)) {
            let value = bytemuck::cast::<UnderlayValue, UnderlayBytes>(*value);
            self.underlay_map.insert(index, value, 0).context("write the map UNDERLAYS")?;
        }
        for index in present.keys().filter(|index| !desired.contains_key(index)) {
            self.underlay_map.remove(index).context("write the map UNDERLAYS")?;
        }
        let first = desired.iter().find(|(_, value)| value.is_first());
        let first = first.map_or((0, [0; 6]), |(index, value)| (*index, value.mac));
        if first != self.first {
            self.first = first;
            self.write_config()?;
        }
        Ok(())
    }

    /// The underlay devices in the kernel's map.
    pub fn underlays(&self) -> Result<Underlays> {
        let entries = self.underlay_map.iter().map(|entry| {
            let (index, value) = entry.context("read the map UNDERLAYS")?;
            Ok((index, bytemuck::cast::<UnderlayBytes, UnderlayValue>(value)))
        });
        entries.collect()
    }

    /// Makes the route maps hold exactly `desired`. Fails as [`OverlaySet::apply_routes`]; the next call continues from there.
    pub fn set_routes(&mut self, desired: &NextHops) -> Result<()> {
        self.change_routes(|maps| maps.set(desired))
    }

    /// Makes `changes` in the route maps, in order. Fails at the first that the kernel refuses, or when there are more routes
    /// than the maps hold: then those that fit are there.
    pub fn apply_routes(&mut self, changes: &[RouteChange<NextHop>]) -> Result<()> {
        self.change_routes(|maps| maps.apply(changes))
    }

    /// Before the programs are told to look into the map of other lengths, its first route is there, and after its last.
    fn change_routes(&mut self, change: impl FnOnce(&mut RouteMaps) -> Result<()>) -> Result<()> {
        let before = self.routes.has_other_lengths();
        let changed = change(&mut self.routes);
        if self.routes.has_other_lengths() != before {
            self.write_config()?;
        }
        changed
    }

    /// The routes in the kernel's maps.
    pub fn routes(&self) -> Result<NextHops> {
        self.routes.read()
    }

    /// Reads the kernel's maps and returns how many of their routes are not as they were written. The next
    /// [`OverlaySet::set_routes`] repairs them.
    pub fn check_routes(&mut self) -> Result<usize> {
        let mut foreign = 0;
        self.change_routes(|maps| {
            foreign = maps.check()?;
            Ok(())
        })?;
        Ok(foreign)
    }

    /// The counters of all CPUs, added up.
    pub fn counters(&self) -> Result<Counters> {
        let mut sum = Counters::ZERO;
        for cpu in self.counters.get(&0, 0).context("read the map COUNTERS")?.iter() {
            sum.add(&bytemuck::pod_read_unaligned(cpu));
        }
        Ok(sum)
    }
}
