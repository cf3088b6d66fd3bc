//! Which peer holds which subnet, derived from lease records. Pure: no store, no kernel.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;
use overlay_ebpf::route::Routes;
use serde::{Deserialize, Serialize};

use crate::lease;

/// A record as a store hands it over: `key` is the part behind `subnets/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// For example `10.5.34.0-24`.
    pub key: String,
    /// JSON, or whatever is there.
    pub value: Vec<u8>,
}

/// A record that yields no route, and why.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Skipped {
    /// The record's key.
    pub record: String,
    /// One sentence.
    pub why: String,
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

/// Subnets of peers, and the records that are none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteTable {
    /// Subnet to underlay address.
    pub routes: BTreeMap<Ipv4Net, Ipv4Addr>,
    /// Records that were left aside.
    pub skipped: Vec<Skipped>,
}

/// One step from one table to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The subnet is new or has another peer.
    Set(Ipv4Net, Ipv4Addr),
    /// Nobody holds the subnet any more.
    Remove(Ipv4Net),
}

impl RouteTable {
    /// The table that `records` describe, with `fixed` peers that need no record. A record that cannot be read is
    /// skipped and never changes another route; if it had given a route before, that one stays (`previous`): half a
    /// write must not cut a peer off.
    pub fn build<'a>(
        own: Own,
        fixed: &BTreeMap<Ipv4Net, Ipv4Addr>,
        records: impl IntoIterator<Item = &'a Record>,
        previous: &BTreeMap<Ipv4Net, Ipv4Addr>,
    ) -> Self {
        let mut table = Self { routes: fixed.clone(), skipped: Vec::new() };
        for record in records {
            match route(own, record) {
                Ok(Some((subnet, peer))) => match table.routes.get(&subnet).copied() {
                    None => {
                        table.routes.insert(subnet, peer);
                    }
                    Some(other) if other == peer => {}
                    Some(other) => table.skip(record, format!("{other} holds {subnet} already")),
                },
                Ok(None) => {}
                Err(Refused { subnet, mut why }) => {
                    if let Some((subnet, peer)) = subnet.and_then(|subnet| previous.get_key_value(&subnet)) {
                        table.routes.entry(*subnet).or_insert(*peer);
                        why.push_str("; its last good value stays in force");
                    }
                    table.skip(record, why);
                }
            }
        }
        table.skipped.sort();
        table
    }

    /// Whoever may write records may name them as he likes: no control characters reach a terminal.
    fn skip(&mut self, record: &Record, why: String) {
        let name: String = record.key.chars().take(64).flat_map(char::escape_debug).collect();
        self.skipped.push(Skipped { record: name, why });
    }
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

struct Refused {
    /// Set when the key is sound, so that it is known whose route the record would be.
    subnet: Option<Ipv4Net>,
    why: String,
}

fn route(own: Own, record: &Record) -> Result<Option<(Ipv4Net, Ipv4Addr)>, Refused> {
    let refused = |subnet, why: String| Err(Refused { subnet, why });
    let subnet = match lease::parse_key(&record.key) {
        Ok(subnet) => subnet,
        Err(error) => return refused(None, error.to_string()),
    };
    let value = match lease::parse_value(&record.value) {
        Ok(value) => value,
        Err(error) => return refused(Some(subnet), error.to_string()),
    };
    if value.public_ip == own.public_ip {
        return match subnet == own.subnet {
            true => Ok(None),
            false => refused(
                None,
                format!("it carries our own address {}, but our subnet is {}", own.public_ip, own.subnet),
            ),
        };
    }
    if let Some(kind) = value.backend_type {
        return refused(None, format!("its holder uses the {kind:?} backend"));
    }
    if !own.network.contains(&subnet) || subnet == own.network {
        return refused(None, format!("it is not a part of the network {}", own.network));
    }
    if subnet.contains(&own.subnet) || own.subnet.contains(&subnet) {
        return refused(None, format!("it overlaps our own subnet {}", own.subnet));
    }
    if own.network.contains(&value.public_ip) {
        return refused(
            None,
            format!("PublicIP {} lies inside the overlay: packets to it would loop", value.public_ip),
        );
    }
    Ok(Some((subnet, value.public_ip)))
}

/// Longest-prefix-match lookup in a fixed set of routes, for the tun datapath.
#[derive(Clone, Debug, Default)]
pub struct Lookup {
    /// One table per prefix length that occurs, longest first.
    by_length: Vec<(u32, BTreeMap<u32, [u8; 4]>)>,
}

impl Lookup {
    /// Prepares `routes` for lookups.
    pub fn new(routes: &BTreeMap<Ipv4Net, Ipv4Addr>) -> Self {
        let mut by_length: BTreeMap<u8, BTreeMap<u32, [u8; 4]>> = BTreeMap::new();
        for (subnet, peer) in routes {
            by_length
                .entry(subnet.prefix_len())
                .or_default()
                .insert(u32::from(subnet.network()), peer.octets());
        }
        let mask = |length: u8| u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
        Self { by_length: by_length.into_iter().rev().map(|(length, table)| (mask(length), table)).collect() }
    }
}

impl Routes for Lookup {
    fn peer_of(&self, address: [u8; 4]) -> Option<[u8; 4]> {
        let address = u32::from_be_bytes(address);
        self.by_length.iter().find_map(|(mask, table)| table.get(&(address & mask)).copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 2);

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn own() -> Own {
        Own {
            network: net("10.244.0.0/16"),
            subnet: net("10.244.1.0/24"),
            public_ip: Ipv4Addr::new(192, 168, 77, 1),
        }
    }

    fn record(key: &str, value: &str) -> Record {
        Record { key: key.to_owned(), value: value.as_bytes().to_vec() }
    }

    fn build(records: &[Record]) -> RouteTable {
        RouteTable::build(own(), &BTreeMap::new(), records, &BTreeMap::new())
    }

    #[test]
    fn a_lease_of_a_peer_is_a_route_and_our_own_is_none() {
        let table = build(&[
            record("10.244.2.0-24", &lease::value(PEER)),
            record("10.244.1.0-24", &lease::value(own().public_ip)),
        ]);
        assert_eq!(table.routes, BTreeMap::from([(net("10.244.2.0/24"), PEER)]));
        assert!(table.skipped.is_empty());
    }

    #[test]
    fn impossible_records_are_skipped_with_a_reason_and_the_rest_stays() {
        let table = build(&[
            record("nonsense", "{}"),
            record("10.244.9.0-24", "{"),
            record("10.245.2.0-24", &lease::value(PEER)),
            record("10.244.0.0-16", &lease::value(PEER)),
            record("10.244.1.128-25", &lease::value(PEER)),
            record("10.244.8.0-24", &lease::value(own().public_ip)),
            record("10.244.7.0-24", r#"{"PublicIP":"10.244.3.3"}"#),
            record("10.244.6.0-24", r#"{"PublicIP":"192.168.77.6","BackendType":"vxlan"}"#),
            record("10.244.2.0-24", &lease::value(PEER)),
        ]);
        assert_eq!(table.routes, BTreeMap::from([(net("10.244.2.0/24"), PEER)]));
        assert_eq!(table.skipped.len(), 8, "{:?}", table.skipped);
    }

    #[test]
    fn a_record_that_breaks_keeps_its_last_good_route() {
        let previous = BTreeMap::from([(net("10.244.2.0/24"), PEER)]);
        let broken = [record("10.244.2.0-24", r#"{"Publ"#)];
        let table = RouteTable::build(own(), &BTreeMap::new(), &broken, &previous);
        assert_eq!(table.routes, previous);
        assert_eq!(table.skipped.len(), 1);
        // Deleted, not broken: the route goes.
        assert!(RouteTable::build(own(), &BTreeMap::new(), &[], &previous).routes.is_empty());
    }

    #[test]
    fn two_holders_of_one_subnet_are_told() {
        let other = Ipv4Addr::new(192, 168, 77, 3);
        let table = build(&[
            record("10.244.2.0-24", &lease::value(PEER)),
            record("10.244.2.0-24&2001:cafe::-64", &lease::value(other)),
            record("\u{1b}[31mred", "{}"),
        ]);
        assert_eq!(table.routes, BTreeMap::from([(net("10.244.2.0/24"), PEER)]));
        let names: Vec<_> = table.skipped.iter().map(|skipped| skipped.record.as_str()).collect();
        assert_eq!(names, ["10.244.2.0-24&2001:cafe::-64", "\\u{1b}[31mred"]);
    }

    #[test]
    fn a_fixed_peer_wins_over_a_record() {
        let fixed = BTreeMap::from([(net("10.244.2.0/24"), Ipv4Addr::new(192, 168, 77, 9))]);
        let table = RouteTable::build(
            own(),
            &fixed,
            &[record("10.244.2.0-24", &lease::value(PEER))],
            &BTreeMap::new(),
        );
        assert_eq!(table.routes, fixed);
    }

    #[test]
    fn diff_is_exactly_the_difference_and_adds_before_it_removes() {
        let current = BTreeMap::from([
            (net("10.244.2.0/24"), PEER),
            (net("10.244.3.0/24"), PEER),
            (net("10.244.4.0/24"), PEER),
        ]);
        let moved = Ipv4Addr::new(192, 168, 77, 3);
        let desired = BTreeMap::from([
            (net("10.244.2.0/24"), PEER),
            (net("10.244.3.0/24"), moved),
            (net("10.244.5.0/24"), PEER),
        ]);
        assert_eq!(
            diff(&current, &desired),
            [
                Change::Set(net("10.244.3.0/24"), moved),
                Change::Set(net("10.244.5.0/24"), PEER),
                Change::Remove(net("10.244.4.0/24")),
            ]
        );
        assert!(diff(&desired, &desired).is_empty());
    }

    #[test]
    fn lookup_prefers_the_longest_prefix() {
        let near = Ipv4Addr::new(192, 168, 77, 4);
        let lookup =
            Lookup::new(&BTreeMap::from([(net("10.244.128.0/17"), PEER), (net("10.244.200.0/24"), near)]));
        assert_eq!(lookup.peer_of([10, 244, 200, 7]), Some(near.octets()));
        assert_eq!(lookup.peer_of([10, 244, 201, 7]), Some(PEER.octets()));
        assert_eq!(lookup.peer_of([10, 244, 1, 7]), None);
        assert_eq!(Lookup::default().peer_of([10, 244, 1, 7]), None);
    }
}
