//! Tests of the selection, on tables in memory.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
};

use super::*;

/// The tables of one service, with the number 7.
#[derive(Default)]
struct Memory {
    slots: Vec<Backend>,
    left: Cell<Option<u32>>,
    turns: Cell<u64>,
    random: Cell<u64>,
    connections: RefCell<BTreeMap<u32, u64>>,
    kept: RefCell<BTreeMap<ClientKey, Affinity>>,
    now: Cell<u64>,
    looked_up: Cell<u32>,
}

impl State for Memory {
    fn slot(&self, key: SlotKey) -> Option<Backend> {
        assert_eq!(key.table, 3);
        self.looked_up.set(self.looked_up.get() + 1);
        self.slots.get(key.slot as usize).copied()
    }

    fn member(&self, key: MemberKey) -> Option<Backend> {
        assert_eq!(key.service, 7);
        let found = self.slots.iter().find(|backend| backend.address == key.address);
        found.filter(|backend| self.left.get() != Some(backend.id)).copied()
    }

    fn turn(&self, service: u32) -> u64 {
        assert_eq!(service, 7);
        self.turns.replace(self.turns.get().wrapping_add(1))
    }

    fn random(&self) -> u32 {
        // Not the hash under test: a linear congruential generator (Knuth's MMIX), of which the upper bits are used.
        let next =
            self.random.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.random.set(next);
        (next >> 32) as u32
    }

    fn connections(&self, id: u32) -> u64 {
        self.connections.borrow().get(&id).copied().unwrap_or(0)
    }

    fn affinity(&self, key: ClientKey) -> Option<Affinity> {
        self.kept.borrow().get(&key).copied()
    }

    fn keep(&self, key: ClientKey, affinity: Affinity) {
        self.kept.borrow_mut().insert(key, affinity);
    }

    fn now(&self) -> u64 {
        self.now.get()
    }
}

impl Memory {
    fn new(weights: &[u16]) -> Self {
        let backend = |(id, weight): (u32, &u16)| Backend {
            address: Address { ip: [10, 244, 1, id as u8], port: [0x1f, 0x90] },
            weight: *weight,
            id,
        };
        Self { slots: (0..).zip(weights).map(backend).collect(), ..Self::default() }
    }

    fn entry(&self, policy: Policy) -> ServiceEntry {
        ServiceEntry {
            table: 3,
            slots: self.slots.len() as u32,
            service: 7,
            policy: policy as u32,
            ..ServiceEntry::default()
        }
    }

    /// How many of `connections` that stay open, each of another client, an endpoint gets.
    fn distribution(&self, policy: Policy, connections: u64) -> Vec<u64> {
        let mut counts = vec![0; self.slots.len()];
        for client in 0..connections {
            let chosen = select(&self.entry(policy), client, self).unwrap();
            counts[chosen.id as usize] += 1;
            *self.connections.borrow_mut().entry(chosen.id).or_default() += 1;
        }
        counts
    }
}

#[test]
fn without_slots_nothing_is_chosen() {
    let none = Memory::default();
    for policy in [Policy::RoundRobin, Policy::Random, Policy::LeastConn, Policy::ClientHash] {
        assert_eq!(select(&none.entry(policy), 1, &none), None);
        let entry = ServiceEntry { affinity_ttl_s: 1, ..none.entry(policy) };
        assert_eq!(select(&entry, 1, &none), None);
    }
    assert!(none.kept.borrow().is_empty());
}

#[test]
fn a_slot_that_is_missing_is_no_endpoint() {
    let two = Memory::new(&[1, 1]);
    let choose = |policy| {
        let entry = ServiceEntry { slots: 3, ..two.entry(policy) };
        select(&entry, 1, &two).map(|backend| backend.id)
    };
    assert_eq!([(); 3].map(|()| choose(Policy::RoundRobin)), [Some(0), Some(1), None]);
    assert!([(); 3].map(|()| choose(Policy::LeastConn)).iter().all(Option::is_some));
}

#[test]
fn round_robin_is_exactly_even() {
    assert_eq!(Memory::new(&[1; 7]).distribution(Policy::RoundRobin, 7000), [1000; 7]);
    let wrapping = Memory::new(&[1; 4]);
    wrapping.turns.set(u64::MAX - 2);
    assert_eq!(wrapping.distribution(Policy::RoundRobin, 400), [100; 4]);
}

#[test]
fn unknown_policies_take_turns() {
    let two = Memory::new(&[1, 1]);
    let entry = ServiceEntry { policy: 99, ..two.entry(Policy::RoundRobin) };
    let chosen: Vec<u32> = (0..4).map(|_| select(&entry, 1, &two).unwrap().id).collect();
    assert_eq!(chosen, [0, 1, 0, 1]);
}

#[test]
fn random_and_hashed_connections_are_even_within_chance() {
    // 3 standard deviations of a binomial distribution; the numbers are the same in every run.
    let (endpoints, connections) = (8, 40_000_u64);
    let share = connections as f64 / endpoints as f64;
    let limit = 3.0 * (share * (1.0 - 1.0 / endpoints as f64)).sqrt();
    for policy in [Policy::Random, Policy::ClientHash] {
        let counts = Memory::new(&vec![1; endpoints]).distribution(policy, connections);
        assert!(counts.iter().all(|count| (*count as f64 - share).abs() < limit), "{policy:?}: {counts:?}");
    }
}

#[test]
fn a_hashed_client_stays() {
    let memory = Memory::new(&[1; 5]);
    let entry = memory.entry(Policy::ClientHash);
    for client in 0..100 {
        let first = select(&entry, client, &memory);
        assert!((0..10).all(|_| select(&entry, client, &memory) == first));
    }
}

#[test]
fn least_connections_fill_up_by_weight() {
    assert_eq!(Memory::new(&[1; 5]).distribution(Policy::LeastConn, 500), [100; 5]);
    let weighted = Memory::new(&[1, 2, 7]).distribution(Policy::LeastConn, 1000);
    for (count, expected) in weighted.iter().zip([100, 200, 700]) {
        assert!(count.abs_diff(expected) <= 3, "{weighted:?}");
    }
    let busy = Memory::new(&[1; 3]);
    busy.connections.borrow_mut().extend([(0, 50), (1, 20)]);
    assert_eq!(busy.distribution(Policy::LeastConn, 20), [0, 0, 20]);
    // Endpoint 2 has now as many connections as endpoint 1.
    assert_eq!(busy.distribution(Policy::LeastConn, 60), [0, 30, 30]);
}

#[test]
fn least_connections_look_at_a_window_that_moves() {
    let many = Memory::new(&[1; 100]);
    let counts = many.distribution(Policy::LeastConn, 1000);
    assert_eq!(many.looked_up.get(), 1000 * COMPARED_SLOTS);
    let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
    assert!(*least >= 8 && *most <= 12, "{counts:?}");
    let few = Memory::new(&[1; 3]);
    few.distribution(Policy::LeastConn, 10);
    assert_eq!(few.looked_up.get(), 30, "no slot is compared with itself");
}

#[test]
fn affinity_keeps_a_client_until_it_pauses() {
    const SECOND: u64 = 1_000_000_000;
    let memory = Memory::new(&[1; 3]);
    let entry = ServiceEntry { affinity_ttl_s: 10, ..memory.entry(Policy::RoundRobin) };
    let connect = |client| select(&entry, client, &memory).unwrap().id;
    assert_eq!([connect(1), connect(2), connect(1), connect(2)], [0, 1, 0, 1]);
    memory.now.set(9 * SECOND);
    assert_eq!(connect(1), 0);
    memory.now.set(18 * SECOND);
    assert_eq!(connect(1), 0, "each connection renews it");
    assert_eq!(connect(2), 2, "it has paused for 18 seconds");
    memory.now.set(28 * SECOND);
    assert_eq!(connect(3), 0, "the turn is at the first endpoint again");
}

#[test]
fn affinity_never_leads_to_an_endpoint_that_left() {
    let memory = Memory::new(&[1; 3]);
    let entry = ServiceEntry { affinity_ttl_s: 10, ..memory.entry(Policy::RoundRobin) };
    assert_eq!(select(&entry, 1, &memory).unwrap().id, 0);
    memory.left.set(Some(0));
    assert_eq!(select(&entry, 1, &memory).unwrap().id, 1);
    memory.left.set(None);
    assert_eq!(select(&entry, 1, &memory).unwrap().id, 1, "it has moved for good");
}
