//! What the programs of virtual service addresses count: of each endpoint, and of each virtual port.

use anyhow::{Context as _, Result};
use aya::{
    maps::{MapData, MapError, PerCpuHashMap, PerCpuValues},
    util::nr_cpus,
};
use overlay_ebpf::service::abi::Counts;

use super::{ProgramSet, route_maps::if_present};

// aya moves map values as plain numbers, so that the type need not implement its marker trait. In groups: bytemuck knows arrays of this
// length, but not of all numbers.
type Numbers = [[u64; 4]; size_of::<Counts>() / size_of::<[u64; 4]>()];

type CountMap = PerCpuHashMap<MapData, u32, Numbers>;

/// The maps. Programs count only for numbers that have an entry.
pub(super) struct ConnectionCounts {
    backends: CountMap,
    services: CountMap,
    cpus: usize,
}

impl ConnectionCounts {
    pub(super) fn take(programs: &mut ProgramSet) -> Result<Self> {
        let cpus = nr_cpus().map_err(|(path, error)| anyhow::Error::new(error).context(path));
        Ok(Self {
            backends: programs.take_map("BACKEND_COUNTS")?,
            services: programs.take_map("SERVICE_COUNTS")?,
            cpus: cpus.context("count the CPUs")?,
        })
    }

    /// Begins at 0 to count for the endpoint with this number.
    pub(super) fn begin_backend(&mut self, id: u32) -> Result<()> {
        begin(&mut self.backends, id, self.cpus).context("write the map BACKEND_COUNTS")
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
        begin(&mut self.services, number, self.cpus).context("write the map SERVICE_COUNTS")
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

fn begin(map: &mut CountMap, number: u32, cpus: usize) -> Result<()> {
    let zero = PerCpuValues::try_from(vec![bytemuck::cast::<Counts, Numbers>(Counts::default()); cpus])
        .context("one value for each CPU")?;
    Ok(map.insert(number, zero, 0)?)
}

/// The sum of all CPUs; 0 when nothing is counted for the number.
fn of(map: &CountMap, number: u32) -> Result<Counts> {
    let values = match map.get(&number, 0) {
        Ok(values) => values,
        Err(MapError::KeyNotFound) => return Ok(Counts::default()),
        Err(error) => return Err(error.into()),
    };
    let mut sum: Numbers = bytemuck::cast(Counts::default());
    for of_cpu in values.iter() {
        for (sum, value) in sum.as_flattened_mut().iter_mut().zip(of_cpu.as_flattened()) {
            *sum = sum.wrapping_add(*value);
        }
    }
    Ok(bytemuck::cast(sum))
}
