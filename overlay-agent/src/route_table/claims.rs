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
pub(super) enum Refused {
    /// Nobody knows what it says, so that what was known before may still hold.
    Unreadable(String),
    /// What it says cannot be.
    Unfit(String),
}

impl Refused {
    pub(super) fn why(self) -> String {
        match self {
            Self::Unreadable(why) | Self::Unfit(why) => why,
        }
    }
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
            let why = match peer(Some(own.network), Some(own), subnet, said) {
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
pub(super) fn check_holder(holder: Ipv4Addr, peer: Ipv4Addr, subnet: Ipv4Net) -> Result<(), String> {
    match holder == peer {
        true => Ok(()),
        false => Err(format!("{holder} holds {subnet} already")),
    }
}

/// The peer that a record names; `None` when it is `own`. An onlooker has no place of his own, and may not know the
/// network.
pub(super) fn peer(
    network: Option<Ipv4Net>,
    own: Option<&Own>,
    subnet: Ipv4Net,
    said: &Said,
) -> Result<Option<Ipv4Addr>, Refused> {
    let refused = |why: String| Err(Refused::Unfit(why));
    let value = match said {
        Ok(value) => value,
        Err(error) => return Err(Refused::Unreadable(error.to_string())),
    };
    let public_ip = value.public_ip;
    if let Some(own) = own.filter(|own| own.public_ip == public_ip) {
        return match subnet == own.subnet {
            true => Ok(None),
            false => {
                refused(format!("it carries our own address {public_ip}, but our subnet is {}", own.subnet))
            }
        };
    }
    if let Some(kind) = &value.backend_type {
        return refused(format!("its holder uses the {kind:?} backend"));
    }
    if let Some(network) = network.filter(|network| !network.contains(&subnet) || subnet == *network) {
        return refused(format!("it is not a part of the network {network}"));
    }
    if let Some(own) = own.filter(|own| subnet.contains(&own.subnet) || own.subnet.contains(&subnet)) {
        return refused(format!("it overlaps our own subnet {}", own.subnet));
    }
    if network.is_some_and(|network| network.contains(&public_ip)) {
        return refused(format!("PublicIP {public_ip} lies inside the overlay: packets to it would loop"));
    }
    Ok(Some(public_ip))
}
