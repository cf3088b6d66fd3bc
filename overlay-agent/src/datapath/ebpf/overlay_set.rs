//! The overlay's set of programs: hooks, and maps as typed values.

use std::{collections::BTreeMap, io::ErrorKind, net::Ipv4Addr};

use anyhow::{Context as _, Result, bail};
use aya::maps::{Array, HashMap, LpmTrie, MapData, MapError, PerCpuArray, lpm_trie::Key};
use ipnet::Ipv4Net;
use overlay_ebpf::{
    abi::{Config, Counters, Endpoint, MAX_ENDPOINTS, MAX_FLOWS, MAX_ROUTES, NextHop, UnderlayValue},
    bypass::Bypass,
};

use super::{
    Hook, HookKind, ProgramSet, btf,
    questions::{self, Answering},
};
use crate::route::{NextHops, Route, RouteChange, Subnet, diff};

/// tc egress of the overlay device.
pub const EGRESS: Hook = Hook { program: "ovl_egress", kind: HookKind::TcEgress };
/// tc egress of a device with an Ethernet header, as in test runs.
pub const EGRESS_ETHERNET: Hook = Hook { program: "ovl_egress_ethernet", kind: HookKind::TcEgress };
/// tc ingress of an underlay device.
pub const INGRESS: Hook = Hook { program: "ovl_ingress", kind: HookKind::TcIngress };
/// tc ingress of a device that leads to a container.
pub const FROM_LOCAL: Hook = Hook { program: "ovl_from_local", kind: HookKind::TcIngress };
/// tc egress of a device that leads to containers, for [`Bypass::Flows`].
pub const TO_LOCAL: Hook = Hook { program: "ovl_to_local", kind: HookKind::TcEgress };
/// Those on devices of containers.
pub(crate) const LOCAL: [Hook; 2] = [FROM_LOCAL, TO_LOCAL];
/// XDP of an underlay device; needs [`INGRESS`] behind it.
pub const XDP: Hook = Hook { program: "ovl_xdp", kind: HookKind::Xdp };

// aya moves map values as plain bytes, so that the types need not implement its marker trait.
type ConfigBytes = [u8; size_of::<Config>()];
type CountersBytes = [u8; size_of::<Counters>()];
type NextHopBytes = [u8; size_of::<NextHop>()];
type EndpointBytes = [u8; size_of::<Endpoint>()];
type UnderlayBytes = [u8; size_of::<UnderlayValue>()];

/// The underlay devices, by index.
pub type Underlays = BTreeMap<u32, UnderlayValue>;

/// The containers of this host, by address.
pub type Endpoints = BTreeMap<Ipv4Addr, Endpoint>;

/// Constants of the loaded programs.
#[derive(Clone, Copy, Debug, Default)]
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
    route_map: LpmTrie<MapData, [u8; 4], NextHopBytes>,
    underlay_map: HashMap<MapData, u32, UnderlayBytes>,
    endpoint_map: HashMap<MapData, [u8; 4], EndpointBytes>,
    counters: PerCpuArray<MapData, CountersBytes>,
    /// With [`Bypass::Flows`].
    _answering: Option<Answering>,
    /// What was written to the route map.
    routes: NextHops,
}

impl OverlaySet {
    /// Loads the maps; see [`ProgramSet::load`]. With [`Bypass::Flows`], it panics outside of a tokio runtime, and fails when the
    /// kernel does not describe its types.
    pub fn load(object: &[u8], options: LoadOptions) -> Result<Self> {
        let LoadOptions { bypass, log } = options;
        let (nfct, flows) = match bypass {
            Bypass::Flows => (btf::offset("sk_buff", "_nfct")?.unwrap_or(0), MAX_FLOWS),
            Bypass::Off | Bypass::All => (0, 1),
        };
        let constants = [("BYPASS", bypass as u32), ("NFCT_OFFSET", nfct)];
        let sizes = [("FLOWS", flows), ("LENIENT", flows)];
        let mut programs = ProgramSet::load("overlay", object, &constants, &sizes, log)?;
        let answering = match bypass {
            Bypass::Flows => {
                Some(questions::answer(programs.take_map("QUESTIONS")?, programs.take_map("LENIENT")?)?)
            }
            Bypass::Off | Bypass::All => None,
        };
        Ok(Self {
            _answering: answering,
            config: programs.take_map("CONFIG")?,
            route_map: programs.take_map("ROUTES")?,
            underlay_map: programs.take_map("UNDERLAYS")?,
            endpoint_map: programs.take_map("ENDPOINTS")?,
            counters: programs.take_map("COUNTERS")?,
            programs,
            routes: NextHops::new(),
        })
    }

    /// Writes this host's configuration.
    pub fn set_config(&mut self, config: &Config) -> Result<()> {
        self.config.set(0, bytemuck::cast::<Config, ConfigBytes>(*config), 0).context("write the map CONFIG")
    }

    /// The configuration in the kernel's map.
    pub fn config(&self) -> Result<Config> {
        let config = self.config.get(&0, 0).context("read the map CONFIG")?;
        Ok(bytemuck::cast::<ConfigBytes, Config>(config))
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

    /// Makes the route map hold exactly `desired`. Fails as [`OverlaySet::apply_routes`]; the next call continues from there.
    pub fn set_routes(&mut self, desired: &NextHops) -> Result<()> {
        self.apply_routes(&diff(&self.routes, desired))
    }

    /// Makes `changes` in the route map, in order. Fails at the first that the kernel refuses, or when there are more routes
    /// than the map holds: then those that fit are there.
    pub fn apply_routes(&mut self, changes: &[RouteChange<NextHop>]) -> Result<()> {
        // Additions come first, so a full map takes some of them only after others have been removed.
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
                "the kernel's map holds {MAX_ROUTES} routes and is full: {left} more are not in it and packets to them are \
                 dropped; use larger subnets, or --datapath tun"
            );
        }
        Ok(())
    }

    fn is_full_for(&self, subnet: Subnet) -> bool {
        self.routes.len() >= MAX_ROUTES as usize && !self.routes.contains_key(&subnet)
    }

    fn set_route(&mut self, Route { subnet, via }: Route<NextHop>) -> Result<()> {
        self.route_map
            .insert(&key(subnet), bytemuck::cast::<NextHop, NextHopBytes>(via), 0)
            .with_context(|| format!("write the route {subnet} via {}", Ipv4Addr::from(via.peer)))?;
        self.routes.insert(subnet, via);
        Ok(())
    }

    fn remove_route(&mut self, subnet: Subnet) -> Result<()> {
        // One that did not fit is not in the map.
        if self.routes.contains_key(&subnet) {
            match self.route_map.remove(&key(subnet)) {
                // Removed by another process.
                Err(MapError::SyscallError(error)) if error.io_error.kind() == ErrorKind::NotFound => {}
                removed => removed.with_context(|| format!("remove the route {subnet}"))?,
            }
            self.routes.remove(&subnet);
        }
        Ok(())
    }

    /// The routes in the kernel's map.
    pub fn routes(&self) -> Result<NextHops> {
        let mut routes = NextHops::new();
        for entry in self.route_map.iter() {
            let (key, via) = entry.context("read the map ROUTES")?;
            let prefix = Ipv4Net::new(key.data().into(), u8::try_from(key.prefix_len())?)?;
            routes.insert(Subnet::containing(prefix), bytemuck::cast::<NextHopBytes, NextHop>(via));
        }
        Ok(routes)
    }

    /// Reads the kernel's map and returns how many of its routes are not as they were written. The next
    /// [`OverlaySet::set_routes`] repairs them.
    pub fn check_routes(&mut self) -> Result<usize> {
        let found = self.routes()?;
        let foreign = diff(&self.routes, &found).len();
        self.routes = found;
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

fn key(subnet: Subnet) -> Key<[u8; 4]> {
    Key::new(u32::from(subnet.prefix().prefix_len()), subnet.base().octets())
}
