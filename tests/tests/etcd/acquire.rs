//! Taking a subnet: alone, in a crowd, again after a restart, and when there is none.

use std::collections::BTreeSet;

use etcd_client::{LeaseTimeToLiveOptions, PutOptions};
use overlay_agent::store::{Store, StoreError, SubnetRequest, etcd::EtcdOptions};

use crate::hosts::{Network, PREFIX, ip, key_of, subnet_key, value};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forty_hosts_that_start_at_once_get_forty_subnets() {
    // Room for 41, so that most draws collide and are drawn again.
    let mut network = Network::of(
        r#"{"Network":"10.5.0.0/16","SubnetLen":24,"SubnetMin":"10.5.1.0","SubnetMax":"10.5.41.0"}"#,
    )
    .await;
    let tasks: Vec<_> = (1..=40)
        .map(|host| {
            let (options, request) = (network.options(host), network.request());
            tokio::spawn(async move {
                let store = Store::etcd(options).await.unwrap();
                store.acquire(&request, ip(host)).await.unwrap().subnet
            })
        })
        .collect();
    let mut subnets = BTreeSet::new();
    for task in tasks {
        subnets.insert(task.await.unwrap());
    }
    assert_eq!(subnets.len(), 40);
    assert_eq!(network.records().await.len(), 40);
    // A host that lost a race revoked no lease of others and left none behind: one per subnet, one per claim on an address.
    let leases = network.raw.leases().await.unwrap();
    assert_eq!(leases.leases().len(), 80);
}

#[tokio::test]
async fn a_record_is_flannels_with_a_note_and_lives_for_24_hours() {
    let mut network = Network::start().await;
    let held = network.acquire(7).await;
    assert!(held.created);
    let record = network.get(&key_of(&held)).await.unwrap();
    assert_eq!(record.value_str().unwrap(), value(7));
    let options = LeaseTimeToLiveOptions::new().with_keys();
    let lease = network.raw.lease_time_to_live(record.lease(), Some(options)).await.unwrap();
    assert_eq!(lease.granted_ttl(), 86400);
    assert_eq!(lease.keys(), [subnet_key(&key_of(&held)).into_bytes()]);
}

#[tokio::test]
async fn a_restarted_host_keeps_its_subnet_by_its_address_and_else_by_its_file() {
    let mut network = Network::start().await;
    let first = network.take(1, "10.5.7.0/24").await;
    let revision = network.get(&key_of(&first)).await.unwrap().mod_revision();
    let other = network.preferring("10.5.200.0/24");
    let again = network.store(1).await.acquire(&other, ip(1)).await.unwrap();
    assert_eq!((again.subnet, again.created), (first.subnet, false));
    let record = network.get(&key_of(&first)).await.unwrap();
    assert_eq!(record.mod_revision(), revision, "a record that is right is not written again");
    // Its record gone, the subnet in its file is free.
    network.store(1).await.release(&again).await.unwrap();
    assert!(network.records().await.is_empty());
    let by_file = network.store(1).await.acquire(&other, ip(1)).await.unwrap();
    assert_eq!((Some(by_file.subnet), by_file.created), (other.earlier, true));
    // Somebody else's is not taken, whatever the file says.
    let third = network.store(2).await.acquire(&other, ip(2)).await.unwrap();
    assert_ne!(Some(third.subnet), other.earlier);
}

#[tokio::test]
async fn a_full_network_is_an_error_that_says_so_and_leaves_nothing_behind() {
    let mut network = Network::of(r#"{"Network":"10.9.0.0/28","SubnetLen":30}"#).await;
    for host in 1..=3 {
        network.acquire(host).await;
    }
    let error = network.acquire_as(4, 4).await.unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }) && !error.is_transient());
    assert!(error.to_string().contains("10.9.0.0/28 is full"), "{error}");
    assert_eq!(network.raw.leases().await.unwrap().leases().len(), 6);
}

#[tokio::test]
async fn a_subnet_that_overlaps_another_length_is_not_taken() {
    let mut network = Network::of(
        r#"{"Network":"10.5.0.0/16","SubnetLen":24,"SubnetMin":"10.5.16.0","SubnetMax":"10.5.19.0"}"#,
    )
    .await;
    let lease = network.raw.lease_grant(600, None).await.unwrap().id();
    network.put("10.5.16.0-23", value(50), lease).await;
    network.put("10.5.18.128-25", value(51), lease).await;
    assert_eq!(network.acquire(1).await.subnet, "10.5.19.0/24".parse().unwrap());
    let error = network.acquire_as(2, 2).await.unwrap_err();
    assert!(error.to_string().contains("full"), "{error}");
}

#[tokio::test]
async fn a_record_of_ours_that_no_longer_fits_the_network_is_replaced() {
    let mut network = Network::start().await;
    let lease = network.raw.lease_grant(600, None).await.unwrap().id();
    network.put("10.77.3.0-24", value(1), lease).await;
    let held = network.acquire(1).await;
    assert!(held.subnet.is_part_of(network.config.network) && held.created);
    assert!(network.get("10.77.3.0-24").await.is_none());
}

#[tokio::test]
async fn a_record_of_another_backend_becomes_ours_of_udp_with_its_lease() {
    let mut network = Network::start().await;
    let lease = network.raw.lease_grant(600, None).await.unwrap().id();
    let vxlan = r#"{"PublicIP":"192.168.77.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"aa:bb:cc:dd:ee:ff"}}"#;
    network.put("10.5.3.0-24", vxlan, lease).await;
    let held = network.acquire(1).await;
    assert_eq!((held.subnet, held.created), ("10.5.3.0/24".parse().unwrap(), false));
    let record = network.get("10.5.3.0-24").await.unwrap();
    assert_eq!((record.value_str().unwrap(), record.lease()), (value(1).as_str(), lease));
}

#[tokio::test]
async fn two_prefixes_live_side_by_side() {
    let mut network = Network::start().await;
    let options = EtcdOptions { prefix: "/other//net/".to_owned(), ..network.options(1) };
    let other = Store::etcd(options).await.unwrap();
    assert!(matches!(other.config(None).await, Err(StoreError::NoConfig(_))));
    other.set_config(r#"{"Network":"10.6.0.0/16"}"#).await.unwrap();
    let config = other.config(None).await.unwrap();
    let there = other.acquire(&SubnetRequest::any(config.clone()), ip(1)).await.unwrap();
    let here = network.acquire(1).await;
    assert!(there.subnet.is_part_of(config.network) && here.subnet.is_part_of(network.config.network));
    assert_eq!(network.records().await.len(), 1);
    let key = format!("/other/net/subnets/{}", key_of(&there));
    assert_eq!(network.raw.get(key, None).await.unwrap().kvs().len(), 1);
}

#[tokio::test]
async fn a_config_is_checked_before_it_is_written_and_when_it_is_read() {
    let mut network = Network::start().await;
    let store = network.store(1).await;
    let wrong = store.set_config(r#"{"Network":"10.5.0.0/30"}"#).await.unwrap_err();
    assert!(matches!(wrong, StoreError::Config { .. }));
    let before = store.set_config(r#"{"Network":"10.8.0.0/16"}"#).await.unwrap();
    assert_eq!(before.as_deref(), Some(crate::hosts::NETWORK));
    assert_eq!(store.config(None).await.unwrap().network, "10.8.0.0/16".parse().unwrap());
    network.raw.put(format!("{PREFIX}/config"), "{", None::<PutOptions>).await.unwrap();
    let error = store.config(None).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&store.config_location()) && text.contains("not a JSON object"), "{text}");
    assert!(error.is_transient(), "agents wait until it is replaced");
}

#[tokio::test]
async fn a_dead_endpoint_is_passed_over() {
    let network = Network::start().await;
    let mut options = network.options(1);
    options.endpoints.insert(0, "http://127.0.0.1:1".to_owned());
    let store = Store::etcd(options.clone()).await.unwrap();
    store.config(None).await.unwrap();
    options.endpoints.truncate(1);
    let error = Store::etcd(options).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert!(error.to_string().contains("127.0.0.1:1") && error.to_string().contains("refused"), "{error}");
}

#[tokio::test]
async fn a_wanted_subnet_takes_the_place_of_the_lease_that_this_host_had() {
    let mut network = Network::start().await;
    let before = network.take(1, "10.5.7.0/24").await;
    let lease = network.lease_of(&before).await;
    // Held by another host: what we have stays.
    network.put("10.5.8.0-24", value(50), 0).await;
    let error = network.try_take(1, "10.5.8.0/24").await.unwrap_err();
    assert!(error.to_string().contains("192.168.77.50"), "{error}");
    assert_eq!(network.lease_of(&before).await, lease);
    let held = network.take(1, "10.5.9.0/24").await;
    assert!(held.created && network.get("10.5.7.0-24").await.is_none());
    assert_eq!(network.get("10.5.9.0-24").await.unwrap().value_str().unwrap(), value(1));
    // A reservation is the operator's.
    network.put("10.5.9.0-24", value(1), 0).await;
    let error = network.try_take(1, "10.5.10.0/24").await.unwrap_err();
    assert!(error.to_string().contains("reserved"), "{error}");
    assert!(network.get("10.5.9.0-24").await.is_some() && network.get("10.5.10.0-24").await.is_none());
}

#[tokio::test]
async fn what_a_fixed_peer_has_is_not_taken_and_our_own_lease_is_not_given_up_for_it() {
    let mut network = Network::of(
        r#"{"Network":"10.5.0.0/16","SubnetLen":24,"SubnetMin":"10.5.16.0","SubnetMax":"10.5.17.0"}"#,
    )
    .await;
    let store = network.store(1).await;
    let fixed = |subnet: &str| SubnetRequest {
        fixed: vec![subnet.parse().unwrap()],
        ..network.preferring("10.5.16.0/24")
    };
    let held = store.acquire(&fixed("10.5.16.0/24"), ip(1)).await.unwrap();
    assert_eq!(held.subnet, "10.5.17.0/24".parse().unwrap());
    // The next start names it as another's.
    let error = store.acquire(&fixed("10.5.17.0/24"), ip(1)).await.unwrap_err();
    assert!(error.to_string().contains("--peer") && !error.is_transient(), "{error}");
    assert_eq!(network.get("10.5.17.0-24").await.unwrap().version(), 1);
}
