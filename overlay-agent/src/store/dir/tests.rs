//! The directory store, on real directories.

use std::{collections::BTreeSet, net::Ipv4Addr};

use crate::{
    config::NetworkConfig,
    lease::{self, Lease, LeaseRecord},
    route::Subnet,
    store::{Event, Held, LeaseEvent, Store, SubnetRequest},
};

const NETWORK: &str = "10.244.0.0/16";

struct Fixture {
    directory: tempfile::TempDir,
    store: Store,
    config: NetworkConfig,
}

impl Fixture {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("net");
        let store = Store::dir(root.clone());
        let network = NETWORK.parse().unwrap();
        let config = store.config(Some(network)).await.unwrap();
        assert!(!root.exists(), "reading changes nothing");
        store.ensure_config(network).await.unwrap();
        Self { directory, store, config }
    }

    fn request(&self) -> SubnetRequest {
        SubnetRequest::any(self.config.clone())
    }

    async fn acquire(&self, last: u8) -> Held {
        self.store.acquire(&self.request(), host(last)).await.unwrap()
    }

    fn file(&self, key: &str) -> std::path::PathBuf {
        self.directory.path().join("net/subnets").join(key)
    }

    fn value(&self, subnet: Subnet) -> String {
        std::fs::read_to_string(self.file(&lease::key(subnet))).unwrap()
    }

    async fn list(&self) -> Vec<LeaseRecord> {
        self.store.list().await.unwrap()
    }
}

fn host(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 77, last)
}

fn subnet(text: &str) -> Subnet {
    text.parse().unwrap()
}

#[tokio::test]
async fn a_config_is_written_whole_and_the_one_before_is_returned() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::dir(directory.path().join("net"));
    let error = store.config(None).await.unwrap_err().to_string();
    assert!(error.contains("net/config") && error.contains("--network"), "{error}");
    let (first, second) = (r#"{"Network":"10.1.0.0/16"}"#, r#"{"Network":"10.2.0.0/16"}"#);
    assert_eq!(store.set_config(first).await.unwrap(), None);
    assert!(store.set_config("{").await.is_err());
    assert_eq!(store.set_config(second).await.unwrap().as_deref(), Some(first));
    assert_eq!(store.config_text().await.unwrap().as_deref(), Some(second));
    let error = store.config(Some("10.9.0.0/16".parse().unwrap())).await.unwrap_err().to_string();
    assert!(error.contains("10.9.0.0/16") && error.contains("10.2.0.0/16"), "{error}");
}

#[tokio::test]
async fn the_config_is_followed_by_its_file() {
    let fixture = Fixture::new().await;
    let mut configs = fixture.store.follow_config();
    assert!(configs.recv().await.unwrap().unwrap().contains(NETWORK));
    for config in [r#"{"Network":"10.1.0.0/16"}"#, r#"{"Network":"10.2.0.0/16"}"#] {
        fixture.store.set_config(config).await.unwrap();
        assert_eq!(configs.recv().await.unwrap().as_deref(), Some(config));
    }
    std::fs::remove_file(fixture.directory.path().join("net/config")).unwrap();
    assert_eq!(configs.recv().await.unwrap(), None);
}

#[tokio::test]
async fn files_with_any_name_are_listed_and_removed() {
    use std::os::unix::ffi::OsStrExt as _;

    let fixture = Fixture::new().await;
    fixture.acquire(1).await;
    let directory = fixture.directory.path().join("net/subnets");
    std::fs::write(directory.join(std::ffi::OsStr::from_bytes(b"\xff\x1b")), "{}").unwrap();
    let records = fixture.list().await;
    let [_, odd] = &records[..] else { panic!("{records:?}") };
    assert_eq!(&*odd.key, r"\xff\x1b");
    assert!(fixture.store.remove(odd).await.unwrap());
    assert_eq!(fixture.list().await.len(), 1);
}

#[tokio::test]
async fn a_host_keeps_its_subnet_and_hosts_get_different_ones() {
    let fixture = Fixture::new().await;
    let first = fixture.acquire(1).await;
    assert!(first.created);
    let request = SubnetRequest { earlier: Some(subnet("10.244.9.0/24")), ..fixture.request() };
    let again = fixture.store.acquire(&request, host(1)).await.unwrap();
    assert_eq!((again.subnet, again.created), (first.subnet, false));
    let request = SubnetRequest { earlier: Some(first.subnet), ..fixture.request() };
    assert_ne!(fixture.store.acquire(&request, host(2)).await.unwrap().subnet, first.subnet);
    assert_eq!(fixture.value(first.subnet), lease::value(host(1)));
}

#[tokio::test]
async fn agents_that_start_at_once_get_different_subnets() {
    let fixture = Fixture::new().await;
    let tasks: Vec<_> = (1..=16)
        .map(|last| {
            let (store, request) = (fixture.store.clone(), fixture.request());
            tokio::spawn(async move { store.acquire(&request, host(last)).await.unwrap().subnet })
        })
        .collect();
    let mut subnets = BTreeSet::new();
    for task in tasks {
        subnets.insert(task.await.unwrap());
    }
    assert_eq!(subnets.len(), 16);
}

#[tokio::test]
async fn release_removes_only_our_own_record() {
    let fixture = Fixture::new().await;
    let held = fixture.acquire(1).await;
    std::fs::write(fixture.file(&lease::key(held.subnet)), lease::value(host(2))).unwrap();
    fixture.store.release(&held).await.unwrap();
    assert_eq!(fixture.list().await.len(), 1);
    std::fs::write(fixture.file(&lease::key(held.subnet)), lease::value(host(1))).unwrap();
    fixture.store.release(&held).await.unwrap();
    assert!(fixture.list().await.is_empty());
}

#[tokio::test]
async fn a_record_is_removed_only_as_it_was_listed() {
    let fixture = Fixture::new().await;
    let missing = Store::dir(fixture.directory.path().join("other"));
    assert!(missing.list::<Lease>().await.unwrap_err().to_string().contains("no store"));
    assert!(fixture.list().await.is_empty());
    // The acquired subnet is a random /24: the others are none.
    fixture.acquire(1).await;
    std::fs::write(fixture.file("10.244.2.0-25"), "old").unwrap();
    nix::unistd::mkfifo(&fixture.file("pipe"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    std::fs::create_dir(fixture.file("10.244.8.0-25")).unwrap();
    let listed = fixture.list().await;
    assert_eq!(listed.len(), 4, "{listed:?}");
    let find = |key: &str| listed.iter().find(|record| *record.key == *key).unwrap();
    assert!(find("10.244.8.0-25").value.is_err());
    std::fs::write(fixture.file("10.244.2.0-25"), "new").unwrap();
    assert!(!fixture.store.remove(find("10.244.2.0-25")).await.unwrap());
    assert!(fixture.store.remove(find("pipe")).await.unwrap() && !fixture.file("pipe").exists());
}

#[tokio::test]
async fn a_follower_sees_changes_and_a_lost_directory_loses_nothing() {
    let fixture = Fixture::new().await;
    let request = |text| SubnetRequest { wanted: Some(subnet(text)), ..fixture.request() };
    fixture.store.acquire(&request("10.244.1.0/24"), host(1)).await.unwrap();
    let mut events = fixture.store.follow::<Lease>();
    let mut next = async || match events.recv().await.unwrap() {
        Event::Snapshot(records) => {
            records.into_iter().map(|record| record.key.to_string()).collect::<Vec<_>>()
        }
        Event::Lost(why) => vec![format!("lost: {why}")],
        Event::Recalled { .. } | Event::Changes(_) => panic!("the directory store sends snapshots"),
    };
    assert_eq!(next().await, ["10.244.1.0-24"]);
    fixture.store.acquire(&request("10.244.2.0/24"), host(2)).await.unwrap();
    while next().await != ["10.244.1.0-24", "10.244.2.0-24"] {}
    let (subnets, aside) = (fixture.file(""), fixture.directory.path().join("aside"));
    std::fs::rename(&subnets, &aside).unwrap();
    loop {
        let keys = next().await;
        if keys.first().is_some_and(|key| key.starts_with("lost")) {
            break;
        }
        assert!(!keys.is_empty(), "a lost store looked empty");
    }
    std::fs::rename(&aside, &subnets).unwrap();
    while next().await.len() != 2 {}
}

#[tokio::test]
async fn a_kept_lease_is_restored_follows_its_host_and_is_never_taken_from_another() {
    let fixture = Fixture::new().await;
    let held = fixture.acquire(1).await;
    let file = fixture.file(&lease::key(held.subnet));
    let mut keeper = fixture.store.keep(held.clone());
    let confirmed = LeaseEvent::Confirmed { expires_in: None };
    assert_eq!(keeper.events.recv().await, Some(confirmed.clone()));

    std::fs::remove_file(&file).unwrap();
    let event = keeper.events.recv().await.unwrap();
    assert!(matches!(&event, LeaseEvent::Reacquired { subnet, .. } if *subnet == held.subnet), "{event:?}");
    assert_eq!(keeper.events.recv().await, Some(confirmed.clone()));
    assert_eq!(fixture.value(held.subnet), lease::value(host(1)));

    keeper.set_address(host(3));
    while keeper.events.recv().await.unwrap() != (LeaseEvent::Readdressed { public_ip: host(3) }) {}
    assert_eq!(fixture.value(held.subnet), lease::value(host(3)));

    // Written whole, as another agent or a tool that synchronises the directory does.
    let other = fixture.directory.path().join("other");
    std::fs::write(&other, lease::value(host(9))).unwrap();
    std::fs::rename(&other, &file).unwrap();
    let why = loop {
        let event = keeper.events.recv().await.unwrap();
        if let LeaseEvent::Lost { why } = event {
            break why;
        }
        assert_eq!(event, confirmed);
    };
    assert!(why.contains("192.168.77.9") && why.contains("our subnet"), "{why}");
    assert_eq!(fixture.value(held.subnet), lease::value(host(9)));
    keeper.stop().await.unwrap();
}
