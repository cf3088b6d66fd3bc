//! The kernel's maps of virtual service addresses: written so that no connection meets a table that is half written.
//!
//! A change of a service goes to new slots under a new version of its table, then its entry switches to them in one step. The former
//! slots stay for [`GRACE`], for programs that read the former entry.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddrV4,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use aya::maps::{Array, HashMap, MapData, MapError};
use bytemuck::AnyBitPattern;
use overlay_ebpf::service::abi::{
    Address, Backend, Counts, MAX_SERVICES, MAX_SLOTS, MemberKey, ServiceEntry, ServiceKey, SlotKey, TCP,
};

use super::{
    ProgramSet,
    backend_ids::{BackendIds, Freed},
    connection_counts::ConnectionCounts,
    route_maps::if_present,
    service_adoption::{AdoptedService, Content, adopt, free_below, parked},
};
use crate::service::{
    front::{Front, Fronts, abi_address, socket_address},
    outcome::{Outcome, Outcomes},
    record::Protocol,
};

// aya moves map keys and values as plain bytes, so that the types need not implement its marker trait.
type ServiceKeyBytes = [u8; size_of::<ServiceKey>()];
type EntryBytes = [u8; size_of::<ServiceEntry>()];
type SlotKeyBytes = [u8; size_of::<SlotKey>()];
type MemberKeyBytes = [u8; size_of::<MemberKey>()];
type BackendBytes = [u8; size_of::<Backend>()];

/// How long what is replaced stays. Programs run for microseconds.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// The maps, and what was written to them.
pub(super) struct ServiceMaps {
    services: HashMap<MapData, ServiceKeyBytes, EntryBytes>,
    slots: HashMap<MapData, SlotKeyBytes, BackendBytes>,
    members: HashMap<MapData, MemberKeyBytes, BackendBytes>,
    connections: Array<MapData, u64>,
    counts: ConnectionCounts,
    written: BTreeMap<ServiceKey, Written>,
    retired: Vec<Retired>,
    ids: BackendIds,
    /// The version of the next table.
    next_table: u32,
    /// Numbers of services that are free, below `next_number`.
    free_numbers: Vec<u32>,
    next_number: u32,
    /// Whether the maps outlive the agent.
    is_pinned: bool,
}

/// A virtual port as it was written.
struct Written {
    /// `None` when an earlier agent wrote it, and it was not compared yet.
    front: Option<Front>,
    /// The table then.
    slots: Vec<Backend>,
    entry: ServiceEntry,
    backends: Vec<Backend>,
    /// Failed connections when [`ServiceMaps::outcomes`] looked last.
    failed: u64,
    /// What became of connections to the endpoints then.
    outcomes: Vec<(SocketAddrV4, Outcome)>,
}

/// A table that no entry names any more.
struct Retired {
    table: u32,
    slots: u32,
    since: Instant,
}

/// A virtual port in the kernel, read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelService {
    /// Its entry.
    pub entry: ServiceEntry,
    /// The endpoints of all slots, in order.
    pub slots: Vec<Address>,
    /// The endpoints that keep clients and sockets, in order of their addresses.
    pub members: Vec<Address>,
}

/// What the programs counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelCounts {
    /// Of virtual ports, since each was written first.
    pub ports: BTreeMap<ServiceKey, Counts>,
    /// Of endpoints by protocol and address, since each was first used by a service. One that several services use is counted once. Those
    /// that were removed are there as long as they have connections.
    pub endpoints: BTreeMap<(u8, Address), KernelEndpoint>,
}

/// An endpoint as the programs count it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelEndpoint {
    /// Open connections, and sockets that send to it.
    pub open: u64,
    /// What only grows.
    pub counts: Counts,
}

impl ServiceMaps {
    pub(super) fn take(programs: &mut ProgramSet) -> Result<Self> {
        Ok(Self {
            services: programs.take_map("SERVICES")?,
            slots: programs.take_map("SLOTS")?,
            members: programs.take_map("MEMBERS")?,
            connections: programs.take_map("CONNECTIONS")?,
            counts: ConnectionCounts::take(programs)?,
            written: BTreeMap::new(),
            retired: Vec::new(),
            ids: BackendIds::default(),
            next_table: 0,
            free_numbers: Vec::new(),
            next_number: 0,
            is_pinned: false,
        })
    }

    /// Takes over what an earlier agent left, and returns the number of its virtual ports. Fails when that contradicts itself. Nothing is
    /// removed that programs may use.
    pub(super) fn adopt(&mut self, now: Instant) -> Result<usize> {
        let (counted_backends, counted_services) = self.counts.counted()?;
        let content = Content {
            services: content(&self.services).context("read the map SERVICES")?,
            slots: content(&self.slots).context("read the map SLOTS")?,
            members: content(&self.members).context("read the map MEMBERS")?,
            counted_backends: counted_backends.clone(),
        };
        let adopted = adopt(content)?;
        self.is_pinned = true;
        self.ids = BackendIds::adopt(&adopted.endpoints, &adopted.unnamed, now);
        for endpoint in adopted.endpoints.values().filter(|endpoint| !counted_backends.contains(&endpoint.id))
        {
            self.counts.begin_backend(endpoint.id)?;
        }
        for stray in &adopted.strays {
            self.remove_member(stray.service, stray.address)?;
        }
        let retired = adopted.retired.into_iter();
        self.retired = retired.map(|(table, slots)| Retired { table, slots, since: now }).collect();
        self.next_table = adopted.next_table;
        let numbers: BTreeSet<u32> = adopted.services.values().map(|service| service.entry.service).collect();
        for number in counted_services.difference(&numbers) {
            self.counts.end_service(*number)?;
        }
        for number in numbers.difference(&counted_services) {
            self.counts.begin_service(*number)?;
        }
        (self.free_numbers, self.next_number) = free_below(&numbers);
        self.written = adopted
            .services
            .into_iter()
            .map(|(key, AdoptedService { entry, slots, members })| {
                (key, Written::adopted(entry, slots, members))
            })
            .collect();
        Ok(self.written.len())
    }

    /// Makes the virtual ports `desired`, as [`Self::change`] does.
    pub(super) fn reconcile(&mut self, desired: &Fronts, now: Instant) -> Result<usize> {
        let present: Vec<ServiceKey> = self.written.keys().copied().collect();
        self.change(present, desired, now)
    }

    /// Writes what differs from `desired` and removes those of `former` that are not in it. Others stay. Returns the number of virtual
    /// ports that changed. What does not fit stays as it was, and the error names the first. `now` is the time of the call.
    pub(super) fn change(
        &mut self,
        former: impl IntoIterator<Item = ServiceKey>,
        desired: &Fronts,
        now: Instant,
    ) -> Result<usize> {
        self.collect(now)?;
        let mut changes = 0;
        for key in former {
            if !desired.contains_key(&key) && self.written.contains_key(&key) {
                self.remove(key, now)?;
                changes += 1;
            }
        }
        let mut failures = Vec::new();
        for (key, front) in desired {
            if self.written.get_mut(key).is_some_and(|written| written.is(front)) {
                continue;
            }
            match self.write(*key, front, now) {
                Ok(()) => changes += 1,
                Err(error) => failures.push((*key, error)),
            }
        }
        let count = failures.len();
        match failures.into_iter().next() {
            None => Ok(changes),
            Some((key, error)) => {
                let [a, b, c, d] = key.address.ip;
                let port = u16::from_be_bytes(key.address.port);
                Err(error.context(format!(
                    "write the endpoints of {a}.{b}.{c}.{d}:{port} for the kernel; with it, {count} virtual ports stay as they were"
                )))
            }
        }
    }

    /// Removes what was replaced more than [`GRACE`] ago.
    pub(super) fn collect(&mut self, now: Instant) -> Result<()> {
        let is_due = |since: Instant| now.saturating_duration_since(since) >= GRACE;
        let (due, kept) =
            std::mem::take(&mut self.retired).into_iter().partition(|retired| is_due(retired.since));
        self.retired = kept;
        for Retired { table, slots, .. } in due {
            self.remove_slots(table, slots)?;
        }
        let connections = &self.connections;
        let free = self.ids.collect(is_due, |id| connections.get(&id, 0).unwrap_or(u64::MAX));
        for Freed { id, endpoint } in free {
            self.counts.end_backend(id)?;
            if let Some((protocol, address)) = endpoint.filter(|_| self.is_pinned) {
                let parked = parked(protocol, address);
                self.remove_member(parked.service, parked.address)?;
            }
        }
        Ok(())
    }

    /// Open connections to an endpoint, as the programs count them; `None` when no service has it.
    pub(super) fn connections(&self, protocol: u8, address: Address) -> Result<Option<u64>> {
        let id = self.ids.get(protocol, address);
        id.map(|id| self.connections.get(&id, 0).context("read the map CONNECTIONS")).transpose()
    }

    /// What the programs counted, of all virtual ports that were written and of their endpoints.
    pub(super) fn counts(&self) -> Result<KernelCounts> {
        let mut ports = BTreeMap::new();
        for (key, written) in &self.written {
            ports.insert(*key, self.counts.of_service(written.entry.service)?);
        }
        let mut endpoints = BTreeMap::new();
        for (protocol, address, id) in self.ids.iter() {
            let open = self.connections.get(&id, 0).context("read the map CONNECTIONS")?;
            let counts = self.counts.of_backend(id)?;
            endpoints.insert((protocol, address), KernelEndpoint { open, counts });
        }
        Ok(KernelCounts { ports, endpoints })
    }

    /// What became of TCP connections to the endpoints of virtual ports at which some have failed. Endpoints of a port are read only when
    /// more have failed since the last call: there may be many of them.
    pub(super) fn outcomes(&mut self) -> Result<Outcomes> {
        let Self { written, counts, .. } = self;
        let mut outcomes = Outcomes::new();
        let of_tcp = written.iter_mut().filter(|(key, _)| key.protocol == TCP);
        for written in of_tcp.map(|(_, written)| written) {
            let failed = counts.of_service(written.entry.service)?.failed;
            if failed != written.failed {
                let of_backend = |backend: &Backend| {
                    let counts = counts.of_backend(backend.id)?;
                    let outcome = Outcome { established: counts.latency.iter().sum(), failed: counts.failed };
                    anyhow::Ok((socket_address(backend.address), outcome))
                };
                written.outcomes = written.backends.iter().map(of_backend).collect::<Result<_>>()?;
                written.failed = failed;
            }
            // The counters of an endpoint are those of all ports, and some ports were read earlier.
            for (address, outcome) in &written.outcomes {
                let known = outcomes.entry((Protocol::Tcp, *address)).or_default();
                if outcome.established + outcome.failed > known.established + known.failed {
                    *known = *outcome;
                }
            }
        }
        Ok(outcomes)
    }

    /// All virtual ports, and the number of slots of all tables, read from the kernel.
    pub(super) fn read(&self) -> Result<(BTreeMap<ServiceKey, KernelService>, usize)> {
        let mut slots = BTreeMap::new();
        for entry in self.slots.iter() {
            let (key, backend) = entry.context("read the map SLOTS")?;
            let backend = bytemuck::cast::<BackendBytes, Backend>(backend);
            slots.insert(bytemuck::cast::<SlotKeyBytes, SlotKey>(key), backend.address);
        }
        let mut members: BTreeMap<u32, Vec<Address>> = BTreeMap::new();
        for entry in self.members.iter() {
            let (key, _) = entry.context("read the map MEMBERS")?;
            let key = bytemuck::cast::<MemberKeyBytes, MemberKey>(key);
            members.entry(key.service).or_default().push(key.address);
        }
        let mut services = BTreeMap::new();
        for entry in self.services.iter() {
            let (key, entry) = entry.context("read the map SERVICES")?;
            let entry = bytemuck::cast::<EntryBytes, ServiceEntry>(entry);
            let of_table =
                (0..entry.slots).filter_map(|slot| slots.get(&SlotKey { table: entry.table, slot }));
            let mut members = members.remove(&entry.service).unwrap_or_default();
            members.sort_unstable();
            let service = KernelService { entry, slots: of_table.copied().collect(), members };
            services.insert(bytemuck::cast::<ServiceKeyBytes, ServiceKey>(key), service);
        }
        Ok((services, slots.len()))
    }

    fn remove(&mut self, key: ServiceKey, now: Instant) -> Result<()> {
        if_present(self.services.remove(&bytemuck::cast::<ServiceKey, ServiceKeyBytes>(key)))
            .context("write the map SERVICES")?;
        let Some(Written { entry, backends, .. }) = self.written.remove(&key) else { return Ok(()) };
        self.retired.push(Retired { table: entry.table, slots: entry.slots, since: now });
        self.free_number(entry.service);
        for backend in backends {
            self.release(key.protocol, backend, now);
            self.remove_member(entry.service, backend.address)?;
        }
        Ok(())
    }

    /// Writes a virtual port. After an error, it is as before.
    fn write(&mut self, key: ServiceKey, front: &Front, now: Instant) -> Result<()> {
        let former = self.written.get(&key).map(|written| written.entry.service);
        let number = former.map_or_else(|| self.take_number(), Ok)?;
        let result = self.prepare(key, front, number, now).and_then(|prepared| {
            let entry = prepared.entry;
            let key_bytes = bytemuck::cast::<ServiceKey, ServiceKeyBytes>(key);
            let written = self.services.insert(key_bytes, bytemuck::cast::<_, EntryBytes>(entry), 0);
            if let Err(error) = written {
                self.undo(key, number, entry, &prepared.backends, now);
                return Err(full_or(error, "SERVICES", MAX_SERVICES));
            }
            Ok(prepared)
        });
        let prepared = match result {
            Ok(prepared) => prepared,
            Err(error) => {
                if former.is_none() {
                    self.free_number(number);
                }
                return Err(error);
            }
        };
        let kept: Vec<Address> = prepared.backends.iter().map(|backend| backend.address).collect();
        if let Some(former) = self.written.insert(key, prepared) {
            self.retired.push(Retired { table: former.entry.table, slots: former.entry.slots, since: now });
            for backend in former.backends {
                self.release(key.protocol, backend, now);
                if !kept.contains(&backend.address) {
                    self.remove_member(number, backend.address)?;
                }
            }
        }
        Ok(())
    }

    /// Writes the endpoints and a new table of a virtual port, which no entry names yet.
    fn prepare(&mut self, key: ServiceKey, front: &Front, number: u32, now: Instant) -> Result<Written> {
        let table = self.next_table;
        self.next_table = table.wrapping_add(1);
        let slots = front.slots();
        let entry = ServiceEntry {
            table,
            slots: u32::try_from(slots.len()).context("too many slots")?,
            service: number,
            affinity_ttl_s: front.affinity_ttl_s,
            policy: front.abi_policy() as u32,
            flags: 0,
        };
        let mut backends = Vec::with_capacity(front.backends.len());
        let prepared = self.write_members(key, front, number, &mut backends);
        let prepared = prepared.and_then(|()| self.write_slots(table, &slots, &backends));
        if let Err(error) = prepared {
            self.undo(key, number, entry, &backends, now);
            return Err(error);
        }
        let (slots, outcomes) = (Vec::new(), Vec::new());
        Ok(Written { front: Some(front.clone()), slots, entry, backends, failed: 0, outcomes })
    }

    fn write_members(
        &mut self,
        key: ServiceKey,
        front: &Front,
        number: u32,
        backends: &mut Vec<Backend>,
    ) -> Result<()> {
        for backend in &front.backends {
            let address = abi_address(backend.address);
            let is_new = self.ids.get(key.protocol, address).is_none();
            let is_parked = self.is_pinned && self.ids.is_released(key.protocol, address);
            let id = self.ids.acquire(key.protocol, address)?;
            let backend = Backend { address, weight: backend.weight.max(1), id };
            backends.push(backend);
            if is_new {
                self.counts.begin_backend(id)?;
            }
            let member = bytemuck::cast::<_, MemberKeyBytes>(MemberKey::new(number, address));
            let written = self.members.insert(member, bytemuck::cast::<_, BackendBytes>(backend), 0);
            written.map_err(|error| full_or(error, "MEMBERS", MAX_SLOTS))?;
            if is_parked {
                let parked = parked(key.protocol, address);
                self.remove_member(parked.service, parked.address)?;
            }
        }
        Ok(())
    }

    /// One user of an endpoint less. After the last one, an agent that starts while it has connections finds its number where it is parked.
    fn release(&mut self, protocol: u8, backend: Backend, now: Instant) {
        let Some(id) = self.ids.release(protocol, backend.address, now).filter(|_| self.is_pinned) else {
            return;
        };
        let key = bytemuck::cast::<_, MemberKeyBytes>(parked(protocol, backend.address));
        let value = bytemuck::cast::<_, BackendBytes>(Backend { id, ..backend });
        // Without room, that agent keeps the number, but does not know the endpoint.
        let _ = self.members.insert(key, value, 0);
    }

    fn write_slots(&mut self, table: u32, slots: &[u32], backends: &[Backend]) -> Result<()> {
        for (slot, index) in (0..).zip(slots) {
            let backend = backends.get(*index as usize).context("a slot of no endpoint")?;
            let key = bytemuck::cast::<_, SlotKeyBytes>(SlotKey { table, slot });
            let written = self.slots.insert(key, bytemuck::cast::<_, BackendBytes>(*backend), 0);
            written.map_err(|error| full_or(error, "SLOTS", MAX_SLOTS))?;
        }
        Ok(())
    }

    /// Removes what [`Self::prepare`] wrote, as far as the virtual port did not have it before.
    fn undo(
        &mut self,
        key: ServiceKey,
        number: u32,
        entry: ServiceEntry,
        backends: &[Backend],
        now: Instant,
    ) {
        // What cannot be removed now is tried again later.
        let _ = self.remove_slots(entry.table, entry.slots);
        for backend in backends {
            self.release(key.protocol, *backend, now);
            let former = self.written.get(&key).map(|written| written.backends.as_slice());
            let is_kept = former.unwrap_or_default().iter().any(|former| former.address == backend.address);
            if !is_kept {
                let _ = self.remove_member(number, backend.address);
            }
        }
    }

    fn remove_slots(&mut self, table: u32, slots: u32) -> Result<()> {
        for slot in 0..slots {
            let key = bytemuck::cast::<_, SlotKeyBytes>(SlotKey { table, slot });
            if_present(self.slots.remove(&key)).context("write the map SLOTS")?;
        }
        Ok(())
    }

    fn remove_member(&mut self, number: u32, address: Address) -> Result<()> {
        let key = bytemuck::cast::<_, MemberKeyBytes>(MemberKey::new(number, address));
        if_present(self.members.remove(&key)).context("write the map MEMBERS")
    }

    /// The number of another virtual port, for which counting begins.
    fn take_number(&mut self) -> Result<u32> {
        let number = match self.free_numbers.pop() {
            Some(number) => number,
            None if self.next_number < MAX_SERVICES => {
                self.next_number += 1;
                self.next_number - 1
            }
            None => {
                return Err(anyhow!(
                    "there are {MAX_SERVICES} virtual ports, no more are possible: remove services"
                ));
            }
        };
        self.counts.begin_service(number).inspect_err(|_| self.free_numbers.push(number))?;
        Ok(number)
    }

    fn free_number(&mut self, number: u32) {
        // What is left there, the next virtual port with the number overwrites.
        let _ = self.counts.end_service(number);
        self.free_numbers.push(number);
    }
}

impl Written {
    fn adopted(entry: ServiceEntry, slots: Vec<Backend>, backends: Vec<Backend>) -> Self {
        Self { front: None, slots, entry, backends, failed: 0, outcomes: Vec::new() }
    }

    /// Whether it was written so.
    fn is(&mut self, front: &Front) -> bool {
        match &self.front {
            Some(known) => return known == front,
            None if !self.is_like(front) => return false,
            None => {}
        }
        (self.front, self.slots) = (Some(front.clone()), Vec::new());
        true
    }

    /// Whether an earlier agent wrote what would be written now.
    fn is_like(&self, front: &Front) -> bool {
        let Self { entry, slots, backends, .. } = self;
        let wanted: BTreeMap<Address, u16> = front
            .backends
            .iter()
            .map(|backend| (abi_address(backend.address), backend.weight.max(1)))
            .collect();
        let present: BTreeMap<Address, u16> =
            backends.iter().map(|backend| (backend.address, backend.weight)).collect();
        let ids: BTreeMap<Address, u32> =
            backends.iter().map(|backend| (backend.address, backend.id)).collect();
        let is_slot = |(slot, index): (&Backend, &u32)| {
            let backend = front.backends.get(*index as usize);
            backend.is_some_and(|backend| abi_address(backend.address) == slot.address)
                && wanted.get(&slot.address) == Some(&slot.weight)
                && ids.get(&slot.address) == Some(&slot.id)
        };
        let table = front.slots();
        (entry.policy, entry.affinity_ttl_s) == (front.abi_policy() as u32, front.affinity_ttl_s)
            && (entry.slots as usize, slots.len()) == (table.len(), table.len())
            && wanted == present
            && slots.iter().zip(&table).all(is_slot)
    }
}

/// All entries of a map.
fn content<K: Ord + AnyBitPattern, V: AnyBitPattern, const N: usize, const M: usize>(
    map: &HashMap<MapData, [u8; N], [u8; M]>,
) -> Result<BTreeMap<K, V>> {
    let entries = map.iter().map(|entry| {
        let (key, value) = entry?;
        Ok((bytemuck::pod_read_unaligned(&key), bytemuck::pod_read_unaligned(&value)))
    });
    entries.collect()
}

/// Names the limit when a map is full.
fn full_or(error: MapError, map: &str, limit: u32) -> anyhow::Error {
    let is_full = matches!(&error, MapError::SyscallError(error)
        if error.io_error.raw_os_error() == Some(nix::libc::E2BIG));
    let error = anyhow::Error::new(error);
    match is_full {
        true => error.context(format!(
            "the kernel's map {map} is full with {limit} entries: use fewer services, endpoints or different weights"
        )),
        false => error.context(format!("write the map {map}")),
    }
}
