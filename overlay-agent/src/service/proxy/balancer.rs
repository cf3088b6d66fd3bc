//! The choice of endpoints: the proxy's state for the code that it shares with the eBPF programs.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddrV4},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use overlay_ebpf::service::{
    abi::{Address, Affinity, Backend, ClientKey, MemberKey, ServiceEntry, SlotKey},
    select::{State, select},
};
use tokio::{sync::watch, time::Instant};

use super::{
    aging::AgeOrder, counters::Tally, endpoint::Endpoint, http::HttpPort, plan::Wanted, shared::Shared,
};
use crate::service::{
    ServiceName,
    front::{Front, abi_address},
    record::Protocol,
};

/// A port of a virtual address.
#[derive(Debug)]
pub(super) struct VirtualPort {
    /// Where the proxy listens.
    pub(super) address: SocketAddrV4,
    /// TCP or UDP.
    pub(super) protocol: Protocol,
    /// Its number. No two have the same, ever.
    pub(super) number: u32,
    turn: AtomicU64,
    table: ArcSwap<Table>,
    problem: Mutex<Option<String>>,
    /// When the HTTP connections of clients are reset, once the port is removed.
    reset_at: watch::Sender<Option<Instant>>,
}

/// Where connections to a port go. Never changed, only replaced.
#[derive(Debug)]
pub(super) struct Table {
    /// The service that the port belongs to.
    pub(super) service: ServiceName,
    /// The service's counters.
    pub(super) tally: Arc<Tally>,
    /// Whether endpoints are told the client.
    pub(super) proxy_protocol: bool,
    /// What requests do, if it is an HTTP port.
    pub(super) http: Option<HttpPort>,
    /// What the table is made of.
    pub(super) front: Front,
    entry: ServiceEntry,
    /// Indices of `endpoints`.
    slots: Vec<u32>,
    /// Those that take connections.
    endpoints: Vec<(Backend, Arc<Endpoint>)>,
    by_address: BTreeMap<Address, u32>,
}

impl Table {
    /// The table of a front. `endpoint` gives the endpoint at an address.
    pub(super) fn new(
        wanted: Wanted,
        tally: Arc<Tally>,
        mut endpoint: impl FnMut(SocketAddrV4) -> Arc<Endpoint>,
    ) -> Self {
        let Wanted { service, proxy_protocol, http, front, .. } = wanted;
        let slots = front.slots();
        let entry = ServiceEntry {
            slots: u32::try_from(slots.len()).unwrap_or(u32::MAX),
            affinity_ttl_s: front.affinity_ttl_s,
            policy: front.abi_policy() as u32,
            ..ServiceEntry::default()
        };
        let with_id = (0..).zip(&front.backends).map(|(id, backend)| {
            let address = abi_address(backend.address);
            (Backend { address, weight: backend.weight, id }, endpoint(backend.address))
        });
        let endpoints: Vec<(Backend, Arc<Endpoint>)> = with_id.collect();
        let by_address = endpoints.iter().map(|(backend, _)| (backend.address, backend.id)).collect();
        Self { service, tally, proxy_protocol, http, front, entry, slots, endpoints, by_address }
    }

    /// Whether it is what the port should have.
    pub(super) fn is_of(&self, wanted: &Wanted) -> bool {
        self.service == wanted.service
            && self.proxy_protocol == wanted.proxy_protocol
            && self.http == wanted.http
            && self.front == wanted.front
    }

    fn by_id(&self, id: u32) -> Option<&(Backend, Arc<Endpoint>)> {
        self.endpoints.get(usize::try_from(id).ok()?)
    }
}

impl VirtualPort {
    pub(super) fn new(address: SocketAddrV4, protocol: Protocol, number: u32, table: Table) -> Self {
        let (turn, table) = (AtomicU64::new(0), ArcSwap::from_pointee(table));
        let reset_at = watch::Sender::new(None);
        Self { address, protocol, number, turn, table, problem: Mutex::default(), reset_at }
    }

    /// The port is removed: HTTP connections of clients end with the request that they are at, or after this time.
    pub(super) fn close(&self, time: Duration) {
        self.reset_at.send_replace(Some(Instant::now() + time));
    }

    /// Follows [`Self::close`].
    pub(super) fn reset_time(&self) -> watch::Receiver<Option<Instant>> {
        self.reset_at.subscribe()
    }

    /// Where connections go now.
    pub(super) fn table(&self) -> Arc<Table> {
        self.table.load_full()
    }

    /// Where connections go from now on.
    pub(super) fn set_table(&self, table: Table) {
        self.table.store(Arc::new(table));
    }

    /// Why it does not listen.
    pub(super) fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns whether that is new.
    pub(super) fn set_problem(&self, problem: Option<String>) -> bool {
        let mut before = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = *before != problem;
        *before = problem;
        is_new
    }

    /// Chooses the endpoints for a connection of `client`; `None` when there are none.
    pub(super) fn choose(&self, client: Ipv4Addr, shared: &Shared) -> Option<Choice> {
        let table = self.table();
        let entry = ServiceEntry { service: self.number, ..table.entry };
        self.choose_of(table, entry, u64::from(client.to_bits()), shared)
    }

    /// Chooses the endpoints for a request that is hashed by `key` and not by its client. It has no affinity.
    pub(super) fn choose_by_key(&self, key: u64, shared: &Shared) -> Option<Choice> {
        let table = self.table();
        let entry = ServiceEntry { service: self.number, affinity_ttl_s: 0, ..table.entry };
        self.choose_of(table, entry, key, shared)
    }

    fn choose_of(
        &self,
        table: Arc<Table>,
        entry: ServiceEntry,
        client: u64,
        shared: &Shared,
    ) -> Option<Choice> {
        let view = View { port: self, table: &table, shared };
        let backend = select(&entry, client, &view)?;
        let first = usize::try_from(backend.id).ok()?;
        let attempts = shared.options.attempts.min(table.endpoints.len());
        Some(Choice { table, first, tried: 0, attempts })
    }

    /// Keeps a client at an endpoint that was not its first choice, if the service has affinity.
    pub(super) fn keep(&self, client: Ipv4Addr, table: &Table, endpoint: SocketAddrV4, shared: &Shared) {
        if table.entry.affinity_ttl_s > 0 {
            let key = ClientKey::new(u64::from(client.to_bits()), self.number);
            shared.affinities.keep(key, Affinity::new(abi_address(endpoint), shared.now()));
        }
    }
}

/// The endpoints for a connection, the chosen one first, then those behind it.
#[derive(Debug)]
pub(super) struct Choice {
    /// The table that they are of.
    pub(super) table: Arc<Table>,
    first: usize,
    tried: usize,
    attempts: usize,
}

impl Choice {
    /// Whether the last one was not the first.
    pub(super) fn is_substitute(&self) -> bool {
        self.tried > 1
    }
}

impl Iterator for Choice {
    type Item = Arc<Endpoint>;

    fn next(&mut self) -> Option<Arc<Endpoint>> {
        if self.tried >= self.attempts {
            return None;
        }
        let place = (self.first + self.tried).checked_rem(self.table.endpoints.len())?;
        self.tried += 1;
        self.table.endpoints.get(place).map(|(_, endpoint)| Arc::clone(endpoint))
    }
}

/// A port with its table, for the choice.
struct View<'a> {
    port: &'a VirtualPort,
    table: &'a Table,
    shared: &'a Shared,
}

impl State for View<'_> {
    fn slot(&self, key: SlotKey) -> Option<Backend> {
        let id = self.table.slots.get(usize::try_from(key.slot).ok()?)?;
        self.table.by_id(*id).map(|(backend, _)| *backend)
    }

    fn member(&self, key: MemberKey) -> Option<Backend> {
        let id = self.table.by_address.get(&key.address)?;
        self.table.by_id(*id).map(|(backend, _)| *backend)
    }

    fn turn(&self, _service: u32) -> u64 {
        self.port.turn.fetch_add(1, Ordering::Relaxed)
    }

    fn random(&self) -> u32 {
        rand::random()
    }

    fn connections(&self, id: u32) -> u64 {
        self.table.by_id(id).map_or(0, |(_, endpoint)| endpoint.tally.open())
    }

    fn affinity(&self, key: ClientKey) -> Option<Affinity> {
        self.shared.affinities.get(key)
    }

    fn keep(&self, key: ClientKey, affinity: Affinity) {
        self.shared.affinities.keep(key, affinity);
    }

    fn now(&self) -> u64 {
        self.shared.now()
    }
}

/// The endpoints of clients, up to a number. Beyond, those that were used least recently are forgotten.
#[derive(Debug)]
pub(super) struct Affinities {
    most: usize,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    by_client: BTreeMap<ClientKey, Affinity>,
    order: AgeOrder<ClientKey>,
}

impl Affinities {
    pub(super) const fn new(most: usize) -> Self {
        Self { most, known: Mutex::new(Known { by_client: BTreeMap::new(), order: AgeOrder::new() }) }
    }

    fn get(&self, key: ClientKey) -> Option<Affinity> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.by_client.get(&key).copied()
    }

    fn keep(&self, key: ClientKey, affinity: Affinity) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let Known { by_client, order } = &mut *known;
        if by_client.insert(key, affinity).is_some() {
            return;
        }
        order.add(key, affinity.used);
        while by_client.len() > self.most {
            let used = |key: &ClientKey| by_client.get(key).map(|affinity| affinity.used);
            let Some(oldest) = order.take_oldest(u64::MAX, used) else { break };
            by_client.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_that_were_used_least_recently_are_forgotten() {
        let affinities = Affinities::new(2);
        let address = Address { ip: [10, 0, 0, 1], port: [0, 80] };
        let keep = |client, time| affinities.keep(ClientKey::new(client, 1), Affinity::new(address, time));
        keep(1, 1);
        keep(2, 2);
        keep(1, 3);
        keep(3, 4);
        let known = [1, 2, 3].map(|client| affinities.get(ClientKey::new(client, 1)).map(|kept| kept.used));
        assert_eq!(known, [Some(3), None, Some(4)]);
        assert_eq!(affinities.get(ClientKey::new(1, 2)), None);
    }
}
