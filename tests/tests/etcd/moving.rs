//! A host gets another address: it keeps its subnet, and never overwrites a record of another host.

use std::time::Duration;

use overlay_agent::store::{LeaseEvent, Store, StoreError, etcd::EtcdOptions};
use tokio::time::sleep;

use crate::hosts::{Keeper, Network, ip, key_of, value};

#[tokio::test]
async fn a_kept_lease_follows_this_host_to_another_address() {
    let mut network = Network::start().await;
    let held = network.take(1, "10.5.1.0/24").await;
    let (lease, key) = (network.lease_of(&held).await, key_of(&held));
    let mut keeper = Keeper::start(&network.store(1).await, held);
    keeper.confirmed().await;
    keeper.0.set_address(ip(9));
    network.wait_for(&key, |record| record.is_some_and(|kv| kv.value_str().unwrap() == value(9))).await;
    assert_eq!(network.get(&key).await.unwrap().lease(), lease, "the etcd lease is the same");
    // The old address is free for another host, the new one is not.
    let other = network.acquire_as(3, 1).await.unwrap();
    let other = Keeper::start(&network.store(3).await, other);
    let refused = network.acquire_as(2, 9).await.unwrap_err();
    assert!(matches!(refused, StoreError::SamePublicIp { .. }), "{refused}");
    // An address that another live host has is not taken from it; ours stays as it was, and is taken when it is free.
    assert_eq!(keeper.news().await, LeaseEvent::Readdressed { public_ip: ip(9) });
    keeper.confirmed().await;
    keeper.0.set_address(ip(1));
    let news = keeper.news().await;
    assert!(matches!(news, LeaseEvent::Superseded { .. }), "{news:?}");
    // Asked for again and again meanwhile: the record is not where it should be, so nothing is confirmed.
    sleep(Duration::from_secs(4)).await;
    assert!(keeper.is_silent());
    assert_eq!(network.get(&key).await.unwrap().value_str().unwrap(), value(9));
    network.store(3).await.release(&other.stop().await).await.unwrap();
    network.wait_for(&key, |record| record.is_some_and(|kv| kv.value_str().unwrap() == value(1))).await;
    assert_eq!(keeper.next().await, LeaseEvent::Readdressed { public_ip: ip(1) });
    keeper.confirmed().await;
    assert_eq!(keeper.stop().await.public_ip(), ip(1));
}

#[tokio::test]
async fn a_record_that_changes_while_its_host_waits_for_the_new_address_is_left_alone() {
    let mut network = Network::start().await;
    // Our claim on the old address outlives the wait.
    let options = EtcdOptions { owner_ttl: Duration::from_secs(60), ..network.options(1) };
    let store = Store::etcd(options).await.unwrap();
    let held = store.acquire(&network.preferring("10.5.1.0/24"), ip(1)).await.unwrap();
    let lease = network.lease_of(&held).await;
    let mut keeper = Keeper::start(&store, held);
    keeper.confirmed().await;
    // Nothing renews this claim: the new address is free in a while.
    network.take(3, "10.5.3.0/24").await;
    keeper.0.set_address(ip(3));
    sleep(Duration::from_millis(300)).await;
    network.put("10.5.1.0-24", value(50), lease).await;
    let LeaseEvent::Moved { from, .. } = keeper.news().await else { panic!("not moved") };
    assert_eq!(from, "10.5.1.0/24".parse().unwrap());
    assert_eq!(network.get("10.5.1.0-24").await.unwrap().value_str().unwrap(), value(50));
    keeper.stop().await;
}

#[tokio::test]
async fn a_host_whose_address_another_has_by_now_goes_on_under_its_new_one() {
    let mut network = Network::start().await;
    let old = network.acquire(1).await;
    let new_store = network.store(2).await;
    let new = new_store.acquire(&network.request(), ip(1)).await.unwrap();
    let new_keeper = Keeper::start(&new_store, new.clone());
    let mut old_keeper = Keeper::start(&network.store(1).await, old);
    assert!(matches!(old_keeper.news().await, LeaseEvent::Superseded { .. }));
    let before = network.get(&key_of(&new)).await.unwrap();
    old_keeper.0.set_address(ip(9));
    let LeaseEvent::Moved { from, to, why } = old_keeper.news().await else { panic!("not moved") };
    assert!(from == new.subnet && to != from && why.contains("192.168.77.1 "), "{to} {why}");
    assert_eq!(old_keeper.news().await, LeaseEvent::Readdressed { public_ip: ip(9) });
    let after = network.get(&key_of(&new)).await.unwrap();
    assert_eq!((after.mod_revision(), after.lease()), (before.mod_revision(), before.lease()));
    let moved = old_keeper.stop().await;
    assert_eq!(network.get(&key_of(&moved)).await.unwrap().value_str().unwrap(), value(9));
    assert_eq!(new_keeper.stop().await.subnet, new.subnet);
}

#[tokio::test]
async fn a_host_whose_old_address_went_to_one_with_a_subnet_of_its_own_keeps_its_subnet() {
    let mut network = Network::start().await;
    let ours = network.take(1, "10.5.1.0/24").await;
    let lease = network.lease_of(&ours).await;
    let mut other = Keeper::start(&network.store(2).await, network.take(2, "10.5.2.0/24").await);
    other.0.set_address(ip(1));
    // Our claim has to end first.
    network
        .wait_for("10.5.2.0-24", |record| record.is_some_and(|kv| kv.value_str().unwrap() == value(1)))
        .await;
    let mut keeper = Keeper::start(&network.store(1).await, ours.clone());
    assert!(matches!(keeper.news().await, LeaseEvent::Superseded { .. }));
    keeper.0.set_address(ip(9));
    assert_eq!(keeper.news().await, LeaseEvent::Readdressed { public_ip: ip(9) });
    let record = network.get("10.5.1.0-24").await.unwrap();
    assert_eq!((record.value_str().unwrap(), record.lease()), (value(9).as_str(), lease));
    assert_eq!(network.get("10.5.2.0-24").await.unwrap().value_str().unwrap(), value(1));
    assert_eq!(other.news().await, LeaseEvent::Readdressed { public_ip: ip(1) });
    assert_eq!(other.stop().await.public_ip(), ip(1));
    assert_eq!(keeper.stop().await.subnet, ours.subnet);
}
