//! The choice of an endpoint for a connection.

use super::{
    abi::{Address, Affinity, Backend, COMPARED_SLOTS, ClientKey, MemberKey, Policy, ServiceEntry, SlotKey},
    hash::hash,
};

/// What the choice depends on: in the kernel the maps, in the agent its own tables.
pub trait State {
    /// The endpoint in a slot.
    fn slot(&self, key: SlotKey) -> Option<Backend>;
    /// The endpoint, if it takes connections of the service.
    fn member(&self, key: MemberKey) -> Option<Backend>;
    /// The counter of a service, before it grows by one. No two calls get the same number.
    fn turn(&self, service: u32) -> u64;
    /// A random number.
    fn random(&self) -> u32;
    /// Open connections to an endpoint.
    fn connections(&self, id: u32) -> u64;
    /// The endpoint of a client.
    fn affinity(&self, key: ClientKey) -> Option<Affinity>;
    /// Keeps the endpoint of a client.
    fn keep(&self, key: ClientKey, affinity: Affinity);
    /// Nanoseconds of the monotonic clock.
    fn now(&self) -> u64;
}

/// The endpoint for a new connection of `client`; `None` when none is usable. Keeps it where the service has affinity.
#[inline(always)]
pub fn select(entry: &ServiceEntry, client: u64, state: &impl State) -> Option<Backend> {
    if entry.affinity_ttl_s == 0 {
        return by_policy(entry, client, state);
    }
    let (key, now) = (ClientKey::new(client, entry.service), state.now());
    let kept = state.affinity(key).filter(|kept| kept.is_valid(entry.affinity_ttl_s, now));
    let kept = kept.and_then(|kept| member(entry, kept.address, state));
    let backend = match kept {
        Some(backend) => backend,
        None => by_policy(entry, client, state)?,
    };
    state.keep(key, Affinity::new(backend.address, now));
    Some(backend)
}

/// The endpoint at this address, if it takes connections of the service.
#[inline(always)]
pub fn member(entry: &ServiceEntry, address: Address, state: &impl State) -> Option<Backend> {
    state.member(MemberKey::new(entry.service, address))
}

#[inline(always)]
fn by_policy(entry: &ServiceEntry, client: u64, state: &impl State) -> Option<Backend> {
    if entry.slots == 0 {
        return None;
    }
    let number = match Policy::of(entry.policy) {
        Policy::RoundRobin => state.turn(entry.service),
        Policy::Random => state.random() as u64,
        Policy::ClientHash => hash(client) as u64,
        Policy::LeastConn => return least_connections(entry, state),
    };
    state.slot(slot(entry, number))
}

#[inline(always)]
fn slot(entry: &ServiceEntry, number: u64) -> SlotKey {
    SlotKey { table: entry.table, slot: number.checked_rem(entry.slots as u64).unwrap_or(0) as u32 }
}

/// Starts at the counter, so that equal endpoints take turns.
#[inline(always)]
fn least_connections(entry: &ServiceEntry, state: &impl State) -> Option<Backend> {
    let turn = state.turn(entry.service);
    // Not an option of both: what it has while it is empty would be undefined, and the compiler may copy that in registers that the
    // verifier then finds uninitialised. With a weight of 0, any other is better.
    let (mut best, mut fewest) = (Backend::default(), 1_u64);
    for offset in 0..COMPARED_SLOTS {
        if offset >= entry.slots {
            break;
        }
        let Some(backend) = state.slot(slot(entry, turn.wrapping_add(offset as u64))) else { continue };
        // With the new one: of two idle endpoints, the one with more weight.
        let connections = state.connections(backend.id).wrapping_add(1);
        if connections.wrapping_mul(best.weight as u64) < fewest.wrapping_mul(backend.weight as u64) {
            (best, fewest) = (backend, connections);
        }
    }
    (best.weight > 0).then_some(best)
}

#[cfg(test)]
#[path = "select_tests.rs"]
mod tests;
