//! Which peer holds which subnet, derived from lease records. Pure: no store, no kernel.
//!
//! `claims` decides about one subnet from the records that name it, [`RouteTable`] keeps all of them up to date record by
//! record.

mod claims;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use claims::Claims;
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::{
    lease::{self, LeaseError, LeaseValue},
    printable::{LONGEST_NAME, LONGEST_REASON, printable},
};

/// A record as a store hands it over: `key` is the part behind `subnets/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// For example `10.5.34.0-24`.
    pub key: String,
    /// JSON, or whatever is there.
    pub value: Vec<u8>,
}

/// One record that was written or removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordChange {
    /// The record is new or has a new value.
    Put(Record),
    /// The record is gone.
    Delete {
        /// Its key, as in [`Record::key`].
        key: String,
    },
}

/// A record that yields no route, and why.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Skipped {
    /// The record's key.
    pub record: String,
    /// One sentence.
    pub why: String,
}

impl Skipped {
    /// Whoever may write records may name them as he likes: no control characters reach a terminal.
    fn new(key: &str, why: &str) -> Self {
        Self { record: printable(key, LONGEST_NAME), why: printable(why, LONGEST_REASON) }
    }
}

/// This host's own place in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Own {
    /// The whole overlay.
    pub network: Ipv4Net,
    /// Our subnet.
    pub subnet: Ipv4Net,
    /// Our underlay address.
    pub public_ip: Ipv4Addr,
}

/// One step from one set of routes to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The subnet is new or has another peer.
    Set(Ipv4Net, Ipv4Addr),
    /// Nobody holds the subnet any more.
    Remove(Ipv4Net),
}

/// What an update of the table has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// First what is new, so that no destination is unreachable in between.
    pub changes: Vec<Change>,
    /// Records that are left aside now and were not before, or for another reason.
    pub skipped: Vec<Skipped>,
}

/// Subnets of peers, and the records that are none.
///
/// `fixed` peers need no record and win over records. A record that cannot be read is skipped and never changes another
/// route; if its subnet had a route before, and no other record says whose it is, that one stays: half a write must not cut
/// a peer off. Of two records for one subnet the one with the first key counts.
///
/// Only records that name a subnet decide about its route. So an update looks at the subnets that its records name and at
/// no others, and leads to the same table as all records at once.
#[derive(Clone, Debug)]
pub struct RouteTable {
    own: Own,
    fixed: BTreeMap<Ipv4Net, Ipv4Addr>,
    claims: BTreeMap<Ipv4Net, Claims>,
    /// Records whose keys name no subnet, by key.
    unnamed: BTreeMap<String, Skipped>,
    routes: BTreeMap<Ipv4Net, Ipv4Addr>,
}

impl RouteTable {
    /// A table with the `fixed` peers and no records yet.
    pub fn new(own: Own, fixed: BTreeMap<Ipv4Net, Ipv4Addr>) -> Self {
        let routes = fixed.clone();
        Self { own, fixed, claims: BTreeMap::new(), unnamed: BTreeMap::new(), routes }
    }

    /// Subnet to underlay address.
    pub fn routes(&self) -> &BTreeMap<Ipv4Net, Ipv4Addr> {
        &self.routes
    }

    /// Records that are left aside, in order.
    pub fn skipped(&self) -> Vec<Skipped> {
        let named = self.claims.values().flat_map(|claims| &claims.skipped);
        let mut skipped: Vec<_> = named.chain(self.unnamed.values()).cloned().collect();
        skipped.sort();
        skipped
    }

    /// What the record of `subnet` says, if there is one.
    pub fn record(&self, subnet: Ipv4Net) -> Option<&Result<LeaseValue, LeaseError>> {
        self.claims.get(&subnet)?.first()
    }

    /// All records as they are now.
    pub fn replace(&mut self, records: impl IntoIterator<Item = Record>) -> Outcome {
        for claims in self.claims.values_mut() {
            claims.clear();
        }
        let known = std::mem::take(&mut self.unnamed);
        for Record { key, value } in records {
            self.put(key, &value);
        }
        let unnamed = self.unnamed.iter().filter(|(key, _)| !known.contains_key(*key));
        let skipped = unnamed.map(|(_, skipped)| skipped.clone()).collect();
        self.decide_all(skipped)
    }

    /// Records that have changed, in order.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = RecordChange>) -> Outcome {
        let mut touched = BTreeSet::new();
        // Keys that name no subnet, and whether they were known before.
        let mut unnamed = BTreeMap::new();
        for change in changes {
            let (RecordChange::Put(Record { key, .. }) | RecordChange::Delete { key }) = &change;
            match lease::parse_key(key) {
                Ok(subnet) => drop(touched.insert(subnet)),
                Err(_) => drop(unnamed.entry(key.clone()).or_insert_with(|| self.unnamed.contains_key(key))),
            }
            match change {
                RecordChange::Put(Record { key, value }) => self.put(key, &value),
                RecordChange::Delete { key } => self.remove(&key),
            }
        }
        let new = unnamed.iter().filter(|(_, known)| !**known);
        let skipped = new.filter_map(|(key, _)| self.unnamed.get(key)).cloned().collect();
        self.decide(touched, skipped)
    }

    /// This host has another place now.
    pub fn set_own(&mut self, own: Own) -> Outcome {
        self.own = own;
        self.decide_all(Vec::new())
    }

    fn put(&mut self, key: String, value: &[u8]) {
        match lease::parse_key(&key) {
            Ok(subnet) => self.claims.entry(subnet).or_default().put(key, lease::parse_value(value)),
            Err(error) => {
                let skipped = Skipped::new(&key, &error.to_string());
                self.unnamed.insert(key, skipped);
            }
        }
    }

    fn remove(&mut self, key: &str) {
        match lease::parse_key(key) {
            Ok(subnet) => {
                if let Some(claims) = self.claims.get_mut(&subnet) {
                    claims.remove(key);
                }
            }
            Err(_) => drop(self.unnamed.remove(key)),
        }
    }

    fn decide_all(&mut self, skipped: Vec<Skipped>) -> Outcome {
        let subnets: Vec<_> = self.claims.keys().copied().collect();
        self.decide(subnets, skipped)
    }

    /// Decides anew about `subnets`, which are in order.
    fn decide(&mut self, subnets: impl IntoIterator<Item = Ipv4Net>, skipped: Vec<Skipped>) -> Outcome {
        let mut outcome = Outcome { changes: Vec::new(), skipped };
        let mut removed = Vec::new();
        for subnet in subnets {
            let Some(claims) = self.claims.get_mut(&subnet) else { continue };
            let before = self.routes.get(&subnet).copied();
            let decision = claims.decide(&self.own, subnet, self.fixed.get(&subnet).copied(), before);
            match decision.peer {
                Some(peer) if before != Some(peer) => {
                    self.routes.insert(subnet, peer);
                    outcome.changes.push(Change::Set(subnet, peer));
                }
                None if before.is_some() => {
                    self.routes.remove(&subnet);
                    removed.push(Change::Remove(subnet));
                }
                Some(_) | None => {}
            }
            let new = decision.skipped.iter().filter(|skipped| !claims.skipped.contains(skipped));
            outcome.skipped.extend(new.cloned());
            claims.skipped = decision.skipped;
            if claims.is_empty() {
                self.claims.remove(&subnet);
            }
        }
        outcome.changes.append(&mut removed);
        outcome
    }
}

/// For each of `records`, in their order, why hosts of `network` make no route of it; `None` for one that is a route to all
/// but its holder. Without `network` it is not known which records lie inside.
pub fn refusals<'a>(
    network: Option<Ipv4Net>,
    records: impl IntoIterator<Item = &'a Record>,
) -> Vec<Option<String>> {
    let mut holders = BTreeMap::new();
    let mut refusal = |record: &Record| {
        let subnet = lease::parse_key(&record.key).map_err(|error| error.to_string())?;
        let said = lease::parse_value(&record.value);
        match claims::peer(network, None, subnet, &said).map_err(claims::Refused::why)? {
            Some(peer) => claims::check_holder(*holders.entry(subnet).or_insert(peer), peer, subnet),
            None => Ok(()),
        }
    };
    let refused = records.into_iter().map(|record| refusal(record).err());
    refused.map(|why| why.map(|why| printable(&why, LONGEST_REASON))).collect()
}

/// The steps from `current` to `desired`: first what is new, so that no destination is unreachable in between.
pub fn diff(current: &BTreeMap<Ipv4Net, Ipv4Addr>, desired: &BTreeMap<Ipv4Net, Ipv4Addr>) -> Vec<Change> {
    let set = desired
        .iter()
        .filter(|(subnet, peer)| current.get(subnet) != Some(peer))
        .map(|(subnet, peer)| Change::Set(*subnet, *peer));
    let remove =
        current.keys().filter(|subnet| !desired.contains_key(subnet)).map(|subnet| Change::Remove(*subnet));
    set.chain(remove).collect()
}
