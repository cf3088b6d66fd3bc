//! This node's own records of a kind, such as its endpoints: written under one lifetime, which a task renews, and gone with the
//! node.
//!
//! In etcd the lifetime is a lease as long as that of an agent's claim (30 s), granted again when it is lost. A directory has no
//! lifetimes: there, [`OwnRecords::stop`] removes the records, and those of an agent that was killed stay until an operator, or
//! the agent's next run with the same records, removes them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};
use tracing::debug;

use super::{
    LifetimeId, Store, StoreError, Version, Writable,
    backend::{Expected, Snapshot, Write},
    backoff::{STEADY, backoff},
    record::{Lifetime, RawRecord},
    write::full,
};

/// Records that one request reads: etcd takes at most 128 operations in one.
const PAGE: usize = 100;

/// How long the end waits for writes: the store may be away.
const LAST_WRITES: Duration = Duration::from_secs(1);

/// Texts by their keys, both whole.
type Texts = BTreeMap<String, String>;

/// Whether the store has this node's records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnState {
    /// Records that the store holds for this node.
    pub written: usize,
    /// Why some are missing, or why that is unknown.
    pub problem: Option<String>,
}

/// A task that keeps this node's records of the kind `K` as [`Self::set`] says. Dropped, it stops, and the records end with their
/// lifetime.
#[derive(Debug)]
pub struct OwnRecords<K: Writable> {
    /// What the task has achieved.
    pub state: watch::Receiver<OwnState>,
    wanted: watch::Sender<Arc<Texts>>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Keeper>,
    kind: std::marker::PhantomData<K>,
}

impl<K: Writable> OwnRecords<K> {
    /// The records that this node should have: others that it wrote before are removed.
    pub fn set<'a>(&self, records: impl IntoIterator<Item = (&'a K::Id, &'a K::Value)>)
    where
        K::Id: 'a,
        K::Value: 'a,
    {
        let texts = records.into_iter().map(|(id, value)| (full::<K>(id), K::text(value))).collect();
        self.wanted.send_replace(Arc::new(texts));
    }

    /// Stops and removes the records.
    pub async fn stop(self) {
        let Self { stop, task, .. } = self;
        drop(stop);
        if let Ok(mut keeper) = task.await {
            keeper.remove_all().await;
        }
    }
}

impl Store {
    /// Keeps records of this node in a task. The node is alone with its keys: a record that is attached to another lifetime is an
    /// earlier run's, and replaced; one without a lifetime is an operator's, and stays, as a problem.
    pub fn keep_own<K: Writable>(&self) -> OwnRecords<K> {
        let (wanted, wishes) = watch::channel(Arc::default());
        let (sender, state) = watch::channel(OwnState::default());
        let (stop, stopped) = oneshot::channel::<()>();
        let (idle, mut is_idle) = watch::channel(true);
        let store = self.clone();
        let mut keeper = Keeper {
            store,
            wishes,
            state: sender,
            idle,
            lifetime: None,
            renew_at: Instant::now(),
            ours: BTreeMap::new(),
        };
        let task = tokio::spawn(async move {
            // A record that was written without being known would stay.
            let stopped_between_writes = async {
                let _ = stopped.await;
                let _ = timeout(LAST_WRITES, is_idle.wait_for(|is_idle| *is_idle)).await;
            };
            tokio::select! {
                () = keeper.run() => {}
                () = stopped_between_writes => {}
            }
            keeper
        });
        OwnRecords { state, wanted, stop, task, kind: std::marker::PhantomData }
    }
}

#[derive(Debug)]
struct Keeper {
    store: Store,
    wishes: watch::Receiver<Arc<Texts>>,
    state: watch::Sender<OwnState>,
    /// Whether nothing is being written.
    idle: watch::Sender<bool>,
    lifetime: Option<LifetimeId>,
    renew_at: Instant,
    /// What we wrote.
    ours: BTreeMap<String, Version>,
}

impl Keeper {
    /// Returns when records cannot be set any more.
    async fn run(&mut self) {
        let mut pauses = backoff();
        loop {
            let wanted = Arc::clone(&self.wishes.borrow_and_update());
            self.idle.send_replace(false);
            let done = self.reconcile(&wanted).await;
            self.idle.send_replace(true);
            let due = match done {
                Ok(problem) => {
                    pauses = backoff();
                    self.report(problem);
                    // A look at the records, too: another client may have removed them.
                    Instant::now() + self.interval()
                }
                Err(error) => {
                    debug!("{error}");
                    // The lifetime may be the reason.
                    self.renew_at = Instant::now();
                    self.report(Some(error.to_string()));
                    Instant::now() + pauses.next().unwrap_or(STEADY)
                }
            };
            tokio::select! {
                () = sleep_until(due) => {}
                changed = self.wishes.changed() => if changed.is_err() { return },
            }
        }
    }

    fn interval(&self) -> Duration {
        self.store.times.claim_ttl / 3
    }

    fn report(&self, problem: Option<String>) {
        let state = OwnState { written: self.ours.len(), problem };
        self.state.send_if_modified(|before| {
            let changed = *before != state;
            *before = state;
            changed
        });
    }

    /// Makes the store's records those that are wanted. Returns why some are not.
    async fn reconcile(&mut self, wanted: &Texts) -> Result<Option<String>, StoreError> {
        self.renew(!wanted.is_empty()).await?;
        let superfluous: Vec<_> =
            self.ours.keys().filter(|key| !wanted.contains_key(*key)).cloned().collect();
        for key in superfluous {
            self.remove(&key).await?;
        }
        let mut problem = None;
        let keys: Vec<_> = wanted.keys().cloned().collect();
        for page in keys.chunks(PAGE) {
            let Snapshot { records, .. } = self.store.backend.get(page.to_vec()).await?;
            for (key, found) in page.iter().zip(records) {
                let Some(text) = wanted.get(key) else { continue };
                match self.write(key, text, found).await? {
                    Ok(version) => drop(self.ours.insert(key.clone(), version)),
                    Err(why) => {
                        self.ours.remove(key);
                        problem.get_or_insert(why);
                    }
                }
            }
        }
        Ok(problem)
    }

    /// Renews the lifetime when it is due, and grants one when there is none but should be.
    async fn renew(&mut self, needed: bool) -> Result<(), StoreError> {
        if !self.store.has_lifetimes() {
            return Ok(());
        }
        if let Some(lifetime) = self.lifetime {
            let asked = Instant::now();
            if asked < self.renew_at {
                return Ok(());
            }
            if self.store.backend.lifetimes()?.renew(lifetime).await? {
                // Before the next look.
                self.renew_at = asked + self.interval() / 2;
                return Ok(());
            }
            debug!("the lifetime of our records has ended: they are written again under a new one");
            (self.lifetime, self.ours) = (None, BTreeMap::new());
        }
        if needed {
            self.lifetime = Some(self.store.backend.lifetimes()?.grant(self.store.times.claim_ttl).await?);
            self.renew_at = Instant::now() + self.interval() / 2;
        }
        Ok(())
    }

    /// Writes one record unless it is there. The inner error is a reason why it stays as it is.
    async fn write(
        &self,
        key: &str,
        text: &str,
        found: Option<RawRecord>,
    ) -> Result<Result<Version, String>, StoreError> {
        let expected = match found {
            None => Expected::Absent,
            Some(found) => {
                let is_ours = match found.version.lifetime {
                    Lifetime::Limited(id) => self.lifetime == Some(id),
                    Lifetime::Untracked => true,
                    Lifetime::Unlimited => {
                        let location = self.store.backend.location(key);
                        return Ok(Err(format!(
                            "{location} was written without a lifetime, by an operator: remove it, and this node writes its own"
                        )));
                    }
                };
                if is_ours && *found.value == *text.as_bytes() {
                    return Ok(Ok(found.version));
                }
                Expected::Unchanged(found.version)
            }
        };
        let write = Write { lifetime: self.lifetime, ..Write::new(key, expected, Some(text.to_owned())) };
        match self.store.backend.write(write).await? {
            Some(written) => Ok(Ok(written.version)),
            None => {
                Ok(Err(format!("another client wrote {} at the same time", self.store.backend.location(key))))
            }
        }
    }

    /// Removes a record, if it is still ours.
    async fn remove(&mut self, key: &str) -> Result<(), StoreError> {
        let expected = match (self.lifetime, self.ours.get(key)) {
            (Some(lifetime), _) => Expected::Attached(lifetime),
            (None, Some(version)) => Expected::Unchanged(*version),
            (None, None) => return Ok(()),
        };
        self.store.backend.write(Write::new(key, expected, None)).await?;
        self.ours.remove(key);
        Ok(())
    }

    async fn remove_all(&mut self) {
        if let Some(lifetime) = self.lifetime.take() {
            return self.store.revoke([lifetime]).await;
        }
        for key in self.ours.keys().cloned().collect::<Vec<_>>() {
            if let Err(error) = self.remove(&key).await {
                debug!("{error}");
            }
        }
    }
}
