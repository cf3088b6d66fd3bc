//! Numbers of endpoints: under them, programs count connections. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use anyhow::{Result, bail};
use overlay_ebpf::service::abi::{Address, MAX_BACKENDS};

use super::service_adoption::{AdoptedEndpoint, free_below};

/// The numbers in use. An endpoint of several services has one.
#[derive(Default)]
pub(super) struct BackendIds {
    by_address: BTreeMap<(u8, Address), Holder>,
    /// Those without users.
    released: BTreeSet<(u8, Address)>,
    /// Numbers of endpoints that are not known any more, and since when.
    unnamed: BTreeMap<u32, Instant>,
    free: Vec<u32>,
    next: u32,
}

struct Holder {
    id: u32,
    users: u32,
    /// When it lost its last user.
    since: Option<Instant>,
}

/// A number that is free again, and the endpoint that had it, if that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    pub(super) id: u32,
    pub(super) endpoint: Option<(u8, Address)>,
}

impl BackendIds {
    /// The numbers that an earlier agent gave to endpoints, and those whose endpoints are not known any more.
    pub(super) fn adopt(
        endpoints: &BTreeMap<(u8, Address), AdoptedEndpoint>,
        unnamed: &BTreeSet<u32>,
        now: Instant,
    ) -> Self {
        let used: BTreeSet<u32> =
            endpoints.values().map(|endpoint| endpoint.id).chain(unnamed.iter().copied()).collect();
        let (free, next) = free_below(&used);
        let holder = |AdoptedEndpoint { id, users }| Holder { id, users, since: (users == 0).then_some(now) };
        Self {
            by_address: endpoints.iter().map(|(owner, endpoint)| (*owner, holder(*endpoint))).collect(),
            released: endpoints
                .iter()
                .filter(|(_, endpoint)| endpoint.users == 0)
                .map(|(owner, _)| *owner)
                .collect(),
            unnamed: unnamed.iter().map(|id| (*id, now)).collect(),
            free,
            next,
        }
    }

    /// The number of an endpoint, for one more user. Fails when all are in use.
    pub(super) fn acquire(&mut self, protocol: u8, address: Address) -> Result<u32> {
        if let Some(holder) = self.by_address.get_mut(&(protocol, address)) {
            holder.users += 1;
            holder.since = None;
            self.released.remove(&(protocol, address));
            return Ok(holder.id);
        }
        let id = match self.free.pop() {
            Some(id) => id,
            None if self.next < MAX_BACKENDS => {
                self.next += 1;
                self.next - 1
            }
            None => bail!("there are {MAX_BACKENDS} endpoints, no more are possible: remove some"),
        };
        self.by_address.insert((protocol, address), Holder { id, users: 1, since: None });
        Ok(id)
    }

    /// One user less. Returns the number if that was the last one.
    pub(super) fn release(&mut self, protocol: u8, address: Address, now: Instant) -> Option<u32> {
        let holder = self.by_address.get_mut(&(protocol, address))?;
        holder.users = holder.users.saturating_sub(1);
        if holder.users > 0 {
            return None;
        }
        holder.since = Some(now);
        self.released.insert((protocol, address));
        Some(holder.id)
    }

    /// Whether an endpoint has a number, but no users.
    pub(super) fn is_released(&self, protocol: u8, address: Address) -> bool {
        self.released.contains(&(protocol, address))
    }

    /// The number of an endpoint.
    pub(super) fn get(&self, protocol: u8, address: Address) -> Option<u32> {
        self.by_address.get(&(protocol, address)).map(|holder| holder.id)
    }

    /// All endpoints with their protocol, their address and their number.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u8, Address, u32)> {
        self.by_address.iter().map(|((protocol, address), holder)| (*protocol, *address, holder.id))
    }

    /// Frees numbers that are without users for long enough, and without connections: those would be counted for the next holder.
    /// Returns what is free then.
    pub(super) fn collect(
        &mut self,
        is_due: impl Fn(Instant) -> bool,
        connections: impl Fn(u32) -> u64,
    ) -> Vec<Freed> {
        let Self { by_address, released, unnamed, .. } = self;
        let mut free = Vec::new();
        unnamed.retain(|id, since| {
            let is_free = is_due(*since) && connections(*id) == 0;
            if is_free {
                free.push(Freed { id: *id, endpoint: None });
            }
            !is_free
        });
        released.retain(|address| {
            let Some(holder) = by_address.get(address) else { return false };
            let is_free = holder.since.is_some_and(&is_due) && connections(holder.id) == 0;
            if is_free {
                free.push(Freed { id: holder.id, endpoint: Some(*address) });
                by_address.remove(address);
            }
            !is_free
        });
        self.free.extend(free.iter().map(|freed| freed.id));
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> Address {
        Address { ip: number.to_be_bytes(), port: [0, 80] }
    }

    #[test]
    fn a_number_is_free_without_users_and_connections() {
        let mut ids = BackendIds::default();
        let now = Instant::now();
        let first = ids.acquire(6, address(1)).unwrap();
        assert_eq!(ids.acquire(6, address(1)).unwrap(), first);
        let second = ids.acquire(17, address(1)).unwrap();
        assert_ne!(first, second);
        ids.release(6, address(1), now);
        ids.collect(|_| true, |_| 0);
        assert_eq!(ids.get(6, address(1)), Some(first), "it has another user");
        ids.release(6, address(1), now);
        ids.collect(|_| false, |_| 0);
        ids.collect(|_| true, |_| 1);
        assert_eq!(ids.get(6, address(1)), Some(first), "it has a connection");
        assert_eq!(ids.acquire(6, address(1)).unwrap(), first);
        ids.release(6, address(1), now);
        assert_eq!(ids.collect(|_| true, |_| 0), [Freed { id: first, endpoint: Some((6, address(1))) }]);
        assert_eq!(ids.get(6, address(1)), None);
        assert_eq!(ids.iter().collect::<Vec<_>>(), [(17, address(1), second)]);
        assert_eq!(ids.acquire(6, address(2)).unwrap(), first, "it is used again");
    }

    #[test]
    fn numbers_of_an_earlier_agent_stay_until_they_have_no_connections() {
        let now = Instant::now();
        let endpoint = |id, users| AdoptedEndpoint { id, users };
        let endpoints = [((6, address(1)), endpoint(1, 2)), ((6, address(2)), endpoint(3, 0))].into();
        let mut ids = BackendIds::adopt(&endpoints, &[5].into(), now);
        assert_eq!([1, 2].map(|number| ids.get(6, address(number))), [Some(1), Some(3)]);
        assert!(!ids.is_released(6, address(1)) && ids.is_released(6, address(2)));
        assert!(ids.collect(|_| true, |_| 1).is_empty());
        let others: Vec<u32> = (10..14).map(|number| ids.acquire(6, address(number)).unwrap()).collect();
        assert_eq!(others, [4, 2, 0, 6], "1, 3 and 5 are in use");
        let named = Freed { id: 3, endpoint: Some((6, address(2))) };
        assert_eq!(ids.collect(|_| true, |_| 0), [Freed { id: 5, endpoint: None }, named]);
        assert_eq!((ids.release(6, address(1), now), ids.release(6, address(1), now)), (None, Some(1)));
    }

    #[test]
    fn numbers_end() {
        let mut ids = BackendIds::default();
        for number in 0..MAX_BACKENDS {
            ids.acquire(6, address(number)).unwrap();
        }
        assert!(ids.acquire(6, address(MAX_BACKENDS)).unwrap_err().to_string().contains("262144"));
        assert!(ids.acquire(6, address(0)).is_ok());
    }
}
