//! The plain definition of the route table, made from all records at once: what [`RouteTable`](super::RouteTable) must equal.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;

use super::{Own, Record, Skipped};
use crate::lease;

/// Routes and skipped records.
pub(super) type Table = (BTreeMap<Ipv4Net, Ipv4Addr>, Vec<Skipped>);

/// The table that `records`, in order of their keys, describe after a table with the routes `previous`.
pub(super) fn build<'a>(
    own: Own,
    fixed: &BTreeMap<Ipv4Net, Ipv4Addr>,
    records: impl IntoIterator<Item = &'a Record>,
    previous: &BTreeMap<Ipv4Net, Ipv4Addr>,
) -> Table {
    let mut routes = fixed.clone();
    let mut skipped = Vec::new();
    let mut unreadable = Vec::new();
    for record in records {
        match route(own, record) {
            Ok(Some((subnet, peer))) => {
                let holder = *routes.entry(subnet).or_insert(peer);
                if holder != peer {
                    skipped.push(Skipped::new(&record.key, &format!("{holder} holds {subnet} already")));
                }
            }
            Ok(None) => {}
            Err((Some(subnet), why)) => unreadable.push((subnet, record, why)),
            Err((None, why)) => skipped.push(Skipped::new(&record.key, &why)),
        }
    }
    let decided = routes.clone();
    for (subnet, record, mut why) in unreadable {
        if !decided.contains_key(&subnet)
            && let Some(peer) = previous.get(&subnet)
        {
            routes.insert(subnet, *peer);
            why.push_str("; its last good value stays in force");
        }
        skipped.push(Skipped::new(&record.key, &why));
    }
    skipped.sort();
    (routes, skipped)
}

/// Why a record gives no route; with the subnet when what was known about it still holds.
type Refused = (Option<Ipv4Net>, String);

/// The route that one record gives.
fn route(own: Own, record: &Record) -> Result<Option<(Ipv4Net, Ipv4Addr)>, Refused> {
    let subnet = lease::parse_key(&record.key).map_err(|error| (None, error.to_string()))?;
    let value = lease::parse_value(&record.value).map_err(|error| (Some(subnet), error.to_string()))?;
    let public_ip = value.public_ip;
    let why = if public_ip == own.public_ip {
        if subnet == own.subnet {
            return Ok(None);
        }
        format!("it carries our own address {}, but our subnet is {}", own.public_ip, own.subnet)
    } else if let Some(kind) = value.backend_type {
        format!("its holder uses the {kind:?} backend")
    } else if !own.network.contains(&subnet) || subnet == own.network {
        format!("it is not a part of the network {}", own.network)
    } else if subnet.contains(&own.subnet) || own.subnet.contains(&subnet) {
        format!("it overlaps our own subnet {}", own.subnet)
    } else if own.network.contains(&public_ip) {
        format!("PublicIP {public_ip} lies inside the overlay: packets to it would loop")
    } else {
        return Ok(Some((subnet, public_ip)));
    };
    Err((None, why))
}
