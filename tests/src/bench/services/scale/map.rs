//! Reads the agent's maps of services in the kernel.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, Map, MapData, MapError};
use overlay_ebpf::service::abi::{Address, Backend, ServiceEntry, ServiceKey, SlotKey};

use crate::bench::kernel_map;

/// Poll interval: short compared to the measured times, long enough not to occupy the core.
const PAUSE: Duration = Duration::from_micros(200);
/// Limit for each wait.
const TIMEOUT: Duration = Duration::from_secs(20);

// aya moves map keys and values as plain bytes.
type KeyBytes = [u8; size_of::<ServiceKey>()];
type EntryBytes = [u8; size_of::<ServiceEntry>()];
type SlotKeyBytes = [u8; size_of::<SlotKey>()];
type BackendBytes = [u8; size_of::<Backend>()];

/// The maps of one agent.
pub(super) struct ServiceMap {
    services: HashMap<MapData, KeyBytes, EntryBytes>,
    slots: HashMap<MapData, SlotKeyBytes, BackendBytes>,
}

impl ServiceMap {
    /// The maps of the process `pid` that have the virtual port `known`; `None` while there are none.
    pub(super) fn find(pid: u32, known: ServiceKey) -> Result<Option<Self>> {
        let services = kernel_map::open(pid, "SERVICES")?;
        for (services, slots) in services.into_iter().zip(kernel_map::open(pid, "SLOTS")?) {
            let services = HashMap::try_from(Map::HashMap(services))?;
            let map = Self { services, slots: HashMap::try_from(Map::HashMap(slots))? };
            if map.entry(known)?.is_some() {
                return Ok(Some(map));
            }
        }
        Ok(None)
    }

    /// Number of virtual ports.
    pub(super) fn len(&self) -> Result<usize> {
        let mut count = 0;
        for key in self.services.keys() {
            key.context("read the agent's map of services")?;
            count += 1;
        }
        Ok(count)
    }

    fn entry(&self, key: ServiceKey) -> Result<Option<ServiceEntry>> {
        match self.services.get(&bytemuck::cast::<ServiceKey, KeyBytes>(key), 0) {
            Ok(entry) => Ok(Some(bytemuck::cast::<EntryBytes, ServiceEntry>(entry))),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("read the agent's map of services"),
        }
    }

    /// Whether connections to a virtual port may go to an endpoint.
    fn has(&self, entry: &ServiceEntry, endpoint: Address) -> Result<bool> {
        for slot in 0..entry.slots {
            let key = bytemuck::cast::<SlotKey, SlotKeyBytes>(SlotKey { table: entry.table, slot });
            let backend = self.slots.get(&key, 0).context("read the agent's map of slots")?;
            if bytemuck::cast::<BackendBytes, Backend>(backend).address == endpoint {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Waits until connections to a virtual port may go to an endpoint, or may not, and returns the time at which it was seen.
    pub(super) fn await_endpoint(
        &self,
        key: ServiceKey,
        endpoint: Address,
        present: bool,
    ) -> Result<Instant> {
        let begun = Instant::now();
        let mut last = None;
        loop {
            let entry = self.entry(key)?.context("the virtual port is gone")?;
            let now = Instant::now();
            // A table of slots is never written again.
            if last != Some(entry.table) && self.has(&entry, endpoint)? == present {
                return Ok(now);
            }
            last = Some(entry.table);
            ensure!(now - begun < TIMEOUT, "a change is not in the map after {TIMEOUT:?}");
            thread::sleep(PAUSE);
        }
    }
}
