//! Records that are no leases, and records as an operator sees them.

use etcd_client::PutOptions;
use overlay_agent::{
    lease::{Lease, LeaseRecord},
    store::{Change, Event},
};

use crate::hosts::{Network, ip, key_of, next, subnet_key, value};

const MIB: usize = 1024 * 1024;

#[tokio::test]
async fn malformed_and_huge_records_disturb_neither_the_list_nor_the_changes() {
    let mut network = Network::start().await;
    let held = network.take(1, "10.5.1.0/24").await;
    let huge = format!(r#"{{"PublicIP":"192.168.77.9","Padding":"{}"}}"#, "x".repeat(MIB));
    for (key, value) in [
        ("not-a-subnet", value(9).into_bytes()),
        ("10.5.30.0-24/below", value(9).into_bytes()),
        ("10.5.31.0-24", b"{".to_vec()),
        ("10.5.32.0-24", br#"{"PublicIP":"0.0.0.0"}"#.to_vec()),
        ("10.5.33.0-24", vec![0xff; 100]),
        ("10.5.34.0-99", value(9).into_bytes()),
    ] {
        network.put(key, value, 0).await;
    }
    network.raw.put([subnet_key("").as_bytes(), &[0xff, 0xfe]].concat(), "{}", None).await.unwrap();
    // More than fits into one answer.
    for number in 0..24 {
        network.put(&format!("10.5.{}.0-24", 100 + number), huge.clone(), 0).await;
    }
    let mut events = network.store(9).await.follow::<Lease>();
    let Event::Snapshot(records) = next(&mut events).await else { panic!("not a snapshot") };
    assert_eq!(records.len(), 1 + 6 + 1 + 24);
    let good: Vec<_> = records.iter().filter(|record| record.id.is_ok() && record.value.is_ok()).collect();
    assert_eq!(good.len(), 1, "a record that is too long is no lease either");
    assert_eq!(*good[0].key, *key_of(&held));
    assert!(
        records.iter().all(|record| format!("{record:?}").len() < 1000),
        "what is kept of a record is short"
    );
    // Changes of that kind pass as well, and what follows them arrives.
    network.put("10.5.90.0-24", huge, 0).await;
    network.put("10.5.91.0-24", value(91), 0).await;
    let mut keys = Vec::new();
    while keys.len() < 2 {
        let Event::Changes(changes) = next(&mut events).await else { panic!("not changes") };
        keys.extend(changes.into_iter().map(|change| match change {
            Change::Put(record) => record.key.to_string(),
            Change::Delete { key } => key.to_string(),
        }));
    }
    assert_eq!(keys, ["10.5.90.0-24", "10.5.91.0-24"]);
    // Nor do they keep a host from its subnet.
    let another = network.acquire(2).await;
    assert!(!["10.5.31.0/24", "10.5.33.0/24", "10.5.90.0/24"].contains(&another.subnet.to_string().as_str()));
}

#[tokio::test]
async fn every_record_can_be_removed_and_leaves_no_etcd_lease_behind() {
    let mut network = Network::start().await;
    let lease = network.raw.lease_grant(600, None).await.unwrap().id();
    let attached = || Some(PutOptions::new().with_lease(lease));
    let keys = [&b"\xff\xfe"[..], br"back\slash", b"esc\x1b[31m", b"two words"];
    for key in keys {
        network.raw.put([subnet_key("").as_bytes(), key].concat(), "{}", attached()).await.unwrap();
    }
    let store = network.store(9).await;
    let records: Vec<LeaseRecord> = store.list().await.unwrap();
    assert_eq!(records.len(), keys.len());
    for text in [r"\xff\xfe", r"back\\slash", r"esc\x1b[31m", "two words"] {
        let leases = network.raw.leases().await.unwrap();
        assert!(leases.leases().iter().any(|other| other.id() == lease), "other records are attached to it");
        let record = records.iter().find(|record| record.has_key(text)).unwrap();
        assert!(store.remove(record).await.unwrap(), "{text}");
    }
    assert_eq!(network.records().await.len(), 0);
    let leases = network.raw.leases().await.unwrap();
    assert!(!leases.leases().iter().any(|other| other.id() == lease));
}

#[tokio::test]
async fn an_operator_sees_holders_and_times_and_removes_what_is_still_as_listed() {
    let mut network = Network::start().await;
    let held = network.take(1, "10.5.1.0/24").await;
    network.put("10.5.2.0-24", value(2), 0).await;
    let vxlan = r#"{"PublicIP":"192.168.77.3","BackendType":"vxlan","BackendData":{}}"#;
    network.put("10.5.3.0-24", vxlan, 0).await;
    network.put("junk", "junk", 0).await;
    let store = network.store(9).await;
    let records: Vec<LeaseRecord> = store.list().await.unwrap();
    let keys: Vec<_> = records.iter().map(|record| &*record.key).collect();
    assert_eq!(keys, ["10.5.1.0-24", "10.5.2.0-24", "10.5.3.0-24", "junk"]);
    let times = store.times_left(&records).await.unwrap();
    let lease = records[0].version.lifetime.id().unwrap();
    assert_eq!((records[0].holder(), lease), (Some(ip(1)), network.lease_of(&held).await));
    let left = times[&lease].as_secs();
    assert!((86000..=86400).contains(&left), "{left}");
    assert!(records[1].is_reservation() && times.len() == 1);
    network.put("10.5.2.0-24", value(20), 0).await;
    assert!(!store.remove(&records[1]).await.unwrap(), "it changed since it was listed");
    assert!(store.remove(&records[2]).await.unwrap());
    assert_eq!(network.records().await.len(), 3);
}

#[tokio::test]
async fn release_removes_only_what_is_still_ours() {
    let mut network = Network::start().await;
    let held = network.acquire(1).await;
    let store = network.store(1).await;
    network.put(&key_of(&held), value(50), 0).await;
    store.release(&held).await.unwrap();
    assert_eq!(network.get(&key_of(&held)).await.unwrap().value_str().unwrap(), value(50));
}
