//! The route table by example, and against its plain definition.

use std::net::Ipv4Addr;

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::*;
use crate::{
    lease,
    route::{Peer, diff},
    store::Version,
};

const PEER: Peer = Peer { address: Ipv4Addr::new(192, 168, 77, 2), takes_unfinished: true };
const OTHER: Peer = Peer { address: Ipv4Addr::new(192, 168, 77, 3), takes_unfinished: true };

fn net(text: &str) -> Subnet {
    text.parse().unwrap()
}

fn own() -> LocalNode {
    LocalNode {
        network: "10.244.0.0/16".parse().unwrap(),
        subnet: net("10.244.1.0/24"),
        public_ip: Ipv4Addr::new(192, 168, 77, 1),
    }
}

fn record(key: &str, value: &str) -> LeaseRecord {
    LeaseRecord::parse(key, value.as_bytes(), Version::default())
}

/// The record of a peer that holds a subnet.
fn held(key: &str, peer: Peer) -> LeaseRecord {
    record(key, &lease::value(peer.address))
}

fn table(records: impl IntoIterator<Item = LeaseRecord>) -> RouteTable {
    let mut table = RouteTable::new(own(), Routes::new());
    table.replace(records);
    table
}

#[test]
fn a_peers_lease_is_a_route_our_own_is_not_and_impossible_records_are_skipped() {
    let table = table([
        record("10.244.1.0-24", &lease::value(own().public_ip)),
        record("nonsense", "{}"),
        record("10.244.9.0-24", "{"),
        held("10.245.2.0-24", PEER),
        held("10.244.0.0-16", PEER),
        held("10.244.1.128-25", PEER),
        record("10.244.8.0-24", &lease::value(own().public_ip)),
        record("10.244.7.0-24", r#"{"PublicIP":"10.244.3.3"}"#),
        record("10.244.6.0-24", r#"{"PublicIP":"192.168.77.6","BackendType":"vxlan"}"#),
        held("10.244.2.0-24", PEER),
    ]);
    assert_eq!(table.routes(), &Routes::from([(net("10.244.2.0/24"), PEER)]));
    assert_eq!(table.skipped().len(), 8, "{:?}", table.skipped());
}

#[test]
fn a_record_that_breaks_keeps_its_last_good_route() {
    let mut table = table([held("10.244.2.0-24", PEER)]);
    let good = table.routes().clone();
    let broken = Change::Put(record("10.244.2.0-24", r#"{"Publ"#));
    let outcome = table.apply([broken.clone()]);
    assert_eq!(table.routes(), &good);
    assert_eq!((outcome.changes, outcome.skipped.len()), (vec![], 1));
    // Reported once.
    assert_eq!(table.apply([broken.clone()]), Outcome::default());
    assert_eq!(table.skipped().len(), 1);
    // Removed and written again, broken, in one step: the deletion was never visible.
    let key: Arc<str> = "10.244.2.0-24".into();
    table.apply([Change::Delete { key: Arc::clone(&key) }, broken]);
    assert_eq!(table.routes(), &good);
    // Deleted, not broken: the route goes.
    let outcome = table.apply([Change::Delete { key }]);
    assert_eq!(outcome.changes, [RouteChange::Remove(net("10.244.2.0/24"))]);
    assert!(table.routes().is_empty() && table.skipped().is_empty());
}

#[test]
fn a_second_holder_of_a_subnet_is_skipped_and_reported() {
    let table = table([
        held("10.244.2.0-24&2001:cafe::-64", OTHER),
        held("10.244.2.0-24", PEER),
        record("\u{1b}[31mred", "{}"),
    ]);
    assert_eq!(table.routes(), &Routes::from([(net("10.244.2.0/24"), PEER)]));
    let skipped = table.skipped();
    let names: Vec<_> = skipped.iter().map(|skipped| skipped.record.as_str()).collect();
    assert_eq!(names, ["10.244.2.0-24&2001:cafe::-64", "\\u{1b}[31mred"]);
}

/// A record of a peer, created at a revision.
fn created(key: &str, peer: Peer, revision: i64) -> LeaseRecord {
    let version = Version { created: Some(revision), ..Version::default() };
    LeaseRecord::parse(key, lease::value(peer.address).as_bytes(), version)
}

#[test]
fn a_later_record_for_a_subnet_takes_nothing_from_its_holder() {
    let (owner, impostor) =
        (created("10.244.2.0-24&2001:cafe::-64", PEER, 7), created("10.244.2.0-24", OTHER, 8));
    let mut table = table([owner.clone()]);
    let outcome = table.apply([Change::Put(impostor.clone())]);
    assert_eq!((outcome.changes, outcome.skipped.len()), (vec![], 1));
    assert_eq!(table.skipped()[0].record, "10.244.2.0-24");
    table.replace([impostor.clone(), owner.clone()]);
    assert_eq!(table.routes(), &Routes::from([(net("10.244.2.0/24"), PEER)]));
    let refused = refusals(None, &[impostor.clone(), owner.clone()]);
    assert!(
        refused[0].as_ref().unwrap().contains("192.168.77.2 holds") && refused[1].is_none(),
        "{refused:?}"
    );
    // Without its holder, the subnet is free for the other one.
    table.apply([Change::Delete { key: owner.key }]);
    assert_eq!(table.routes(), &Routes::from([(net("10.244.2.0/24"), OTHER)]));
}

#[test]
fn a_key_in_another_spelling_is_no_route() {
    let table = table([held("010.244.2.0-24", OTHER), held("10.244.2.0-24", PEER)]);
    assert_eq!(table.routes(), &Routes::from([(net("10.244.2.0/24"), PEER)]));
    assert_eq!(table.skipped()[0].record, "010.244.2.0-24");
}

#[test]
fn a_record_that_cannot_be_read_does_not_hold_back_one_that_can() {
    let mut table = table([record("10.244.2.0-24", "{"), held("10.244.2.0-24&2001:cafe::-64", PEER)]);
    let outcome = table.apply([Change::Put(held("10.244.2.0-24&2001:cafe::-64", OTHER))]);
    assert_eq!(outcome.changes, [RouteChange::set(net("10.244.2.0/24"), OTHER)]);
    assert!(outcome.skipped.is_empty(), "{outcome:?}");
}

#[test]
fn a_fixed_peer_is_there_from_the_start_and_wins_over_a_record() {
    let fixed = Routes::from([(net("10.244.2.0/24"), OTHER)]);
    let mut table = RouteTable::new(own(), fixed.clone());
    assert_eq!(table.routes(), &fixed);
    let outcome = table.replace([held("10.244.2.0-24", PEER)]);
    assert_eq!((outcome.changes, outcome.skipped.len()), (vec![], 1));
    assert_eq!(table.routes(), &fixed);
    assert!(table.replace([]).changes.is_empty());
    assert_eq!(table.routes(), &fixed);
}

/// Keys and values that meet in every way: subnets named twice, nested, ours, foreign, fixed, broken.
const KEYS: &str = "10.244.1.0-24 10.244.1.128-25 10.244.2.0-24 10.244.2.0-24&2001:cafe:42:1::-64 \
                    10.244.2.0-24&2001:cafe:42:2::-64 10.244.2.0-25 10.244.3.0-24 10.244.4.0-24 10.244.0.0-16 \
                    10.245.2.0-24 nonsense 10.244.5.1-24";
const VALUES: [&str; 9] = [
    r#"{"PublicIP":"192.168.77.1","PublicIPv6":null}"#,
    r#"{"PublicIP":"192.168.77.2","PublicIPv6":null}"#,
    r#"{"PublicIP":"192.168.77.3","PublicIPv6":null}"#,
    r#"{"PublicIP":"192.168.77.3","BackendType":"vxlan"}"#,
    r#"{"PublicIP":"10.244.3.3"}"#,
    r#"{"PublicIP":"0.0.0.0"}"#,
    r#"{"Publ"#,
    "[]",
    "",
];

fn any<T: Copy>(random: &mut StdRng, choice: &[T]) -> T {
    choice[random.random_range(0..choice.len())]
}

#[test]
fn generated_changes_lead_to_the_table_of_all_records_at_once() {
    let keys: Vec<_> = KEYS.split(' ').collect();
    for seed in 0..200 {
        let mut random = StdRng::seed_from_u64(seed);
        let fixed: Routes = (seed % 2 == 1).then_some((net("10.244.4.0/24"), PEER)).into_iter().collect();
        let mut own = own();
        let mut table = RouteTable::new(own, fixed.clone());
        let mut records: BTreeMap<String, LeaseRecord> = BTreeMap::new();
        for round in 0..60 {
            let before = (table.routes().clone(), table.skipped());
            let outcome = match random.random_range(0..10) {
                0 => {
                    records.retain(|_, _| random.random_bool(0.7));
                    table.replace(records.values().cloned())
                }
                1 => {
                    own.subnet = net(any(&mut random, &["10.244.1.0/24", "10.244.3.0/24"]));
                    own.public_ip = any(&mut random, &[own.public_ip, OTHER.address]);
                    table.set_local(own)
                }
                _ => {
                    let mut changes = Vec::new();
                    for _ in 0..random.random_range(1..6) {
                        let key = any(&mut random, &keys).to_owned();
                        if random.random_bool(0.3) {
                            records.remove(&key);
                            changes.push(Change::Delete { key: key.into() });
                        } else {
                            let created = random.random_bool(0.5).then(|| random.random_range(0..50));
                            let version = Version { created, ..Version::default() };
                            let value = any(&mut random, &VALUES).as_bytes();
                            let record = LeaseRecord::parse(&key, value, version);
                            records.insert(key, record.clone());
                            changes.push(Change::Put(record));
                        }
                    }
                    table.apply(changes)
                }
            };
            let (routes, skipped) = reference::build(own, &fixed, records.values(), &before.0);
            let context = || format!("seed {seed}, round {round}: {records:?}");
            assert_eq!(table.routes(), &routes, "{}", context());
            assert_eq!(table.skipped(), skipped, "{}", context());
            assert_eq!(outcome.changes, diff(&before.0, &routes), "{}", context());
            let mut reported = outcome.skipped;
            reported.sort();
            let new: Vec<_> = skipped.into_iter().filter(|one| !before.1.contains(one)).collect();
            assert_eq!(reported, new, "{}", context());
        }
    }
}

#[test]
fn operators_see_the_same_reasons_and_every_holder() {
    let records = [
        record("10.244.1.0-24", &lease::value(own().public_ip)),
        held("10.244.2.0-24", PEER),
        record("10.244.6.0-24", r#"{"PublicIP":"192.168.77.6","BackendType":"vxlan"}"#),
        record("10.244.9.0-24", "{"),
        held("10.245.2.0-24", PEER),
    ];
    let reasons = refusals(Some(own().network), &records);
    assert_eq!(reasons[..2], [None, None]);
    let skipped = table(records.clone()).skipped();
    let whys: Vec<_> = skipped.into_iter().map(|skipped| Some(skipped.why)).collect();
    assert_eq!(reasons[2..], whys);
    // Without a network nothing lies outside of it.
    assert_eq!(refusals(None, &records)[4], None);
}

#[test]
fn a_reason_that_quotes_a_record_is_short_and_harmless() {
    let long = format!("[\"\u{9b}31m{}\"]", "x".repeat(5000));
    let why = refusals(None, &[record("10.244.2.0-24", &long)])[0].clone().unwrap();
    assert!(why.len() < 300 && why.contains("\\u{9b}31m") && why.contains("..."), "{why}");
}
