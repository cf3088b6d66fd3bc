//! What the records say about this host's own subnet: peers act on the records, whatever the lease keeper knows.

use std::{iter::successors, net::Ipv4Addr};

use ipnet::Ipv4Net;

use super::{
    RouteTable,
    candidates::{self, Candidate},
};
use crate::{
    printable::{LONGEST_NAME, printable},
    route::{LocalNode, Subnet},
};

/// This host's subnet in the records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnSubnet {
    /// What the record of the subnet says.
    pub record: OwnRecord,
    /// Records by which other hosts have a share in it.
    pub rivals: Vec<Rival>,
}

/// What the record of this host's subnet says. Peers have a route here only while it names this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OwnRecord {
    /// There is none.
    #[default]
    Missing,
    /// Peers skip it: it cannot be read, or is of another backend.
    Unusable,
    /// It names another address.
    Of(Ipv4Addr),
    /// It names this host.
    Ours,
}

/// A record of another host for an address range that overlaps this host's subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rival {
    /// The record's key.
    pub record: String,
    /// The other host.
    pub holder: Ipv4Addr,
    /// The part of this host's subnet for which peers send packets to the other host; `None` when this host's own record takes
    /// precedence.
    pub diverted: Option<Subnet>,
}

impl RouteTable {
    /// This host's subnet in the records. A record for a part of it diverts that part, because the longest prefix wins; an older
    /// record for the same subnet diverts all of it.
    pub fn own_subnet(&self) -> OwnSubnet {
        let LocalNode { network, subnet: own, public_ip } = self.local;
        let mut found = OwnSubnet::default();
        let wider = successors(own.prefix().supernet(), Ipv4Net::supernet);
        let wider = wider.map(Subnet::containing).take_while(|wider| wider.is_part_of(network));
        let inside = self.candidates.range(own..).map(|(subnet, _)| *subnet);
        let inside = inside.take_while(|subnet| own.prefix().contains(&subnet.prefix()));
        for subnet in wider.chain(inside) {
            let Some(candidates) = self.candidates.get(&subnet) else { continue };
            let (mut rivals, mut first) = (Vec::new(), None);
            for Candidate { key, value, .. } in &candidates.records {
                // As peers, which have other subnets, decide about it.
                let peer = value
                    .as_ref()
                    .ok()
                    .and_then(|value| candidates::peer(Some(network), None, subnet, value).ok().flatten());
                let Some(peer) = peer else {
                    first.get_or_insert(OwnRecord::Unusable);
                    continue;
                };
                let is_first = !matches!(first, Some(OwnRecord::Of(_) | OwnRecord::Ours));
                match peer.address == public_ip {
                    true => first = Some(OwnRecord::Ours),
                    false => {
                        if is_first {
                            first = Some(OwnRecord::Of(peer.address));
                        }
                        let diverts = subnet == own && is_first || own.is_wider_than(subnet);
                        rivals.push(Rival {
                            record: printable(key, LONGEST_NAME),
                            holder: peer.address,
                            diverted: diverts.then_some(subnet),
                        });
                    }
                }
            }
            if subnet == own {
                found.record = first.unwrap_or_default();
            }
            // Without a record of its own, this host does not hold the subnet at all.
            if subnet != own || found.record == OwnRecord::Ours {
                found.rivals.append(&mut rivals);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        lease::{self, LeaseRecord},
        route::Routes,
        store::Version,
    };

    const US: u8 = 1;

    fn host(number: u8) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, 77, number)
    }

    /// The own subnet, 10.244.1.0/24, with records `(key, host)` in the order of their creation.
    fn own_subnet(records: &[(&str, u8)]) -> OwnSubnet {
        let network = "10.244.0.0/16".parse().unwrap();
        let subnet = "10.244.1.0/24".parse().unwrap();
        let mut table = RouteTable::new(LocalNode { network, subnet, public_ip: host(US) }, Routes::new());
        table.replace(records.iter().zip(1..).map(|((key, holder), revision)| {
            let version = Version { created: Some(revision), ..Version::default() };
            LeaseRecord::parse(key, lease::value(host(*holder)).as_bytes(), version)
        }));
        table.own_subnet()
    }

    /// The numbers of the rivals' hosts, and what each diverts.
    fn rivals(records: &[(&str, u8)]) -> Vec<(u8, Option<String>)> {
        let rival =
            |rival: Rival| (rival.holder.octets()[3], rival.diverted.map(|subnet| subnet.to_string()));
        own_subnet(records).rivals.into_iter().map(rival).collect()
    }

    #[test]
    fn a_record_of_this_host_holds_the_subnet() {
        assert_eq!(own_subnet(&[]).record, OwnRecord::Missing);
        let theirs = own_subnet(&[("10.244.1.0-24", 2), ("10.244.2.0-24", US)]);
        assert_eq!(theirs.record, OwnRecord::Of(host(2)));
        for key in ["10.244.1.0-24", "10.244.1.0-24&2001:cafe::-64"] {
            let alone = OwnSubnet { record: OwnRecord::Ours, rivals: Vec::new() };
            assert_eq!(own_subnet(&[(key, US), ("10.244.2.0-24", 2), ("10.244.0.0-24", 3)]), alone);
        }
    }

    #[test]
    fn a_rival_diverts_packets_if_its_record_is_older_or_its_prefix_longer() {
        let (ours, dual_stack) = (("10.244.1.0-24", US), "10.244.1.0-24&2001:cafe::-64");
        assert_eq!(rivals(&[ours, (dual_stack, 2)]), [(2, None)]);
        assert_eq!(rivals(&[(dual_stack, 2), ours]), [(2, Some("10.244.1.0/24".to_owned()))]);
        let parts = [("10.244.1.0-25", 2), ours, ("10.244.1.255-32", 3), ("10.244.0.0-20", 4)];
        let diverted = |part: &str| Some(part.to_owned());
        assert_eq!(
            rivals(&parts),
            [(4, None), (2, diverted("10.244.1.0/25")), (3, diverted("10.244.1.255/32"))]
        );
        assert_eq!(rivals(&[ours, ("10.244.1.0-25", US)]), []);
    }

    #[test]
    fn a_subnet_of_another_host_has_no_rival() {
        assert_eq!(rivals(&[("10.244.1.0-24", 2)]), []);
    }
}
