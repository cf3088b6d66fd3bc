//! Chooses a host's subnet from the lease records. Pure: no store, no clock.

use std::net::Ipv4Addr;

use rand::seq::IndexedRandom as _;

use super::SubnetRequest;
use crate::{lease::LeaseRecord, route::Subnet, store::StoreError};

/// The next step on the way to a subnet.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Choice {
    /// This record is ours: keep it.
    Keep(LeaseRecord, Subnet),
    /// This record is ours, but does not fit the request: remove it and choose again.
    Discard(LeaseRecord),
    /// This subnet is free.
    Take(Subnet),
}

/// Free subnets among which one is drawn: enough that hosts that start together rarely draw the same.
const CANDIDATES: usize = 4096;

/// Chooses as flannel does: the record that carries our address, else the earlier subnet if it is free, else a random free
/// one. With a wanted subnet, that one or none.
/// Fails when the wanted subnet is not available, our record contradicts a `--peer`, or the network is full.
pub(super) fn choose(
    records: &[LeaseRecord],
    request: &SubnetRequest,
    public_ip: Ipv4Addr,
) -> Result<Choice, StoreError> {
    let SubnetRequest { config, wanted, earlier, fixed } = request;
    let held: Vec<(&LeaseRecord, Subnet)> =
        records.iter().filter_map(|record| Some((record, record.subnet()?))).collect();
    let mut ours: Vec<(&LeaseRecord, Subnet)> =
        held.iter().copied().filter(|(record, _)| record.holder() == Some(public_ip)).collect();
    // A reservation first, then the subnet of an earlier run.
    ours.sort_by_key(|(record, subnet)| (!record.is_reservation(), Some(*subnet) != wanted.or(*earlier)));
    if let Some(wanted) = *wanted {
        return choose_wanted(&held, &ours, request, public_ip, wanted);
    }
    let mut refused = None;
    for (record, subnet) in &ours {
        if !config.may_be_held(*subnet, record.is_reservation()) {
            continue;
        }
        match fixed.iter().find(|peer| peer.overlaps(*subnet)) {
            None => return Ok(Choice::Keep((*record).clone(), *subnet)),
            Some(peer) => refused = refused.or(Some((*subnet, *peer))),
        }
    }
    // Only the operator knows which of the two is right: the record stays.
    if let Some((subnet, peer)) = refused {
        return Err(StoreError::Conflict(format!(
            "this host ({public_ip}) holds {subnet}, and a --peer has {peer}: drop the --peer, or release {subnet} first"
        )));
    }
    // A reservation belongs to the operator and stays, even where it cannot be used.
    if let Some((record, _)) = ours.iter().find(|(record, _)| !record.is_reservation()) {
        return Ok(Choice::Discard((*record).clone()));
    }
    let taken = Taken::new(held.iter().map(|(_, subnet)| subnet).chain(fixed));
    if let Some(earlier) = earlier.filter(|subnet| config.may_be_assigned(*subnet) && taken.is_free(*subnet))
    {
        return Ok(Choice::Take(earlier));
    }
    let free: Vec<_> = config.subnets().filter(|subnet| taken.is_free(*subnet)).take(CANDIDATES).collect();
    free.choose(&mut rand::rng()).map(|subnet| Choice::Take(*subnet)).ok_or_else(|| StoreError::full(config))
}

fn choose_wanted(
    held: &[(&LeaseRecord, Subnet)],
    ours: &[(&LeaseRecord, Subnet)],
    request: &SubnetRequest,
    public_ip: Ipv4Addr,
    wanted: Subnet,
) -> Result<Choice, StoreError> {
    let conflict = |why: String| Err(StoreError::Conflict(why));
    let network = request.config.network;
    if !wanted.is_part_of(network) {
        return conflict(format!(
            "the subnet {wanted} is not a part of the network {network}: choose another --subnet"
        ));
    }
    if let Some(peer) = request.fixed.iter().find(|peer| peer.overlaps(wanted)) {
        return conflict(format!(
            "the subnet {wanted} overlaps {peer}, which a --peer has: drop the --peer, or choose another --subnet"
        ));
    }
    if let Some((record, subnet)) = ours.iter().find(|(_, subnet)| *subnet == wanted) {
        return Ok(Choice::Keep((*record).clone(), *subnet));
    }
    if let Some((_, subnet)) = ours.iter().find(|(record, _)| record.is_reservation()) {
        return conflict(format!(
            "{subnet} is reserved for this host ({public_ip}): drop --subnet, or remove the reservation first"
        ));
    }
    let mut others = held.iter().filter(|(record, _)| record.holder() != Some(public_ip));
    if let Some((record, other)) = others.find(|(_, other)| other.overlaps(wanted)) {
        let holder = record
            .holder()
            .map_or_else(|| "a record that cannot be read".to_owned(), |holder| holder.to_string());
        let overlap = if *other == wanted { String::new() } else { format!("overlaps {other}, which ") };
        return conflict(format!(
            "--subnet asks for {wanted}, which {overlap}{holder} holds: choose another --subnet, or release {other} first"
        ));
    }
    // Our earlier lease is removed only now that the wanted subnet is known to be free.
    Ok(ours.first().map_or(Choice::Take(wanted), |(record, _)| Choice::Discard((*record).clone())))
}

/// Held addresses as sorted ranges without overlap: a network of millions of subnets is searched in one pass.
struct Taken(Vec<(u32, u32)>);

impl Taken {
    fn new<'a>(subnets: impl Iterator<Item = &'a Subnet>) -> Self {
        let mut ranges: Vec<(u32, u32)> = subnets.map(range).collect();
        ranges.sort_unstable();
        // Prefixes either nest or are apart, so a range that starts inside the one before ends inside it, too.
        ranges.dedup_by(|later, earlier| later.0 <= earlier.1);
        Self(ranges)
    }

    fn is_free(&self, subnet: Subnet) -> bool {
        let (first, last) = range(&subnet);
        let next = self.0.partition_point(|(_, end)| *end < first);
        self.0.get(next).is_none_or(|(start, _)| *start > last)
    }
}

fn range(subnet: &Subnet) -> (u32, u32) {
    let prefix = subnet.prefix();
    (u32::from(prefix.network()), u32::from(prefix.broadcast()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::NetworkConfig,
        lease,
        store::{Lifetime, Version},
    };

    const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
    const OTHER: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 2);
    const THIRD: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 3);

    fn net(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    /// A record in etcd; `lease` is 0 for a reservation.
    fn record(key: &str, value: &str, lease: i64) -> LeaseRecord {
        let lifetime = if lease == 0 { Lifetime::Unlimited } else { Lifetime::Limited(lease) };
        LeaseRecord::parse(key, value.as_bytes(), Version { lifetime, ..Version::default() })
    }

    fn entry(key: &str, public_ip: Ipv4Addr, lease: i64) -> LeaseRecord {
        record(key, &lease::value(public_ip), lease)
    }

    fn request() -> SubnetRequest {
        let config =
            r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.16.0","SubnetMax":"10.5.19.0","SubnetLen":24}"#;
        SubnetRequest::any(NetworkConfig::parse(config).unwrap())
    }

    fn keep(record: &LeaseRecord) -> Choice {
        Choice::Keep(record.clone(), record.subnet().unwrap())
    }

    fn take(subnet: &str) -> Choice {
        Choice::Take(net(subnet))
    }

    fn chosen(entries: &[LeaseRecord], earlier: Option<&str>) -> Choice {
        choose(entries, &SubnetRequest { earlier: earlier.map(net), ..request() }, HOST).unwrap()
    }

    #[test]
    fn our_own_record_is_preferred_and_a_reservation_before_a_lease() {
        let entries = [
            entry("10.5.16.0-24", HOST, 7),
            entry("10.5.17.0-24", HOST, 8),
            entry("10.5.200.0-24", OTHER, 0),
        ];
        assert_eq!(chosen(&entries, Some("10.5.17.0/24")), keep(&entries[1]));
        let reserved = [entries[0].clone(), entry("10.5.200.0-24", HOST, 0)];
        assert_eq!(chosen(&reserved, None), keep(&reserved[1]));
    }

    #[test]
    fn a_lease_that_no_longer_fits_is_discarded_and_a_reservation_left_alone() {
        let lease = entry("10.5.200.0-24", HOST, 7);
        assert_eq!(chosen(std::slice::from_ref(&lease), None), Choice::Discard(lease));
        let elsewhere = entry("10.6.0.0-24", HOST, 0);
        assert_eq!(chosen(&[elsewhere], Some("10.5.18.0/24")), take("10.5.18.0/24"));
    }

    #[test]
    fn only_free_subnets_are_taken() {
        let entries = [
            entry("10.5.16.0-25", OTHER, 7),
            entry("10.5.17.0-24&2001:cafe::-64", OTHER, 7),
            entry("10.5.18.0-24", OTHER, 0),
            record("10.6.0.0-24", "garbage", 1),
        ];
        for _ in 0..20 {
            assert_eq!(chosen(&entries, Some("10.5.18.0/24")), take("10.5.19.0/24"));
        }
        let unreadable = record("10.5.19.0-24", "garbage", 1);
        let full = [&entries[..], &[unreadable]].concat();
        let error = choose(&full, &request(), HOST).unwrap_err().to_string();
        assert!(error.contains("full") && error.contains("10.5.19.0"), "{error}");
    }

    #[test]
    fn a_wanted_subnet_is_taken_or_refused_with_the_reason() {
        let entries = [entry("10.5.16.0-24", OTHER, 7), entry("10.5.200.0-24", THIRD, 0)];
        let choose = |host, wanted| {
            let fixed = vec![net("10.5.50.0/24")];
            choose(&entries, &SubnetRequest { wanted: Some(net(wanted)), fixed, ..request() }, host)
        };
        assert_eq!(choose(HOST, "10.5.100.0/24").unwrap(), take("10.5.100.0/24"));
        assert!(matches!(choose(OTHER, "10.5.16.0/24").unwrap(), Choice::Keep(..)));
        for (host, wanted, why) in [
            (HOST, "10.6.0.0/24", "not a part"),
            (HOST, "10.5.16.128/25", "192.168.77.2 holds"),
            (OTHER, "10.5.50.0/24", "--peer"),
            (THIRD, "10.5.17.0/24", "reserved"),
            (THIRD, "10.5.16.0/24", "reserved"),
        ] {
            let error = choose(host, wanted).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_wanted_subnet_takes_the_place_of_our_lease_once_it_is_free() {
        let entries = [entry("10.5.16.0-24", HOST, 7), entry("10.5.17.0-24", OTHER, 8)];
        let choose =
            |wanted| choose(&entries, &SubnetRequest { wanted: Some(net(wanted)), ..request() }, HOST);
        assert_eq!(choose("10.5.18.0/24").unwrap(), Choice::Discard(entries[0].clone()));
        assert_eq!(choose("10.5.16.128/25").unwrap(), Choice::Discard(entries[0].clone()));
        assert!(choose("10.5.17.0/24").unwrap_err().to_string().contains("192.168.77.2 holds"));
    }

    #[test]
    fn a_fixed_peers_subnet_is_neither_taken_nor_kept_nor_removed() {
        let fixed = vec![net("10.5.16.0/23"), net("10.5.18.128/25")];
        let request = SubnetRequest { earlier: Some(net("10.5.17.0/24")), fixed, ..request() };
        for _ in 0..20 {
            assert_eq!(choose(&[], &request, HOST).unwrap(), take("10.5.19.0/24"));
        }
        let ours = [entry("10.5.16.0-24", HOST, 7), entry("10.5.19.0-24", HOST, 8)];
        assert_eq!(choose(&ours, &request, HOST).unwrap(), keep(&ours[1]));
        let error = choose(&ours[..1], &request, HOST).unwrap_err().to_string();
        assert!(error.contains("10.5.16.0/24") && error.contains("--peer"), "{error}");
    }

    #[test]
    fn nested_and_neighbouring_ranges_are_told_apart() {
        let entries =
            [entry("10.5.0.0-20", OTHER, 1), entry("10.5.3.0-24", OTHER, 1), entry("10.5.17.0-24", OTHER, 1)];
        let subnets: Vec<_> = entries.iter().filter_map(LeaseRecord::subnet).collect();
        let taken = Taken::new(subnets.iter());
        for subnet in ["10.5.15.0/24", "10.5.4.0/24", "10.5.17.0/24", "10.5.16.0/23", "10.4.0.0/15"] {
            assert!(!taken.is_free(net(subnet)), "{subnet}");
        }
        for subnet in ["10.5.16.0/24", "10.5.18.0/24", "10.4.255.0/24"] {
            assert!(taken.is_free(net(subnet)), "{subnet}");
        }
    }
}
