//! The records that name one subnet, and the route that they give it.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::Skipped;
use crate::{
    lease::{LeaseRecord, LeaseValue},
    route::{LocalNode, Peer, Subnet},
    store::RecordError,
};

type Value = Result<LeaseValue, RecordError>;

/// The records that name one subnet.
#[derive(Clone, Debug, Default)]
pub(super) struct Candidates {
    /// In order of their keys: one, except where flannel's dual-stack keys name an IPv4 subnet twice.
    records: Vec<(String, Value)>,
    /// The records that the last decision skipped.
    pub(super) skipped: Vec<Skipped>,
}

/// The decision about a subnet.
pub(super) struct Decision {
    pub(super) peer: Option<Peer>,
    pub(super) skipped: Vec<Skipped>,
}

/// Why a record gives no route.
pub(super) enum Refused {
    /// It cannot be read, so that the route before it may still be right.
    Unreadable(String),
    /// It cannot be a route.
    Unfit(String),
}

impl Refused {
    pub(super) fn why(self) -> String {
        match self {
            Self::Unreadable(why) | Self::Unfit(why) => why,
        }
    }
}

impl Candidates {
    pub(super) fn put(&mut self, LeaseRecord { key, value, .. }: LeaseRecord) {
        match self.find(&key) {
            Ok(index) => {
                if let Some(record) = self.records.get_mut(index) {
                    record.1 = value;
                }
            }
            Err(index) => {
                // Nearly always the only one.
                self.records.reserve_exact(1);
                self.records.insert(index, (key, value));
            }
        }
    }

    pub(super) fn remove(&mut self, key: &str) {
        if let Ok(index) = self.find(key) {
            drop(self.records.remove(index));
        }
    }

    pub(super) fn clear(&mut self) {
        self.records.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    fn find(&self, key: &str) -> Result<usize, usize> {
        self.records.binary_search_by(|(known, _)| known.as_str().cmp(key))
    }

    /// The peer of `subnet`: a fixed one, else that of the first usable record, else, while a record cannot be read, the one
    /// `before`.
    pub(super) fn decide(
        &self,
        local: &LocalNode,
        subnet: Subnet,
        fixed: Option<Peer>,
        before: Option<Peer>,
    ) -> Decision {
        let mut decision = Decision { peer: fixed, skipped: Vec::new() };
        let mut unreadable = Vec::new();
        for (key, value) in &self.records {
            let why = match peer(Some(local.network), Some(local), subnet, value) {
                Ok(None) => continue,
                Ok(Some(peer)) => match check_holder(*decision.peer.get_or_insert(peer), peer, subnet) {
                    Ok(()) => continue,
                    Err(why) => why,
                },
                Err(Refused::Unreadable(why)) => {
                    unreadable.push((key, why));
                    continue;
                }
                Err(Refused::Unfit(why)) => why,
            };
            decision.skipped.push(Skipped::new(key, &why));
        }
        let kept = before.filter(|_| decision.peer.is_none() && !unreadable.is_empty());
        decision.peer = decision.peer.or(kept);
        for (key, mut why) in unreadable {
            if kept.is_some() {
                why.push_str("; its last good value stays in force");
            }
            decision.skipped.push(Skipped::new(key, &why));
        }
        decision
    }
}

/// Of two records for one subnet, only the first holder's counts.
pub(super) fn check_holder(holder: Peer, peer: Peer, subnet: Subnet) -> Result<(), String> {
    match holder == peer {
        true => Ok(()),
        false => Err(format!("{holder} holds {subnet} already")),
    }
}

/// The peer that a record names; `None` for the record of this host. Commands for operators run outside of any host's place
/// (`local`), and perhaps without knowing the network.
pub(super) fn peer(
    network: Option<Ipv4Net>,
    local: Option<&LocalNode>,
    subnet: Subnet,
    value: &Value,
) -> Result<Option<Peer>, Refused> {
    let refused = |why: String| Err(Refused::Unfit(why));
    let value = match value {
        Ok(value) => value,
        Err(error) => return Err(Refused::Unreadable(error.to_string())),
    };
    let public_ip: Ipv4Addr = value.public_ip;
    if let Some(local) = local.filter(|local| local.public_ip == public_ip) {
        return match subnet == local.subnet {
            true => Ok(None),
            false => {
                refused(format!("it carries our own address {public_ip}, but our subnet is {}", local.subnet))
            }
        };
    }
    if let Some(kind) = &value.backend_type {
        return refused(format!("its holder uses the {kind:?} backend"));
    }
    if let Some(network) = network.filter(|network| !subnet.is_part_of(*network)) {
        return refused(format!("it is not a part of the network {network}"));
    }
    if let Some(local) = local.filter(|local| subnet.overlaps(local.subnet)) {
        return refused(format!("it overlaps our own subnet {}", local.subnet));
    }
    if network.is_some_and(|network| network.contains(&public_ip)) {
        return refused(format!("PublicIP {public_ip} lies inside the overlay: packets to it would loop"));
    }
    Ok(Some(public_ip.into()))
}
