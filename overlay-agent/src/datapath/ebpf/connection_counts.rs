//! What the programs of virtual service addresses count: of each endpoint, and of each virtual port.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData, MapError};
use overlay_ebpf::service::abi::Counts;

use super::{ProgramSet, route_maps::if_present};

// aya moves map values as plain numbers, so that the type need not implement its marker trait. In groups: bytemuck knows arrays of this
// length, but not of all numbers.
type Numbers = [[u64; 4]; size_of::<Counts>() / size_of::<[u64; 4]>()];

type CountMap = HashMap<MapData, u32, Numbers>;

/// The maps. Programs count only for numbers that have an entry.
pub(super) struct ConnectionCounts {
    backends: CountMap,
    services: CountMap,
}

impl ConnectionCounts {
    pub(super) fn take(programs: &mut ProgramSet) -> Result<Self> {
        Ok(Self {
            backends: programs.take_map("BACKEND_COUNTS")?,
            services: programs.take_map("SERVICE_COUNTS")?,
        })
    }

    /// The numbers of all endpoints and of all virtual ports that are counted.
    pub(super) fn counted(&self) -> Result<(BTreeSet<u32>, BTreeSet<u32>)> {
        let backends =
            self.backends.keys().collect::<Result<_, _>>().context("read the map BACKEND_COUNTS")?;
        let services =
            self.services.keys().collect::<Result<_, _>>().context("read the map SERVICE_COUNTS")?;
        Ok((backends, services))
    }

    /// Begins at 0 to count for the endpoint with this number.
    pub(super) fn begin_backend(&mut self, id: u32) -> Result<()> {
        begin(&mut self.backends, id).context("write the map BACKEND_COUNTS")
    }

    /// Forgets what was counted for the endpoint.
    pub(super) fn end_backend(&mut self, id: u32) -> Result<()> {
        if_present(self.backends.remove(&id)).context("write the map BACKEND_COUNTS")
    }

    /// What was counted for the endpoint.
    pub(super) fn of_backend(&self, id: u32) -> Result<Counts> {
        of(&self.backends, id).context("read the map BACKEND_COUNTS")
    }

    /// As [`Self::begin_backend`], for a virtual port.
    pub(super) fn begin_service(&mut self, number: u32) -> Result<()> {
        begin(&mut self.services, number).context("write the map SERVICE_COUNTS")
    }

    /// As [`Self::end_backend`], for a virtual port.
    pub(super) fn end_service(&mut self, number: u32) -> Result<()> {
        if_present(self.services.remove(&number)).context("write the map SERVICE_COUNTS")
    }

    /// As [`Self::of_backend`], for a virtual port.
    pub(super) fn of_service(&self, number: u32) -> Result<Counts> {
        of(&self.services, number).context("read the map SERVICE_COUNTS")
    }
}

fn begin(map: &mut CountMap, number: u32) -> Result<()> {
    Ok(map.insert(number, bytemuck::cast::<Counts, Numbers>(Counts::default()), 0)?)
}

/// 0 when nothing is counted for the number.
fn of(map: &CountMap, number: u32) -> Result<Counts> {
    match map.get(&number, 0) {
        Ok(numbers) => Ok(bytemuck::cast(numbers)),
        Err(MapError::KeyNotFound) => Ok(Counts::default()),
        Err(error) => Err(error.into()),
    }
}
