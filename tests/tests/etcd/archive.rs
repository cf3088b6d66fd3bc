//! A host that boots while etcd is away, with what an earlier run has left on disk, and etcd's return.

use std::{path::Path, time::SystemTime};

use overlay_agent::{
    lease::Lease,
    store::{Event, Held, LeaseEvent, RecalledLease, Store, etcd::EtcdOptions},
};
use tokio::sync::mpsc;

use crate::hosts::{Keeper, Network, ip, key_of, next, value};

/// Another boot of the first host.
fn rebooted(network: &Network) -> Store {
    let options = EtcdOptions { instance: Some("host 1, rebooted".to_owned()), ..network.options(1) };
    Store::etcd_unreached(options).unwrap()
}

/// Runs an agent of the first host beside two others, kills it, and leaves its file.
async fn leave_file(network: &mut Network, path: &Path) -> Held {
    let store = network.store(1).await.archived(None);
    let held = store.acquire(&network.request(), ip(1)).await.unwrap();
    let lease = network.raw.lease_grant(3600, None).await.unwrap().id();
    network.put("10.5.200.0-24", value(200), lease).await;
    network.put("10.5.201.0-24", "not a record \u{1b}\\", 0).await;
    let mut keeper = Keeper::start(&store, held.clone());
    let mut configs = store.follow_config();
    next(&mut configs).await;
    let mut events = store.follow::<Lease>();
    assert!(matches!(next(&mut events).await, Event::Snapshot(records) if records.len() == 3));
    let archive = store.keep_archive(path.to_owned()).unwrap();
    keeper.confirmed().await;
    archive.stop().await;
    // Not stopped: its claim lives on.
    drop(keeper);
    held
}

/// Starts from the file.
fn start(
    store: Store,
    network: &Network,
    path: &Path,
) -> (Store, Keeper, mpsc::Receiver<Event<Lease>>, LeaseEvent) {
    let now = SystemTime::now();
    let saved = store.saved(path, ip(1), now).unwrap().unwrap();
    let lease = RecalledLease::new(&saved, network.request(), now);
    let store = store.archived(Some(saved));
    let left = lease.expires_in();
    let events = store.follow();
    let keeper = Keeper(store.keep_recalled(lease));
    (store, keeper, events, LeaseEvent::Confirmed { expires_in: left })
}

#[tokio::test]
async fn a_host_that_boots_without_etcd_goes_on_with_its_lease() {
    let mut network = Network::start().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ovl0.snapshot");
    let held = leave_file(&mut network, &path).await;
    let before = network.get(&key_of(&held)).await.unwrap();
    network.etcd.kill();
    let (_store, mut keeper, mut events, rest) = start(rebooted(&network), &network, &path);
    let LeaseEvent::Confirmed { expires_in: Some(rest) } = rest else { panic!("no end") };
    assert!((86_000..=86_400).contains(&rest.as_secs()), "{rest:?}");
    let Event::Recalled { records, .. } = next(&mut events).await else { panic!("not recalled") };
    assert_eq!(records.len(), 3);
    assert!(matches!(next(&mut events).await, Event::Lost(_)));
    let LeaseEvent::Unconfirmed { expires_in: Some(left), .. } = keeper.next().await else {
        panic!("confirmed without etcd")
    };
    assert!(left <= rest);
    network.etcd.restart().unwrap();
    // The claim of the earlier boot has to end first; nothing but the confirmation tells of it.
    keeper.confirmed().await;
    let again = loop {
        match next(&mut events).await {
            Event::Snapshot(records) => break records,
            Event::Lost(_) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(again, records, "also a record that cannot be used, and its versions");
    network
        .wait_for(&key_of(&held), |record| {
            record.is_some_and(|record| {
                (record.mod_revision(), record.lease()) == (before.mod_revision(), before.lease())
            })
        })
        .await;
    assert_eq!(keeper.stop().await.subnet, held.subnet);
}

#[tokio::test]
async fn etcd_that_returns_empty_takes_nothing_from_a_host_that_booted_without_it() {
    let mut network = Network::start().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ovl0.snapshot");
    let held = leave_file(&mut network, &path).await;
    network.etcd.wipe().unwrap();
    let (store, mut keeper, mut events, _) = start(rebooted(&network), &network, &path);
    assert!(matches!(next(&mut events).await, Event::Recalled { .. }));
    network.etcd.restart().unwrap();
    let known = loop {
        match next(&mut events).await {
            Event::Snapshot(records) => break records,
            Event::Lost(_) => {}
            other => panic!("{other:?}"),
        }
    };
    assert!(known.iter().any(|record| &*record.key == "10.5.200.0-24"), "{known:?}");
    loop {
        match keeper.next().await {
            LeaseEvent::Unconfirmed { .. } => {}
            LeaseEvent::Reacquired { subnet, .. } => break assert_eq!(subnet, held.subnet),
            other => panic!("{other:?}"),
        }
    }
    keeper.confirmed().await;
    // The next file still has what etcd lost.
    let mut configs = store.follow_config();
    assert_eq!(next(&mut configs).await, None);
    let archive = store.keep_archive(path.clone()).unwrap();
    store.archived(None).set_config(crate::hosts::NETWORK).await.unwrap();
    while next(&mut configs).await.is_none() {}
    archive.stop().await;
    let saved = rebooted(&network).saved(&path, ip(1), SystemTime::now()).unwrap().unwrap();
    assert_eq!((saved.subnet(), saved.records()), (held.subnet, 3));
}
