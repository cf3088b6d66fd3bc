//! Records that are no leases, and records as an operator sees them.

use overlay_agent::{route_table::RecordChange, store::Event};
use tokio::sync::mpsc;

use crate::hosts::{Events, Network, ip, key_of, subnet_key, value};

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
    let (sender, events) = mpsc::channel(8);
    let store = network.store(9).await;
    tokio::spawn(async move { store.watch(sender).await });
    let mut events = Events(events);
    let Event::Snapshot(records) = events.next().await else { panic!("not a snapshot") };
    assert_eq!(records.len(), 1 + 6 + 1 + 24);
    let good: Vec<_> = records
        .iter()
        .filter(|record| overlay_agent::lease::parse_value(&record.value).is_ok())
        .filter(|record| overlay_agent::lease::parse_key(&record.key).is_ok())
        .collect();
    assert_eq!(good.len(), 1, "a record that is too long is no lease either");
    assert_eq!(good[0].key, key_of(&held));
    assert!(records.iter().all(|record| record.value.len() <= 64 * 1024));
    // Changes of that kind pass as well, and what follows them arrives.
    network.put("10.5.90.0-24", huge, 0).await;
    network.put("10.5.91.0-24", value(91), 0).await;
    let mut keys = Vec::new();
    while keys.len() < 2 {
        let Event::Changes(changes) = events.next().await else { panic!("not changes") };
        keys.extend(changes.into_iter().map(|change| match change {
            RecordChange::Put(record) => record.key,
            RecordChange::Delete { key } => key,
        }));
    }
    assert_eq!(keys, ["10.5.90.0-24", "10.5.91.0-24"]);
    // Nor do they keep a host from its subnet.
    let another = network.acquire(2).await;
    assert!(!["10.5.31.0/24", "10.5.33.0/24", "10.5.90.0/24"].contains(&another.subnet.to_string().as_str()));
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
    let leases = store.leases().await.unwrap();
    let keys: Vec<_> = leases.iter().map(|lease| lease.record.key.as_str()).collect();
    assert_eq!(keys, ["10.5.1.0-24", "10.5.2.0-24", "10.5.3.0-24", "junk"]);
    assert_eq!((leases[0].public_ip, leases[0].etcd_lease), (Some(ip(1)), held.etcd_lease()));
    let left = leases[0].expires_in.unwrap().as_secs();
    assert!((86000..=86400).contains(&left), "{left}");
    assert_eq!((leases[1].public_ip, leases[1].expires_in), (Some(ip(2)), None));
    assert_eq!(leases[2].backend_type.as_deref(), Some("vxlan"));
    assert_eq!((leases[3].subnet, leases[3].public_ip), (None, None));
    network.put("10.5.2.0-24", value(20), 0).await;
    assert!(!store.remove(&leases[1]).await.unwrap(), "it is not what was listed any more");
    assert!(store.remove(&leases[2]).await.unwrap());
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
