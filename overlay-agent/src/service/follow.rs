//! Follows the records of services in the store, and publishes the catalog that they make.

use std::{pin::pin, sync::Arc, time::Duration};

use ipnet::Ipv4Net;
use tokio::{
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval, sleep},
};
use tracing::debug;

use super::{
    Catalog,
    index::{Index, Indexed},
    record::{Endpoints, Services, Vips},
    vip::Work,
};
use crate::store::{Event, Store};

/// Wait for further changes before a catalog is made: many come together.
const SETTLE: Duration = Duration::from_millis(10);
/// Interval of attempts to make a store ready in which there was no service yet.
const PREPARE: Duration = Duration::from_secs(1);

/// How current the catalog is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FollowState {
    /// Whether there is a catalog: all records were read at least once.
    pub ready: bool,
    /// Why the store cannot be read. The last catalog stays in force meanwhile.
    pub lost: Option<String>,
}

/// The services of the store. The task behind it ends when this and all receivers are dropped.
#[derive(Debug)]
pub struct Following {
    /// How current the catalog is.
    pub state: watch::Receiver<FollowState>,
    /// What is to be done about virtual addresses; nothing before the catalog is ready.
    pub work: watch::Receiver<Arc<Work>>,
    catalog: watch::Receiver<Arc<Catalog>>,
}

impl Following {
    /// The catalog, and each that follows. Waits until all records were read once: before, it would look as if there were no
    /// services. `None` when the task was ended with its runtime.
    pub async fn catalog(&mut self) -> Option<watch::Receiver<Arc<Catalog>>> {
        self.state.wait_for(|state| state.ready).await.ok()?;
        Some(self.catalog.clone())
    }
}

/// Follows the services of a store in a task. `pool` has the virtual addresses.
pub fn follow(store: &Store, pool: Ipv4Net) -> Following {
    let (catalogs, catalog) = watch::channel(Arc::default());
    let (works, work) = watch::channel(Arc::default());
    let (states, state) = watch::channel(FollowState::default());
    let store = store.clone();
    tokio::spawn(async move {
        prepare(&store).await;
        let follower = Follower {
            index: Index::new(pool),
            services: Source::new(store.follow()),
            vips: Source::new(store.follow()),
            endpoints: Source::new(store.follow()),
            store,
            catalogs,
            works,
            states,
        };
        follower.run().await;
    });
    Following { state, work, catalog }
}

/// A failure is only logged: to follow the records then fails, too, and says why.
async fn prepare(store: &Store) {
    let prepare = async {
        store.prepare::<Services>().await?;
        store.prepare::<Vips>().await?;
        store.prepare::<Endpoints>().await
    };
    if let Err(error) = prepare.await {
        debug!("{error}");
    }
}

/// The events of one kind.
struct Source<K: Indexed> {
    events: mpsc::Receiver<Event<K>>,
    listed: bool,
    /// Whether the records are still those of an earlier run.
    recalled: bool,
    lost: Option<String>,
}

impl<K: Indexed> Source<K> {
    fn new(events: mpsc::Receiver<Event<K>>) -> Self {
        Self { events, listed: false, recalled: false, lost: None }
    }

    fn take(&mut self, event: Event<K>, index: &mut Index) {
        match event {
            Event::Snapshot(records) => {
                index.replace(records);
                (self.listed, self.recalled, self.lost) = (true, false, None);
            }
            Event::Recalled { records, seen } => {
                index.replace(records);
                (self.listed, self.recalled) = (true, true);
                let seen = humantime::format_rfc3339_seconds(seen);
                self.lost = Some(format!("the store does not answer, and the state is of {seen}"));
            }
            Event::Changes(changes) => index.apply(changes),
            Event::Lost(why) => self.lost = Some(why),
        }
    }

    /// Takes the events that wait.
    fn drain(&mut self, index: &mut Index) {
        while let Ok(event) = self.events.try_recv() {
            self.take(event, index);
        }
    }
}

struct Follower {
    store: Store,
    index: Index,
    services: Source<Services>,
    vips: Source<Vips>,
    endpoints: Source<Endpoints>,
    catalogs: watch::Sender<Arc<Catalog>>,
    works: watch::Sender<Arc<Work>>,
    states: watch::Sender<FollowState>,
}

impl Follower {
    async fn run(mut self) {
        let (catalogs, works, states) = (self.catalogs.clone(), self.works.clone(), self.states.clone());
        let unused = async {
            catalogs.closed().await;
            works.closed().await;
            states.closed().await;
        };
        let mut unused = pin!(unused);
        let mut preparations = interval(PREPARE);
        preparations.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let ready = self.states.borrow().ready;
            let Self { index, services, vips, endpoints, .. } = &mut self;
            tokio::select! {
                Some(event) = services.events.recv() => services.take(event, index),
                Some(event) = vips.events.recv() => vips.take(event, index),
                Some(event) = endpoints.events.recv() => endpoints.take(event, index),
                () = &mut unused => return,
                _ = preparations.tick(), if !ready => {
                    prepare(&self.store).await;
                    continue;
                }
            }
            sleep(SETTLE).await;
            self.services.drain(&mut self.index);
            self.vips.drain(&mut self.index);
            self.endpoints.drain(&mut self.index);
            self.publish();
        }
    }

    /// Publishes what has changed, once all kinds were listed and while none of them is lost: parts of different times would not
    /// fit each other. Those of an earlier run do, and make a catalog; but addresses are assigned and released by what the store has.
    fn publish(&mut self) {
        let lost = [&self.services.lost, &self.vips.lost, &self.endpoints.lost].into_iter().flatten().next();
        let listed = self.services.listed && self.vips.listed && self.endpoints.listed;
        let recalled = self.services.recalled && self.vips.recalled && self.endpoints.recalled;
        let lost = lost.cloned();
        if listed && lost.is_none() {
            let catalog = self.index.catalog();
            publish(&self.catalogs, catalog);
            publish(&self.works, self.index.work());
        } else if recalled {
            publish(&self.catalogs, self.index.catalog());
        }
        let is_whole = listed && lost.is_none() || recalled;
        let state = FollowState { ready: is_whole || self.states.borrow().ready, lost };
        self.states.send_if_modified(|before| {
            let changed = *before != state;
            if changed {
                debug!("services: {state:?}");
            }
            *before = state;
            changed
        });
    }
}

/// Publishes a value unless it is the last one.
fn publish<T>(sender: &watch::Sender<Arc<T>>, value: Arc<T>) {
    sender.send_if_modified(|before| {
        let changed = !Arc::ptr_eq(before, &value);
        *before = value;
        changed
    });
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;
    use crate::store::{Record, Version};

    const LONG: Duration = Duration::from_secs(20);

    type Sender<K> = mpsc::Sender<Event<K>>;

    /// A follower of these events.
    fn follow() -> (Sender<Services>, Sender<Vips>, Sender<Endpoints>, Following) {
        let (services, service_events) = mpsc::channel(4);
        let (vips, vip_events) = mpsc::channel(4);
        let (endpoints, endpoint_events) = mpsc::channel(4);
        let (catalogs, catalog) = watch::channel(Arc::default());
        let (works, work) = watch::channel(Arc::default());
        let (states, state) = watch::channel(FollowState::default());
        let follower = Follower {
            // It need not exist.
            store: Store::dir("/nonexistent".into()),
            index: Index::new("10.251.0.0/16".parse().unwrap()),
            services: Source::new(service_events),
            vips: Source::new(vip_events),
            endpoints: Source::new(endpoint_events),
            catalogs,
            works,
            states,
        };
        tokio::spawn(follower.run());
        (services, vips, endpoints, Following { state, work, catalog })
    }

    fn web() -> Record<Services> {
        let web = br#"{"v":1,"ports":[{"name":"http","port":80,"protocol":"tcp"}]}"#;
        Record::parse("shop/web", web, Version::default())
    }

    #[tokio::test]
    async fn records_of_an_earlier_run_make_a_catalog_and_no_work() {
        let (services, vips, endpoints, Following { mut state, mut work, mut catalog }) = follow();
        let seen = std::time::SystemTime::UNIX_EPOCH;
        let bank = Record::parse(
            "bank/api",
            br#"{"v":1,"ports":[{"name":"a","port":1,"protocol":"tcp"}]}"#,
            Version::default(),
        );
        // Of two addresses, one is held for nothing, and a service has none.
        let held =
            ["10.251.0.7", "10.251.0.8"].map(|vip| Record::parse(vip, b"shop/web", Version::default()));
        services.send(Event::Recalled { records: vec![bank.clone(), web()], seen }).await.unwrap();
        vips.send(Event::Recalled { records: held.to_vec(), seen }).await.unwrap();
        sleep(Duration::from_millis(200)).await;
        assert!(!catalog.has_changed().unwrap() && !state.borrow().ready);
        endpoints.send(Event::Recalled { records: Vec::new(), seen }).await.unwrap();
        let now = timeout(LONG, state.wait_for(|state| state.ready)).await.unwrap().unwrap().clone();
        assert!(now.lost.unwrap().contains("1970-01-01T00:00:00Z"));
        assert_eq!(catalog.borrow_and_update().services.len(), 2);
        // The store answers for some kinds only.
        services.send(Event::Snapshot(vec![bank, web()])).await.unwrap();
        vips.send(Event::Snapshot(held.to_vec())).await.unwrap();
        endpoints.send(Event::Lost("away".to_owned())).await.unwrap();
        sleep(Duration::from_millis(200)).await;
        assert!(!work.has_changed().unwrap(), "addresses are assigned by what an earlier run knew");
        endpoints.send(Event::Snapshot(Vec::new())).await.unwrap();
        drop(timeout(LONG, state.wait_for(|state| state.lost.is_none())).await.unwrap().unwrap());
        let work = work.borrow_and_update().clone();
        assert_eq!((work.missing.len(), work.surplus.len()), (1, 1));
        assert!(!catalog.has_changed().unwrap(), "the store has what the earlier run knew");
    }

    #[tokio::test]
    async fn nothing_is_published_before_every_kind_was_listed() {
        let (services, vips, endpoints, Following { mut state, mut work, mut catalog }) = follow();
        services.send(Event::Snapshot(vec![web()])).await.unwrap();
        endpoints.send(Event::Snapshot(Vec::new())).await.unwrap();
        sleep(Duration::from_millis(200)).await;
        assert!(!catalog.has_changed().unwrap() && !work.has_changed().unwrap() && !state.borrow().ready);
        // Whether its address is released or assigned depends on this.
        let held = Record::parse("10.251.0.7", b"shop/web", Version::default());
        vips.send(Event::Snapshot(vec![held])).await.unwrap();
        drop(timeout(LONG, state.wait_for(|state| state.ready)).await.unwrap().unwrap());
        assert_eq!(catalog.borrow_and_update().vips().len(), 1);
        assert_eq!(**work.borrow_and_update(), Work::default());

        // A kind that is lost holds back the others.
        vips.send(Event::Lost("away".to_owned())).await.unwrap();
        services.send(Event::Snapshot(Vec::new())).await.unwrap();
        drop(timeout(LONG, state.wait_for(|state| state.lost.is_some())).await.unwrap().unwrap());
        sleep(Duration::from_millis(200)).await;
        assert!(!catalog.has_changed().unwrap() && !work.has_changed().unwrap() && state.borrow().ready);
        vips.send(Event::Snapshot(Vec::new())).await.unwrap();
        timeout(LONG, catalog.wait_for(|catalog| catalog.services.is_empty())).await.unwrap().unwrap();
    }
}
