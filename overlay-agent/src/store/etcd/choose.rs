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

/// What a host asks for, and what it must not have.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wish<'a> {
    /// This one or none.
    pub(super) wanted: Option<Ipv4Net>,
    /// This one if it is free.
    pub(super) earlier: Option<Ipv4Net>,
    /// Held by others, though no record says so.
    pub(super) fixed: &'a [Ipv4Net],
}

/// Free subnets among which one is drawn. Enough that hosts that start together rarely draw the same.
const CANDIDATES: usize = 4096;

/// Chooses as flannel does: the record that carries our address, else `earlier` if it is free, else a free one by chance.
/// With `wanted`, that one or none.
pub(super) fn choose(
    entries: &[Entry],
    config: &NetworkConfig,
    public_ip: Ipv4Addr,
    wish: Wish<'_>,
) -> Result<Choice, EtcdError> {
    let Wish { wanted, earlier, fixed } = wish;
    let held: Vec<(&Entry, Ipv4Net)> =
        entries.iter().filter_map(|entry| Some((entry, entry.subnet()?))).collect();
    let mut ours: Vec<(&Entry, Ipv4Net)> =
        held.iter().copied().filter(|(entry, _)| holder(entry) == Some(public_ip)).collect();
    // What the operator reserved goes first, then what we had before.
    ours.sort_by_key(|(entry, subnet)| (!entry.is_reservation(), Some(*subnet) != wanted.or(earlier)));
    if let Some(wanted) = wanted {
        return choose_wanted(&held, &ours, config, public_ip, wanted, fixed);
    }
    let mut refused = None;
    for (entry, subnet) in ours.iter().filter(|(entry, subnet)| fits(config, entry, *subnet)) {
        match fixed.iter().find(|peer| overlap(**peer, *subnet)) {
            None => return Ok(Choice::Keep((*entry).clone(), *subnet)),
            Some(peer) => refused = refused.or(Some((*subnet, *peer))),
        }
    }
    // Which of the two is right only the operator knows: the record stays.
    if let Some((subnet, peer)) = refused {
        return Err(EtcdError::Wanted(format!(
            "this host ({public_ip}) holds {subnet}, and a --peer has {peer}: drop the --peer, or release {subnet} first"
        )));
    }
    // A reservation is the operator's: it is left alone even where it cannot be used.
    if let Some((entry, _)) = ours.iter().find(|(entry, _)| !entry.is_reservation()) {
        return Ok(Choice::Discard((*entry).clone()));
    }
    if let Some(earlier) =
        earlier.filter(|subnet| config.may_be_given(*subnet) && is_free(&held, fixed, *subnet))
    {
        return Ok(Choice::Take(earlier));
    }
    let taken = Taken::new(&held, fixed);
    let free: Vec<_> = config.subnets().filter(|subnet| taken.is_free(*subnet)).take(CANDIDATES).collect();
    free.choose(&mut rand::rng()).map(|subnet| Choice::Take(*subnet)).ok_or_else(|| EtcdError::full(config))
}

fn choose_wanted(
    held: &[(&Entry, Ipv4Net)],
    ours: &[(&Entry, Ipv4Net)],
    config: &NetworkConfig,
    public_ip: Ipv4Addr,
    wanted: Ipv4Net,
    fixed: &[Ipv4Net],
) -> Result<Choice, EtcdError> {
    if !config.is_part(wanted) {
        return Err(EtcdError::Wanted(format!(
            "the subnet {wanted} is not a part of the network {}: choose another --subnet",
            config.network
        )));
    }
    if let Some(peer) = fixed.iter().find(|peer| overlap(**peer, wanted)) {
        return Err(EtcdError::Wanted(format!(
            "the subnet {wanted} overlaps {peer}, which a --peer has: drop the --peer, or choose another --subnet"
        )));
    }
    if let Some((entry, subnet)) = ours.iter().find(|(_, subnet)| *subnet == wanted) {
        return Ok(Choice::Keep((*entry).clone(), *subnet));
    }
    if let Some((_, subnet)) = ours.iter().find(|(entry, _)| entry.is_reservation()) {
        return Err(EtcdError::Wanted(format!(
            "{subnet} is reserved for this host ({public_ip}): drop --subnet, or remove the reservation first"
        )));
    }
    let others = held.iter().filter(|(entry, _)| holder(entry) != Some(public_ip));
    if let Some((entry, other)) = others.clone().find(|(_, other)| overlap(*other, wanted)) {
        let who = holder(entry)
            .map_or_else(|| "a record that cannot be read".to_owned(), |holder| holder.to_string());
        let how = if *other == wanted { String::new() } else { format!("overlaps {other}, which ") };
        return Err(EtcdError::Wanted(format!(
            "--subnet asks for {wanted}, which {how}{who} holds: choose another --subnet, or release {other} first"
        )));
    }
    // What we had before makes room, and only now that the wanted one is known to be free.
    Ok(ours.first().map_or(Choice::Take(wanted), |(entry, _)| Choice::Discard((*entry).clone())))
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

fn is_free(held: &[(&Entry, Ipv4Net)], fixed: &[Ipv4Net], subnet: Ipv4Net) -> bool {
    !held.iter().map(|(_, other)| other).chain(fixed).any(|other| overlap(*other, subnet))
}

fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// Held addresses as sorted ranges that do not touch each other: a network of millions of subnets is looked through once.
struct Taken(Vec<(u32, u32)>);

impl Taken {
    fn new(held: &[(&Entry, Ipv4Net)], fixed: &[Ipv4Net]) -> Self {
        let nets = held.iter().map(|(_, net)| net).chain(fixed);
        let mut ranges: Vec<(u32, u32)> =
            nets.map(|net| (u32::from(net.network()), u32::from(net.broadcast()))).collect();
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
    const THIRD: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 3);

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn entry(key: &str, public_ip: Ipv4Addr, lease: i64) -> Entry {
        let value = lease::value(public_ip).into_bytes();
        Entry { key: key.to_owned(), value, lease, create_revision: 1, mod_revision: 1 }
    }

    fn config() -> NetworkConfig {
        NetworkConfig::parse(
            r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.16.0","SubnetMax":"10.5.19.0","SubnetLen":24}"#,
        )
        .unwrap()
    }

    fn chosen(entries: &[Entry], earlier: Option<&str>) -> Choice {
        choose(entries, &config(), HOST, Wish { earlier: earlier.map(net), ..Wish::default() }).unwrap()
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
        let error = choose(&full, &config(), HOST, Wish::default()).unwrap_err().to_string();
        assert!(error.contains("full") && error.contains("10.5.19.0"), "{error}");
    }

    #[test]
    fn a_wanted_subnet_is_had_or_refused_with_the_reason() {
        let entries = [entry("10.5.16.0-24", OTHER, 7), entry("10.5.200.0-24", THIRD, 0)];
        let fixed = [net("10.5.50.0/24")];
        let choose = |host, wanted| {
            choose(
                &entries,
                &config(),
                host,
                Wish { wanted: Some(net(wanted)), earlier: None, fixed: &fixed },
            )
        };
        assert_eq!(choose(HOST, "10.5.100.0/24").unwrap(), Choice::Take(net("10.5.100.0/24")));
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
            |wanted| choose(&entries, &config(), HOST, Wish { wanted: Some(net(wanted)), ..Wish::default() });
        assert_eq!(choose("10.5.18.0/24").unwrap(), Choice::Discard(entries[0].clone()));
        assert_eq!(choose("10.5.16.128/25").unwrap(), Choice::Discard(entries[0].clone()));
        assert!(choose("10.5.17.0/24").unwrap_err().to_string().contains("192.168.77.2 holds"));
    }

    #[test]
    fn what_a_fixed_peer_has_is_neither_taken_nor_kept_nor_removed() {
        let fixed = [net("10.5.16.0/23"), net("10.5.18.128/25")];
        let wish = Wish { earlier: Some(net("10.5.17.0/24")), fixed: &fixed, ..Wish::default() };
        for _ in 0..20 {
            let chosen = choose(&[], &config(), HOST, wish).unwrap();
            assert_eq!(chosen, Choice::Take(net("10.5.19.0/24")));
        }
        let ours = [entry("10.5.16.0-24", HOST, 7), entry("10.5.19.0-24", HOST, 8)];
        assert_eq!(
            choose(&ours, &config(), HOST, wish).unwrap(),
            Choice::Keep(ours[1].clone(), net("10.5.19.0/24"))
        );
        let error = choose(&ours[..1], &config(), HOST, wish).unwrap_err().to_string();
        assert!(error.contains("10.5.16.0/24") && error.contains("--peer"), "{error}");
    }

    #[test]
    fn nested_and_neighbouring_ranges_are_told_apart() {
        let entries =
            [entry("10.5.0.0-20", OTHER, 1), entry("10.5.3.0-24", OTHER, 1), entry("10.5.17.0-24", OTHER, 1)];
        let held: Vec<_> = entries.iter().map(|entry| (entry, entry.subnet().unwrap())).collect();
        let taken = Taken::new(&held, &[]);
        for subnet in ["10.5.15.0/24", "10.5.4.0/24", "10.5.17.0/24", "10.5.16.0/23", "10.4.0.0/15"] {
            assert!(!taken.is_free(net(subnet)), "{subnet}");
            assert!(!is_free(&held, &[], net(subnet)), "{subnet}");
        }
        for subnet in ["10.5.16.0/24", "10.5.18.0/24", "10.4.255.0/24"] {
            assert!(taken.is_free(net(subnet)) && is_free(&held, &[], net(subnet)), "{subnet}");
        }
    }
}
