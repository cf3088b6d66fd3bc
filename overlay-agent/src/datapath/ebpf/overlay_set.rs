//! The overlay's set of programs: hooks, and maps as typed values.

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, MapData};
use nix::{
    sys::time::TimeValLike as _,
    time::{ClockId, clock_getres},
};
use overlay_ebpf::{
    abi::{Config, Counters, Endpoint, MAX_ENDPOINTS, MAX_FLOWS, MAX_MOVED, NextHop, UnderlayValue},
    bypass::Bypass,
    wire::Ethernet,
};

use tracing::warn;

use super::{
    Hook, HookKind, Pinned, Pins, Place, ProgramSet, btf,
    counter_maps::{CounterMaps, Replaced},
    questions::{self, Answering},
    route_maps::{Capacity, RouteMaps, RouteWrites},
};
use crate::route::{NextHops, RouteChange};

/// tc egress of the overlay device.
pub const EGRESS: Hook = Hook { program: "ovl_egress", kind: HookKind::TcEgress, place: Place::First };
/// tc egress of a device with an Ethernet header, as in test runs.
pub const EGRESS_ETHERNET: Hook =
    Hook { program: "ovl_egress_ethernet", kind: HookKind::TcEgress, place: Place::First };
/// tc ingress of an underlay device.
pub const INGRESS: Hook = Hook { program: "ovl_ingress", kind: HookKind::TcIngress, place: Place::First };
/// tc ingress of a device that leads to a container.
pub const FROM_LOCAL: Hook =
    Hook { program: "ovl_from_local", kind: HookKind::TcIngress, place: Place::Last };
/// tc egress of a device that leads to containers, for [`Bypass::Flows`].
pub const TO_LOCAL: Hook = Hook { program: "ovl_to_local", kind: HookKind::TcEgress, place: Place::Last };
/// Those on devices of containers.
pub(crate) const LOCAL: [Hook; 2] = [FROM_LOCAL, TO_LOCAL];
/// Attached nowhere: see [`OverlaySet::show_alive`].
const HEARTBEAT: Hook = Hook { program: "ovl_heartbeat", kind: HookKind::TcIngress, place: Place::Last };
/// XDP of an underlay device; needs [`INGRESS`] behind it.
pub const XDP: Hook = Hook { program: "ovl_xdp", kind: HookKind::Xdp, place: Place::First };

/// The map of the programs' counters.
pub(crate) const COUNTERS: &str = "COUNTERS";
/// The map of what earlier sets have counted.
pub(super) const CARRIED: &str = "CARRIED";

// aya moves map values as plain bytes, so that the types need not implement its marker trait.
pub(super) type ConfigBytes = [u8; size_of::<Config>()];
type EndpointBytes = [u8; size_of::<Endpoint>()];
type UnderlayBytes = [u8; size_of::<UnderlayValue>()];

/// The maps that outlive the agent. Questions to the agent and lines of the log do not.
const PINNED: [&str; 10] = [
    "CONFIG",
    "ROUTES",
    "PREFIXES",
    "UNDERLAYS",
    "ENDPOINTS",
    COUNTERS,
    CARRIED,
    "FLOWS",
    "RELEASED",
    "ALIVE_UNTIL",
];

/// The underlay devices, by index.
pub type Underlays = BTreeMap<u32, UnderlayValue>;

/// The addresses that peers had until a moment ago, and those that they have now.
pub type FormerAddresses = BTreeMap<Ipv4Addr, Ipv4Addr>;

/// The containers of this host, by address.
pub type Endpoints = BTreeMap<Ipv4Addr, Endpoint>;

/// Constants of the loaded programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Which packets skip the host's stack.
    pub bypass: Bypass,
    /// Log failures.
    pub log: bool,
}

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
    moved: HashMap<MapData, [u8; 4], [u8; 4]>,
    endpoint_map: HashMap<MapData, [u8; 4], EndpointBytes>,
    counters: CounterMaps,
    /// Those of sets whose programs may still be attached.
    replaced: Replaced,
    /// Whether the maps are those of an earlier agent, or of another set of this process.
    has_earlier_maps: bool,
    /// With [`Bypass::Flows`].
    _answering: Option<Answering>,
}

impl OverlaySet {
    /// Loads the maps, with room for the routes of any but the largest networks; see [`ProgramSet::load`]. With [`Bypass::Flows`], it
    /// panics outside of a tokio runtime, and fails when the kernel does not describe its types.
    pub fn load(object: &[u8], options: LoadOptions) -> Result<Self> {
        Self::load_with(object, options, Capacity::default(), None)
    }

    /// As [`Self::load`], with room for the routes of the network of `config`. With `pins`, maps and links outlive this process, and what an
    /// earlier agent left in the maps is taken over: it stays until other values are set.
    pub fn load_for(
        object: &[u8],
        options: LoadOptions,
        config: &Config,
        pins: Option<&Pins>,
    ) -> Result<Self> {
        let mut set = Self::load_with(object, options, Capacity::of(config), pins)?;
        if pins.is_some() {
            set.adopt()?;
            let (replaced, lost) = Replaced::open(set.programs.other_generations()?);
            set.replaced = replaced;
            for error in lost {
                warn!("counters of an earlier agent are not continued: {error:#}");
            }
        }
        Ok(set)
    }

    /// Whether the maps are those of an earlier agent or of another set of this process, with what they hold.
    pub(crate) fn has_earlier_maps(&self) -> bool {
        self.has_earlier_maps
    }

    /// Adds the counters of `before`, whose programs these replace, and those of sets before it. Then removes maps that only they had.
    pub(crate) fn settle(&mut self, before: Option<Self>) -> Result<()> {
        if let Some(before) = before {
            self.replaced.push(before.counters);
        }
        self.replaced.carry_to(&mut self.counters)?;
        self.programs.remove_other_generations()
    }

    fn load_with(
        object: &[u8],
        options: LoadOptions,
        capacity: Capacity,
        pins: Option<&Pins>,
    ) -> Result<Self> {
        let LoadOptions { bypass, log } = options;
        let (nfct, flows) = match bypass {
            Bypass::Flows => (btf::offset("sk_buff", "_nfct")?.unwrap_or(0), MAX_FLOWS),
            Bypass::Off | Bypass::All => (0, 1),
        };
        // The resolution of coarse clocks is the kernel's tick (clock_getres(2), kernel/time/posix-timers.c).
        let tick =
            clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).context("read the length of the kernel's tick")?;
        let tick = u32::try_from(tick.num_nanoseconds()).context("the kernel's tick takes seconds")?;
        let constants = [("BYPASS", bypass as u32), ("NFCT_OFFSET", nfct), ("TICK", tick)];
        let sizes = [&capacity.sizes()[..], &[("FLOWS", flows), ("RELEASED", flows)]].concat();
        let mut programs = ProgramSet::load(
            "overlay",
            object,
            &constants,
            &sizes,
            log,
            pins.map(|pins| Pinned { pins, maps: &PINNED }),
        )?;
        let answering = match bypass {
            Bypass::Flows => {
                Some(questions::answer(programs.take_map("QUESTIONS")?, programs.take_map("RELEASED")?)?)
            }
            Bypass::Off | Bypass::All => None,
        };
        Ok(Self {
            _answering: answering,
            config: programs.take_map("CONFIG")?,
            written: Config::default(),
            first: (0, [0; 6]),
            routes: RouteMaps::take(&mut programs, capacity)?,
            underlay_map: programs.take_map("UNDERLAYS")?,
            moved: programs.take_map("MOVED")?,
            endpoint_map: programs.take_map("ENDPOINTS")?,
            counters: CounterMaps::take(&mut programs)?,
            replaced: Replaced::default(),
            has_earlier_maps: programs.keeps_maps(),
            programs,
        })
    }

    /// Reads what the maps hold.
    fn adopt(&mut self) -> Result<()> {
        let config = self.config.get(&0, 0).context("read the map CONFIG")?;
        let config = bytemuck::cast::<ConfigBytes, Config>(config);
        self.written = config.with_other_lengths(false).with_first_underlay(0, [0; 6]);
        let first = self.underlays()?.into_iter().find(|(_, value)| value.is_first());
        self.first = first.map_or((0, [0; 6]), |(index, value)| (index, value.mac));
        self.routes.adopt(config.subnet)
    }

    /// Tells the programs that the agent keeps neighbours and containers up to date for the next five seconds. Without, packets take the
    /// host's stack, and the kernel looks up the neighbour of each. Fails when the kernel refuses the program.
    pub fn show_alive(&mut self) -> Result<()> {
        self.programs.load_program(HEARTBEAT)?;
        // The kernel takes nothing shorter than an Ethernet header.
        self.programs.test_run(HEARTBEAT, &[0; Ethernet::LEN], 0)?;
        Ok(())
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

    /// Makes the map of peers' former addresses hold exactly `desired`, as far as it has room. Fails when the kernel refuses an update.
    pub fn set_former(&mut self, desired: &FormerAddresses) -> Result<()> {
        let present = self.moved.keys().collect::<Result<Vec<_>, _>>().context("read the map MOVED")?;
        for former in present.iter().filter(|former| !desired.contains_key(&Ipv4Addr::from(**former))) {
            self.moved.remove(former).context("write the map MOVED")?;
        }
        for (former, now) in desired.iter().take(MAX_MOVED as usize) {
            self.moved.insert(former.octets(), now.octets(), 0).context("write the map MOVED")?;
        }
        Ok(())
    }

    /// Makes the map of containers hold exactly `desired`, as far as it has room: removals first. Returns how many it has no room for.
    pub fn set_endpoints(&mut self, desired: &Endpoints) -> Result<usize> {
        let mut present = self.endpoints()?;
        let gone: Vec<_> = present.keys().filter(|address| !desired.contains_key(address)).copied().collect();
        for address in gone {
            self.endpoint_map.remove(&address.octets()).context("write the map ENDPOINTS")?;
            present.remove(&address);
        }
        let mut left = 0;
        for (address, endpoint) in desired {
            let before = present.get(address);
            if before == Some(endpoint) {
                continue;
            }
            if before.is_none() && present.len() >= MAX_ENDPOINTS as usize {
                left += 1;
                continue;
            }
            let value = bytemuck::cast::<Endpoint, EndpointBytes>(*endpoint);
            self.endpoint_map.insert(address.octets(), value, 0).context("write the map ENDPOINTS")?;
            present.insert(*address, *endpoint);
        }
        Ok(left)
    }

    /// The containers in the kernel's map.
    pub fn endpoints(&self) -> Result<Endpoints> {
        let entries = self.endpoint_map.iter().map(|entry| {
            let (address, value) = entry.context("read the map ENDPOINTS")?;
            Ok((address.into(), bytemuck::cast::<EndpointBytes, Endpoint>(value)))
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

    /// Whether the route maps have no room for another route.
    pub(crate) fn is_full(&self) -> bool {
        self.routes.is_full()
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

    /// Changes that were made in the route maps.
    pub(crate) fn route_writes(&self) -> RouteWrites {
        self.routes.writes
    }

    /// The counters of all CPUs, added up, with those of sets that this one replaces.
    pub fn counters(&self) -> Result<Counters> {
        let mut sum = self.counters.total()?;
        sum.add(&self.replaced.total(&self.counters)?);
        Ok(sum)
    }
}
