//! Files of services in a directory, and a store that is another one.

use super::*;
use crate::service::{
    health::{Verdict, Verdicts},
    record::EndpointState,
};

const LONG: Duration = Duration::from_secs(20);

struct Fixture {
    directory: tempfile::TempDir,
    store: Store,
    verdicts: watch::Sender<Option<Arc<Verdicts>>>,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["files", "net"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        let store = Store::dir(directory.path().join("net"));
        Self { directory, store, verdicts: watch::Sender::new(Some(Arc::default())) }
    }

    fn start(&self) -> ServiceFiles {
        let path = |name: &str| self.directory.path().join(name);
        let options = FileOptions {
            directory: path("files"),
            state_file: path("run/services.json"),
            node: "node-a".to_owned(),
        };
        keep(&self.store, options, self.verdicts.subscribe())
    }

    fn write(&self, file: &str, text: &str) {
        std::fs::write(self.directory.path().join("files").join(file), text).unwrap();
    }

    fn remove(&self, file: &str) {
        std::fs::remove_file(self.directory.path().join("files").join(file)).unwrap();
    }

    /// Waits until the store has these services, each with the number of its first port, and these endpoints.
    async fn until(&self, services: &[&str], endpoints: &[&str]) {
        let deadline = tokio::time::Instant::now() + LONG;
        loop {
            let records = self.store.list::<Services>().await.unwrap();
            let found: Vec<_> = records
                .iter()
                .map(|record| format!("{} {}", record.key, record.value.as_ref().unwrap().ports[0].port))
                .collect();
            let records = self.store.list::<Endpoints>().await.unwrap();
            let own: Vec<_> = records.into_iter().map(|record| record.key.to_string()).collect();
            if found == services && own == endpoints {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "{found:?} {own:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn until_skipped(files: &mut ServiceFiles, key: &str, words: &str) {
    let is_skipped = |state: &FilesState| state.skipped.get(key).is_some_and(|why| why.contains(words));
    let state = tokio::time::timeout(LONG, files.state.wait_for(is_skipped)).await;
    drop(state.expect("it is not skipped").unwrap());
}

fn web(port: u16) -> String {
    format!("name: shop/web\nports: [{{name: http, port: {port}}}]\n")
}

#[tokio::test]
async fn services_and_endpoints_come_and_go_with_their_files() {
    let fixture = Fixture::new();
    let files = fixture.start();
    fixture.write("web.yaml", &format!("{}endpoints: [{{address: 10.244.1.2}}]\n", web(80)));
    fixture.write("db.json", r#"{"bank/db": {"ports": [{"name": "pg", "port": 5432}]}}"#);
    fixture.write("notes.txt", "no service");
    fixture.write(".web.yaml", "an editor's");
    fixture.until(&["bank/db 5432", "shop/web 80"], &["shop/web/node-a/10-244-1-2"]).await;
    fixture.write("web.yaml", &format!("{}endpoints: [{{address: 10.244.1.3}}]\n", web(81)));
    fixture.until(&["bank/db 5432", "shop/web 81"], &["shop/web/node-a/10-244-1-3"]).await;
    assert_eq!(files.state.borrow().skipped, BTreeMap::new());
    fixture.remove("web.yaml");
    fixture.until(&["bank/db 5432"], &[]).await;
    fixture.write("web.yaml", &format!("{}endpoints: [{{address: 10.244.1.3}}]\n", web(81)));
    fixture.until(&["bank/db 5432", "shop/web 81"], &["shop/web/node-a/10-244-1-3"]).await;
    files.stop().await;
    fixture.until(&["bank/db 5432", "shop/web 81"], &[]).await;

    // A file that goes while no agent runs.
    fixture.remove("web.yaml");
    let _files = fixture.start();
    fixture.until(&["bank/db 5432"], &[]).await;
}

#[tokio::test]
async fn a_bad_file_changes_nothing() {
    let fixture = Fixture::new();
    fixture.write("web.yaml", &web(80));
    let mut files = fixture.start();
    fixture.until(&["shop/web 80"], &[]).await;
    fixture.write("web.yaml", "name: shop/web\nports: [\n");
    until_skipped(&mut files, "web.yaml", "neither YAML nor JSON").await;
    fixture.write("db.yaml", "bank/db: {ports: [{name: pg, port: 5432}]}\n");
    fixture.until(&["bank/db 5432", "shop/web 80"], &[]).await;
    files.stop().await;

    // A restarted agent does not know what the bad file meant, so it removes nothing.
    fixture.remove("db.yaml");
    let mut files = fixture.start();
    until_skipped(&mut files, "web.yaml", "neither YAML nor JSON").await;
    sleep(Duration::from_millis(300)).await;
    fixture.until(&["bank/db 5432", "shop/web 80"], &[]).await;
    fixture.write("web.yaml", &web(81));
    fixture.until(&["shop/web 81"], &[]).await;
    tokio::time::timeout(LONG, files.state.wait_for(|state| state.skipped.is_empty()))
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn what_others_wrote_is_neither_replaced_nor_removed() {
    let fixture = Fixture::new();
    fixture.write("web.yaml", &web(80));
    let mut files = fixture.start();
    fixture.until(&["shop/web 80"], &[]).await;
    let name = "shop/web".parse().unwrap();
    let record = fixture.store.get::<Services>(&name).await.unwrap().unwrap();
    let mut changed = record.value.unwrap();
    changed.ports[0].port = 8080.try_into().unwrap();
    let replaced = fixture.store.replace_record::<Services>(&name, record.version, &changed, None, &[]).await;
    assert!(replaced.unwrap().is_some());
    fixture.write("web.yaml", &web(81));
    until_skipped(&mut files, "shop/web", "service remove shop/web").await;
    fixture.remove("web.yaml");
    let is_done = |state: &FilesState| state.skipped.is_empty();
    tokio::time::timeout(LONG, files.state.wait_for(is_done)).await.unwrap().unwrap();
    fixture.until(&["shop/web 8080"], &[]).await;
}

#[tokio::test]
async fn the_first_of_two_files_with_one_service_counts() {
    let fixture = Fixture::new();
    fixture.write("a.yaml", &web(80));
    fixture
        .write("b.yaml", "shop/web: {ports: [{name: x, port: 1}]}\nshop/b: {ports: [{name: x, port: 2}]}\n");
    let mut files = fixture.start();
    until_skipped(&mut files, "b.yaml", "has the service shop/web").await;
    fixture.until(&["shop/web 80"], &[]).await;
    fixture.remove("a.yaml");
    fixture.until(&["shop/b 2", "shop/web 1"], &[]).await;
}

#[tokio::test]
async fn a_directory_that_is_gone_removes_nothing() {
    let fixture = Fixture::new();
    fixture.write("web.yaml", &web(80));
    let mut files = fixture.start();
    fixture.until(&["shop/web 80"], &[]).await;
    std::fs::rename(fixture.directory.path().join("files"), fixture.directory.path().join("aside")).unwrap();
    let is_lost = |state: &FilesState| state.problem.is_some();
    tokio::time::timeout(LONG, files.state.wait_for(is_lost)).await.unwrap().unwrap();
    fixture.until(&["shop/web 80"], &[]).await;
}

#[tokio::test]
async fn endpoints_have_the_states_that_their_checks_find() {
    let fixture = Fixture::new();
    fixture.verdicts.send_replace(None);
    let files = fixture.start();
    let endpoints = "endpoints: [{address: 10.244.1.2}, {address: 10.244.1.3, state: draining}]\n";
    fixture.write("web.yaml", &format!("{}{endpoints}", web(80)));
    fixture.until(&["shop/web 80"], &[]).await;
    let names = ["10-244-1-2", "10-244-1-3"].map(|id| format!("shop/web/node-a/{id}"));
    let send = |is_up| {
        let verdict = Verdict { is_up, why: None };
        let verdicts = names.iter().map(|name| (name.parse().unwrap(), verdict.clone()));
        fixture.verdicts.send_replace(Some(Arc::new(verdicts.collect())));
    };
    // The first verdicts come before the first records.
    sleep(Duration::from_millis(200)).await;
    fixture.until(&["shop/web 80"], &[]).await;
    for (is_up, state) in
        [(false, EndpointState::Down), (true, EndpointState::Ready), (false, EndpointState::Down)]
    {
        send(is_up);
        let deadline = tokio::time::Instant::now() + LONG;
        loop {
            let records = fixture.store.list::<Endpoints>().await.unwrap();
            let states: Vec<_> = records.iter().map(|record| record.value.as_ref().unwrap().state).collect();
            if states == [state, EndpointState::Draining] {
                break;
            }
            assert!(tokio::time::Instant::now() < deadline, "{states:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }
    assert_eq!(files.named.borrow().len(), 2);
    files.stop().await;
    fixture.until(&["shop/web 80"], &[]).await;
}
