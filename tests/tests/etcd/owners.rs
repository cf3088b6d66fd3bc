//! Two hosts with one public address: the second refuses, a restarted one does not.

use std::time::{Duration, Instant};

use etcd_client::GetOptions;
use overlay_agent::store::{LeaseEvent, StoreError};

use crate::hosts::{Keeper, Network, PREFIX, ip, key_of};

#[tokio::test]
async fn a_second_host_with_a_live_ones_address_refuses() {
    let mut network = Network::start().await;
    let held = network.acquire(1).await;
    let keeper = Keeper::start(&network.store(1).await, held.clone());
    let error = network.acquire_as(2, 1).await.unwrap_err();
    assert!(matches!(error, StoreError::SamePublicIp { .. }) && !error.is_transient());
    let text = error.to_string();
    assert!(text.contains("192.168.77.1") && text.contains("--public-ip"), "{text}");
    assert_eq!(network.records().await.len(), 1);
    assert_eq!(keeper.stop().await.subnet, held.subnet);
}

#[tokio::test]
async fn a_new_machine_with_a_dead_ones_address_waits_and_gets_its_subnet() {
    let network = Network::start().await;
    // Nothing renews this claim: its agent is dead.
    let dead = network.acquire(1).await;
    let start = Instant::now();
    let held = network.acquire_as(2, 1).await.unwrap();
    assert_eq!((held.subnet, held.created), (dead.subnet, false));
    assert!(start.elapsed() > Duration::from_secs(1), "it did not wait for the claim to end");
}

#[tokio::test]
async fn a_restarted_agent_does_not_wait() {
    let network = Network::start().await;
    let killed = network.acquire(1).await;
    let start = Instant::now();
    assert_eq!(network.acquire(1).await.subnet, killed.subnet);
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn a_stopped_agent_delays_no_other_host_and_its_record_stays() {
    let mut network = Network::start().await;
    let held = network.acquire(1).await;
    network.store(1).await.leave(&held).await;
    let claims = GetOptions::new().with_prefix().with_count_only();
    let key = format!("{PREFIX}/overlay-agent/");
    assert_eq!(network.raw.get(key, Some(claims)).await.unwrap().count(), 0);
    assert!(network.get(&key_of(&held)).await.is_some());
    let start = Instant::now();
    assert_eq!(network.acquire_as(2, 1).await.unwrap().subnet, held.subnet);
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn a_host_that_was_replaced_while_it_was_away_stays_off_the_subnet() {
    let mut network = Network::start().await;
    let old = network.acquire(1).await;
    let new_store = network.store(2).await;
    let new = new_store.acquire(&network.request(), ip(1)).await.unwrap();
    let new_keeper = Keeper::start(&new_store, new.clone());
    let before = network.get(&key_of(&new)).await.unwrap();
    let mut old_keeper = Keeper::start(&network.store(1).await, old);
    assert!(matches!(old_keeper.news().await, LeaseEvent::Superseded { why } if why.contains("--public-ip")));
    assert_eq!(network.get(&key_of(&new)).await.unwrap().mod_revision(), before.mod_revision());
    // When the new agent stops, the old one acquires the lease again.
    let new = new_keeper.stop().await;
    new_store.release(&new).await.unwrap();
    assert!(matches!(old_keeper.news().await, LeaseEvent::Reacquired { subnet, .. } if subnet == new.subnet));
    old_keeper.stop().await;
}
