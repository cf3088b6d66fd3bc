//! Reservations: records without an etcd lease, which are the operator's.

use crate::hosts::{Keeper, Network, ip, value};

#[tokio::test]
async fn a_reservation_is_used_by_its_owner_and_never_gains_an_expiry() {
    let mut network = Network::start().await;
    network.put("10.5.250.0-24", value(1), 0).await;
    let before = network.get("10.5.250.0-24").await.unwrap();
    let held = network.acquire(1).await;
    assert_eq!((held.subnet, held.created), ("10.5.250.0/24".parse().unwrap(), false));
    let mut keeper = Keeper::start(&network.store(1).await, held);
    assert_eq!(keeper.confirmed().await, None);
    let held = keeper.stop().await;
    network.store(1).await.release(&held).await.unwrap();
    let after = network.get("10.5.250.0-24").await.unwrap();
    assert_eq!((after.lease(), after.mod_revision()), (0, before.mod_revision()));
}

#[tokio::test]
async fn a_reservation_is_never_taken_by_others() {
    let mut network = Network::of(
        r#"{"Network":"10.5.0.0/16","SubnetLen":24,"SubnetMin":"10.5.16.0","SubnetMax":"10.5.18.0"}"#,
    )
    .await;
    network.put("10.5.16.0-24", value(1), 0).await;
    network.put("10.5.17.0-24", value(2), 0).await;
    assert_eq!(network.acquire(3).await.subnet, "10.5.18.0/24".parse().unwrap());
    let earlier = network.preferring("10.5.16.0/24");
    let error = network.store(4).await.acquire(&earlier, ip(4)).await.unwrap_err();
    assert!(error.to_string().contains("full"), "{error}");
    let wanted = network.try_take(4, "10.5.16.0/24").await.unwrap_err();
    assert!(wanted.to_string().contains("192.168.77.1"), "{wanted}");
}

#[tokio::test]
async fn a_lease_that_an_operator_makes_a_reservation_stays_one() {
    let mut network = Network::start().await;
    let held = network.take(1, "10.5.9.0/24").await;
    let mut keeper = Keeper::start(&network.short_store(1, 4).await, held);
    assert!(keeper.confirmed().await.is_some());
    // As `etcdctl put` does: without a lease.
    network.put("10.5.9.0-24", value(1), 0).await;
    while keeper.confirmed().await.is_some() {}
    keeper.stop().await;
    assert_eq!(network.get("10.5.9.0-24").await.unwrap().lease(), 0);
}
