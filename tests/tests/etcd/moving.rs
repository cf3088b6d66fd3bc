//! A host gets another address: its subnet goes with it, and never over what somebody else wrote.

use std::time::{Duration, Instant};

use overlay_agent::store::{
    Event, LeaseEvent,
    etcd::{EtcdError, EtcdOptions, EtcdStore},
};
use tokio::time::sleep;

use crate::hosts::{Keeper, Network, ip, key_of, value};

#[tokio::test]
async fn a_subnet_follows_its_host_to_another_address() {
    let mut network = Network::start().await;
    let store = network.store(1).await;
    let held = network.acquire(1).await;
    let moved = store.readdress(&held, ip(9)).await.unwrap();
    assert_eq!((moved.subnet, moved.public_ip), (held.subnet, ip(9)));
    let record = network.get(&key_of(&held)).await.unwrap();
    assert_eq!(record.value_str().unwrap(), value(9));
    assert_eq!(Some(record.lease()), held.etcd_lease());
    // The old address is free for another host at once.
    let start = Instant::now();
    assert_ne!(
        network.store(3).await.acquire(&network.config, ip(1), None, None).await.unwrap().subnet,
        held.subnet
    );
    assert!(start.elapsed() < Duration::from_secs(2));
    // Moving what is no longer ours moves nothing.
    assert!(store.readdress(&held, ip(10)).await.is_err());
    assert_eq!(network.get(&key_of(&held)).await.unwrap().value_str().unwrap(), value(9));
}

#[tokio::test]
async fn a_kept_lease_follows_this_host_to_another_address() {
    let mut network = Network::start().await;
    let held = network.take(1, "10.5.1.0/24").await;
    let (lease, key) = (held.etcd_lease().unwrap(), key_of(&held));
    let mut keeper = Keeper::start(network.store(1).await, held);
    keeper.events.confirmed().await;
    keeper.public_ip.send(ip(9)).unwrap();
    network.wait_for(&key, |record| record.is_some_and(|kv| kv.value_str().unwrap() == value(9))).await;
    assert_eq!(network.get(&key).await.unwrap().lease(), lease, "its time goes on");
    // The old address is free for another host, the new one is not.
    let other = network.store(3).await.acquire(&network.config, ip(1), None, None).await.unwrap();
    let other = Keeper::start(network.store(3).await, other);
    let refused = network.store(2).await.acquire(&network.config, ip(9), None, None).await.unwrap_err();
    assert!(matches!(refused, EtcdError::SamePublicIp { .. }), "{refused}");
    // An address that another live host has is not taken from it; ours stays as it was, and is taken when it is free.
    assert_eq!(keeper.events.news().await, LeaseEvent::Readdressed { public_ip: ip(9) });
    keeper.events.confirmed().await;
    keeper.public_ip.send(ip(1)).unwrap();
    let next = loop {
        match keeper.events.next().await {
            // The last word under the address that was right until now.
            Event::Lease(LeaseEvent::Confirmed { .. }) => {}
            next => break next,
        }
    };
    assert!(matches!(next, Event::Lease(LeaseEvent::Superseded { .. })), "{next:?}");
    // Asked for again and again meanwhile: the record is not where it should be, so nothing is confirmed.
    sleep(Duration::from_secs(4)).await;
    assert!(keeper.events.0.try_recv().is_err());
    assert_eq!(network.get(&key).await.unwrap().value_str().unwrap(), value(9));
    network.store(3).await.release(&other.stop().await).await.unwrap();
    network.wait_for(&key, |record| record.is_some_and(|kv| kv.value_str().unwrap() == value(1))).await;
    let next = keeper.events.next().await;
    assert_eq!(next, Event::Lease(LeaseEvent::Readdressed { public_ip: ip(1) }));
    keeper.events.confirmed().await;
    assert_eq!(keeper.stop().await.public_ip, ip(1));
}

#[tokio::test]
async fn what_somebody_writes_while_we_wait_for_our_new_address_stays() {
    let mut network = Network::start().await;
    // Our claim on the old address outlives the wait.
    let options = EtcdOptions { owner_ttl: Duration::from_secs(60), ..network.options(1) };
    let store = EtcdStore::connect(options).await.unwrap();
    let wanted = Some("10.5.1.0/24".parse().unwrap());
    let held = store.acquire(&network.config, ip(1), wanted, None).await.unwrap();
    // Nothing renews this claim: the new address is free in a while.
    network.take(3, "10.5.3.0/24").await;
    let moving = tokio::spawn({
        let held = held.clone();
        async move { store.readdress(&held, ip(3)).await }
    });
    sleep(Duration::from_millis(300)).await;
    network.put("10.5.1.0-24", value(50), held.etcd_lease().unwrap()).await;
    let refused = moving.await.unwrap().unwrap_err();
    assert!(refused.to_string().contains("no longer ours"), "{refused}");
    assert_eq!(network.get("10.5.1.0-24").await.unwrap().value_str().unwrap(), value(50));
}

#[tokio::test]
async fn a_host_whose_address_another_has_by_now_goes_on_under_its_new_one() {
    let mut network = Network::start().await;
    let old = network.acquire(1).await;
    let new_store = network.store(2).await;
    let new = new_store.acquire(&network.config, ip(1), None, None).await.unwrap();
    let new_keeper = Keeper::start(new_store, new.clone());
    let mut old_keeper = Keeper::start(network.store(1).await, old);
    assert!(matches!(old_keeper.events.news().await, LeaseEvent::Superseded { .. }));
    let before = network.get(&key_of(&new)).await.unwrap();
    old_keeper.public_ip.send(ip(9)).unwrap();
    let LeaseEvent::Moved { from, to, why } = old_keeper.events.news().await else { panic!("not moved") };
    assert!(from == new.subnet && to != from && why.contains("192.168.77.1 "), "{to} {why}");
    assert_eq!(old_keeper.events.news().await, LeaseEvent::Readdressed { public_ip: ip(9) });
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
    let mut other = Keeper::start(network.store(2).await, network.take(2, "10.5.2.0/24").await);
    other.public_ip.send(ip(1)).unwrap();
    // Our claim has to end first.
    network
        .wait_for("10.5.2.0-24", |record| record.is_some_and(|kv| kv.value_str().unwrap() == value(1)))
        .await;
    let mut keeper = Keeper::start(network.store(1).await, ours.clone());
    assert!(matches!(keeper.events.news().await, LeaseEvent::Superseded { .. }));
    keeper.public_ip.send(ip(9)).unwrap();
    assert_eq!(keeper.events.news().await, LeaseEvent::Readdressed { public_ip: ip(9) });
    let record = network.get("10.5.1.0-24").await.unwrap();
    assert_eq!((record.value_str().unwrap(), Some(record.lease())), (value(9).as_str(), ours.etcd_lease()));
    assert_eq!(network.get("10.5.2.0-24").await.unwrap().value_str().unwrap(), value(1));
    assert_eq!(other.events.news().await, LeaseEvent::Readdressed { public_ip: ip(1) });
    assert_eq!(other.stop().await.public_ip, ip(1));
    assert_eq!(keeper.stop().await.subnet, ours.subnet);
}
