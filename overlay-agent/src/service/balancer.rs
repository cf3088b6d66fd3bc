//! The load balancer in user space: chooses endpoints by the code that the eBPF programs run, on tables of its own.

use std::{
    collections::{BTreeMap, HashMap},
    net::{Ipv4Addr, SocketAddrV4},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use overlay_ebpf::service::{
    abi::{Address, Affinity, Backend, ClientKey, MAX_CLIENTS, MemberKey, ServiceEntry, ServiceKey, SlotKey},
    select::{State, select},
};

use super::front::{Front, Fronts, abi_address};

/// Open connections by endpoint. An endpoint of several services has one number.
type Connections = BTreeMap<(u8, Address), Arc<AtomicU64>>;

/// The tables of all virtual ports. Every method works from any thread.
#[derive(Debug)]
pub struct Balancer {
    /// The beginning of its time.
    start: Instant,
    tables: Mutex<Tables>,
}

#[derive(Debug, Default)]
struct Tables {
    by_key: BTreeMap<ServiceKey, Arc<Table>>,
    connections: Connections,
}

/// A virtual port.
#[derive(Debug)]
struct Table {
    front: Front,
    entry: ServiceEntry,
    /// [`Backend::id`] is the index.
    backends: Vec<Backend>,
    connections: Vec<Arc<AtomicU64>>,
    /// Indices of `backends`.
    slots: Vec<u32>,
    /// Those outlive changes of the table.
    kept: Arc<Kept>,
}

/// What stays when endpoints change.
#[derive(Debug, Default)]
struct Kept {
    turns: AtomicU64,
    clients: Mutex<Clients>,
}

/// Clients with affinity.
#[derive(Debug, Default)]
struct Clients {
    endpoints: HashMap<u64, Affinity>,
    /// When those that paused were last removed, in seconds.
    pruned: u64,
}

/// The endpoint of a connection, which counts as open until this is dropped.
#[derive(Debug)]
pub struct Chosen {
    /// Where to connect.
    pub address: SocketAddrV4,
    connections: Option<Arc<AtomicU64>>,
}

impl Drop for Chosen {
    fn drop(&mut self) {
        if let Some(connections) = &self.connections {
            connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Default for Balancer {
    fn default() -> Self {
        Self { start: Instant::now(), tables: Mutex::default() }
    }
}

impl Balancer {
    /// Balances as `fronts` says from now on. Turns and clients of virtual ports that stay go on.
    pub fn reconcile(&self, fronts: &Fronts) {
        let mut tables = lock(&self.tables);
        let Tables { by_key, connections } = &mut *tables;
        by_key.retain(|key, _| fronts.contains_key(key));
        for (key, front) in fronts {
            let former = by_key.get(key);
            if former.is_some_and(|table| table.front == *front) {
                continue;
            }
            let kept = former.map(|table| Arc::clone(&table.kept)).unwrap_or_default();
            by_key.insert(*key, Arc::new(Table::new(*key, front, kept, connections)));
        }
        // Those of tables and open connections have other holders.
        connections.retain(|_, connections| Arc::strong_count(connections) > 1);
    }

    /// The endpoint for a new connection of `client`, a number that identifies it: an address, or a hash of what a policy names. `None`
    /// when there is no such virtual port, or no usable endpoint.
    pub fn choose(&self, key: ServiceKey, client: u64) -> Option<Chosen> {
        self.choose_at(key, client, u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn choose_at(&self, key: ServiceKey, client: u64, now: u64) -> Option<Chosen> {
        let table = Arc::clone(lock(&self.tables).by_key.get(&key)?);
        let backend = select(&table.entry, client, &Moment { table: &table, now })?;
        let connections = table.connections.get(backend.id as usize).cloned();
        if let Some(connections) = &connections {
            connections.fetch_add(1, Ordering::Relaxed);
        }
        let Address { ip, port } = backend.address;
        let address = SocketAddrV4::new(Ipv4Addr::from(ip), u16::from_be_bytes(port));
        Some(Chosen { address, connections })
    }
}

impl Table {
    fn new(key: ServiceKey, front: &Front, kept: Arc<Kept>, connections: &mut Connections) -> Self {
        let slots = front.slots();
        let entry = ServiceEntry {
            table: 0,
            slots: u32::try_from(slots.len()).unwrap_or(u32::MAX),
            service: 0,
            affinity_ttl_s: front.affinity_ttl_s,
            policy: front.abi_policy() as u32,
            flags: 0,
        };
        let backend = |(id, backend): (u32, &super::catalog::Backend)| Backend {
            address: abi_address(backend.address),
            weight: backend.weight.max(1),
            id,
        };
        let backends: Vec<Backend> = (0..).zip(&front.backends).map(backend).collect();
        let mut of =
            |backend: &Backend| Arc::clone(connections.entry((key.protocol, backend.address)).or_default());
        let connections = backends.iter().map(&mut of).collect();
        Self { front: front.clone(), entry, backends, connections, slots, kept }
    }
}

/// A virtual port at a time, in nanoseconds.
struct Moment<'a> {
    table: &'a Table,
    now: u64,
}

impl State for Moment<'_> {
    fn slot(&self, key: SlotKey) -> Option<Backend> {
        let index = self.table.slots.get(key.slot as usize)?;
        self.table.backends.get(*index as usize).copied()
    }

    fn member(&self, key: MemberKey) -> Option<Backend> {
        self.table.backends.iter().find(|backend| backend.address == key.address).copied()
    }

    fn turn(&self, _service: u32) -> u64 {
        self.table.kept.turns.fetch_add(1, Ordering::Relaxed)
    }

    fn random(&self) -> u32 {
        rand::random()
    }

    fn connections(&self, id: u32) -> u64 {
        let connections = self.table.connections.get(id as usize);
        connections.map_or(0, |connections| connections.load(Ordering::Relaxed))
    }

    fn affinity(&self, key: ClientKey) -> Option<Affinity> {
        lock(&self.table.kept.clients).endpoints.get(&key.client).copied()
    }

    fn keep(&self, key: ClientKey, affinity: Affinity) {
        let mut clients = lock(&self.table.kept.clients);
        let Clients { endpoints, pruned } = &mut *clients;
        let is_full = |endpoints: &HashMap<u64, Affinity>| endpoints.len() >= MAX_CLIENTS as usize;
        if is_full(endpoints) && !endpoints.contains_key(&key.client) {
            // Once in a second, because it looks at all of them.
            let second = self.now / 1_000_000_000;
            if *pruned != second {
                *pruned = second;
                let ttl_s = self.table.entry.affinity_ttl_s;
                endpoints.retain(|_, kept| kept.is_valid(ttl_s, self.now));
            }
            if is_full(endpoints) {
                // Without room, the client has no affinity.
                return;
            }
        }
        endpoints.insert(key.client, affinity);
    }

    fn now(&self) -> u64 {
        self.now
    }
}

/// Nothing that holds one of the locks panics between two writes.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::{catalog, record::Policy};

    const KEY: ServiceKey = ServiceKey::new(Address { ip: [10, 251, 0, 1], port: [0, 80] }, 6);

    fn fronts(policy: Policy, affinity_ttl_s: u32, numbers: &[u8]) -> Fronts {
        let backend = |number: &u8| catalog::Backend {
            address: SocketAddrV4::new(Ipv4Addr::new(10, 244, 1, *number), 8080),
            weight: 1,
        };
        let front = Front { policy, affinity_ttl_s, backends: numbers.iter().map(backend).collect() };
        [(KEY, front)].into()
    }

    fn number(chosen: &Option<Chosen>) -> Option<u8> {
        chosen.as_ref().map(|chosen| chosen.address.ip().octets()[3])
    }

    #[test]
    fn turns_go_on_when_endpoints_change() {
        let balancer = Balancer::default();
        assert!(balancer.choose(KEY, 1).is_none());
        balancer.reconcile(&fronts(Policy::RoundRobin, 0, &[1, 2, 3, 4]));
        let choose = || number(&balancer.choose(KEY, 1)).unwrap();
        assert_eq!([choose(), choose()], [1, 2]);
        balancer.reconcile(&fronts(Policy::RoundRobin, 0, &[1, 2, 3]));
        assert_eq!([choose(), choose()], [3, 1]);
        balancer.reconcile(&fronts(Policy::RoundRobin, 0, &[]));
        assert!(balancer.choose(KEY, 1).is_none());
        balancer.reconcile(&Fronts::new());
        assert!(balancer.choose(KEY, 1).is_none());
    }

    #[test]
    fn open_connections_count_also_when_the_endpoint_comes_back() {
        let balancer = Balancer::default();
        balancer.reconcile(&fronts(Policy::LeastConn, 0, &[1, 2]));
        let held: Vec<_> = (0..6).map(|_| balancer.choose(KEY, 1)).collect();
        assert_eq!(held.iter().filter(|chosen| number(chosen) == Some(1)).count(), 3);
        balancer.reconcile(&fronts(Policy::LeastConn, 0, &[3]));
        balancer.reconcile(&fronts(Policy::LeastConn, 0, &[1, 3]));
        let more: Vec<_> = (0..3).map(|_| number(&balancer.choose(KEY, 1)).unwrap()).collect();
        assert_eq!(more, [3, 3, 3], "endpoint 1 has three connections");
        drop(held);
        balancer.reconcile(&fronts(Policy::LeastConn, 0, &[3]));
        assert_eq!(lock(&balancer.tables).connections.len(), 1, "only endpoint 3 is known");
    }

    #[test]
    fn affinity_follows_the_clock() {
        const SECOND: u64 = 1_000_000_000;
        let balancer = Balancer::default();
        balancer.reconcile(&fronts(Policy::RoundRobin, 10, &[1, 2, 3]));
        let choose = |client, second| number(&balancer.choose_at(KEY, client, second * SECOND)).unwrap();
        assert_eq!([choose(1, 0), choose(2, 0), choose(1, 9), choose(1, 18)], [1, 2, 1, 1]);
        assert_eq!(choose(1, 28), 3, "it has ended");
        balancer.reconcile(&fronts(Policy::RoundRobin, 10, &[1, 2]));
        assert_ne!(choose(1, 29), 3, "its endpoint has left");
    }

    #[test]
    fn clients_that_paused_make_room() {
        const SECOND: u64 = 1_000_000_000;
        let balancer = Balancer::default();
        balancer.reconcile(&fronts(Policy::RoundRobin, 10, &[1, 2]));
        let most = u64::from(MAX_CLIENTS);
        for client in 0..most + 5 {
            balancer.choose_at(KEY, client, 0).unwrap();
        }
        let kept = || lock(&lock(&balancer.tables).by_key[&KEY].kept.clients).endpoints.len() as u64;
        assert_eq!(kept(), most);
        balancer.choose_at(KEY, most, 11 * SECOND).unwrap();
        assert_eq!(kept(), 1);
    }

    #[test]
    fn hashed_clients_go_where_the_kernel_sends_them() {
        let balancer = Balancer::default();
        let fronts = fronts(Policy::Maglev, 0, &[1, 2, 3]);
        balancer.reconcile(&fronts);
        let (front, mut counts) = (&fronts[&KEY], [0_u32; 4]);
        let slots = front.slots();
        for client in 0..1000 {
            // The kernel's map has the endpoint of this slot.
            let slot = overlay_ebpf::service::hash::hash(client) as usize % slots.len();
            let chosen = balancer.choose(KEY, client).unwrap();
            assert_eq!(chosen.address, front.backends[slots[slot] as usize].address);
            counts[usize::from(chosen.address.ip().octets()[3])] += 1;
        }
        assert!(counts[1..].iter().all(|count| count.abs_diff(333) < 60), "{counts:?}");
    }
}
