//! Services in a store that is a directory: the catalog as it changes, and virtual addresses.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::{sync::watch, time::timeout};

use super::{
    Catalog, Following, follow,
    record::{Vip, Vips},
    vip::{self, VipKeeper, VipOptions},
};
use crate::store::Store;

const WEB: &str = r#"{"v":1,"ports":[{"name":"http","port":80,"protocol":"tcp"}]}"#;
const LONG: Duration = Duration::from_secs(20);

struct Fixture {
    directory: tempfile::TempDir,
    store: Store,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::dir(directory.path().join("net"));
        std::fs::create_dir(directory.path().join("net")).unwrap();
        Self { directory, store }
    }

    fn file(&self, key: &str) -> PathBuf {
        self.directory.path().join("net").join(key)
    }

    fn write(&self, key: &str, value: &str) {
        let file = self.file(key);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, value).unwrap();
    }

    fn remove(&self, key: &str) {
        std::fs::remove_file(self.file(key)).unwrap();
    }

    async fn agent(&self, pool: &str, quarantine: Duration) -> Agent {
        let pool = pool.parse().unwrap();
        let mut following = follow(&self.store, pool);
        let keeper = vip::keep(&self.store, VipOptions { pool, quarantine }, following.work.clone());
        let catalog = timeout(LONG, following.catalog()).await.unwrap().unwrap();
        Agent { following, catalog, keeper }
    }

    async fn vips(&self) -> Vec<(String, Vip)> {
        let records = self.store.list::<Vips>().await.unwrap();
        records.into_iter().map(|record| (record.key.to_string(), record.value.unwrap())).collect()
    }
}

struct Agent {
    following: Following,
    catalog: watch::Receiver<Arc<Catalog>>,
    keeper: VipKeeper,
}

impl Agent {
    /// The first catalog that is as `wanted` says.
    async fn until(&mut self, wanted: impl FnMut(&Arc<Catalog>) -> bool) -> Arc<Catalog> {
        let catalog = timeout(LONG, self.catalog.wait_for(wanted)).await;
        catalog.expect("the catalog did not change as expected").unwrap().clone()
    }

    async fn until_vip(&mut self, service: &str) -> String {
        let name = service.parse().unwrap();
        let vip = |catalog: &Catalog| catalog.services.get(&name).and_then(|service| service.vip);
        let catalog = self.until(|catalog| vip(catalog).is_some()).await;
        vip(&catalog).unwrap().to_string()
    }
}

const POOL: &str = "10.251.0.0/16";

#[tokio::test]
async fn the_first_catalog_has_all_records_and_a_lost_store_loses_none() {
    let fixture = Fixture::new();
    fixture.write("services/shop/web", WEB);
    fixture.write("services/shop/bad", "{}");
    fixture.write("vips/10.251.0.7", "shop/web");
    fixture.write("endpoints/shop/web/a/1", r#"{"overlay_ip":"10.244.1.2"}"#);
    let mut following = follow(&fixture.store, POOL.parse().unwrap());
    assert!(!following.state.borrow().ready);
    let mut catalog = timeout(LONG, following.catalog()).await.unwrap().unwrap();
    let first = Arc::clone(&catalog.borrow_and_update());
    let web = &first.services[&"shop/web".parse().unwrap()];
    assert_eq!((web.vip.map(|vip| vip.to_string()).as_deref(), web.endpoints.len()), (Some("10.251.0.7"), 1));
    assert_eq!(first.skipped[0].key, "services/shop/bad");

    let aside = fixture.directory.path().join("aside");
    std::fs::rename(fixture.file("services"), &aside).unwrap();
    let lost = timeout(LONG, following.state.wait_for(|state| state.lost.is_some())).await.unwrap();
    assert!(lost.unwrap().ready);
    assert_eq!(*catalog.borrow(), first);
    std::fs::rename(&aside, fixture.file("services")).unwrap();
    drop(timeout(LONG, following.state.wait_for(|state| state.lost.is_none())).await.unwrap().unwrap());
    assert!(!catalog.has_changed().unwrap(), "the same services are no news");
    fixture.write("endpoints/shop/web/a/2", r#"{"overlay_ip":"10.244.1.3"}"#);
    let both = |catalog: &Arc<Catalog>| catalog.services.values().all(|service| service.endpoints.len() == 2);
    timeout(LONG, catalog.wait_for(both)).await.unwrap().unwrap();
}

#[tokio::test]
async fn nothing_is_published_while_a_kind_was_not_listed() {
    let fixture = Fixture::new();
    fixture.write("services/shop/web", WEB);
    // No directory: it cannot be listed.
    std::fs::write(fixture.file("vips"), "").unwrap();
    let mut following = follow(&fixture.store, POOL.parse().unwrap());
    timeout(LONG, following.state.wait_for(|state| state.lost.is_some())).await.unwrap().unwrap();
    assert!(timeout(Duration::from_millis(200), following.catalog()).await.is_err());
    fixture.remove("vips");
    let catalog = timeout(LONG, following.catalog()).await.unwrap().unwrap();
    assert_eq!(catalog.borrow().services.len(), 1);
}

#[tokio::test]
async fn agents_that_race_give_each_service_one_address() {
    let fixture = Fixture::new();
    let mut agents = Vec::new();
    for _ in 0..4 {
        agents.push(fixture.agent("10.251.0.0/28", Duration::from_secs(100)).await);
    }
    // More than half of the pool: their candidates meet.
    for number in 0..10 {
        fixture.write(&format!("services/shop/web-{number}"), WEB);
    }
    let has_all = |catalog: &Arc<Catalog>| {
        catalog.services.len() == 10 && catalog.services.values().all(|service| service.vip.is_some())
    };
    for agent in &mut agents {
        agent.until(has_all).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    // Two agents may give a service two addresses at once; one of them is released again.
    let held = |vips: &[(String, Vip)]| {
        let held = vips.iter().filter_map(|(_, vip)| match vip {
            Vip::Held(holder) => Some(holder.to_string()),
            Vip::Released(_) => None,
        });
        held.collect::<Vec<_>>()
    };
    let start = std::time::Instant::now();
    while held(&fixture.vips().await).len() != 10 {
        assert!(start.elapsed() < LONG, "{:?}", fixture.vips().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let holders = held(&fixture.vips().await);
    assert_eq!(holders.iter().collect::<std::collections::BTreeSet<_>>().len(), 10, "{holders:?}");
    for number in 10..14 {
        fixture.write(&format!("services/shop/web-{number}"), WEB);
    }
    // There are 13 addresses.
    let problem = |problems: &vip::Problems| !problems.is_empty();
    for agent in &mut agents {
        let problems = timeout(LONG, agent.keeper.problems.wait_for(problem)).await.unwrap().unwrap().clone();
        let why = problems.values().next().unwrap();
        assert!(why.contains("all 13 addresses of the pool 10.251.0.0/28"), "{why}");
        assert!(agent.following.state.borrow().lost.is_none());
    }
    assert_eq!(fixture.vips().await.len(), 13);
}

#[tokio::test]
async fn a_released_address_goes_to_no_other_service_before_the_quarantine_ends() {
    let fixture = Fixture::new();
    let quarantine = Duration::from_secs(2);
    let mut agent = fixture.agent("10.251.0.0/30", quarantine).await;
    fixture.write("services/shop/web", WEB);
    let vip = agent.until_vip("shop/web").await;
    fixture.remove("services/shop/web");
    let is_released = async || matches!(&fixture.vips().await[..], [(_, Vip::Released(_))]);
    while !is_released().await {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // The same service gets it back at once, and then releases it again.
    fixture.write("services/shop/web", WEB);
    assert_eq!(agent.until_vip("shop/web").await, vip);
    let released = std::time::Instant::now();
    fixture.remove("services/shop/web");
    let other = r#"{"v":1,"vip":"VIP","ports":[{"name":"http","port":80,"protocol":"tcp"}]}"#;
    fixture.write("services/shop/other", &other.replace("VIP", &vip));
    let problem =
        |problems: &vip::Problems| problems.values().any(|why| why.contains("clients may still use it"));
    timeout(LONG, agent.keeper.problems.wait_for(problem)).await.unwrap().unwrap();
    assert_eq!(agent.until_vip("shop/other").await, vip);
    assert!(released.elapsed() >= quarantine, "{:?}", released.elapsed());
    timeout(LONG, agent.keeper.problems.wait_for(|problems| problems.is_empty())).await.unwrap().unwrap();
}

#[tokio::test]
async fn work_that_is_out_of_date_does_nothing() {
    let fixture = Fixture::new();
    let version = crate::store::Version::default();
    let record = |key: &str, value: &str| crate::store::Record::parse(key, value.as_bytes(), version);
    fixture.write("services/shop/web", WEB);
    fixture.write("services/shop/api", WEB);
    fixture.write("vips/10.251.0.7", "shop/web");
    let held = fixture.store.list::<Vips>().await.unwrap().remove(0);
    let services = fixture.store.list().await.unwrap();
    // The service was written since, and another one has changed.
    let missing = vec![crate::store::Record { version, ..services[0].clone() }];
    let surplus = vec![vip::Surplus { vip: held.clone(), service: None }];
    let stale = vip::Work { missing, surplus, ..vip::Work::default() };
    let (sender, work) = watch::channel(Arc::new(stale.clone()));
    let options = VipOptions { pool: POOL.parse().unwrap(), quarantine: Duration::from_secs(100) };
    let _keeper = vip::keep(&fixture.store, options, work);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(fixture.vips().await, [("10.251.0.7".to_owned(), Vip::Held("shop/web".parse().unwrap()))]);

    // An address that was taken since is not taken from its holder.
    let free = vip::Surplus { vip: record("10.251.0.7", "shop/old"), service: None };
    sender.send_replace(Arc::new(vip::Work { missing: Vec::new(), surplus: vec![free], ..stale }));
    tokio::time::sleep(Duration::from_millis(800)).await;
    assert_eq!(fixture.vips().await.len(), 1);
    assert_eq!(fixture.store.list::<Vips>().await.unwrap(), [held]);
}

#[tokio::test]
async fn a_wanted_address_that_cannot_be_had_is_a_problem_of_its_service_alone() {
    let fixture = Fixture::new();
    let wants = |vip: &str| {
        format!(r#"{{"v":1,"vip":"{vip}","ports":[{{"name":"http","port":80,"protocol":"tcp"}}]}}"#)
    };
    fixture.write("services/shop/web", &wants("10.251.7.7"));
    fixture.write("services/shop/outside", &wants("10.9.0.1"));
    fixture.write("services/shop/headless", &WEB.replace(r#""v":1"#, r#""v":1,"headless":true"#));
    let mut agent = fixture.agent(POOL, Duration::from_secs(100)).await;
    assert_eq!(agent.until_vip("shop/web").await, "10.251.7.7");
    fixture.write("services/shop/late", &wants("10.251.7.7"));
    let problems = agent.keeper.problems.wait_for(|problems| problems.len() == 2);
    let problems = timeout(LONG, problems).await.unwrap().unwrap().clone();
    let why = |name: &str| &problems[&name.parse().unwrap()];
    assert!(why("shop/late").contains("shop/web holds the wanted address 10.251.7.7"), "{problems:?}");
    assert!(why("shop/outside").contains("no usable address of the pool 10.251.0.0/16"), "{problems:?}");
    assert_eq!(fixture.vips().await.len(), 1);
}
