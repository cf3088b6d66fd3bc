//! The plain definition of the route table, made from all records at once: what [`RouteTable`](super::RouteTable) must equal.

use super::Skipped;
use crate::{
    lease::LeaseRecord,
    route::{LocalNode, Peer, Routes, Subnet},
};

/// Routes and skipped records.
pub(super) type Table = (Routes, Vec<Skipped>);

/// The table that `records` describe after a table with the routes `previous`.
pub(super) fn build<'a>(
    local: LocalNode,
    fixed: &Routes,
    records: impl IntoIterator<Item = &'a LeaseRecord>,
    previous: &Routes,
) -> Table {
    let mut routes = fixed.clone();
    let mut skipped = Vec::new();
    let mut unreadable = Vec::new();
    let mut records: Vec<_> = records.into_iter().collect();
    records.sort_by_key(|record| (record.version.created, &record.key));
    for record in records {
        match route(local, record) {
            Ok(Some((subnet, peer))) => {
                let holder = *routes.entry(subnet).or_insert(peer);
                if holder.address != peer.address {
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
type Refused = (Option<Subnet>, String);

/// The route that one record gives.
fn route(local: LocalNode, record: &LeaseRecord) -> Result<Option<(Subnet, Peer)>, Refused> {
    let subnet = record.id.clone().map_err(|error| (None, error.to_string()))?;
    let value = record.value.clone().map_err(|error| (Some(subnet), error.to_string()))?;
    let public_ip = value.public_ip;
    let why = if public_ip == local.public_ip {
        if subnet == local.subnet {
            return Ok(None);
        }
        format!("it carries our own address {}, but our subnet is {}", local.public_ip, local.subnet)
    } else if let Some(kind) = value.backend_type {
        format!("its holder uses the \"{kind}\" backend")
    } else if !subnet.is_part_of(local.network) {
        format!("it is not a part of the network {}", local.network)
    } else if subnet.overlaps(local.subnet) {
        format!("it overlaps our own subnet {}", local.subnet)
    } else if local.network.contains(&public_ip) {
        format!("PublicIP {public_ip} lies inside the overlay: packets to it would loop")
    } else {
        return Ok(Some((subnet, Peer { address: public_ip, takes_unfinished: value.takes_unfinished })));
    };
    Err((None, why))
}
