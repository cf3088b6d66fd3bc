//! The records that name one subnet, and the route that they give it.

use std::sync::Arc;

use ipnet::Ipv4Net;

use super::Skipped;
use crate::{
    lease::{LeaseRecord, LeaseValue},
    route::{LocalNode, Peer, Subnet},
    store::RecordError,
};

/// A record that names the subnet.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) key: Arc<str>,
    /// The revision at which it was created, where the store keeps one.
    created: Option<i64>,
    pub(super) value: Result<LeaseValue, RecordError>,
}

/// The records that name one subnet.
#[derive(Clone, Debug, Default)]
pub(super) struct Candidates {
    /// Oldest first, then in order of their keys: one, except where flannel's dual-stack keys name an IPv4 subnet twice.
    pub(super) records: Vec<Candidate>,
    /// The records that the last decision skipped.
    pub(super) skipped: Vec<Skipped>,
}

impl Candidates {
    pub(super) fn put(&mut self, LeaseRecord { key, value, version, .. }: LeaseRecord) {
        self.remove(&key);
        let new = Candidate { key, created: version.created, value };
        let index = self.records.partition_point(|known| known.order() < new.order());
        // Nearly always the only one.
        self.records.reserve_exact(1);
        self.records.insert(index, new);
    }

    pub(super) fn remove(&mut self, key: &str) {
        self.records.retain(|known| *known.key != *key);
    }

    /// The peer of `subnet`, and the records that do not count. The peer is a fixed one, else that of the oldest usable record,
    /// else, while a record cannot be read, the one `before`.
    pub(super) fn decide(
        &self,
        local: &LocalNode,
        subnet: Subnet,
        fixed: Option<Peer>,
        before: Option<Peer>,
    ) -> (Option<Peer>, Vec<Skipped>) {
        let (mut holder, mut skipped, mut unreadable) = (fixed, Vec::new(), Vec::new());
        for Candidate { key, value, .. } in &self.records {
            let value = match value {
                Ok(value) => value,
                Err(error) => {
                    unreadable.push((key, error.to_string()));
                    continue;
                }
            };
            let refused = match peer(Some(local.network), Some(local), subnet, value) {
                Ok(None) => continue,
                Ok(Some(peer)) => check_holder(*holder.get_or_insert(peer), peer, subnet),
                Err(why) => Err(why),
            };
            skipped.extend(refused.err().map(|why| Skipped::new(key, &why)));
        }
        let kept = before.filter(|_| holder.is_none() && !unreadable.is_empty());
        for (key, mut why) in unreadable {
            if kept.is_some() {
                why.push_str("; its last good value stays in force");
            }
            skipped.push(Skipped::new(key, &why));
        }
        (holder.or(kept), skipped)
    }
}

impl Candidate {
    fn order(&self) -> (Option<i64>, &str) {
        (self.created, &self.key)
    }
}

/// Of two records for one subnet, only the older one counts.
pub(super) fn check_holder(holder: Peer, peer: Peer, subnet: Subnet) -> Result<(), String> {
    match holder.address == peer.address {
        true => Ok(()),
        false => Err(format!("{holder} holds {subnet} already")),
    }
}

/// The peer that a record names, or why it is no route; `None` for the record of this host. Commands for operators run outside
/// of any host's place (`local`), and perhaps without knowing the network.
pub(super) fn peer(
    network: Option<Ipv4Net>,
    local: Option<&LocalNode>,
    subnet: Subnet,
    value: &LeaseValue,
) -> Result<Option<Peer>, String> {
    let public_ip = value.public_ip;
    if let Some(local) = local.filter(|local| local.public_ip == public_ip) {
        return match subnet == local.subnet {
            true => Ok(None),
            false => {
                Err(format!("it carries our own address {public_ip}, but our subnet is {}", local.subnet))
            }
        };
    }
    if let Some(kind) = &value.backend_type {
        return Err(format!("its holder uses the \"{kind}\" backend"));
    }
    if let Some(network) = network.filter(|network| !subnet.is_part_of(*network)) {
        return Err(format!("it is not a part of the network {network}"));
    }
    if let Some(local) = local.filter(|local| subnet.overlaps(local.subnet)) {
        return Err(format!("it overlaps our own subnet {}", local.subnet));
    }
    if network.is_some_and(|network| network.contains(&public_ip)) {
        return Err(format!("PublicIP {public_ip} lies inside the overlay: packets to it would loop"));
    }
    Ok(Some(Peer { address: public_ip, takes_unfinished: value.takes_unfinished }))
}
