//! What an earlier agent left in the maps of virtual service addresses, whenever it was killed. Pure.
//!
//! Entries of `SERVICES` are the truth, because programs begin there. What no entry leads to is left from a change that was not completed, or
//! was replaced and not removed yet.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail, ensure};
use overlay_ebpf::service::abi::{
    Address, Backend, MAX_BACKENDS, MAX_SERVICES, MAX_SLOTS, MemberKey, ServiceEntry, ServiceKey, SlotKey,
};

/// [`MemberKey::service`] of endpoints that no service has any more, but connections: no service has such a number, so no program finds
/// them. The last byte is the protocol.
const PARKED: u32 = 0xffff_ff00;

/// The key under which an agent that starts finds the number of such an endpoint.
pub(super) fn parked(protocol: u8, address: Address) -> MemberKey {
    MemberKey::new(PARKED | u32::from(protocol), address)
}

/// What the maps hold.
#[derive(Debug, Default)]
pub(super) struct Content {
    pub(super) services: BTreeMap<ServiceKey, ServiceEntry>,
    pub(super) slots: BTreeMap<SlotKey, Backend>,
    pub(super) members: BTreeMap<MemberKey, Backend>,
    /// The numbers of endpoints that are counted.
    pub(super) counted_backends: BTreeSet<u32>,
}

/// What that means.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Adopted {
    pub(super) services: BTreeMap<ServiceKey, AdoptedService>,
    /// All endpoints with a number.
    pub(super) endpoints: BTreeMap<(u8, Address), AdoptedEndpoint>,
    /// Numbers of endpoints that nothing names: sockets may be connected to them.
    pub(super) unnamed: BTreeSet<u32>,
    /// Members of no service.
    pub(super) strays: Vec<MemberKey>,
    /// Tables that no entry names, with the number of their slots.
    pub(super) retired: BTreeMap<u32, u32>,
    /// The version of the next table.
    pub(super) next_table: u32,
}

/// A virtual port.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct AdoptedService {
    pub(super) entry: ServiceEntry,
    /// Its table; empty when a part is missing.
    pub(super) slots: Vec<Backend>,
    pub(super) members: Vec<Backend>,
}

/// An endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AdoptedEndpoint {
    pub(super) id: u32,
    /// The number of virtual ports that have it.
    pub(super) users: u32,
}

/// Fails when the maps contradict themselves, which no agent leaves.
pub(super) fn adopt(content: Content) -> Result<Adopted> {
    let Content { services, slots, members, counted_backends } = content;
    let last_table =
        slots.keys().map(|key| key.table).chain(services.values().map(|entry| entry.table)).max();
    let next_table = last_table.map_or(0, |last: u32| last.wrapping_add(1));
    let mut adopted = Adopted { next_table, ..Adopted::default() };

    let mut protocols = BTreeMap::new();
    for (key, entry) in services {
        ensure!(entry.service < MAX_SERVICES, "the number {} of a virtual port is too high", entry.service);
        ensure!(entry.slots <= MAX_SLOTS, "a virtual port has {} slots", entry.slots);
        if protocols.insert(entry.service, key).is_some() {
            bail!("two virtual ports have the number {}", entry.service);
        }
        let table = (0..entry.slots).map(|slot| slots.get(&SlotKey { table: entry.table, slot }).copied());
        let slots = table.collect::<Option<Vec<_>>>().unwrap_or_default();
        adopted.services.insert(key, AdoptedService { entry, slots, members: Vec::new() });
    }
    let named: BTreeSet<u32> = adopted.services.values().map(|service| service.entry.table).collect();
    ensure!(named.len() == adopted.services.len(), "two virtual ports have one table");
    for key in slots.keys().filter(|key| !named.contains(&key.table)) {
        let length = adopted.retired.entry(key.table).or_default();
        *length = (*length).max(key.slot.saturating_add(1));
    }

    let mut owners: BTreeMap<u32, (u8, Address)> = BTreeMap::new();
    let (mut unowned, mut are_parked) = (counted_backends, Vec::new());
    for (key, backend) in members {
        ensure!(backend.id < MAX_BACKENDS, "the number {} of an endpoint is too high", backend.id);
        ensure!(backend.address == key.address, "an endpoint has two addresses");
        let [.., last] = key.service.to_be_bytes();
        let service = protocols.get(&key.service);
        let owner = match service {
            Some(service) => (service.protocol, key.address),
            None if key.service & PARKED == PARKED => (last, key.address),
            None => {
                adopted.strays.push(key);
                unowned.insert(backend.id);
                continue;
            }
        };
        let same = *owners.entry(backend.id).or_insert(owner) == owner;
        ensure!(same, "two endpoints have the number {}", backend.id);
        let endpoint = adopted.endpoints.entry(owner);
        let endpoint = endpoint.or_insert(AdoptedEndpoint { id: backend.id, users: 0 });
        ensure!(endpoint.id == backend.id, "an endpoint has the numbers {} and {}", endpoint.id, backend.id);
        match service.and_then(|key| adopted.services.get_mut(key)) {
            Some(service) => {
                endpoint.users += 1;
                service.members.push(backend);
            }
            None => are_parked.push((owner, key)),
        }
    }
    // A service has it again.
    let is_used = |owner| adopted.endpoints.get(owner).is_some_and(|endpoint| endpoint.users > 0);
    adopted.strays.extend(are_parked.iter().filter(|(owner, _)| is_used(owner)).map(|(_, key)| *key));
    adopted.unnamed = unowned.into_iter().filter(|id| !owners.contains_key(id)).collect();
    Ok(adopted)
}

/// The numbers below the first one above all of `used`, and that one.
pub(super) fn free_below(used: &BTreeSet<u32>) -> (Vec<u32>, u32) {
    let next = used.last().map_or(0, |last| last + 1);
    ((0..next).filter(|number| !used.contains(number)).collect(), next)
}

#[cfg(test)]
mod tests {
    use overlay_ebpf::service::abi::{TCP, UDP};

    use super::*;

    fn address(number: u8) -> Address {
        Address { ip: [10, 244, 1, number], port: [0, 80] }
    }

    fn port(number: u8, protocol: u8) -> ServiceKey {
        ServiceKey::new(Address { ip: [10, 251, 0, number], port: [0, 80] }, protocol)
    }

    fn endpoint(number: u8, id: u32) -> Backend {
        Backend { address: address(number), weight: 1, id }
    }

    /// A TCP port with number 5, and a UDP port with number 7, of which each has the endpoints 1 and 2.
    fn content() -> Content {
        let mut content = Content::default();
        for (number, protocol, table, ids) in [(5, TCP, 40, [0, 1]), (7, UDP, 41, [2, 3])] {
            let entry = ServiceEntry { table, slots: 3, service: number, ..ServiceEntry::default() };
            content.services.insert(port(1, protocol), entry);
            for (slot, at) in [(0, 0), (1, 1), (2, 0)] {
                content.slots.insert(SlotKey { table, slot }, endpoint(at as u8 + 1, ids[at]));
            }
            for (at, id) in ids.into_iter().enumerate() {
                let endpoint = endpoint(at as u8 + 1, id);
                content.members.insert(MemberKey::new(number, endpoint.address), endpoint);
                content.counted_backends.insert(id);
            }
        }
        content
    }

    #[test]
    fn what_is_complete_is_taken_over() {
        let adopted = adopt(content()).unwrap();
        let tcp = &adopted.services[&port(1, TCP)];
        assert_eq!(tcp.slots, [endpoint(1, 0), endpoint(2, 1), endpoint(1, 0)]);
        assert_eq!(tcp.members, [endpoint(1, 0), endpoint(2, 1)]);
        assert_eq!(adopted.endpoints[&(UDP, address(2))], AdoptedEndpoint { id: 3, users: 1 });
        assert_eq!((adopted.endpoints.len(), adopted.next_table), (4, 42));
        assert!(adopted.unnamed.is_empty() && adopted.strays.is_empty() && adopted.retired.is_empty());
        assert_eq!(adopt(Content::default()).unwrap(), Adopted::default());
    }

    #[test]
    fn what_a_change_left_is_found() {
        let mut content = content();
        // A table that is half written or was replaced, an endpoint of a port that is gone, and one that has connections alone.
        content.slots.insert(SlotKey { table: 60, slot: 8 }, endpoint(3, 9));
        content.slots.remove(&SlotKey { table: 41, slot: 1 });
        let stray = MemberKey::new(9, address(3));
        content.members.insert(stray, endpoint(3, 9));
        content.members.insert(parked(TCP, address(4)), endpoint(4, 11));
        content.members.insert(parked(TCP, address(1)), endpoint(1, 0));
        content.counted_backends.extend([9, 11, 13]);
        let adopted = adopt(content).unwrap();
        assert!(adopted.services[&port(1, UDP)].slots.is_empty(), "a slot is missing");
        assert_eq!(adopted.retired, [(60, 9)].into());
        assert_eq!(adopted.strays, [stray, parked(TCP, address(1))]);
        assert_eq!(adopted.endpoints[&(TCP, address(4))], AdoptedEndpoint { id: 11, users: 0 });
        assert_eq!(adopted.endpoints[&(TCP, address(1))], AdoptedEndpoint { id: 0, users: 1 });
        assert_eq!(adopted.unnamed, [9, 13].into());
        assert_eq!(adopted.next_table, 61);
    }

    #[test]
    fn contradictions_are_refused() {
        let refused = |change: &dyn Fn(&mut Content)| {
            let mut content = content();
            change(&mut content);
            adopt(content).unwrap_err().to_string()
        };
        let entry = |service, slots| ServiceEntry { table: 50, slots, service, ..ServiceEntry::default() };
        let second = |entry| {
            move |content: &mut Content| {
                content.services.insert(port(2, TCP), entry);
            }
        };
        assert!(refused(&second(entry(5, 0))).contains("two virtual ports"));
        assert!(refused(&second(entry(MAX_SERVICES, 0))).contains("too high"));
        assert!(refused(&second(entry(8, u32::MAX))).contains("slots"));
        assert!(refused(&second(ServiceEntry { table: 40, ..entry(8, 0) })).contains("one table"));
        let member = |number, backend: Backend, key| {
            move |content: &mut Content| {
                content.members.insert(MemberKey::new(number, key), backend);
            }
        };
        assert!(refused(&member(5, endpoint(3, 2), address(3))).contains("two endpoints"));
        assert!(refused(&member(5, endpoint(3, MAX_BACKENDS), address(3))).contains("too high"));
        assert!(refused(&member(5, endpoint(3, 8), address(4))).contains("two addresses"));
        let other = |content: &mut Content| {
            content.members.insert(parked(TCP, address(1)), endpoint(1, 8));
        };
        assert!(refused(&other).contains("the numbers"));
    }

    #[test]
    fn free_numbers_are_the_gaps() {
        assert_eq!(free_below(&[1, 4].into()), (vec![0, 2, 3], 5));
        assert_eq!(free_below(&BTreeSet::new()), (Vec::new(), 0));
    }
}
