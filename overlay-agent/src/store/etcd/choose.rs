//! Which subnet a host should have, decided from the records alone. Pure: no etcd, no clock.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use rand::seq::IndexedRandom as _;

use super::{error::EtcdError, records::Entry};
use crate::config::NetworkConfig;

/// What to do next on the way to a subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// This record is ours: go on with it.
    Keep(Entry, Ipv4Net),
    /// This record is ours, but no longer fits the network: remove it and look again.
    Discard(Entry),
    /// Nobody holds this subnet.
    Take(Ipv4Net),
}

/// Free subnets among which one is drawn. Enough that hosts that start together rarely draw the same.
const CANDIDATES: usize = 4096;

/// Chooses as flannel does: the record that carries our address, else `earlier` if it is free, else a free one by chance.
/// With `wanted`, that one or none.
pub(super) fn choose(
    entries: &[Entry],
    config: &NetworkConfig,
    public_ip: Ipv4Addr,
    wanted: Option<Ipv4Net>,
    earlier: Option<Ipv4Net>,
) -> Result<Choice, EtcdError> {
    let held: Vec<(&Entry, Ipv4Net)> =
        entries.iter().filter_map(|entry| Some((entry, entry.subnet()?))).collect();
    let mut ours: Vec<(&Entry, Ipv4Net)> =
        held.iter().copied().filter(|(entry, _)| holder(entry) == Some(public_ip)).collect();
    // What the operator reserved goes first, then what we had before.
    ours.sort_by_key(|(entry, subnet)| (!entry.is_reservation(), Some(*subnet) != wanted.or(earlier)));
    if let Some(wanted) = wanted {
        return choose_wanted(&held, &ours, config, public_ip, wanted);
    }
    if let Some((entry, subnet)) = ours.iter().find(|(entry, subnet)| fits(config, entry, *subnet)) {
        return Ok(Choice::Keep((*entry).clone(), *subnet));
    }
    // A reservation is the operator's: it is left alone even where it cannot be used.
    if let Some((entry, _)) = ours.iter().find(|(entry, _)| !entry.is_reservation()) {
        return Ok(Choice::Discard((*entry).clone()));
    }
    if let Some(earlier) = earlier.filter(|subnet| config.may_be_given(*subnet) && is_free(&held, *subnet)) {
        return Ok(Choice::Take(earlier));
    }
    let taken = Taken::new(&held);
    let free: Vec<_> = config.subnets().filter(|subnet| taken.is_free(*subnet)).take(CANDIDATES).collect();
    free.choose(&mut rand::rng()).map(|subnet| Choice::Take(*subnet)).ok_or_else(|| EtcdError::full(config))
}

fn choose_wanted(
    held: &[(&Entry, Ipv4Net)],
    ours: &[(&Entry, Ipv4Net)],
    config: &NetworkConfig,
    public_ip: Ipv4Addr,
    wanted: Ipv4Net,
) -> Result<Choice, EtcdError> {
    if !config.is_part(wanted) {
        return Err(EtcdError::Wanted(format!(
            "the subnet {wanted} is not a part of the network {}: choose another --subnet",
            config.network
        )));
    }
    if let Some((entry, subnet)) = ours.iter().find(|(_, subnet)| *subnet == wanted) {
        return Ok(Choice::Keep((*entry).clone(), *subnet));
    }
    if let Some((_, subnet)) = ours.first() {
        return Err(EtcdError::Wanted(format!(
            "this host ({public_ip}) already holds {subnet}: drop --subnet, or release {subnet} first"
        )));
    }
    match held.iter().find(|(_, other)| overlap(*other, wanted)) {
        None => Ok(Choice::Take(wanted)),
        Some((entry, other)) => {
            let who = holder(entry)
                .map_or_else(|| "a record that cannot be read".to_owned(), |holder| holder.to_string());
            Err(EtcdError::Wanted(format!(
                "the subnet {wanted} overlaps {other}, which {who} holds: choose another --subnet"
            )))
        }
    }
}

/// Records of others that overlap `subnet`; `own` is our record's key.
pub(super) fn is_overlapped(keys: &[String], own: &str, subnet: Ipv4Net) -> bool {
    keys.iter()
        .filter(|key| *key != own)
        .filter_map(|key| crate::lease::parse_key(key).ok())
        .any(|other| overlap(other, subnet))
}

fn holder(entry: &Entry) -> Option<Ipv4Addr> {
    entry.parsed().map(|value| value.public_ip)
}

fn fits(config: &NetworkConfig, entry: &Entry, subnet: Ipv4Net) -> bool {
    config.may_be_held(subnet, entry.is_reservation())
}

fn is_free(held: &[(&Entry, Ipv4Net)], subnet: Ipv4Net) -> bool {
    !held.iter().any(|(_, other)| overlap(*other, subnet))
}

fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// Held addresses as sorted ranges that do not touch each other: a network of millions of subnets is looked through once.
struct Taken(Vec<(u32, u32)>);

impl Taken {
    fn new(held: &[(&Entry, Ipv4Net)]) -> Self {
        let mut ranges: Vec<(u32, u32)> =
            held.iter().map(|(_, net)| (u32::from(net.network()), u32::from(net.broadcast()))).collect();
        ranges.sort_unstable();
        // Prefixes either nest or are apart, so a range that starts inside the one before ends inside it too.
        ranges.dedup_by(|later, earlier| later.0 <= earlier.1);
        Self(ranges)
    }

    fn is_free(&self, subnet: Ipv4Net) -> bool {
        let (first, last) = (u32::from(subnet.network()), u32::from(subnet.broadcast()));
        let next = self.0.partition_point(|(_, end)| *end < first);
        self.0.get(next).is_none_or(|(start, _)| *start > last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease;

    const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
    const OTHER: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 2);

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn entry(key: &str, public_ip: Ipv4Addr, lease: i64) -> Entry {
        Entry { key: key.to_owned(), value: lease::value(public_ip).into_bytes(), lease, mod_revision: 1 }
    }

    fn config() -> NetworkConfig {
        NetworkConfig::parse(
            r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.16.0","SubnetMax":"10.5.19.0","SubnetLen":24}"#,
        )
        .unwrap()
    }

    fn chosen(entries: &[Entry], earlier: Option<&str>) -> Choice {
        choose(entries, &config(), HOST, None, earlier.map(net)).unwrap()
    }

    #[test]
    fn our_own_record_goes_first_and_a_reservation_before_a_lease() {
        let entries = [
            entry("10.5.16.0-24", HOST, 7),
            entry("10.5.17.0-24", HOST, 8),
            entry("10.5.200.0-24", OTHER, 0),
        ];
        assert_eq!(
            chosen(&entries, Some("10.5.17.0/24")),
            Choice::Keep(entries[1].clone(), net("10.5.17.0/24"))
        );
        let reserved = [entries[0].clone(), entry("10.5.200.0-24", HOST, 0)];
        assert_eq!(chosen(&reserved, None), Choice::Keep(reserved[1].clone(), net("10.5.200.0/24")));
    }

    #[test]
    fn a_lease_that_no_longer_fits_is_discarded_and_a_reservation_left_alone() {
        let lease = entry("10.5.200.0-24", HOST, 7);
        assert_eq!(chosen(std::slice::from_ref(&lease), None), Choice::Discard(lease));
        let elsewhere = entry("10.6.0.0-24", HOST, 0);
        assert_eq!(chosen(&[elsewhere], Some("10.5.18.0/24")), Choice::Take(net("10.5.18.0/24")));
    }

    #[test]
    fn only_free_subnets_are_taken() {
        let entries = [
            entry("10.5.16.0-25", OTHER, 7),
            entry("10.5.17.0-24&2001:cafe::-64", OTHER, 7),
            entry("10.5.18.0-24", OTHER, 0),
            Entry { value: b"garbage".to_vec(), ..entry("10.6.0.0-24", OTHER, 1) },
        ];
        for _ in 0..20 {
            assert_eq!(chosen(&entries, Some("10.5.18.0/24")), Choice::Take(net("10.5.19.0/24")));
        }
        let unreadable = Entry { value: b"garbage".to_vec(), ..entry("10.5.19.0-24", OTHER, 1) };
        let full = [&entries[..], &[unreadable]].concat();
        let error = choose(&full, &config(), HOST, None, None).unwrap_err().to_string();
        assert!(error.contains("full") && error.contains("10.5.19.0"), "{error}");
    }

    #[test]
    fn a_wanted_subnet_is_had_or_refused_with_the_reason() {
        let entries = [entry("10.5.16.0-24", OTHER, 7)];
        let choose = |host, wanted| choose(&entries, &config(), host, Some(net(wanted)), None);
        assert_eq!(choose(HOST, "10.5.100.0/24").unwrap(), Choice::Take(net("10.5.100.0/24")));
        assert!(matches!(choose(OTHER, "10.5.16.0/24").unwrap(), Choice::Keep(..)));
        for (host, wanted, why) in [
            (HOST, "10.6.0.0/24", "not a part"),
            (HOST, "10.5.16.128/25", "192.168.77.2 holds"),
            (OTHER, "10.5.17.0/24", "already holds"),
        ] {
            let error = choose(host, wanted).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn nested_and_neighbouring_ranges_are_told_apart() {
        let entries =
            [entry("10.5.0.0-20", OTHER, 1), entry("10.5.3.0-24", OTHER, 1), entry("10.5.17.0-24", OTHER, 1)];
        let held: Vec<_> = entries.iter().map(|entry| (entry, entry.subnet().unwrap())).collect();
        let taken = Taken::new(&held);
        for subnet in ["10.5.15.0/24", "10.5.4.0/24", "10.5.17.0/24", "10.5.16.0/23", "10.4.0.0/15"] {
            assert!(!taken.is_free(net(subnet)), "{subnet}");
            assert!(!is_free(&held, net(subnet)), "{subnet}");
        }
        for subnet in ["10.5.16.0/24", "10.5.18.0/24", "10.4.255.0/24"] {
            assert!(taken.is_free(net(subnet)) && is_free(&held, net(subnet)), "{subnet}");
        }
    }
}
