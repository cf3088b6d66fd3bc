//! Kinds of records whose keys have several parts, in directories inside the directory; writes of any kind, and own records.

use std::path::PathBuf;

use crate::{
    service::{
        EndpointName, ServiceName,
        record::{self, Endpoints, Services, Vip, Vips},
    },
    store::{Condition, Event, Store, Writable as _},
};

const WEB: &str = r#"{"v":1,"ports":[{"name":"http","port":80,"protocol":"tcp"}]}"#;

struct Fixture {
    directory: tempfile::TempDir,
    store: Store,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::dir(directory.path().to_owned());
        Self { directory, store }
    }

    fn file(&self, key: &str) -> PathBuf {
        self.directory.path().join(key)
    }

    fn write(&self, key: &str, value: &str) {
        let file = self.file(key);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, value).unwrap();
    }

    async fn services(&self) -> Vec<String> {
        let records = self.store.list::<Services>().await.unwrap();
        records.into_iter().map(|record| record.key.to_string()).collect()
    }
}

fn web() -> ServiceName {
    "shop/web".parse().unwrap()
}

fn service() -> record::Service {
    serde_json::from_str(WEB).unwrap()
}

fn endpoint(id: &str) -> (EndpointName, record::Endpoint) {
    let name = format!("shop/web/node-a/{id}").parse().unwrap();
    (name, serde_json::from_str(r#"{"overlay_ip":"10.244.1.2"}"#).unwrap())
}

#[tokio::test]
async fn keys_with_several_parts_are_listed_written_and_removed() {
    let fixture = Fixture::new();
    assert!(fixture.services().await.is_empty());
    fixture.write("services/shop/api", WEB);
    fixture.write("services/shop/.api.swp", WEB);
    fixture.write("services/flat", WEB);
    fixture.write("services/shop/web/deeper", WEB);
    let store = &fixture.store;
    assert_eq!(fixture.services().await, ["flat", "shop/api", "shop/web"]);
    std::fs::remove_dir_all(fixture.file("services/shop/web")).unwrap();
    let version = store.create_record::<Services>(&web(), &service(), None, &[]).await.unwrap().unwrap();
    assert_eq!(store.create_record::<Services>(&web(), &service(), None, &[]).await.unwrap(), None);
    let mut changed = service();
    changed.headless = true;
    let newer =
        store.replace_record::<Services>(&web(), version, &changed, None, &[]).await.unwrap().unwrap();
    assert_eq!(store.replace_record::<Services>(&web(), version, &service(), None, &[]).await.unwrap(), None);
    let record = store.get::<Services>(&web()).await.unwrap().unwrap();
    assert_eq!((record.version, record.value), (newer, Ok(changed)));
    assert!(store.create_record::<Services>(&web(), &service(), Some(7), &[]).await.is_err(), "no lifetimes");

    for record in store.list::<Services>().await.unwrap() {
        assert!(store.remove(&record).await.unwrap());
    }
    assert!(
        !fixture.file("services/shop/api").exists() && fixture.file("services/shop").exists(),
        "the file of another tool stays"
    );
    std::fs::remove_file(fixture.file("services/shop/.api.swp")).unwrap();
    let (name, value) = endpoint("1");
    store.create_record::<Endpoints>(&name, &value, None, &[]).await.unwrap().unwrap();
    let record = store.get::<Endpoints>(&name).await.unwrap().unwrap();
    store.remove(&record).await.unwrap();
    assert!(fixture.file("endpoints").exists() && !fixture.file("endpoints/shop").exists());
}

#[tokio::test]
async fn a_write_needs_its_conditions() {
    let fixture = Fixture::new();
    let (store, vip) = (&fixture.store, "10.251.0.1".parse().unwrap());
    let held = Vip::Held(web());
    store.create_record::<Services>(&web(), &service(), None, &[]).await.unwrap().unwrap();
    let absent = [Condition::absent::<Services>(&web())];
    assert_eq!(store.create_record::<Vips>(&vip, &held, None, &absent).await.unwrap(), None);
    let record = store.get::<Services>(&web()).await.unwrap().unwrap();
    let unchanged = [Condition::unchanged(&record)];
    fixture.write("services/shop/web", &Services::text(&service()).replace("80", "81"));
    assert_eq!(store.create_record::<Vips>(&vip, &held, None, &unchanged).await.unwrap(), None);
    fixture.write("services/shop/web", &Services::text(&service()));
    assert!(store.create_record::<Vips>(&vip, &held, None, &unchanged).await.unwrap().is_some());
    assert_eq!(std::fs::read_to_string(fixture.file("vips/10.251.0.1")).unwrap(), "shop/web");
}

#[tokio::test]
async fn new_directories_are_followed() {
    let fixture = Fixture::new();
    fixture.store.prepare::<Endpoints>().await.unwrap();
    let mut events = fixture.store.follow::<Endpoints>();
    let mut next = async || match events.recv().await.unwrap() {
        Event::Snapshot(records) => {
            records.into_iter().map(|record| record.key.to_string()).collect::<Vec<_>>()
        }
        other @ (Event::Recalled { .. } | Event::Changes(_) | Event::Lost(_)) => panic!("{other:?}"),
    };
    assert!(next().await.is_empty());
    for (key, known) in [("shop/web/a/1", 1), ("shop/web/b/1", 2), ("bank/web/a/1", 3), ("shop/web/b/2", 4)] {
        fixture.write(&format!("endpoints/{key}"), r#"{"overlay_ip":"10.244.1.2"}"#);
        while next().await.len() != known {}
    }
    std::fs::remove_dir_all(fixture.file("endpoints/shop")).unwrap();
    while next().await != ["bank/web/a/1"] {}
    fixture.write("endpoints/shop/web/a/1", r#"{"overlay_ip":"10.244.1.2"}"#);
    while next().await.len() != 2 {}
}

#[tokio::test]
async fn own_records_follow_what_is_set_and_are_removed_at_the_end() {
    let fixture = Fixture::new();
    let mut own = fixture.store.keep_own::<Endpoints>();
    let [(first, value), (second, _)] = [endpoint("1"), endpoint("2")];
    own.set([(&first, &value), (&second, &value)]);
    own.state.wait_for(|state| state.written == 2).await.unwrap();
    assert_eq!(fixture.store.list::<Endpoints>().await.unwrap().len(), 2);
    let drained = record::Endpoint { state: record::EndpointState::Draining, ..value.clone() };
    own.set([(&second, &drained)]);
    own.state.wait_for(|state| state.written == 1).await.unwrap();
    let records = fixture.store.list::<Endpoints>().await.unwrap();
    assert_eq!((records.len(), records[0].value.as_ref()), (1, Ok(&drained)));
    own.stop().await;
    assert!(fixture.store.list::<Endpoints>().await.unwrap().is_empty());
}
