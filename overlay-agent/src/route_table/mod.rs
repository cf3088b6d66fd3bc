//! Routes to peers, derived from lease records. Pure: no store, no kernel.
//!
//! `candidates` decides about one subnet from the records that name it, [`RouteTable`] updates all subnets record by record,
//! `own_subnet` finds what the records say about this host's subnet.

mod candidates;
mod own_subnet;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use candidates::Candidates;
use ipnet::Ipv4Net;
pub use own_subnet::{OwnRecord, OwnSubnet, Rival};
use serde::{Deserialize, Serialize};

use crate::{
    lease::{Lease, LeaseRecord},
    printable::{LONGEST_NAME, LONGEST_REASON, printable},
    route::{LocalNode, RouteChange, Routes, Subnet},
    store::{Change, Kind as _},
};

/// A record that gives no route.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Skipped {
    /// The record's key.
    pub record: String,
    /// The reason.
    pub why: String,
}

impl Skipped {
    /// Records may contain anything: control characters must not reach a terminal.
    fn new(key: &str, why: &str) -> Self {
        Self { record: printable(key, LONGEST_NAME), why: printable(why, LONGEST_REASON) }
    }
}

/// The effect of an update of the table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Changed routes, additions first, so that no destination is unreachable in between.
    pub changes: Vec<RouteChange>,
    /// Records that are skipped now and were not before, or for another reason.
    pub skipped: Vec<Skipped>,
}

/// Routes to peers, and the records that give none.
///
/// `fixed` routes need no record and take precedence. A record that cannot be read is skipped and never changes another
/// route; if its subnet had a route before, and no other record names a holder, that route stays: half a write must not cut
/// a peer off. Of two records for one subnet the older one counts; in a store without revisions, the one with the first key.
///
/// Only records that name a subnet decide about its route. So an update considers the subnets that its records name and no
/// others, and leads to the same table as all records at once.
#[derive(Clone, Debug)]
pub struct RouteTable {
    local: LocalNode,
    fixed: Routes,
    candidates: BTreeMap<Subnet, Candidates>,
    /// Records whose keys name no subnet, by key.
    unnamed: BTreeMap<Arc<str>, Skipped>,
    routes: Routes,
}

impl RouteTable {
    /// A table with the `fixed` routes and no records yet.
    pub fn new(local: LocalNode, fixed: Routes) -> Self {
        let routes = fixed.clone();
        Self { local, fixed, candidates: BTreeMap::new(), unnamed: BTreeMap::new(), routes }
    }

    /// All routes.
    pub fn routes(&self) -> &Routes {
        &self.routes
    }

    /// Skipped records, in order.
    pub fn skipped(&self) -> Vec<Skipped> {
        let named = self.candidates.values().flat_map(|candidates| &candidates.skipped);
        let mut skipped: Vec<_> = named.chain(self.unnamed.values()).cloned().collect();
        skipped.sort();
        skipped
    }

    /// Replaces all records.
    pub fn replace(&mut self, records: impl IntoIterator<Item = LeaseRecord>) -> Outcome {
        for candidates in self.candidates.values_mut() {
            candidates.records.clear();
        }
        let known = std::mem::take(&mut self.unnamed);
        for record in records {
            self.put(record);
        }
        let unnamed = self.unnamed.iter().filter(|(key, _)| !known.contains_key(*key));
        let skipped = unnamed.map(|(_, skipped)| skipped.clone()).collect();
        self.decide_all(skipped)
    }

    /// Applies changes of records, in order.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = Change<Lease>>) -> Outcome {
        let mut touched = BTreeSet::new();
        // Keys that name no subnet, and whether they were known before.
        let mut unnamed = BTreeMap::new();
        for change in changes {
            let (key, id) = match &change {
                Change::Put(record) => (&record.key, record.id.clone()),
                Change::Delete { key } => (key, Lease::parse_key(key)),
            };
            match &id {
                Ok(subnet) => drop(touched.insert(*subnet)),
                Err(_) => drop(unnamed.entry(key.clone()).or_insert_with(|| self.unnamed.contains_key(key))),
            }
            match (change, id) {
                (Change::Put(record), _) => self.put(record),
                (Change::Delete { key }, Ok(subnet)) => {
                    if let Some(candidates) = self.candidates.get_mut(&subnet) {
                        candidates.remove(&key);
                    }
                }
                (Change::Delete { key }, Err(_)) => drop(self.unnamed.remove(&key)),
            }
        }
        let new = unnamed.iter().filter(|(_, known)| !**known);
        let skipped = new.filter_map(|(key, _)| self.unnamed.get(key)).cloned().collect();
        self.decide(touched, skipped)
    }

    /// This host has another place in the network.
    pub fn set_local(&mut self, local: LocalNode) -> Outcome {
        self.local = local;
        self.decide_all(Vec::new())
    }

    fn put(&mut self, record: LeaseRecord) {
        match &record.id {
            Ok(subnet) => self.candidates.entry(*subnet).or_default().put(record),
            Err(error) => {
                let skipped = Skipped::new(&record.key, &error.to_string());
                self.unnamed.insert(record.key, skipped);
            }
        }
    }

    fn decide_all(&mut self, skipped: Vec<Skipped>) -> Outcome {
        let subnets: Vec<_> = self.candidates.keys().copied().collect();
        self.decide(subnets, skipped)
    }

    /// Decides again about `subnets`, which are in order.
    fn decide(&mut self, subnets: impl IntoIterator<Item = Subnet>, skipped: Vec<Skipped>) -> Outcome {
        let mut outcome = Outcome { changes: Vec::new(), skipped };
        let mut removed = Vec::new();
        for subnet in subnets {
            let Some(candidates) = self.candidates.get_mut(&subnet) else { continue };
            let before = self.routes.get(&subnet).copied();
            let fixed = self.fixed.get(&subnet).copied();
            let (peer, skipped) = candidates.decide(&self.local, subnet, fixed, before);
            match peer {
                Some(peer) if before != Some(peer) => {
                    self.routes.insert(subnet, peer);
                    outcome.changes.push(RouteChange::set(subnet, peer));
                }
                None if before.is_some() => {
                    self.routes.remove(&subnet);
                    removed.push(RouteChange::Remove(subnet));
                }
                Some(_) | None => {}
            }
            let new = skipped.iter().filter(|skipped| !candidates.skipped.contains(skipped));
            outcome.skipped.extend(new.cloned());
            candidates.skipped = skipped;
            if candidates.records.is_empty() {
                self.candidates.remove(&subnet);
            }
        }
        outcome.changes.append(&mut removed);
        outcome
    }
}

/// For each of `records`, in their order, why hosts of `network` skip it; `None` for one that is a route to all but its
/// holder. Without `network` it is unknown which records lie inside.
pub fn refusals<'a>(
    network: Option<Ipv4Net>,
    records: impl IntoIterator<Item = &'a LeaseRecord>,
) -> Vec<Option<String>> {
    let records: Vec<_> = records.into_iter().collect();
    let mut oldest_first: Vec<_> = records.iter().enumerate().collect();
    oldest_first.sort_by_key(|(_, record)| (record.version.created, &record.key));
    let mut holders = Routes::new();
    let mut refusal = |record: &LeaseRecord| {
        let subnet = record.id.clone().map_err(|error| error.to_string())?;
        let value = record.value.as_ref().map_err(ToString::to_string)?;
        match candidates::peer(network, None, subnet, value)? {
            Some(peer) => candidates::check_holder(*holders.entry(subnet).or_insert(peer), peer, subnet),
            None => Ok(()),
        }
    };
    let mut refusals: Vec<_> =
        oldest_first.into_iter().map(|(index, record)| (index, refusal(record).err())).collect();
    refusals.sort_by_key(|(index, _)| *index);
    refusals.into_iter().map(|(_, why)| why.map(|why| printable(&why, LONGEST_REASON))).collect()
}
