//! The counters of the overlay's programs. They go on when other programs with other maps take the place of these.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use aya::maps::{Array, IterableMap as _, MapData, PerCpuArray};
use overlay_ebpf::abi::{Carried, Counters};

use super::{
    ProgramSet,
    overlay_set::{CARRIED, COUNTERS},
    pinned_state::open_map,
};

// aya moves map values as plain bytes, so that the types need not implement its marker trait.
type CountersBytes = [u8; size_of::<Counters>()];
type CarriedBytes = [u8; size_of::<Carried>()];

/// What a set of programs counts, and what it took over from those before.
pub(super) struct CounterMaps {
    live: PerCpuArray<MapData, CountersBytes>,
    carried: Array<MapData, CarriedBytes>,
    /// The kernel's number of the map `live`.
    id: u32,
}

impl CounterMaps {
    /// Takes them out of a set.
    pub(super) fn take(programs: &mut ProgramSet) -> Result<Self> {
        Self::new(programs.take_map(COUNTERS)?, programs.take_map(CARRIED)?)
    }

    /// Opens those of another set, which may be of another version.
    pub(super) fn open(directory: &Path) -> Result<Self> {
        Self::new(open_map(directory, COUNTERS)?, open_map(directory, CARRIED)?)
    }

    fn new(live: PerCpuArray<MapData, CountersBytes>, carried: Array<MapData, CarriedBytes>) -> Result<Self> {
        let id = live.map().info().context("read the number of the map COUNTERS")?.id();
        Ok(Self { live, carried, id })
    }

    fn carried(&self) -> Result<Carried> {
        let carried = self.carried.get(&0, 0).context("read the map CARRIED")?;
        Ok(bytemuck::pod_read_unaligned(&carried))
    }

    /// Of all CPUs, and of earlier sets.
    pub(super) fn total(&self) -> Result<Counters> {
        let mut sum = self.carried()?.counters;
        for cpu in self.live.get(&0, 0).context("read the map COUNTERS")?.iter() {
            sum.add(&bytemuck::pod_read_unaligned(cpu));
        }
        Ok(sum)
    }

    /// Whether `other` is already in [`Self::total`].
    fn includes(&self, other: &Self) -> Result<bool> {
        Ok(other.id == self.id || self.carried()?.last_map == u64::from(other.id))
    }

    /// Adds what `other` has counted, once, however often this is called for it before another one's turn comes.
    fn carry(&mut self, other: &Self) -> Result<()> {
        if self.includes(other)? {
            return Ok(());
        }
        let mut carried = self.carried()?;
        carried.counters.add(&other.total()?);
        carried.last_map = other.id.into();
        let bytes: CarriedBytes = bytemuck::bytes_of(&carried).try_into().context("the size of CARRIED")?;
        self.carried.set(0, bytes, 0).context("write the map CARRIED")
    }
}

/// The counters of sets that another one replaces.
#[derive(Default)]
pub(super) struct Replaced(Vec<(CounterMaps, Option<PathBuf>)>);

impl Replaced {
    /// Those of the sets with maps in these directories, and why some cannot be had.
    pub(super) fn open(directories: Vec<PathBuf>) -> (Self, Vec<anyhow::Error>) {
        let (mut found, mut errors) = (Vec::new(), Vec::new());
        for directory in directories {
            match CounterMaps::open(&directory) {
                Ok(maps) => found.push((maps, Some(directory))),
                Err(error) => errors.push(error),
            }
        }
        (Self(found), errors)
    }

    /// Adds those of a set of this process.
    pub(super) fn push(&mut self, maps: CounterMaps) {
        if !self.0.iter().any(|(present, _)| present.id == maps.id) {
            self.0.push((maps, None));
        }
    }

    /// Their sum, but what `own` includes.
    pub(super) fn total(&self, own: &CounterMaps) -> Result<Counters> {
        let mut sum = Counters::ZERO;
        for (maps, _) in &self.0 {
            if !own.includes(maps)? {
                sum.add(&maps.total()?);
            }
        }
        Ok(sum)
    }

    /// Adds them to `own`, and removes their directories: a process that is killed meanwhile leaves nothing that is counted twice.
    pub(super) fn carry_to(&mut self, own: &mut CounterMaps) -> Result<()> {
        for (maps, directory) in std::mem::take(&mut self.0) {
            own.carry(&maps)?;
            if let Some(directory) = directory {
                super::generation::remove(&directory)?;
            }
        }
        Ok(())
    }
}
