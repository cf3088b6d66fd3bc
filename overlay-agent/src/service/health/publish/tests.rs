//! Verdicts and a store that is a directory.

use std::collections::BTreeMap;

use tokio::time::timeout;

use super::*;
use crate::service::{
    files::NamedEndpoints,
    follow,
    health::{Verdict, Verdicts},
    record::Services,
};

const LONG: Duration = Duration::from_secs(20);

struct Stage {
    directory: tempfile::TempDir,
    store: Store,
    verdicts: watch::Sender<Option<Arc<Verdicts>>>,
    kept: watch::Sender<Arc<NamedEndpoints>>,
    _following: follow::Following,
    _publishing: Publishing,
}

fn name(id: &str) -> EndpointName {
    format!("shop/web/a/{id}").parse().unwrap()
}

fn endpoint(state: &str) -> Endpoint {
    let json = format!(
        r#"{{"overlay_ip":"10.244.1.2","ports":{{"http":8080}},"weight":7,"zone":"z","state":"{state}"}}"#
    );
    serde_json::from_str(&json).unwrap()
}

impl Stage {
    async fn new(endpoints: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("net");
        std::fs::create_dir(&root).unwrap();
        let store = Store::dir(root);
        let service = serde_json::from_str(r#"{"v":1,"ports":[{"name":"http","port":80}]}"#).unwrap();
        store.create_record::<Services>(&"shop/web".parse().unwrap(), &service, None, &[]).await.unwrap();
        for (id, state) in endpoints {
            store.create_record::<Endpoints>(&name(id), &endpoint(state), None, &[]).await.unwrap();
        }
        let mut following = follow::follow(&store, "10.251.0.0/24".parse().unwrap());
        let catalog = timeout(LONG, following.catalog()).await.unwrap().unwrap();
        let (verdicts, kept) = (watch::Sender::new(None), watch::Sender::new(Arc::default()));
        let publishing = publish(&store, verdicts.subscribe(), catalog, Some(kept.subscribe()));
        Self { directory, store, verdicts, kept, _following: following, _publishing: publishing }
    }

    fn decide(&self, verdicts: &[(&str, bool)]) {
        let verdict = |(id, is_up): &(&str, bool)| (name(id), Verdict { is_up: *is_up, why: None });
        self.verdicts.send_replace(Some(Arc::new(verdicts.iter().map(verdict).collect())));
    }

    /// Waits until the store has these states, in order of the identifiers. Nothing else of the records may change.
    async fn until(&self, wanted: &[&str]) {
        let wanted: Vec<Endpoint> = wanted.iter().map(|state| endpoint(state)).collect();
        let deadline = tokio::time::Instant::now() + LONG;
        loop {
            let records = self.store.list::<Endpoints>().await.unwrap();
            let found: Vec<_> = records.into_iter().filter_map(|record| record.value.ok()).collect();
            if found == wanted {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "{found:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn stays(&self, wanted: &[&str]) {
        sleep(Duration::from_millis(500)).await;
        self.until(wanted).await;
    }

    /// An operator writes a record.
    async fn write(&self, id: &str, state: &str) {
        let record = self.store.get::<Endpoints>(&name(id)).await.unwrap().unwrap();
        let (name, endpoint) = (name(id), endpoint(state));
        let written =
            self.store.replace_record::<Endpoints>(&name, record.version, &endpoint, None, &[]).await;
        assert!(written.unwrap().is_some());
    }
}

#[tokio::test]
async fn the_state_of_a_record_follows_the_verdict() {
    let stage = Stage::new(&[("1", "ready"), ("2", "draining"), ("3", "down"), ("4", "down")]).await;
    stage.stays(&["ready", "draining", "down", "down"]).await;
    // A verdict of one that has no record does no harm.
    stage.decide(&[("0", false), ("1", false), ("2", false), ("3", true)]);
    stage.until(&["down", "draining", "ready", "down"]).await;
    stage.write("1", "ready").await;
    stage.until(&["down", "draining", "ready", "down"]).await;
    stage.write("2", "ready").await;
    stage.until(&["down", "down", "ready", "down"]).await;
    stage.write("1", "draining").await;
    stage.decide(&[("1", true), ("2", true), ("3", true)]);
    stage.until(&["draining", "ready", "ready", "down"]).await;
}

#[tokio::test]
async fn endpoints_of_files_are_left_to_their_writer() {
    let stage = Stage::new(&[("1", "ready"), ("2", "ready")]).await;
    stage.kept.send_replace(Arc::new(BTreeMap::from([(name("1"), endpoint("ready"))])));
    stage.decide(&[("1", false), ("2", false)]);
    stage.until(&["ready", "down"]).await;
    stage.stays(&["ready", "down"]).await;
    stage.kept.send_replace(Arc::default());
    stage.until(&["down", "down"]).await;
}

#[tokio::test]
async fn an_endpoint_that_is_not_checked_any_more_is_ready() {
    let stage = Stage::new(&[("1", "ready"), ("2", "down")]).await;
    stage.decide(&[("1", false)]);
    stage.until(&["down", "down"]).await;
    stage.decide(&[]);
    // Not the one that it has not marked.
    stage.until(&["ready", "down"]).await;
    stage.stays(&["ready", "down"]).await;
}

#[tokio::test]
async fn a_verdict_is_written_when_the_store_is_back() {
    let stage = Stage::new(&[("1", "ready")]).await;
    let (here, away) = (stage.directory.path().join("net"), stage.directory.path().join("away"));
    std::fs::rename(&here, &away).unwrap();
    stage.decide(&[("1", false)]);
    sleep(Duration::from_millis(300)).await;
    std::fs::rename(&away, &here).unwrap();
    stage.until(&["down"]).await;
}
