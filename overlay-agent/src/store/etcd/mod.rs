//! The etcd store: flannel's records in etcd, version 3 of its API. The only module that knows etcd.
//!
//! In reading order: `options`, `server` and `keys`, `session` (the connection), `connector` and `tls` below it, this file
//! (the primitives), `follow` (everybody's records), `error`. Every write is a transaction that names what it replaces.

mod connector;
mod error;
mod follow;
mod keys;
mod options;
mod server;
mod session;
mod tls;

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use etcd_client::{
    Client, Compare, CompareOp, Error, GetOptions, GetResponse, KeyValue, KvClient, LeaseTimeToLiveOptions,
    LeaseTimeToLiveResponse, PutOptions, Txn, TxnOp, TxnOpResponse, TxnResponse, WatchOptions, WatchResponse,
    WatchStream,
};
use tokio::sync::Mutex;

pub(super) use follow::follow;
pub use options::{EtcdOptions, LEASE_TTL, OWNER_TTL, RENEW_MARGIN};

use super::{
    StoreError,
    backend::{Expected, Snapshot, Write, Written},
    record::{Kind, Lifetime, LifetimeId, MAX_VALUE, RawRecord, Record, Version},
};
use error::store_error;
use keys::{Keys, range_end};
use server::Server;
use session::{Connection, Current, REQUEST, in_time};

/// Longest answer that is accepted, in bytes. It holds any single record: etcd's own limit for one is 1.5 MiB unless raised.
const MAX_ANSWER: usize = 16 * 1024 * 1024;
/// Records per request. 10,000 usual leases are 1.3 MB.
const PAGE: i64 = 4000;
/// Attempts at a list whose history etcd compacts half-way.
const LIST_ATTEMPTS: usize = 5;

/// One network's records in etcd, and the connection to it.
#[derive(Debug)]
pub(super) struct Etcd {
    pub(super) options: EtcdOptions,
    pub(super) keys: Keys,
    /// Servers behind the endpoints.
    servers: Vec<Server>,
    current: Mutex<Current>,
    /// Whether a user name that etcd does not need was reported.
    warned_of_users: AtomicBool,
}

impl Etcd {
    pub(super) async fn get(&self, keys: &[String]) -> Result<Snapshot<Vec<Option<RawRecord>>>, StoreError> {
        let operation = format!("read {} in etcd", self.locations(keys));
        let gets: Vec<_> = keys.iter().map(|key| TxnOp::get(self.keys.full(key), None)).collect();
        let answer = self.txn(&operation, Txn::new().and_then(gets)).await?;
        let revision = answer.header().map_or(0, |header| header.revision());
        let records =
            answer.op_responses().into_iter().filter_map(got).map(|kvs| kvs.first().map(|kv| self.raw(kv)));
        Ok(Snapshot { revision, records: records.collect() })
    }

    async fn txn(&self, operation: &str, txn: Txn) -> Result<TxnResponse, StoreError> {
        self.request(operation, async move |client| kv(&client).txn(txn).await).await
    }

    async fn try_get(
        &self,
        operation: &str,
        key: Vec<u8>,
        options: GetOptions,
    ) -> Result<Result<GetResponse, Error>, StoreError> {
        self.try_request(operation, async move |client| kv(&client).get(key, Some(options)).await).await
    }

    pub(super) async fn list<K: Kind>(&self) -> Result<Snapshot<Vec<Record<K>>>, StoreError> {
        let Snapshot { revision, records } = self.list_as(K::PREFIX, Record::from).await?;
        Ok(Snapshot { revision, records })
    }

    /// All records below a prefix, each as `make` has it: of a large network, no second copy is needed.
    async fn list_as<T>(
        &self,
        prefix: &str,
        make: impl Fn(RawRecord) -> T,
    ) -> Result<Snapshot<Vec<T>>, StoreError> {
        let operation = format!("list {} in etcd", self.keys.location(prefix));
        let prefix = self.keys.full(prefix);
        for _ in 0..LIST_ATTEMPTS {
            if let Some(snapshot) = self.list_once(&prefix, &operation, &make).await? {
                return Ok(snapshot);
            }
        }
        Err(StoreError::away(operation, "its history is compacted faster than it can be read"))
    }

    /// Reads pages of one revision; `None` when etcd compacted that revision between two pages.
    async fn list_once<T>(
        &self,
        prefix: &[u8],
        operation: &str,
        make: &impl Fn(RawRecord) -> T,
    ) -> Result<Option<Snapshot<Vec<T>>>, StoreError> {
        let mut start = prefix.to_vec();
        let mut snapshot = Snapshot { revision: 0, records: Vec::new() };
        let mut limit = PAGE;
        loop {
            let options = GetOptions::new()
                .with_range(range_end(prefix))
                .with_limit(limit)
                .with_revision(snapshot.revision);
            let page = match self.try_get(operation, start.clone(), options).await? {
                Ok(page) => page,
                Err(error) if error::is_compacted(&error) => return Ok(None),
                Err(error) if error::is_too_long(&error) && limit > 1 => {
                    limit = (limit / 8).max(1);
                    continue;
                }
                Err(error) => return Err(store_error(operation, &error)),
            };
            if snapshot.revision == 0 {
                snapshot.revision = page.header().map_or(0, |header| header.revision());
            }
            snapshot.records.extend(page.kvs().iter().map(|kv| make(self.raw(kv))));
            match page.kvs().last() {
                Some(last) if page.more() => {
                    start = last.key().to_vec();
                    start.push(0);
                }
                _ => return Ok(Some(snapshot)),
            }
            limit = limit.saturating_mul(2).min(PAGE);
        }
    }

    pub(super) async fn write(&self, write: Write) -> Result<Option<Written>, StoreError> {
        let key = self.keys.full(&write.key);
        let operation = format!("write {} in etcd", self.keys.location(&write.key));
        let conditions: Vec<_> =
            write.when.iter().flat_map(|(key, expected)| self.compare(key, *expected)).collect();
        let change = match write.value {
            Some(value) => TxnOp::put(key, value, write.lifetime.map(|id| PutOptions::new().with_lease(id))),
            None => TxnOp::delete(key, None),
        };
        let list = write.list.map(|prefix| {
            TxnOp::get(self.keys.full(prefix), Some(GetOptions::new().with_prefix().with_keys_only()))
        });
        let operations: Vec<_> = [change].into_iter().chain(list).collect();
        let answer = self.txn(&operation, Txn::new().when(conditions).and_then(operations)).await?;
        if !answer.succeeded() {
            return Ok(None);
        }
        let revision = answer.header().map_or(0, |header| header.revision());
        let lifetime = write.lifetime.map_or(Lifetime::Unlimited, Lifetime::Limited);
        // The revision of creation is right for new records only; for others nothing needs it.
        let version = Version { created: Some(revision), modified: revision, lifetime };
        let keys = answer.op_responses().into_iter().filter_map(got).flatten();
        let keys = keys.map(|kv| self.keys.relative(kv.key())).collect();
        Ok(Some(Written { version, keys }))
    }

    fn compare(&self, key: &str, expected: Expected) -> Vec<Compare> {
        let key = self.keys.full(key);
        match expected {
            Expected::Absent => vec![Compare::version(key, CompareOp::Equal, 0)],
            Expected::Unchanged(version) => vec![
                Compare::mod_revision(key.clone(), CompareOp::Equal, version.modified),
                Compare::lease(key, CompareOp::Equal, version.lifetime.id().unwrap_or(0)),
            ],
            Expected::Attached(lifetime) => vec![Compare::lease(key, CompareOp::Equal, lifetime)],
        }
    }

    /// Creates a lifetime.
    pub(super) async fn grant(&self, ttl: Duration) -> Result<LifetimeId, StoreError> {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        let grant = async move |mut client: Client| client.lease_grant(seconds, None).await;
        Ok(self.request("grant a lease in etcd", grant).await?.id())
    }

    /// Renews a lifetime. `false` when it has ended.
    ///
    /// One answer is enough: a stream to `etcd grpc-proxy` carries one at once, and the next one only after two thirds of the
    /// lifetime. The client reads that answer and does not return it, so [`Self::duration`] is another request.
    pub(super) async fn renew(&self, lifetime: LifetimeId) -> Result<bool, StoreError> {
        let renew = async move |mut client: Client| client.lease_keep_alive(lifetime).await;
        let renewed = self.try_request("renew a lease in etcd", renew).await?;
        Ok(lives("renew a lease in etcd", renewed)?.is_some())
    }

    /// The duration of a lifetime that was renewed just now; `None` when it has ended.
    pub(super) async fn duration(&self, lifetime: LifetimeId) -> Result<Option<Duration>, StoreError> {
        let answer = self.time_to_live(lifetime).await?;
        Ok(answer.filter(|answer| answer.ttl() > 0).and_then(|answer| seconds(answer.granted_ttl())))
    }

    /// The rest of a lifetime; `None` when it has ended.
    pub(super) async fn time_left(&self, lifetime: LifetimeId) -> Result<Option<Duration>, StoreError> {
        // -1 means that it has ended.
        Ok(self.time_to_live(lifetime).await?.and_then(|answer| seconds(answer.ttl())))
    }

    async fn time_to_live(
        &self,
        lifetime: LifetimeId,
    ) -> Result<Option<LeaseTimeToLiveResponse>, StoreError> {
        let read = async move |mut client: Client| client.lease_time_to_live(lifetime, None).await;
        lives("read a lease in etcd", self.try_request("read a lease in etcd", read).await?)
    }

    /// Ends a lifetime and removes its records.
    pub(super) async fn revoke(&self, lifetime: LifetimeId) -> Result<(), StoreError> {
        let revoke = async move |mut client: Client| client.lease_revoke(lifetime).await;
        self.request("revoke a lease in etcd", revoke).await.map(drop)
    }

    /// Ends a lifetime to which no record is attached.
    pub(super) async fn revoke_unused(&self, lifetime: LifetimeId) -> Result<(), StoreError> {
        let options = LeaseTimeToLiveOptions::new().with_keys();
        let read = async move |mut client: Client| client.lease_time_to_live(lifetime, Some(options)).await;
        let answer = self.request("read a lease in etcd", read).await?;
        if answer.ttl() > 0 && answer.keys().is_empty() { self.revoke(lifetime).await } else { Ok(()) }
    }

    pub(super) async fn watch_keys(
        self: &Arc<Self>,
        keys: &[String],
        revision: i64,
    ) -> Result<KeyWatch, StoreError> {
        self.watch(keys, WatchOptions::new().with_start_revision(revision + 1)).await
    }

    /// Opens one stream with a watch for each key.
    async fn watch(self: &Arc<Self>, keys: &[String], options: WatchOptions) -> Result<KeyWatch, StoreError> {
        let operation = format!("watch {} in etcd", self.locations(keys));
        let connection = self.connection().await?;
        let mut client = connection.client.watch_client().max_decoding_message_size(MAX_ANSWER);
        let opened = async {
            let mut keys = keys.iter().map(|key| self.keys.full(key));
            let first = keys.next().ok_or(Error::InvalidArgs("no key to watch".to_owned()))?;
            let mut stream = client.watch(first, Some(options.clone())).await?;
            for key in keys {
                stream.watch(key, Some(options.clone())).await?;
            }
            Ok(stream)
        };
        let failure = match in_time(&operation, REQUEST, opened).await {
            Ok(Ok(stream)) => return Ok(KeyWatch { etcd: Arc::clone(self), connection, stream }),
            Ok(Err(error)) => store_error(&operation, &error),
            Err(late) => late,
        };
        self.drop_connection(&connection).await;
        Err(failure)
    }

    /// Full keys, for messages.
    fn locations(&self, keys: &[String]) -> String {
        let locations: Vec<_> = keys.iter().map(|key| self.keys.location(key)).collect();
        locations.join(" and ")
    }

    fn raw(&self, kv: &KeyValue) -> RawRecord {
        let version = Version {
            created: Some(kv.create_revision()),
            modified: kv.mod_revision(),
            lifetime: if kv.lease() == 0 { Lifetime::Unlimited } else { Lifetime::Limited(kv.lease()) },
        };
        let value = kv.value().get(..MAX_VALUE).unwrap_or(kv.value()).into();
        RawRecord { key: self.keys.relative(kv.key()), value, version }
    }
}

fn kv(client: &Client) -> KvClient {
    client.kv_client().max_decoding_message_size(MAX_ANSWER)
}

/// The answer about a lifetime; `None` when it has ended.
fn lives<T>(operation: &str, answer: Result<T, Error>) -> Result<Option<T>, StoreError> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error::is_no_lease(&error) => Ok(None),
        Err(error) => Err(store_error(operation, &error)),
    }
}

fn got(answer: TxnOpResponse) -> Option<Vec<KeyValue>> {
    match answer {
        TxnOpResponse::Get(mut answer) => Some(answer.take_kvs()),
        TxnOpResponse::Put(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => None,
    }
}

fn seconds(ttl: i64) -> Option<Duration> {
    u64::try_from(ttl).ok().map(Duration::from_secs)
}

/// A stream of changes, with the connection that carries it.
pub(super) struct KeyWatch {
    etcd: Arc<Etcd>,
    connection: Connection,
    stream: WatchStream,
}

impl KeyWatch {
    pub(super) async fn changed(&mut self) -> Result<(), StoreError> {
        loop {
            match self.next().await? {
                // The answer to the request for a watch, or a progress notification.
                Some(answer) if answer.events().is_empty() => {}
                Some(_) | None => return Ok(()),
            }
        }
    }

    /// The next message; `None` when etcd no longer has the history between the last one and now, so that the caller must
    /// read the current state.
    async fn next(&mut self) -> Result<Option<WatchResponse>, StoreError> {
        let operation = "watch records in etcd";
        let failure = match self.stream.message().await {
            Ok(Some(answer)) if answer.compact_revision() > 0 => return Ok(None),
            Ok(Some(answer)) if !answer.canceled() => return Ok(Some(answer)),
            Ok(Some(answer)) => error::cancellation(operation, answer.cancel_reason()),
            Ok(None) => StoreError::away(operation, "the connection ended"),
            Err(error) => store_error(operation, &error),
        };
        self.etcd.drop_connection(&self.connection).await;
        Err(failure)
    }
}
