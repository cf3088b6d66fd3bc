//! Follows all records of a kind: a list, then changes, and a list again after any gap.
//!
//! etcd may come back empty (a new disk, a wrong data directory). A list of it would then remove every route. So the records
//! that were known before are kept beside the new ones until their hosts have had the time of a lease to write them again.

use std::{collections::BTreeMap, sync::Arc};

use backon::ExponentialBackoff;
use etcd_client::{EventType, GetOptions, ResponseHeader, WatchOptions, WatchResponse};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};
use tracing::warn;

use super::{Etcd, error, store_error};
use crate::store::{
    StoreError,
    archive::{Archive, Known, Raw, Recalled},
    backend::Snapshot,
    backoff::{STEADY, backoff},
    record::{Change, Event, Kind, RawRecord, Record},
};

/// Sends events until their receiver is closed: a snapshot first, then changes; [`Event::Lost`] once for each kind of reason why
/// etcd cannot be read, and a snapshot when it can again. All that is known goes to `archive`, too; when that begins with records of
/// an earlier run, these come before everything else, and are treated as if etcd had had them.
pub(in crate::store) async fn follow<K: Kind>(
    etcd: Arc<Etcd>,
    archive: Option<Arc<Archive>>,
    events: mpsc::Sender<Event<K>>,
) {
    let mut follower = Follower {
        etcd,
        archive,
        events: events.clone(),
        known: BTreeMap::new(),
        remembered: BTreeMap::new(),
        remembered_until: Instant::now(),
        lost: None,
    };
    tokio::select! {
        () = follower.run() => {}
        () = events.closed() => {}
    }
}

struct Follower<K: Kind> {
    etcd: Arc<Etcd>,
    archive: Option<Arc<Archive>>,
    events: mpsc::Sender<Event<K>>,
    /// The records that etcd last had.
    known: Known,
    /// Records of an etcd whose data is gone. They count until `remembered_until`.
    remembered: Known,
    remembered_until: Instant,
    /// The last error, while etcd cannot be read.
    lost: Option<StoreError>,
}

impl<K: Kind> Follower<K> {
    async fn run(&mut self) {
        let mut pauses = backoff();
        if let Some(Recalled { records, seen }) =
            self.archive.as_ref().and_then(|archive| archive.follow::<K>())
        {
            self.known = records;
            self.send(Event::Recalled { records: parse(self.known.iter()), seen }).await;
        }
        loop {
            if let Err(error) = self.list_and_watch(&mut pauses).await {
                if let Some(archive) = &self.archive {
                    archive.lose::<K>();
                }
                // Another kind of error calls for another remedy.
                if self.lost.as_ref().is_none_or(|before| !before.is_like(&error)) {
                    self.send(Event::Lost(error.to_string())).await;
                }
                self.lost = Some(error);
                sleep(pauses.next().unwrap_or(STEADY)).await;
            }
        }
    }

    /// Returns when etcd no longer has the history since the list.
    async fn list_and_watch(&mut self, pauses: &mut ExponentialBackoff) -> Result<(), StoreError> {
        let Snapshot { revision, records } = self.etcd.list_as(K::PREFIX, |raw| raw).await?;
        if !self.is_same_history().await? {
            self.remember();
        }
        self.known = records.into_iter().map(known::<K>).collect();
        self.remembered.retain(|key, _| !self.known.contains_key(key));
        // Opened before the snapshot is sent: a failure now must not be reported as a snapshot and a loss.
        let options = WatchOptions::new()
            .with_prefix()
            .with_start_revision(revision + 1)
            // Many changes at once come in pieces that fit the limit for an answer.
            .with_fragment();
        let mut watch = self.etcd.watch(&[K::PREFIX.to_owned()], options).await?;
        let steady = sleep(STEADY);
        tokio::pin!(steady);
        let mut is_steady = false;
        self.lost = None;
        if let Some(archive) = &self.archive {
            archive.list::<K>(revision, &self.known, |key| self.remembered.contains_key(key));
        }
        self.send(self.snapshot()).await;
        loop {
            tokio::select! {
                // Not before: a member that opens streams and breaks them would be listed without end.
                () = &mut steady, if !is_steady => {
                    is_steady = true;
                    *pauses = backoff();
                }
                message = watch.next() => {
                    let Some(answer) = message? else { return Ok(()) };
                    let changes = self.apply(&answer);
                    if !changes.is_empty() {
                        self.send(Event::Changes(changes)).await;
                    }
                }
                () = sleep_until(self.remembered_until), if !self.remembered.is_empty() => {
                    warn!("{} records from before etcd lost its data were not written again", self.remembered.len());
                    self.forget_in_archive(revision);
                    self.remembered.clear();
                    self.send(self.snapshot()).await;
                }
            }
        }
    }

    /// Whether the history of the etcd that answers now contains the youngest known record.
    async fn is_same_history(&self) -> Result<bool, StoreError> {
        let Some((key, youngest)) = self.known.iter().max_by_key(|(_, raw)| raw.version.modified) else {
            return Ok(true);
        };
        let key = self.etcd.keys.full(&format!("{}{key}", K::PREFIX));
        let options = GetOptions::new().with_revision(youngest.version.modified);
        let operation = "read etcd's history";
        match self.etcd.try_get(operation, key, options).await? {
            // Numbers of etcd leases are random: the same one at the same revision is no coincidence.
            Ok(answer) => Ok(answer.kvs().first().is_some_and(|kv| {
                let version = self.etcd.raw(kv).version;
                (version.modified, version.lifetime) == (youngest.version.modified, youngest.version.lifetime)
            })),
            // The history goes further than ours; that part of it is gone.
            Err(error) if error::is_compacted(&error) => Ok(true),
            Err(error) if error::is_future(&error) => Ok(false),
            Err(error) => Err(store_error(operation, &error)),
        }
    }

    /// Keeps what is known for the time of a lease.
    fn remember(&mut self) {
        let ttl = self.etcd.options.lease_ttl;
        warn!(
            "etcd has lost its data: the {} known records stay in force until they are written again, for {} min at most",
            self.known.len(),
            ttl.as_secs().div_ceil(60)
        );
        self.remembered.append(&mut self.known);
        self.remembered_until = Instant::now() + ttl;
    }

    fn snapshot(&self) -> Event<K> {
        let mut records = parse(self.known.iter().chain(&self.remembered));
        records.sort_by(|a, b| a.key.cmp(&b.key));
        Event::Snapshot(records)
    }

    /// The remembered records are of no use any more.
    fn forget_in_archive(&self, revision: i64) {
        if let Some(archive) = &self.archive {
            archive.apply::<K>(revision, self.remembered.keys().map(|key| (Arc::clone(key), None)));
        }
    }

    fn apply(&mut self, answer: &WatchResponse) -> Vec<Change<K>> {
        let (mut changes, mut raws) = (Vec::new(), Vec::new());
        for event in answer.events() {
            let Some(kv) = event.kv() else { continue };
            let (key, raw) = known::<K>(self.etcd.raw(kv));
            self.remembered.remove(&key);
            match event.event_type() {
                EventType::Put => {
                    changes.push(Change::Put(raw.parse(&key)));
                    raws.push((Arc::clone(&key), Some(raw.clone())));
                    self.known.insert(key, raw);
                }
                EventType::Delete => {
                    self.known.remove(&key);
                    raws.push((Arc::clone(&key), None));
                    changes.push(Change::Delete { key });
                }
            }
        }
        if let Some(archive) = self.archive.as_ref().filter(|_| !raws.is_empty()) {
            archive.apply::<K>(answer.header().map_or(0, ResponseHeader::revision), raws);
        }
        changes
    }

    /// A closed receiver ends [`follow`].
    async fn send(&self, event: Event<K>) {
        let _ = self.events.send(event).await;
    }
}

/// A record as it is kept.
fn known<K: Kind>(RawRecord { key, value, version }: RawRecord) -> (Arc<str>, Raw) {
    (key.strip_prefix(K::PREFIX).unwrap_or(&key).into(), Raw { value, version })
}

fn parse<'a, K: Kind>(records: impl Iterator<Item = (&'a Arc<str>, &'a Raw)>) -> Vec<Record<K>> {
    records.map(|(key, raw)| raw.parse(key)).collect()
}
