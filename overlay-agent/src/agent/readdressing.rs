//! Changes of underlay addresses without loss: for a while, the address before and the one after both count.
//!
//! A host and its peers cannot change at the same moment. So a host whose address changes goes on sending from the former one until its record
//! names the new one and peers had a second to read it, and accepts packets to both meanwhile and for a while after. A peer accepts packets
//! from both from the moment on when it reads the record. Both hold for the eBPF programs only: the kernel neither delivers to sockets what is
//! addressed to an address that the host has lost, nor sends from it.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use tracing::warn;

use super::forwarding::Forwarding;
use crate::route::{NextHops, RouteChange};

/// How long a former address is the source of outer packets, at most: the store may be away.
const ANNOUNCED_WITHIN: Duration = Duration::from_secs(10);
/// How long peers have to read the changed record.
const READ_WITHIN: Duration = Duration::from_secs(1);
/// How long packets to and from a former address are accepted after that.
const ACCEPTED: Duration = Duration::from_secs(15);

impl Forwarding {
    /// The record names this host's address.
    pub(super) fn announced(&mut self) {
        self.former.announced(Instant::now());
    }

    /// Former addresses count for a while only.
    pub(super) async fn expire_former(&mut self) {
        let now = Instant::now();
        if self.former_peers.expire(now) {
            self.set_former_peers();
        }
        if self.former.expire(now) {
            self.try_reconcile().await;
        }
    }

    pub(super) fn set_former_peers(&mut self) {
        if let Err(error) = self.datapath.set_former(self.former_peers.addresses()) {
            warn!("packets from former addresses of peers are dropped: {error:#}");
        }
    }
}

/// This host's former address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum FormerOwn {
    /// There is none that counts.
    #[default]
    None,
    /// Outer packets come from it until then.
    Source(Ipv4Addr, Instant),
    /// Packets to it are accepted until then.
    Accepted(Ipv4Addr, Instant),
}

impl FormerOwn {
    /// The host has another address than `former`. `is_announced` when peers learn of it by a record.
    pub(super) fn changed(&mut self, former: Ipv4Addr, is_announced: bool, now: Instant) {
        *self = match (*self, is_announced) {
            // Peers may know none of the addresses since this one.
            (Self::Source(source, _), true) => Self::Source(source, now + ANNOUNCED_WITHIN),
            (_, true) => Self::Source(former, now + ANNOUNCED_WITHIN),
            (_, false) => Self::Accepted(former, now + ACCEPTED),
        };
    }

    /// The record names the present address.
    pub(super) fn announced(&mut self, now: Instant) {
        if let Self::Source(_, end) = self {
            *end = (*end).min(now + READ_WITHIN);
        }
    }

    /// Follows the time. Returns whether something is different.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        *self = match *self {
            Self::Source(former, end) if now >= end => Self::Accepted(former, now + ACCEPTED),
            Self::Accepted(_, end) if now >= end => Self::None,
            Self::None | Self::Source(..) | Self::Accepted(..) => return false,
        };
        true
    }

    /// When [`Self::expire`] is due.
    pub(super) fn expires_at(&self) -> Option<Instant> {
        match self {
            Self::None => None,
            Self::Source(_, end) | Self::Accepted(_, end) => Some(*end),
        }
    }

    /// The source of outer packets, and the other address to which peers may send, for the present address.
    pub(super) fn addresses(&self, present: Ipv4Addr) -> (Ipv4Addr, Ipv4Addr) {
        match self {
            Self::None => (present, present),
            Self::Source(former, _) => (*former, present),
            Self::Accepted(former, _) => (present, *former),
        }
    }
}

/// Former addresses of peers.
#[derive(Clone, Debug, Default)]
pub(super) struct FormerPeers(BTreeMap<Ipv4Addr, (Ipv4Addr, Instant)>);

impl FormerPeers {
    /// Notes which peers have another address after `changes` of routes than in `hops`, and returns whether one has.
    pub(super) fn note(&mut self, changes: &[RouteChange], hops: &NextHops, now: Instant) -> bool {
        let mut is_changed = false;
        for change in changes {
            let RouteChange::Set(route) = change else { continue };
            let former = hops.get(&route.subnet).map(|hop| Ipv4Addr::from(hop.peer));
            if let Some(former) = former.filter(|former| *former != route.via.address) {
                self.changed(former, route.via.address, now);
                is_changed = true;
            }
        }
        is_changed
    }

    /// A peer has the address `present` instead of `former`.
    fn changed(&mut self, former: Ipv4Addr, present: Ipv4Addr, now: Instant) {
        // One that returns is no former one, and earlier ones are of the same peer.
        self.0.remove(&present);
        for (address, _) in self.0.values_mut().filter(|(address, _)| *address == former) {
            *address = present;
        }
        self.0.insert(former, (present, now + ACCEPTED));
    }

    /// Forgets those whose time is over. Returns whether there was one.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let before = self.0.len();
        self.0.retain(|_, (_, end)| *end > now);
        self.0.len() != before
    }

    /// When [`Self::expire`] is due.
    pub(super) fn expires_at(&self) -> Option<Instant> {
        self.0.values().map(|(_, end)| *end).min()
    }

    /// Former addresses with the present ones.
    pub(super) fn addresses(&self) -> BTreeMap<Ipv4Addr, Ipv4Addr> {
        self.0.iter().map(|(former, (present, _))| (*former, *present)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const NEW: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
    const LAST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 3);

    fn seconds(number: u64) -> Duration {
        Duration::from_secs(number)
    }

    #[test]
    fn the_source_changes_when_peers_had_time_to_read_the_record() {
        let (start, mut own) = (Instant::now(), FormerOwn::default());
        assert_eq!((own.addresses(OLD), own.expires_at()), ((OLD, OLD), None));
        own.changed(OLD, true, start);
        assert_eq!(own.addresses(NEW), (OLD, NEW));
        own.announced(start + seconds(2));
        assert!(!own.expire(start + seconds(2)) && own.addresses(NEW) == (OLD, NEW));
        assert!(own.expire(start + seconds(3)) && own.addresses(NEW) == (NEW, OLD));
        assert!(!own.expire(start + seconds(17)) && own.expire(start + seconds(18)));
        assert_eq!(own.addresses(NEW), (NEW, NEW));
    }

    #[test]
    fn the_source_changes_although_the_store_is_away() {
        let (start, mut own) = (Instant::now(), FormerOwn::default());
        own.changed(OLD, true, start);
        // Another change before peers know of the first.
        own.changed(NEW, true, start + seconds(1));
        assert_eq!(own.addresses(LAST), (OLD, LAST));
        assert!(!own.expire(start + seconds(10)) && own.expire(start + seconds(11)));
        assert_eq!(own.addresses(LAST), (LAST, OLD));
        // Without a store, nothing tells peers.
        own.changed(LAST, false, start + seconds(12));
        assert_eq!(own.addresses(NEW), (NEW, LAST));
    }

    #[test]
    fn former_addresses_of_a_peer_lead_to_its_present_one() {
        let (start, mut peers) = (Instant::now(), FormerPeers::default());
        peers.changed(OLD, NEW, start);
        peers.changed(NEW, LAST, start + seconds(1));
        assert_eq!(peers.addresses(), BTreeMap::from([(OLD, LAST), (NEW, LAST)]));
        // Back again.
        peers.changed(LAST, OLD, start + seconds(2));
        assert_eq!(peers.addresses(), BTreeMap::from([(NEW, OLD), (LAST, OLD)]));
        assert_eq!(peers.expires_at(), Some(start + seconds(16)));
        assert!(!peers.expire(start + seconds(15)) && peers.expire(start + seconds(16)));
        assert_eq!(peers.addresses(), BTreeMap::from([(LAST, OLD)]));
    }
}
