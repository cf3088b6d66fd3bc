//! What is pinned for an overlay device, read without loading anything and without changing anything.

use std::path::Path;

use anyhow::{Context as _, Result};
use aya::maps::{Array, Map, MapData, MapError};
use overlay_ebpf::abi::{Config, Counters};

use super::{
    Pins, TcxLinks,
    counter_maps::CounterMaps,
    overlay_set::{COUNTERS, ConfigBytes},
    pins::pinned_link,
    route_maps,
};
use crate::route::NextHops;

/// A program whose link is pinned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PinnedProgram {
    /// Its name.
    pub(crate) program: String,
    /// The device that it was attached to.
    pub(crate) ifindex: u32,
    /// Whether the kernel still lists it there.
    pub(crate) is_attached: bool,
}

/// Programs and maps of an overlay device.
#[derive(Clone, Debug)]
pub(crate) struct PinnedState {
    pub(crate) programs: Vec<PinnedProgram>,
    /// The maps, unless they are of another version.
    pub(crate) maps: Option<PinnedMaps>,
}

/// What the maps hold.
#[derive(Clone, Debug)]
pub(crate) struct PinnedMaps {
    pub(crate) config: Config,
    pub(crate) routes: NextHops,
    pub(crate) counters: Counters,
}

impl PinnedState {
    /// Reads it. Fails when the kernel refuses the maps, or they have another shape than this version's.
    pub(crate) fn read(pins: &Pins) -> Result<Self> {
        let maps = pins.present_maps().map(|directory| PinnedMaps::read(&directory)).transpose()?;
        Ok(Self { programs: programs(pins)?, maps })
    }

    /// Whether a program of this name is attached.
    pub(crate) fn runs(&self, program: &str) -> bool {
        self.programs.iter().any(|pinned| pinned.is_attached && pinned.program == program)
    }
}

impl PinnedMaps {
    fn read(directory: &Path) -> Result<Self> {
        let config: Array<MapData, ConfigBytes> = open_map(directory, "CONFIG")?;
        let config = config.get(&0, 0).context("read the map CONFIG")?;
        Ok(Self {
            config: bytemuck::cast::<ConfigBytes, Config>(config),
            routes: route_maps::pinned(directory)?,
            counters: counters(directory)?,
        })
    }
}

/// What the programs of an earlier agent have counted; `None` when there is no map of this version.
pub(crate) fn left_counters(pins: &Pins) -> Result<Option<Counters>> {
    let maps = pins.present_maps().filter(|directory| directory.join(COUNTERS).exists());
    maps.map(|directory| counters(&directory)).transpose()
}

fn counters(directory: &Path) -> Result<Counters> {
    CounterMaps::open(directory)?.total()
}

fn programs(pins: &Pins) -> Result<Vec<PinnedProgram>> {
    let mut opened = Vec::new();
    for path in pins.links()? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Others lead to no device.
        let Some((program, Ok(ifindex))) = name.rsplit_once(':').map(|(name, index)| (name, index.parse()))
        else {
            continue;
        };
        if let Some(link) = pinned_link(&path)? {
            opened.push((program.to_owned(), ifindex, link));
        }
    }
    let links = TcxLinks::read()?;
    let programs = opened.into_iter().map(|(program, ifindex, link)| {
        Ok(PinnedProgram { is_attached: links.device(&link)? == Some(ifindex), program, ifindex })
    });
    programs.collect()
}

/// Opens the map that is pinned under this name.
pub(super) fn open_map<M: TryFrom<Map, Error = MapError>>(directory: &Path, name: &str) -> Result<M> {
    let path = directory.join(name);
    let open = || M::try_from(Map::from_map_data(MapData::from_pin(&path)?)?);
    open().with_context(|| format!("open the pinned map {}", path.display()))
}
