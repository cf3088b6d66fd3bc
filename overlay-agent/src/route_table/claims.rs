//! The records that name one subnet, and what they decide about its route.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::{Own, Skipped};
use crate::lease::{LeaseError, LeaseValue};

/// What a record says about its holder. Values are not kept: they may be long.
type Said = Result<LeaseValue, LeaseError>;

/// The records that name one subnet.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims {
    /// In order of their keys: one, but for flannel's dual-stack keys, which may name an IPv4 subnet twice.
    records: Vec<(String, Said)>,
    /// Those that were left aside when it was last decided.
    pub(super) skipped: Vec<Skipped>,
}

/// What became of a subnet.
pub(super) struct Decision {
    pub(super) peer: Option<Ipv4Addr>,
    pub(super) skipped: Vec<Skipped>,
}

/// Why a record gives no route.
enum Refused {
    /// Nobody knows what it says, so that what was known before may still hold.
    Unreadable(String),
    /// What it says cannot be.
    Unfit(String),
}

impl Claims {
    pub(super) fn put(&mut self, key: String, said: Said) {
        match self.find(&key) {
            Ok(index) => {
                if let Some(record) = self.records.get_mut(index) {
                    record.1 = said;
                }
            }
            Err(index) => {
                // Nearly always the only one.
                self.records.reserve_exact(1);
                self.records.insert(index, (key, said));
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

    pub(super) fn first(&self) -> Option<&Said> {
        self.records.first().map(|(_, said)| said)
    }

    fn find(&self, key: &str) -> Result<usize, usize> {
        self.records.binary_search_by(|(known, _)| known.as_str().cmp(key))
    }

    /// Who gets `subnet`: a fixed peer, else whom the first record that can be used names, else, while there is a record
    /// that cannot be read, whoever had it `before`.
    pub(super) fn decide(
        &self,
        own: &Own,
        subnet: Ipv4Net,
        fixed: Option<Ipv4Addr>,
        before: Option<Ipv4Addr>,
    ) -> Decision {
        let mut decision = Decision { peer: fixed, skipped: Vec::new() };
        let mut unreadable = Vec::new();
        for (key, said) in &self.records {
            let why = match peer(own, subnet, said) {
                Ok(None) => continue,
                Ok(Some(peer)) => match *decision.peer.get_or_insert(peer) {
                    other if other == peer => continue,
                    other => format!("{other} holds {subnet} already"),
                },
                Err(Refused::Unreadable(why)) => {
                    unreadable.push((key, why));
                    continue;
                }
                Err(Refused::Unfit(why)) => why,
            };
            decision.skipped.push(Skipped::new(key, why));
        }
        let kept = before.filter(|_| decision.peer.is_none() && !unreadable.is_empty());
        decision.peer = decision.peer.or(kept);
        for (key, mut why) in unreadable {
            if kept.is_some() {
                why.push_str("; its last good value stays in force");
            }
            decision.skipped.push(Skipped::new(key, why));
        }
        decision
    }
}

/// The peer that a record names; `None` when it is our own.
fn peer(own: &Own, subnet: Ipv4Net, said: &Said) -> Result<Option<Ipv4Addr>, Refused> {
    let refused = |why: String| Err(Refused::Unfit(why));
    let value = match said {
        Ok(value) => value,
        Err(error) => return Err(Refused::Unreadable(error.to_string())),
    };
    if value.public_ip == own.public_ip {
        return match subnet == own.subnet {
            true => Ok(None),
            false => refused(format!(
                "it carries our own address {}, but our subnet is {}",
                own.public_ip, own.subnet
            )),
        };
    }
    if let Some(kind) = &value.backend_type {
        return refused(format!("its holder uses the {kind:?} backend"));
    }
    if !own.network.contains(&subnet) || subnet == own.network {
        return refused(format!("it is not a part of the network {}", own.network));
    }
    if subnet.contains(&own.subnet) || own.subnet.contains(&subnet) {
        return refused(format!("it overlaps our own subnet {}", own.subnet));
    }
    if own.network.contains(&value.public_ip) {
        return refused(format!(
            "PublicIP {} lies inside the overlay: packets to it would loop",
            value.public_ip
        ));
    }
    Ok(Some(value.public_ip))
}
