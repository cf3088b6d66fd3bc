//! Records that are invalid, removed for good, or another host's: which leases a host keeps, and which it does not take.

use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Permission, PermissionType, RoleRevokePermissionOptions};
use overlay_agent::store::{LeaseEvent, Store};
use tokio::time::sleep;

use crate::{
    hosts::{Keeper, Network, PREFIX, ip, key_of, subnet_key, value},
    security::{PASSWORD, user, with_users},
};

#[tokio::test]
async fn an_overwritten_record_of_ours_is_restored_and_the_subnet_kept() {
    let mut network = Network::start().await;
    let held = network.acquire(1).await;
    let key = key_of(&held);
    let born = network.get(&key).await.unwrap().create_revision();
    let mut keeper = Keeper::start(&network.store(1).await, held.clone());
    keeper.confirmed().await;
    let ours = network.lease_of(&held).await;
    // With our etcd lease, as a program does that keeps it, and without, as `etcdctl put` does.
    for lease in [ours, 0] {
        network.put(&key, "{\"Public\u{1b}[2J", lease).await;
        let LeaseEvent::Reacquired { subnet, why } = keeper.news().await else { panic!("not retaken") };
        assert_eq!(subnet, held.subnet);
        assert!(why.contains("Public") && !why.contains('\u{1b}'), "{why}");
        let record = network.get(&key).await.unwrap();
        assert_eq!(record.value_str().unwrap(), value(1));
        assert_eq!((record.lease(), record.create_revision()), (ours, born));
    }
    assert_eq!(keeper.stop().await.subnet, held.subnet);
    assert_eq!(network.records().await.len(), 1);
}

#[tokio::test]
async fn an_unreadable_new_record_is_left_alone_and_the_subnet_kept() {
    let mut network = Network::start().await;
    let held = network.acquire(1).await;
    let key = key_of(&held);
    network.raw.delete(subnet_key(&key), None).await.unwrap();
    network.put(&key, "garbage", 0).await;
    let before = network.get(&key).await.unwrap();
    let mut keeper = Keeper::start(&network.store(1).await, held.clone());
    let LeaseEvent::Lost { why } = keeper.news().await else { panic!("not unheld") };
    assert!(why.contains("garbage") && why.contains(&key), "{why}");
    sleep(Duration::from_secs(4)).await;
    assert!(keeper.is_silent());
    assert_eq!(network.get(&key).await.unwrap().mod_revision(), before.mod_revision());
    network.raw.delete(subnet_key(&key), None).await.unwrap();
    let news = keeper.news().await;
    assert!(matches!(&news, LeaseEvent::Reacquired { subnet, .. } if *subnet == held.subnet), "{news:?}");
    keeper.stop().await;
    assert_eq!(network.records().await.len(), 1);
}

#[tokio::test]
async fn a_record_that_others_wrote_with_our_etcd_lease_does_not_end_with_it() {
    let mut network = Network::start().await;
    let held = network.acquire(1).await;
    let key = key_of(&held);
    let mut keeper = Keeper::start(&network.store(1).await, held.clone());
    keeper.confirmed().await;
    let lease = network.lease_of(&held).await;
    network.put(&key, value(50), lease).await;
    assert!(matches!(keeper.news().await, LeaseEvent::Moved { .. }));
    keeper.confirmed().await;
    assert_eq!(network.get(&key).await.unwrap().value_str().unwrap(), value(50));
    keeper.stop().await;
}

#[tokio::test]
async fn a_removed_record_that_may_not_be_written_again_is_a_lost_claim_and_fills_etcd_with_nothing() {
    let mut network = Network::start().await;
    with_users(&mut network).await;
    let as_root = ConnectOptions::new().with_user("root", "root-secret");
    let mut root = Client::connect([network.etcd.endpoint()], Some(as_root)).await.unwrap();
    let store = Store::etcd(user(&network, PASSWORD)).await.unwrap();
    let held = store.acquire(&network.request(), ip(1)).await.unwrap();
    let key = subnet_key(&key_of(&held));
    let mut keeper = Keeper::start(&store, held.clone());
    keeper.confirmed().await;

    let prefix = format!("{PREFIX}/");
    let all = RoleRevokePermissionOptions::new().with_prefix();
    root.role_revoke_permission("overlay", prefix.clone(), Some(all)).await.unwrap();
    let read = Permission::new(PermissionType::Read, prefix.clone()).with_prefix();
    root.role_grant_permission("overlay", read).await.unwrap();
    root.delete(key.clone(), None).await.unwrap();
    let news = loop {
        match keeper.news().await {
            // Its login is from before the change.
            LeaseEvent::Unconfirmed { .. } => {}
            news => break news,
        }
    };
    let LeaseEvent::Lost { why } = &news else { panic!("{news:?}") };
    assert!(why.contains("removed"), "{why}");
    sleep(Duration::from_secs(6)).await;
    // That of the record, that of the claim on the address, and another of seconds while that is tried again.
    let leases = root.leases().await.unwrap().leases().len();
    assert!(leases <= 3, "{leases} leases");

    let write = Permission::new(PermissionType::Readwrite, prefix).with_prefix();
    root.role_grant_permission("overlay", write).await.unwrap();
    let news = loop {
        match keeper.news().await {
            LeaseEvent::Lost { .. } => {}
            news => break news,
        }
    };
    assert!(matches!(&news, LeaseEvent::Reacquired { subnet, .. } if *subnet == held.subnet), "{news:?}");
    let record = root.get(key, None).await.unwrap().take_kvs().pop().unwrap();
    assert_eq!(record.value_str().unwrap(), value(1));
    keeper.stop().await;
}
