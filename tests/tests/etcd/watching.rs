//! Following the records while etcd is paused, killed, compacted and wiped.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use overlay_agent::{
    lease::{Lease, LeaseRecord},
    store::{Change, Event, Store},
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};

use crate::hosts::{Keeper, NETWORK, Network, PREFIX, ip, key_of, next, subnet_key, value};

/// What a follower knows, built from its events as the agent does.
struct Follower {
    events: mpsc::Receiver<Event<Lease>>,
    records: BTreeMap<Arc<str>, LeaseRecord>,
    lost: usize,
    snapshots: usize,
}

impl Follower {
    fn start(store: &Store) -> Self {
        Self { events: store.follow(), records: BTreeMap::new(), lost: 0, snapshots: 0 }
    }

    async fn step(&mut self) {
        match next(&mut self.events).await {
            Event::Snapshot(records) => {
                self.snapshots += 1;
                self.records = records.into_iter().map(|record| (record.key.clone(), record)).collect();
            }
            Event::Changes(changes) => {
                for change in changes {
                    match change {
                        Change::Put(record) => self.records.insert(record.key.clone(), record),
                        Change::Delete { key } => self.records.remove(&key),
                    };
                }
            }
            Event::Recalled { .. } => panic!("not from disk"),
            Event::Lost(why) => {
                assert!(!why.is_empty());
                self.lost += 1;
            }
        }
    }

    async fn until_snapshot(&mut self, number: usize) {
        while self.snapshots < number {
            self.step().await;
        }
    }

    async fn until_lost(&mut self, number: usize) {
        while self.lost < number {
            self.step().await;
        }
    }

    async fn until_known(&mut self, key: &str, known: bool) {
        while self.records.contains_key(key) != known {
            self.step().await;
        }
    }

    fn keys(&self) -> Vec<&str> {
        self.records.keys().map(|key| &**key).collect()
    }
}

#[tokio::test]
async fn a_list_comes_first_and_then_every_change() {
    let mut network = Network::start().await;
    network.put("10.5.1.0-24", value(1), 0).await;
    let mut follower = Follower::start(&network.store(9).await);
    follower.until_snapshot(1).await;
    assert_eq!(follower.keys(), ["10.5.1.0-24"]);
    network.put("10.5.2.0-24", value(2), 0).await;
    network.raw.delete(subnet_key("10.5.1.0-24"), None).await.unwrap();
    follower.until_known("10.5.1.0-24", false).await;
    assert_eq!(follower.keys(), ["10.5.2.0-24"]);
    network.put("10.5.2.0-24", value(3), 0).await;
    follower.step().await;
    assert_eq!(follower.records["10.5.2.0-24"].holder(), Some(ip(3)));
    assert_eq!((follower.snapshots, follower.lost), (1, 0));
}

#[tokio::test]
async fn an_empty_network_is_an_empty_list() {
    let network = Network::start().await;
    let mut follower = Follower::start(&network.store(9).await);
    follower.until_snapshot(1).await;
    assert!(follower.records.is_empty());
}

#[tokio::test]
async fn a_killed_etcd_is_lost_once_and_followed_again_with_what_it_had() {
    let mut network = Network::start().await;
    let held = network.acquire(1).await;
    let mut follower = Follower::start(&network.store(9).await);
    follower.until_snapshot(1).await;
    network.etcd.kill();
    follower.until_lost(1).await;
    // Neither a second word nor an empty list comes while it is away.
    assert!(timeout(Duration::from_secs(4), follower.events.recv()).await.is_err());
    network.etcd.restart().unwrap();
    follower.until_snapshot(2).await;
    assert_eq!(follower.keys(), [key_of(&held)]);
    let second = network.acquire(2).await;
    follower.until_known(&key_of(&second), true).await;
    assert_eq!((follower.records.len(), follower.lost), (2, 1));
}

#[tokio::test]
async fn a_paused_etcd_is_noticed_and_followed_again() {
    let mut network = Network::start().await;
    network.put("10.5.1.0-24", value(1), 0).await;
    let mut follower = Follower::start(&network.store(9).await);
    follower.until_snapshot(1).await;
    network.etcd.pause().unwrap();
    follower.until_lost(1).await;
    assert_eq!(follower.keys(), ["10.5.1.0-24"]);
    network.etcd.resume().unwrap();
    follower.until_snapshot(2).await;
    network.put("10.5.2.0-24", value(2), 0).await;
    follower.until_known("10.5.2.0-24", true).await;
    assert_eq!((follower.records.len(), follower.lost), (2, 1));
}

#[tokio::test]
async fn what_happened_and_was_compacted_while_we_were_away_is_in_the_next_list() {
    let mut network = Network::start().await;
    for host in 1..=3 {
        network.put(&format!("10.5.{host}.0-24"), value(host), 0).await;
    }
    let mut follower = Follower::start(&network.store(9).await);
    follower.until_snapshot(1).await;
    assert_eq!(follower.records.len(), 3);
    network.etcd.kill();
    follower.until_lost(1).await;
    // On another port, only the test reaches it. Its data is the same.
    network.etcd.restart_elsewhere().unwrap();
    let mut raw = etcd_client::Client::connect([network.etcd.endpoint()], None).await.unwrap();
    raw.delete(subnet_key("10.5.1.0-24"), None).await.unwrap();
    raw.put(subnet_key("10.5.2.0-24"), value(20), None).await.unwrap();
    let last = raw.put(subnet_key("10.5.4.0-24"), value(4), None).await.unwrap();
    raw.compact(last.header().unwrap().revision(), None).await.unwrap();
    network.etcd.restart_back().unwrap();
    follower.until_snapshot(2).await;
    assert_eq!(follower.keys(), ["10.5.2.0-24", "10.5.3.0-24", "10.5.4.0-24"]);
    assert_eq!(follower.records["10.5.2.0-24"].holder(), Some(ip(20)));
    assert_eq!(follower.lost, 1);
}

#[tokio::test]
async fn wiped_data_removes_no_route_until_hosts_had_time_to_write_again() {
    let mut network = Network::start().await;
    let (present, absent) = (network.acquire(1).await, network.acquire(2).await);
    // The host of `present` is alive; that of `absent` is not.
    let keeper = Keeper::start(&network.store(1).await, present.clone());
    let mut follower = Follower::start(&network.short_store(9, 8).await);
    follower.until_snapshot(1).await;
    assert_eq!(follower.records.len(), 2);
    network.etcd.wipe().unwrap();
    network.etcd.restart().unwrap();
    follower.until_snapshot(2).await;
    assert_eq!(follower.records.len(), 2, "a route went with etcd's data");
    network.wait_for(&key_of(&present), |record| record.is_some()).await;
    follower.until_snapshot(3).await;
    assert_eq!(follower.keys(), [key_of(&present)], "{} was never written again", absent.subnet);
    keeper.stop().await;
}

#[tokio::test]
async fn a_wiped_etcd_that_has_grown_as_long_again_is_still_recognised() {
    let mut network = Network::start().await;
    let held = network.take(1, "10.5.5.0/24").await;
    let mut follower = Follower::start(&network.store(9).await);
    follower.until_snapshot(1).await;
    network.etcd.kill();
    follower.until_lost(1).await;
    network.etcd.wipe().unwrap();
    network.etcd.restart_elsewhere().unwrap();
    let mut raw = etcd_client::Client::connect([network.etcd.endpoint()], None).await.unwrap();
    for count in 0..50 {
        raw.put(format!("{PREFIX}/other"), count.to_string(), None).await.unwrap();
    }
    raw.put(subnet_key("10.5.77.0-24"), value(77), None).await.unwrap();
    network.etcd.restart_back().unwrap();
    follower.until_snapshot(2).await;
    assert!(follower.records.contains_key(&*key_of(&held)), "{:?}", follower.keys());
    assert!(follower.records.contains_key("10.5.77.0-24"));
}

#[tokio::test]
async fn pages_of_records_and_many_changes_at_once_all_arrive() {
    let mut network = Network::start().await;
    let mut puts = Vec::new();
    for third in 0..=49u8 {
        for part in 0..100u8 {
            puts.push((format!("10.{}.{third}.0-24", part + 100), value(third)));
        }
    }
    // More than one page, written as fast as etcd takes it.
    for chunk in puts.chunks(100) {
        let puts: Vec<_> = chunk
            .iter()
            .map(|(key, value)| etcd_client::TxnOp::put(subnet_key(key), value.as_str(), None))
            .collect();
        network.raw.txn(etcd_client::Txn::new().and_then(puts)).await.unwrap();
    }
    let mut follower = Follower::start(&network.store(9).await);
    follower.until_snapshot(1).await;
    assert_eq!(follower.records.len(), 5000);
    let options = etcd_client::DeleteOptions::new().with_prefix();
    network.raw.delete(subnet_key("10.100."), Some(options)).await.unwrap();
    while follower.records.len() > 4950 {
        follower.step().await;
    }
    assert_eq!(follower.snapshots, 1);
}

#[tokio::test]
async fn a_member_whose_streams_break_at_once_is_not_asked_for_everything_without_end() {
    let network = Network::start().await;
    // In front of etcd, something that lets every connection live just long enough for a list and a watch.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut options = network.options(9);
    let server = options.endpoints[0].strip_prefix("http://").unwrap().to_owned();
    options.endpoints = vec![format!("http://{}", listener.local_addr().unwrap())];
    let breaking = tokio::spawn(async move {
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut server = TcpStream::connect(&server).await.unwrap();
            tokio::spawn(async move {
                let _ =
                    timeout(Duration::from_millis(300), copy_bidirectional(&mut client, &mut server)).await;
            });
        }
    });
    let mut follower = Follower::start(&Store::etcd(options).await.unwrap());
    let _ = timeout(Duration::from_secs(8), async {
        loop {
            follower.step().await;
        }
    })
    .await;
    breaking.abort();
    // With the shortest pause every time there would be 20.
    assert!((1..=10).contains(&follower.snapshots), "{} lists in 8 s", follower.snapshots);
}

#[tokio::test]
async fn the_config_is_followed_through_changes_outages_and_removal() {
    let mut network = Network::start().await;
    let store = network.store(1).await;
    let mut configs = store.follow_config();
    assert_eq!(next(&mut configs).await.as_deref(), Some(NETWORK));
    let other = r#"{"Network":"10.6.0.0/16"}"#;
    store.set_config(other).await.unwrap();
    assert_eq!(next(&mut configs).await.as_deref(), Some(other));
    network.etcd.kill();
    network.etcd.restart().unwrap();
    // Neighbours of the key are none of its changes.
    network.wait_for("", |_| true).await;
    network.raw.put(format!("{PREFIX}/config2"), "{}", None).await.unwrap();
    network.raw.put(format!("{PREFIX}/config"), "{", None).await.unwrap();
    assert_eq!(next(&mut configs).await.as_deref(), Some("{"));
    network.raw.delete(format!("{PREFIX}/config"), None).await.unwrap();
    assert_eq!(next(&mut configs).await, None);
}
