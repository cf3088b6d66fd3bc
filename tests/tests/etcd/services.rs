//! Records of services in etcd: the catalog across a restart, virtual addresses between agents, endpoints that end with their node.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use etcd_client::{GetOptions, KeyValue, PutOptions};
use overlay_agent::{
    service::{
        Catalog, EndpointName, Following, follow,
        record::{Endpoint, Endpoints},
        vip::{self, VipKeeper, VipOptions},
    },
    store::{OwnRecords, Store},
};
use tokio::{sync::watch, time::timeout};

use crate::hosts::{Network, PREFIX, TIMEOUT};

pub(crate) const WEB: &str = r#"{"v":1,"ports":[{"name":"http","port":80,"protocol":"tcp"}]}"#;

impl Network {
    async fn write(&mut self, key: &str, value: &str) {
        self.raw.put(format!("{PREFIX}/{key}"), value, None).await.unwrap();
    }

    async fn delete(&mut self, key: &str) {
        self.raw.delete(format!("{PREFIX}/{key}"), None).await.unwrap();
    }

    /// The records whose keys begin so.
    async fn below(&mut self, prefix: &str) -> Vec<KeyValue> {
        let options = GetOptions::new().with_prefix();
        self.raw.get(format!("{PREFIX}/{prefix}"), Some(options)).await.unwrap().take_kvs()
    }

    async fn until_below(&mut self, prefix: &str, wanted: impl Fn(&[KeyValue]) -> bool) -> Vec<KeyValue> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let records = self.below(prefix).await;
            if wanted(&records) {
                return records;
            }
            assert!(Instant::now() < deadline, "not as expected: {records:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

struct Agent {
    following: Following,
    catalog: watch::Receiver<Arc<Catalog>>,
    keeper: VipKeeper,
}

impl Agent {
    async fn start(store: &Store, pool: &str, quarantine: u64) -> Self {
        let pool = pool.parse().unwrap();
        let options = VipOptions { pool, quarantine: Duration::from_secs(quarantine) };
        let mut following = follow(store, pool);
        let keeper = vip::keep(store, options, following.work.clone());
        let catalog = timeout(TIMEOUT, following.catalog()).await.unwrap().unwrap();
        Self { following, catalog, keeper }
    }

    async fn until(&mut self, wanted: impl FnMut(&Arc<Catalog>) -> bool) -> Arc<Catalog> {
        let catalog = timeout(TIMEOUT, self.catalog.wait_for(wanted)).await;
        catalog.expect("the catalog did not change as expected").unwrap().clone()
    }

    async fn until_vip(&mut self, service: &str) -> String {
        let name = service.parse().unwrap();
        let vip = |catalog: &Catalog| catalog.services.get(&name).and_then(|service| service.vip);
        let catalog = self.until(|catalog| vip(catalog).is_some()).await;
        vip(&catalog).unwrap().to_string()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_catalog_outlives_a_restart_of_etcd_and_follows_it_again() {
    let mut network = Network::start().await;
    network.write("services/shop/web", WEB).await;
    network.write("services/shop/bad", "{}").await;
    network.write("endpoints/shop/web/a/1", r#"{"overlay_ip":"10.5.1.2"}"#).await;
    let mut agent = Agent::start(&network.store(1).await, "10.251.0.0/16", 100).await;
    let vip = agent.until_vip("shop/web").await;
    let before = agent.until(|catalog| !catalog.skipped.is_empty()).await;
    network.etcd.kill();
    let lost = timeout(TIMEOUT, agent.following.state.wait_for(|state| state.lost.is_some())).await.unwrap();
    assert!(lost.unwrap().lost.as_ref().unwrap().contains("etcd"));
    assert_eq!(*agent.catalog.borrow_and_update(), before, "the last state stays in force");
    network.etcd.restart().unwrap();
    drop(
        timeout(TIMEOUT, agent.following.state.wait_for(|state| state.lost.is_none()))
            .await
            .unwrap()
            .unwrap(),
    );
    assert_eq!(*agent.catalog.borrow(), before);
    network.write("endpoints/shop/web/a/2", r#"{"overlay_ip":"10.5.1.3"}"#).await;
    let after =
        agent.until(|catalog| catalog.services.values().any(|service| service.endpoints.len() == 2)).await;
    assert_eq!(after.skipped[0].key, "services/shop/bad");
    assert_eq!(agent.until_vip("shop/web").await, vip);
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_that_race_give_each_service_one_address() {
    let mut network = Network::start().await;
    let mut agents = Vec::new();
    for host in 1..=3 {
        agents.push(Agent::start(&network.store(host).await, "10.251.0.0/27", 100).await);
    }
    for number in 0..12 {
        network.write(&format!("services/shop/web-{number}"), WEB).await;
    }
    let has_all = |catalog: &Arc<Catalog>| {
        catalog.services.len() == 12 && catalog.services.values().all(|service| service.vip.is_some())
    };
    for agent in &mut agents {
        agent.until(has_all).await;
    }
    // Two agents may give a service two addresses at once; one of them is released again.
    let holders = |records: &[KeyValue]| {
        let values = records.iter().map(|record| record.value_str().unwrap().to_owned());
        values.filter(|value| !value.starts_with('{')).collect::<Vec<_>>()
    };
    let records = network.until_below("vips/", |records| holders(records).len() == 12).await;
    let distinct: std::collections::BTreeSet<_> = holders(&records).into_iter().collect();
    assert_eq!(distinct.len(), 12, "{distinct:?}");

    // Two services that want one address: the first to get it keeps it.
    let wants = r#"{"v":1,"vip":"10.251.0.VIP","ports":[{"name":"http","port":80,"protocol":"tcp"}]}"#;
    let is_taken = |last: &u8| {
        let key = format!("vips/10.251.0.{last}");
        records.iter().any(|record| record.key_str().unwrap().ends_with(&key))
    };
    let free = (1..30).find(|last| !is_taken(last)).unwrap();
    let wants = wants.replace("VIP", &free.to_string());
    network.write("services/bank/a", &wants).await;
    network.write("services/bank/b", &wants).await;
    for agent in &mut agents {
        let problems = agent.keeper.problems.wait_for(|problems| problems.len() == 1);
        let problems = timeout(TIMEOUT, problems).await.unwrap().unwrap().clone();
        assert!(problems.values().all(|why| why.contains("holds the wanted address")), "{problems:?}");
        agent.until(|catalog| catalog.vips().len() == 13).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_ends_the_quarantine_of_a_released_address() {
    let mut network = Network::start().await;
    let mut agent = Agent::start(&network.store(1).await, "10.251.0.0/30", 4).await;
    network.write("services/shop/web", WEB).await;
    let vip = agent.until_vip("shop/web").await;
    assert_eq!(network.below("vips/").await[0].lease(), 0, "an address is held without an end");
    network.delete("services/shop/web").await;
    let is_released = |records: &[KeyValue]| records.len() == 1 && records[0].lease() != 0;
    network.until_below("vips/", is_released).await;
    // Its own service gets it back at once.
    network.write("services/shop/web", WEB).await;
    assert_eq!(agent.until_vip("shop/web").await, vip);
    let held = network.until_below("vips/", |records| !is_released(records)).await;
    assert_eq!((held[0].value_str().unwrap(), held[0].lease()), ("shop/web", 0));
    let released = Instant::now();
    network.delete("services/shop/web").await;
    let wants = WEB.replace(r#""v":1"#, &format!(r#""v":1,"vip":"{vip}""#));
    network.write("services/shop/other", &wants).await;
    let is_kept =
        |problems: &vip::Problems| problems.values().any(|why| why.contains("clients may still use it"));
    timeout(TIMEOUT, agent.keeper.problems.wait_for(is_kept)).await.unwrap().unwrap();
    assert_eq!(agent.until_vip("shop/other").await, vip);
    assert!(released.elapsed() >= Duration::from_secs(4), "{:?}", released.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_address_of_a_service_whose_record_is_there_is_never_released() {
    let mut network = Network::start().await;
    let mut agent = Agent::start(&network.store(1).await, "10.251.0.0/16", 100).await;
    network.write("services/shop/web", WEB).await;
    let vip = agent.until_vip("shop/web").await;
    network.write("services/shop/web", "unreadable").await;
    agent.until(|catalog| catalog.services.is_empty()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(network.below("vips/").await[0].value_str().unwrap(), "shop/web");
    network.write("services/shop/web", WEB).await;
    assert_eq!(agent.until_vip("shop/web").await, vip);
}

fn endpoint(id: &str) -> (EndpointName, Endpoint) {
    let name = format!("shop/web/node-a/{id}").parse().unwrap();
    (name, serde_json::from_str(r#"{"overlay_ip":"10.5.1.2"}"#).unwrap())
}

async fn until_written(own: &mut OwnRecords<Endpoints>, count: usize) {
    let written = own.state.wait_for(|state| state.written == count && state.problem.is_none());
    timeout(TIMEOUT, written).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_end_with_their_node() {
    let mut network = Network::start().await;
    let store = network.store(1).await;
    let mut own = store.keep_own::<Endpoints>();
    let [(first, value), (second, _)] = [endpoint("1"), endpoint("2")];
    own.set([(&first, &value), (&second, &value)]);
    until_written(&mut own, 2).await;
    let records = network.below("endpoints/").await;
    assert!(records.len() == 2 && records.iter().all(|record| record.lease() != 0), "{records:?}");
    // Longer than its lifetime.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let revisions = |records: &[KeyValue]| records.iter().map(KeyValue::mod_revision).collect::<Vec<_>>();
    let later = network.below("endpoints/").await;
    assert_eq!(revisions(&later), revisions(&records), "they are renewed, not written again");

    // A lifetime that was lost is granted again.
    network.raw.lease_revoke(records[0].lease()).await.unwrap();
    let other = |after: &[KeyValue]| after.len() == 2 && after[0].lease() != records[0].lease();
    network.until_below("endpoints/", other).await;
    own.set([(&second, &value)]);
    let left = network.until_below("endpoints/", |records| records.len() == 1).await;
    assert!(left[0].key_str().unwrap().ends_with("shop/web/node-a/2"));

    // As a process that was killed: nothing is removed, and nothing is renewed.
    drop(own);
    assert_eq!(network.below("endpoints/").await.len(), 1);
    network.until_below("endpoints/", <[KeyValue]>::is_empty).await;

    let mut own = store.keep_own::<Endpoints>();
    own.set([(&first, &value)]);
    until_written(&mut own, 1).await;
    own.stop().await;
    assert!(network.below("endpoints/").await.is_empty(), "one that stops removes them at once");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_earlier_runs_endpoint_is_taken_over_and_an_operators_stays() {
    let mut network = Network::start().await;
    let lease = network.raw.lease_grant(1000, None).await.unwrap().id();
    let key = |id: &str| format!("{PREFIX}/endpoints/shop/web/node-a/{id}");
    let text = r#"{"overlay_ip":"10.5.1.9"}"#;
    network.raw.put(key("1"), text, Some(PutOptions::new().with_lease(lease))).await.unwrap();
    network.raw.put(key("2"), text, None).await.unwrap();
    let mut own = network.store(1).await.keep_own::<Endpoints>();
    let [(first, value), (second, _)] = [endpoint("1"), endpoint("2")];
    own.set([(&first, &value), (&second, &value)]);
    let state =
        timeout(TIMEOUT, own.state.wait_for(|state| state.written == 1)).await.unwrap().unwrap().clone();
    let problem = state.problem.unwrap();
    assert!(problem.contains("endpoints/shop/web/node-a/2") && problem.contains("operator"), "{problem}");
    let records = network.below("endpoints/").await;
    assert!(records[0].lease() != lease && records[0].value_str().unwrap().contains("10.5.1.2"));
    assert_eq!((records[1].lease(), records[1].value_str().unwrap()), (0, text));
    own.set([]);
    network.until_below("endpoints/", |records| records.len() == 1).await;
}
