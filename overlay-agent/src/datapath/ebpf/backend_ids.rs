//! Numbers of endpoints: under them, programs count connections. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use anyhow::{Result, bail};
use overlay_ebpf::service::abi::{Address, MAX_BACKENDS};

/// The numbers in use. An endpoint of several services has one.
#[derive(Default)]
pub(super) struct BackendIds {
    by_address: BTreeMap<(u8, Address), Holder>,
    /// Those without users.
    released: BTreeSet<(u8, Address)>,
    free: Vec<u32>,
    next: u32,
}

struct Holder {
    id: u32,
    users: u32,
    /// When it lost its last user.
    since: Option<Instant>,
}

impl BackendIds {
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

    /// One user less.
    pub(super) fn release(&mut self, protocol: u8, address: Address, now: Instant) {
        if let Some(holder) = self.by_address.get_mut(&(protocol, address)) {
            holder.users = holder.users.saturating_sub(1);
            if holder.users == 0 {
                holder.since = Some(now);
                self.released.insert((protocol, address));
            }
        }
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
    /// Returns the numbers.
    pub(super) fn collect(
        &mut self,
        is_due: impl Fn(Instant) -> bool,
        connections: impl Fn(u32) -> u64,
    ) -> Vec<u32> {
        let Self { by_address, released, .. } = self;
        let mut free = Vec::new();
        released.retain(|address| {
            let Some(holder) = by_address.get(address) else { return false };
            let is_free = holder.since.is_some_and(&is_due) && connections(holder.id) == 0;
            if is_free {
                free.push(holder.id);
                by_address.remove(address);
            }
            !is_free
        });
        self.free.extend_from_slice(&free);
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
        assert_eq!(ids.collect(|_| true, |_| 0), [first]);
        assert_eq!(ids.get(6, address(1)), None);
        assert_eq!(ids.iter().collect::<Vec<_>>(), [(17, address(1), second)]);
        assert_eq!(ids.acquire(6, address(2)).unwrap(), first, "it is used again");
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
