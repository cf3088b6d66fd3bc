//! Following everybody's records: a list, then what changes, and a list again whenever there is any doubt.
//!
//! etcd's data may be gone when it comes back (a new disk, a wrong data directory). A list of it would then say that no host
//! holds anything, and every route would go. So the records that were known before are kept beside the new ones until their
//! holders have had the time of a lease to write them again.

use std::collections::BTreeMap;

use etcd_client::{EventType, GetOptions, WatchOptions, WatchResponse, WatchStream};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::warn;

use super::{
    EtcdStore,
    error::{self, EtcdError},
    records::{Entry, LONGEST_ANSWER, Listing},
    session::{Backoff, Connection, REQUEST, STEADY, Shared},
};
use crate::{
    route_table::{Record, RecordChange},
    store::Event,
};

impl EtcdStore {
    /// Follows the records until `events` is closed: a snapshot first, then changes; [`Event::Lost`] once when etcd cannot be
    /// read, and a snapshot when it can again.
    pub async fn watch(&self, events: mpsc::Sender<Event>) {
        let mut follower = Follower::new(self.session.clone(), events.clone());
        tokio::select! {
            () = follower.run() => {}
            () = events.closed() => {}
        }
    }
}

/// Nobody listens any more.
struct Closed;

/// Why following ended.
enum End {
    /// etcd no longer has the history between what is known and now.
    Doubt,
    /// etcd cannot be read.
    Lost(EtcdError),
    /// Nobody listens any more.
    Closed,
}

impl From<Closed> for End {
    fn from(_: Closed) -> Self {
        Self::Closed
    }
}

impl From<EtcdError> for End {
    fn from(error: EtcdError) -> Self {
        Self::Lost(error)
    }
}

struct Follower {
    session: Shared,
    events: mpsc::Sender<Event>,
    /// The records as etcd last had them.
    known: BTreeMap<String, Entry>,
    /// Records that were known to an etcd whose data is gone, and until when they count.
    remembered: BTreeMap<String, Record>,
    remembered_until: Instant,
    lost: bool,
}

impl Follower {
    fn new(session: Shared, events: mpsc::Sender<Event>) -> Self {
        Self {
            session,
            events,
            known: BTreeMap::new(),
            remembered: BTreeMap::new(),
            remembered_until: Instant::now(),
            lost: false,
        }
    }

    /// Ends when nobody listens any more.
    async fn run(&mut self) {
        let mut backoff = Backoff::default();
        loop {
            match self.follow(&mut backoff).await {
                End::Closed => return,
                End::Doubt => {}
                End::Lost(error) => {
                    if !self.lost {
                        self.lost = true;
                        if self.send(Event::Lost(error.to_string())).await.is_err() {
                            return;
                        }
                    }
                    sleep(backoff.next()).await;
                }
            }
        }
    }

    async fn follow(&mut self, backoff: &mut Backoff) -> End {
        match self.list_and_watch(backoff).await {
            Ok(end) | Err(end) => end,
        }
    }

    async fn list_and_watch(&mut self, backoff: &mut Backoff) -> Result<End, End> {
        let listing = self.session.list().await?;
        if !self.is_same_history().await? {
            self.remember();
        }
        let revision = listing.revision;
        self.learn(listing);
        // Opened before anybody is told: a failure now would be said as a snapshot and a loss in one breath.
        let (mut watch, connection) = self.open_watch(revision + 1).await?;
        let steady = sleep(STEADY);
        tokio::pin!(steady);
        let mut is_steady = false;
        self.lost = false;
        self.send(self.snapshot()).await?;
        loop {
            tokio::select! {
                // Not before: a member that opens streams and breaks them would be asked for everything without end.
                () = &mut steady, if !is_steady => {
                    is_steady = true;
                    backoff.reset();
                }
                message = watch.message() => match message {
                    Ok(Some(answer)) if answer.compact_revision() > 0 => return Ok(End::Doubt),
                    Ok(Some(answer)) if !answer.canceled() => {
                        let changes = self.apply(&answer);
                        if !changes.is_empty() {
                            self.send(Event::Changes(changes)).await?;
                        }
                    }
                    broken => {
                        self.session.drop_connection(&connection).await;
                        return Err(End::Lost(broken_off(broken)));
                    }
                },
                () = sleep_until(self.remembered_until), if !self.remembered.is_empty() => {
                    warn!("{} records of before etcd lost its data were not written again", self.remembered.len());
                    self.remembered.clear();
                    self.send(self.snapshot()).await?;
                }
            }
        }
    }

    /// Whether the etcd that answers now is the one from which our records are: its history has the youngest of them.
    async fn is_same_history(&self) -> Result<bool, EtcdError> {
        let Some(youngest) = self.known.values().max_by_key(|entry| entry.mod_revision) else {
            return Ok(true);
        };
        let key = self.session.keys.record(&youngest.key);
        let options = GetOptions::new().with_revision(youngest.mod_revision);
        let operation = "read etcd's history";
        let answer = self
            .session
            .try_request(operation, |client| async move {
                client.kv_client().max_decoding_message_size(LONGEST_ANSWER).get(key, Some(options)).await
            })
            .await?;
        match answer {
            Ok(answer) => Ok(answer.kvs().first().is_some_and(|kv| {
                // etcd leases have random numbers: the same one at the same revision is no coincidence.
                kv.mod_revision() == youngest.mod_revision && kv.lease() == youngest.lease
            })),
            // Its history goes further than ours; what it was is gone.
            Err(error) if error::is_compacted(&error) => Ok(true),
            Err(error) if error::is_future(&error) => Ok(false),
            Err(error) => Err(EtcdError::of(operation, &error)),
        }
    }

    /// Puts what is known aside as the word of hosts that have not spoken again yet.
    fn remember(&mut self) {
        let ttl = self.session.options.lease_ttl;
        warn!(
            "etcd has lost its data: the {} records that were known stay in force until they are written again, for {} min \
             at most",
            self.known.len(),
            ttl.as_secs().div_ceil(60)
        );
        let known = std::mem::take(&mut self.known);
        self.remembered.extend(known.into_iter().map(|(key, entry)| (key, entry.record())));
        self.remembered_until = Instant::now() + ttl;
    }

    fn learn(&mut self, listing: Listing) {
        self.known = listing.entries.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
        self.remembered.retain(|key, _| !self.known.contains_key(key));
    }

    fn snapshot(&self) -> Event {
        let mut records: Vec<_> = self.known.values().map(Entry::record).collect();
        records.extend(self.remembered.values().cloned());
        records.sort_by(|a, b| a.key.cmp(&b.key));
        Event::Snapshot(records)
    }

    fn apply(&mut self, answer: &WatchResponse) -> Vec<RecordChange> {
        let mut changes = Vec::new();
        for event in answer.events() {
            let Some(kv) = event.kv() else { continue };
            let entry = Entry::new(&self.session.keys, kv);
            self.remembered.remove(&entry.key);
            match event.event_type() {
                EventType::Put => {
                    changes.push(RecordChange::Put(entry.record()));
                    self.known.insert(entry.key.clone(), entry);
                }
                EventType::Delete => {
                    self.known.remove(&entry.key);
                    changes.push(RecordChange::Delete { key: entry.key });
                }
            }
        }
        changes
    }

    async fn open_watch(&self, revision: i64) -> Result<(WatchStream, Connection), EtcdError> {
        let operation = format!("watch {} in etcd", self.session.keys.subnets());
        let connection = self.session.connection().await?;
        let options = WatchOptions::new()
            .with_prefix()
            .with_start_revision(revision)
            // Many changes at once come in pieces that fit the limit below.
            .with_fragment();
        let mut client = connection.client.watch_client().max_decoding_message_size(LONGEST_ANSWER);
        let opened = timeout(REQUEST, client.watch(self.session.keys.subnets(), Some(options))).await;
        let why = match opened {
            Ok(Ok(watch)) => return Ok((watch, connection)),
            Ok(Err(error)) => EtcdError::of(&operation, &error),
            Err(_) => EtcdError::Away { operation, why: format!("no answer within {} s", REQUEST.as_secs()) },
        };
        self.session.drop_connection(&connection).await;
        Err(why)
    }

    async fn send(&self, event: Event) -> Result<(), Closed> {
        self.events.send(event).await.map_err(|_| Closed)
    }
}

fn broken_off(message: Result<Option<WatchResponse>, etcd_client::Error>) -> EtcdError {
    let operation = "watch the records in etcd".to_owned();
    match message {
        Err(error) => EtcdError::of(&operation, &error),
        Ok(Some(answer)) => EtcdError::Away { operation, why: answer.cancel_reason().to_owned() },
        Ok(None) => EtcdError::Away { operation, why: "the connection ended".to_owned() },
    }
}
