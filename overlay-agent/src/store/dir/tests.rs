//! The directory store, on real directories.

use super::*;

fn store() -> (tempfile::TempDir, DirStore, NetworkConfig) {
    let directory = tempfile::tempdir().unwrap();
    let store = DirStore::new(directory.path().join("net"));
    let network = "10.244.0.0/16".parse().unwrap();
    let config = store.config(Some(network)).unwrap();
    assert!(!store.root().exists(), "asking changes nothing");
    store.ensure_config(network).unwrap();
    (directory, store, config)
}

fn host(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 77, last)
}

#[test]
fn a_missing_config_names_the_file_and_the_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let error = DirStore::new(directory.path().to_path_buf()).config(None).unwrap_err().to_string();
    assert!(error.contains("config") && error.contains("--network"), "{error}");
}

#[test]
fn a_network_that_contradicts_the_config_is_refused() {
    let (_directory, store, _config) = store();
    let error = store.config(Some("10.9.0.0/16".parse().unwrap())).unwrap_err().to_string();
    assert!(error.contains("10.9.0.0/16") && error.contains("10.244.0.0/16"), "{error}");
}

#[test]
fn a_host_keeps_its_subnet_and_hosts_get_different_ones() {
    let (_directory, store, config) = store();
    let first = store.acquire(&config, host(1), None, None, &BTreeMap::new()).unwrap();
    assert!(first.created);
    let again = store
        .acquire(&config, host(1), None, Some("10.244.9.0/24".parse().unwrap()), &BTreeMap::new())
        .unwrap();
    assert_eq!(again, Acquired { created: false, ..first });
    let second = store.acquire(&config, host(2), None, Some(first.subnet), &BTreeMap::new()).unwrap();
    assert_ne!(second.subnet, first.subnet);
    let record =
        store.list().unwrap().into_iter().find(|record| record.key == lease::key(first.subnet)).unwrap();
    assert_eq!(record.value, lease::value(host(1)).as_bytes());
}

#[test]
fn the_subnet_of_an_earlier_run_is_preferred_when_free() {
    let (_directory, store, config) = store();
    let earlier = "10.244.77.0/24".parse().unwrap();
    assert_eq!(
        store.acquire(&config, host(1), None, Some(earlier), &BTreeMap::new()).unwrap().subnet,
        earlier
    );
}

#[test]
fn a_wanted_subnet_is_had_or_refused_with_the_reason() {
    let (_directory, store, config) = store();
    let wanted = Some("10.244.5.0/24".parse().unwrap());
    assert!(store.acquire(&config, host(1), wanted, None, &BTreeMap::new()).unwrap().created);
    assert!(!store.acquire(&config, host(1), wanted, None, &BTreeMap::new()).unwrap().created);
    let taken = store.acquire(&config, host(2), wanted, None, &BTreeMap::new()).unwrap_err().to_string();
    assert!(taken.contains("192.168.77.1"), "{taken}");
    let inside = store
        .acquire(&config, host(2), Some("10.244.5.128/25".parse().unwrap()), None, &BTreeMap::new())
        .unwrap_err();
    assert!(inside.to_string().contains("overlaps"), "{inside}");
    let outside = store
        .acquire(&config, host(2), Some("10.245.5.0/24".parse().unwrap()), None, &BTreeMap::new())
        .unwrap_err();
    assert!(outside.to_string().contains("not a part"), "{outside}");
    let other = store
        .acquire(&config, host(1), Some("10.244.6.0/24".parse().unwrap()), None, &BTreeMap::new())
        .unwrap_err();
    assert!(other.to_string().contains("already holds"), "{other}");
}

#[test]
fn a_full_network_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let store = DirStore::new(directory.path().to_path_buf());
    let config = NetworkConfig::parse(r#"{"Network":"10.9.0.0/28","SubnetLen":30}"#).unwrap();
    for last in 1..=3 {
        store.acquire(&config, host(last), None, None, &BTreeMap::new()).unwrap();
    }
    let error = store.acquire(&config, host(4), None, None, &BTreeMap::new()).unwrap_err().to_string();
    assert!(error.contains("full"), "{error}");
}

#[test]
fn agents_that_start_at_once_get_different_subnets() {
    let (_directory, store, config) = store();
    let subnets: std::collections::BTreeSet<_> = std::thread::scope(|scope| {
        let (store, config) = (&store, &config);
        let threads: Vec<_> = (1..=16)
            .map(|last| {
                scope.spawn(move || {
                    store.acquire(config, host(last), None, None, &BTreeMap::new()).unwrap().subnet
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(subnets.len(), 16);
}

#[test]
fn readdress_changes_only_our_own_record() {
    let (_root, store, config) = store();
    let taken = store.acquire(&config, host(1), None, None, &BTreeMap::new()).unwrap();
    assert!(!store.readdress(taken.subnet, host(2), host(3)).unwrap());
    assert!(store.readdress(taken.subnet, host(1), host(3)).unwrap());
    let records = store.list().unwrap();
    assert_eq!(records.len(), 1, "{records:?}");
    assert_eq!(records[0].value, lease::value(host(3)).as_bytes());
}

#[test]
fn release_removes_only_our_own_record() {
    let (_directory, store, config) = store();
    let subnet = store.acquire(&config, host(1), None, None, &BTreeMap::new()).unwrap().subnet;
    store.release(subnet, host(2)).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    store.release(subnet, host(1)).unwrap();
    assert!(store.list().unwrap().is_empty());
}

#[tokio::test]
async fn a_watcher_sees_changes_and_a_lost_directory_loses_nothing() {
    let (_directory, store, config) = store();
    store.acquire(&config, host(1), Some("10.244.1.0/24".parse().unwrap()), None, &BTreeMap::new()).unwrap();
    let (sender, mut events) = mpsc::channel(4);
    let watcher = tokio::spawn(store.clone().watch(sender));
    let keys = |event: Event| match event {
        Event::Snapshot(records) => records.into_iter().map(|record| record.key).collect::<Vec<_>>(),
        Event::Lost(why) => vec![format!("lost: {why}")],
        Event::Changes(_) | Event::Lease(_) => panic!("the directory store sends snapshots"),
    };
    assert_eq!(keys(events.recv().await.unwrap()), ["10.244.1.0-24"]);
    store.acquire(&config, host(2), Some("10.244.2.0/24".parse().unwrap()), None, &BTreeMap::new()).unwrap();
    loop {
        let keys = keys(events.recv().await.unwrap());
        if keys == ["10.244.1.0-24", "10.244.2.0-24"] {
            break;
        }
    }
    let (subnets, aside) = (store.root().join("subnets"), store.root().join("aside"));
    std::fs::rename(&subnets, &aside).unwrap();
    loop {
        let keys = keys(events.recv().await.unwrap());
        if keys.first().is_some_and(|key| key.starts_with("lost")) {
            break;
        }
        assert!(!keys.is_empty(), "a lost store looked empty");
    }
    std::fs::rename(&aside, &subnets).unwrap();
    loop {
        if keys(events.recv().await.unwrap()).len() == 2 {
            break;
        }
    }
    drop(events);
    watcher.await.unwrap();
}

#[test]
fn a_fixed_peers_subnet_is_never_taken() {
    let directory = tempfile::tempdir().unwrap();
    let store = DirStore::new(directory.path().to_path_buf());
    let config = NetworkConfig::parse(r#"{"Network":"10.9.0.0/28","SubnetLen":30}"#).unwrap();
    let fixed: BTreeMap<_, _> = config.subnets().map(|subnet| (subnet, host(2))).collect();
    assert!(store.acquire(&config, host(1), None, None, &fixed).unwrap_err().to_string().contains("full"));
}

#[test]
fn what_is_no_file_is_a_record_that_says_nothing() {
    let (_directory, store, config) = store();
    store.acquire(&config, host(1), None, None, &BTreeMap::new()).unwrap();
    let fifo = store.root().join("subnets/10.244.9.0-24");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
    std::fs::create_dir(store.root().join("subnets/10.244.8.0-24")).unwrap();
    let records = store.list().unwrap();
    assert_eq!(records.len(), 3);
    assert_eq!(records.iter().filter(|record| record.value.is_empty()).count(), 2);
}

#[test]
fn a_lost_record_of_ours_comes_back_and_anothers_stays() {
    let (_directory, store, config) = store();
    let subnet = store.acquire(&config, host(1), None, None, &BTreeMap::new()).unwrap().subnet;
    assert!(!store.reclaim(subnet, host(2)).unwrap());
    std::fs::remove_file(store.root().join("subnets").join(lease::key(subnet))).unwrap();
    assert!(store.reclaim(subnet, host(1)).unwrap());
    assert_eq!(store.list().unwrap()[0].value, lease::value(host(1)).as_bytes());
}
