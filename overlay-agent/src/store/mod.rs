//! Records of one network, in etcd or in a directory: one interface for the agent and for an operator's commands.
//!
//! In reading order: `record` (kinds, versions, events), `backend` (the primitives), `etcd` and `dir` (the two stores), and
//! [`Store`], which the rest of the program uses: everybody's records here, writes of any kind in `write`, the network's
//! configuration in `config`, this host's own lease in `lease`, and its other records in `own`. `archive` keeps a copy of all on
//! disk.

mod archive;
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
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{sync::mpsc, task::JoinSet};
use tracing::debug;

pub use archive::{ArchiveKeeper, Saved, Unusable};
pub use error::StoreError;
pub use lease::{Held, LeaseEvent, LeaseKeeper, RecalledLease, SubnetRequest};
pub use own::{OwnRecords, OwnState};
pub use record::{Change, Event, Kind, Lifetime, LifetimeId, Record, RecordError, Version, Writable};
pub use write::Condition;

pub(crate) use dir::KeyWatch as DirectoryWatch;

use archive::Archive;
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
    /// Where everything that is followed is kept for a start without the store.
    archive: Option<Arc<Archive>>,
}

impl Store {
    /// The store in a directory, which need not exist yet.
    pub fn dir(root: PathBuf) -> Self {
        Self::new(Backend::Dir(Arc::new(Dir { root })), &EtcdOptions::default())
    }

    /// Connects to an etcd endpoint that answers.
    /// Fails when the options cannot be used, etcd refuses the user, or no endpoint can be used.
    pub async fn etcd(options: EtcdOptions) -> Result<Self, StoreError> {
        let store = Self::etcd_unreached(options)?;
        store.reach().await?;
        Ok(store)
    }

    /// The store in etcd, without a connection yet: [`Self::reach`] makes one, or the first request.
    /// Fails when the options cannot be used.
    pub fn etcd_unreached(options: EtcdOptions) -> Result<Self, StoreError> {
        let etcd = Etcd::new(options.clone())?;
        Ok(Self::new(Backend::Etcd(Arc::new(etcd)), &options))
    }

    /// Connects to an etcd endpoint that answers, unless there is a connection. A directory needs none.
    /// Fails when etcd refuses the user, or no endpoint can be used.
    pub async fn reach(&self) -> Result<(), StoreError> {
        match &self.backend {
            Backend::Dir(_) => Ok(()),
            Backend::Etcd(etcd) => etcd.reach().await,
        }
    }

    fn new(backend: Backend, options: &EtcdOptions) -> Self {
        let EtcdOptions { lease_ttl, renew_margin, owner_ttl: claim_ttl, .. } = *options;
        let instance = options.instance.clone().unwrap_or_else(lease::this_instance);
        Self { backend, times: Times { lease_ttl, renew_margin, claim_ttl }, instance, archive: None }
    }

    /// Name of the store, for messages.
    pub fn name(&self) -> String {
        match &self.backend {
            Backend::Dir(dir) => format!("dir:{}", dir.root.display()),
            Backend::Etcd(etcd) => format!("etcd at {}", etcd.endpoints()),
        }
    }

    /// What an earlier run of this host has left in the file at `path`; `None` when there is no file, and for a directory store,
    /// whose records are on this host anyway. The lease must be of `public_ip`, and not have ended at the time `now`.
    /// Fails when the file cannot be used.
    pub fn saved(
        &self,
        path: &Path,
        public_ip: Ipv4Addr,
        now: SystemTime,
    ) -> Result<Option<Saved>, Unusable> {
        match &self.backend {
            Backend::Dir(_) => Ok(None),
            Backend::Etcd(etcd) => Saved::read(path, etcd.identity(), public_ip, self.times.lease_ttl, now),
        }
    }

    /// Collects from now on what [`Self::keep_archive`] writes: records that are followed, the configuration and this host's
    /// lease. With what an earlier run has `saved`, [`Self::follow`] begins with its records.
    #[must_use]
    pub fn archived(self, saved: Option<Saved>) -> Self {
        let archive = match (&self.backend, saved) {
            (Backend::Dir(_), _) => None,
            (Backend::Etcd(_), Some(saved)) => Some(saved.into_archive()),
            (Backend::Etcd(etcd), None) => Some(Archive::new(etcd.identity())),
        };
        Self { archive: archive.map(Arc::new), ..self }
    }

    /// Keeps the file at `path` in a task; `None` when nothing is collected.
    pub fn keep_archive(&self, path: PathBuf) -> Option<ArchiveKeeper> {
        let archive = Arc::clone(self.archive.as_ref()?);
        Some(archive::keep(archive, path))
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
    /// [`Event::Recalled`] and [`Event::Lost`] a snapshot follows when the store can be read again.
    pub fn follow<K: Kind>(&self) -> mpsc::Receiver<Event<K>> {
        let (sender, receiver) = mpsc::channel(4);
        match &self.backend {
            Backend::Dir(dir) => drop(tokio::spawn(dir::follow(Arc::clone(dir), sender))),
            Backend::Etcd(etcd) => {
                drop(tokio::spawn(etcd::follow(Arc::clone(etcd), self.archive.clone(), sender)));
            }
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
