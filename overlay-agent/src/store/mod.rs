//! Records of one network, in etcd or in a directory: one interface for the agent and for an operator's commands.
//!
//! In reading order: `record` (kinds, versions, events), `backend` (the primitives), `etcd` and `dir` (the two stores), and
//! [`Store`], which the rest of the program uses: everybody's records here, writes of any kind in `write`, the network's
//! configuration in `config`, this host's own lease in `lease`, and its other records in `own`.

mod backend;
mod backoff;
mod config;
mod dir;
mod error;
pub mod etcd;
mod lease;
mod own;
mod record;
mod write;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::{sync::mpsc, task::JoinSet};
use tracing::debug;

pub use error::StoreError;
pub use lease::{Held, LeaseEvent, LeaseKeeper, SubnetRequest};
pub use own::{OwnRecords, OwnState};
pub use record::{Change, Event, Kind, Lifetime, LifetimeId, Record, RecordError, Version, Writable};
pub use write::Condition;

pub(crate) use dir::KeyWatch as DirectoryWatch;

use backend::{Backend, Expected, Write};
use dir::Dir;
use etcd::{Etcd, EtcdOptions};
use lease::Times;

/// Requests for the rest of a lifetime that are under way at once.
const CONCURRENT_REQUESTS: usize = 32;

/// The records of one network. Clones share the connection.
#[derive(Clone, Debug)]
pub struct Store {
    backend: Backend,
    times: Times,
    /// Identity of this host among hosts with the same address.
    instance: String,
}

impl Store {
    /// The store in a directory, which need not exist yet.
    pub fn dir(root: PathBuf) -> Self {
        Self::new(Backend::Dir(Arc::new(Dir { root })), &EtcdOptions::default())
    }

    /// Connects to an etcd endpoint that answers.
    /// Fails when the options cannot be used, etcd refuses the user, or no endpoint can be used.
    pub async fn etcd(options: EtcdOptions) -> Result<Self, StoreError> {
        let etcd = Etcd::connect(options.clone()).await?;
        Ok(Self::new(Backend::Etcd(Arc::new(etcd)), &options))
    }

    fn new(backend: Backend, options: &EtcdOptions) -> Self {
        let EtcdOptions { lease_ttl, renew_margin, owner_ttl: claim_ttl, .. } = *options;
        let instance = options.instance.clone().unwrap_or_else(lease::this_instance);
        Self { backend, times: Times { lease_ttl, renew_margin, claim_ttl }, instance }
    }

    /// Name of the store, for messages.
    pub fn name(&self) -> String {
        match &self.backend {
            Backend::Dir(dir) => format!("dir:{}", dir.root.display()),
            Backend::Etcd(etcd) => format!("etcd at {}", etcd.endpoints()),
        }
    }

    /// Whether the store exists. A directory is created with the first write; etcd exists once it is connected.
    pub fn exists(&self) -> bool {
        match &self.backend {
            Backend::Dir(dir) => dir.root.is_dir(),
            Backend::Etcd(_) => true,
        }
    }

    /// All records of a kind, in order of their keys.
    /// Fails when the store cannot be read, or there is no such directory.
    pub async fn list<K: Kind>(&self) -> Result<Vec<Record<K>>, StoreError> {
        if let Backend::Dir(dir) = &self.backend {
            if !self.exists() {
                let what = format!("there is no store at {}", dir.root.display());
                return Err(StoreError::failed(what, "there is no such directory: check --store"));
            }
            // No host has written a record yet.
            if !dir.path(K::PREFIX).exists() {
                return Ok(Vec::new());
            }
        }
        self.backend.list().await
    }

    /// Makes a kind exist of which there may be no record yet: without its directory, a directory store cannot be followed, as one
    /// that lost its records. Makes no store that does not exist, and nothing in etcd, which needs nothing.
    /// Fails when the directory cannot be written.
    pub async fn prepare<K: Kind>(&self) -> Result<(), StoreError> {
        match &self.backend {
            Backend::Dir(dir) if self.exists() => dir.blocking(|dir| dir.create::<K>()).await,
            Backend::Dir(_) | Backend::Etcd(_) => Ok(()),
        }
    }

    /// Follows all records of a kind in a task that ends when the receiver is dropped: a snapshot first, then changes. After
    /// [`Event::Lost`] a snapshot follows when the store can be read again.
    pub fn follow<K: Kind>(&self) -> mpsc::Receiver<Event<K>> {
        let (sender, receiver) = mpsc::channel(4);
        match &self.backend {
            Backend::Dir(dir) => drop(tokio::spawn(dir::follow(Arc::clone(dir), sender))),
            Backend::Etcd(etcd) => drop(tokio::spawn(etcd::follow(Arc::clone(etcd), sender))),
        }
        receiver
    }

    /// Removes a record of any host, if it is unchanged, and its lifetime unless another record is attached to it. `false` when
    /// the record changed meanwhile.
    /// Fails when the store cannot be written.
    pub async fn remove<K: Kind>(&self, record: &Record<K>) -> Result<bool, StoreError> {
        let key = format!("{}{}", K::PREFIX, record.key);
        let write = Write::new(key, Expected::Unchanged(record.version), None);
        let removed = self.backend.write(write).await?.is_some();
        if let (true, Some(lifetime)) = (removed, record.version.lifetime.id())
            && let Err(error) = self.backend.lifetimes()?.revoke_unused(lifetime).await
        {
            // It ends by itself.
            debug!("{error}");
        }
        Ok(removed)
    }

    /// The rests of the lifetimes that records are attached to. A lifetime that has ended is missing. One request for each.
    /// Fails when the store cannot be read.
    pub async fn times_left<K: Kind>(
        &self,
        records: &[Record<K>],
    ) -> Result<BTreeMap<LifetimeId, Duration>, StoreError> {
        let distinct: BTreeSet<_> =
            records.iter().filter_map(|record| record.version.lifetime.id()).collect();
        let mut waiting = distinct.into_iter();
        let mut requests = JoinSet::new();
        let mut times = BTreeMap::new();
        loop {
            while requests.len() < CONCURRENT_REQUESTS
                && let Some(lifetime) = waiting.next()
            {
                let backend = self.backend.clone();
                requests.spawn(async move {
                    let left = backend.lifetimes()?.time_left(lifetime).await?;
                    Ok::<_, StoreError>(left.map(|left| (lifetime, left)))
                });
            }
            let Some(done) = requests.join_next().await else { return Ok(times) };
            times.extend(done.map_err(|error| StoreError::failed("read a lifetime", error))??);
        }
    }
}
