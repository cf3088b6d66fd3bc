//! An agent whose endpoint is `etcd grpc-proxy`: it answers the first renewal on a stream at once, and others when it sends them
//! to etcd itself.

use std::time::Duration;

use overlay_agent::{
    lease::Lease,
    store::{Change, Event, LeaseEvent, Store, etcd::EtcdOptions},
};
use overlay_tests::grpc_proxy::GrpcProxy;

use crate::hosts::{Keeper, Network, ip, key_of, next, subnet_key, value};

/// A store behind the proxy whose leases last `seconds`, and are renewed after 3.
async fn store(network: &Network, proxy: &GrpcProxy, seconds: u64) -> Store {
    let ttl = Duration::from_secs(seconds);
    let endpoints = vec![proxy.endpoint()];
    let options = EtcdOptions {
        endpoints,
        lease_ttl: ttl,
        renew_margin: ttl - Duration::from_secs(3),
        ..network.options(1)
    };
    Store::etcd(options).await.unwrap()
}

#[tokio::test]
async fn a_lease_is_renewed_through_a_proxy() {
    let mut network = Network::start().await;
    let proxy = GrpcProxy::start(&network.etcd.endpoint()).unwrap();
    let store = store(&network, &proxy, 30).await;
    let held = store.acquire(&network.request(), ip(1)).await.unwrap();
    let mut keeper = Keeper::start(&store, held.clone());
    // The proxy sends a second answer only after 20 s: too late for a request.
    for _ in 0..3 {
        assert_eq!(keeper.confirmed().await, Some(Duration::from_secs(30)));
    }
    assert_eq!(network.get(&key_of(&held)).await.unwrap().version(), 1);
    keeper.stop().await;
}

#[tokio::test]
async fn an_outage_behind_a_proxy_is_survived() {
    let mut network = Network::start().await;
    let proxy = GrpcProxy::start(&network.etcd.endpoint()).unwrap();
    let store = store(&network, &proxy, 86400).await;
    let held = store.acquire(&network.request(), ip(1)).await.unwrap();
    let mut events = store.follow::<Lease>();
    assert!(matches!(next(&mut events).await, Event::Snapshot(records) if records.len() == 1));
    let mut keeper = Keeper::start(&store, held.clone());
    keeper.confirmed().await;
    network.etcd.kill();
    assert!(matches!(keeper.news().await, LeaseEvent::Unconfirmed { .. }));
    network.etcd.restart().unwrap();
    keeper.confirmed().await;
    network.wait_for(&key_of(&held), |record| record.is_some()).await;
    network.put("10.5.200.0-24", value(200), 0).await;
    loop {
        let found = match next(&mut events).await {
            Event::Snapshot(records) => records.iter().any(|record| &*record.key == "10.5.200.0-24"),
            Event::Changes(changes) => changes
                .iter()
                .any(|change| matches!(change, Change::Put(record) if &*record.key == "10.5.200.0-24")),
            Event::Recalled { .. } | Event::Lost(_) => false,
        };
        if found {
            break;
        }
    }
    keeper.stop().await;
}

#[tokio::test]
async fn a_restarted_agent_and_a_deleted_record_come_back_through_a_proxy() {
    let mut network = Network::start().await;
    let proxy = GrpcProxy::start(&network.etcd.endpoint()).unwrap();
    let first = store(&network, &proxy, 86400).await;
    let held = first.acquire(&network.request(), ip(1)).await.unwrap();
    let mut keeper = Keeper::start(&first, held);
    keeper.confirmed().await;
    let held = keeper.stop().await;

    let second = store(&network, &proxy, 86400).await;
    let again = second.acquire(&network.request(), ip(1)).await.unwrap();
    assert_eq!((again.subnet, again.created), (held.subnet, false));
    let mut events = second.follow::<Lease>();
    assert!(matches!(next(&mut events).await, Event::Snapshot(records) if records.len() == 1));
    let mut keeper = Keeper::start(&second, again.clone());
    assert_eq!(keeper.confirmed().await, Some(Duration::from_secs(86400)));
    network.raw.delete(subnet_key(&key_of(&again)), None).await.unwrap();
    let news = keeper.news().await;
    assert!(matches!(news, LeaseEvent::Reacquired { subnet, .. } if subnet == again.subnet), "{news:?}");
    let mut put = None;
    while put.is_none() {
        let Event::Changes(changes) = next(&mut events).await else { panic!("not changes") };
        put = changes.into_iter().find(|change| matches!(change, Change::Put(_)));
    }
    assert_eq!(network.get(&key_of(&again)).await.unwrap().value_str().unwrap(), value(1));
    keeper.stop().await;
}
