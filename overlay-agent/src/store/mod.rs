//! Records of one network, in etcd or in a directory: one interface for the agent and for an operator's commands.
//!
//! In reading order: `record` (kinds, versions, events), `backend` (the primitives), `etcd` and `dir` (the two stores), `lease`
//! (this host's own lease), and [`Store`], which the rest of the program uses.

mod backend;
mod backoff;
mod dir;
mod error;
pub mod etcd;
mod lease;
mod record;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use ipnet::Ipv4Net;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{JoinHandle, JoinSet},
};

pub use error::StoreError;
pub use lease::{Held, LeaseEvent, SubnetRequest};
pub use record::{Change, Event, Kind, Lifetime, LifetimeId, Record, RecordError, Version};

use crate::{config::NetworkConfig, lease::Lease};
use backend::{Backend, Expected, Write};
use dir::Dir;
use etcd::{Etcd, EtcdOptions};
use lease::{ATTEMPTS, Leases};

/// Key of the network's configuration.
const CONFIG: &str = "config";
/// Requests for the rest of a lifetime that are under way at once.
const CONCURRENT_REQUESTS: usize = 32;

/// The records of one network. Clones share the connection.
#[derive(Clone, Debug)]
pub struct Store {
    backend: Backend,
    leases: Leases,
}

impl Store {
    /// The store in a directory, which need not exist yet.
    pub fn dir(root: PathBuf) -> Self {
        Self::new(Backend::Dir(Arc::new(Dir::new(root))))
    }

    /// Connects to the first etcd endpoint that answers.
    /// Fails when the options cannot be used, etcd refuses the user, or no endpoint answers (the only one of these
    /// that [`StoreError::is_transient`]).
    pub async fn etcd(options: EtcdOptions) -> Result<Self, StoreError> {
        Ok(Self::new(Backend::Etcd(Arc::new(Etcd::connect(options).await?))))
    }

    fn new(backend: Backend) -> Self {
        Self { leases: Leases::new(backend.clone()), backend }
    }

    /// Name of the store, for messages.
    pub fn name(&self) -> String {
        match &self.backend {
            Backend::Dir(dir) => format!("dir:{}", dir.root().display()),
            Backend::Etcd(etcd) => format!("etcd at {}", etcd.endpoints()),
        }
    }

    /// Location of the network's configuration, for messages.
    pub fn config_location(&self) -> String {
        let location = self.backend.location(CONFIG);
        match &self.backend {
            Backend::Dir(_) => location,
            Backend::Etcd(_) => format!("{location} in {}", self.name()),
        }
    }

    /// The network's configuration as it is stored; `None` when there is none.
    /// Fails when the store cannot be read.
    pub async fn config_text(&self) -> Result<Option<String>, StoreError> {
        let record = self.backend.get_one(CONFIG).await?;
        Ok(record.map(|record| String::from_utf8_lossy(&record.value).into_owned()))
    }

    /// The network's configuration. `None` when it has yet to be written to etcd. A directory without one takes `network`,
    /// see [`Self::ensure_config`].
    /// Fails when the store cannot be read, the configuration cannot be used or contradicts `network`, or a directory
    /// has none.
    pub async fn config(&self, network: Option<Ipv4Net>) -> Result<Option<NetworkConfig>, StoreError> {
        let location = self.config_location();
        let text = match (self.config_text().await?, network, &self.backend) {
            (Some(text), _, _) => text,
            (None, _, Backend::Etcd(_)) => return Ok(None),
            (None, Some(network), Backend::Dir(_)) => config_record(network),
            (None, None, Backend::Dir(_)) => {
                return Err(StoreError::Conflict(format!(
                    "the store has no network config: write one to {location}, for example \
                     {{\"Network\":\"10.244.0.0/16\"}}, or name the network with --network"
                )));
            }
        };
        let config = self.parse_config(&text)?;
        match network {
            Some(network) if network.trunc() != config.network => Err(StoreError::Conflict(format!(
                "--network is {network}, but {location} says {}: change one of them",
                config.network
            ))),
            _ => Ok(Some(config)),
        }
    }

    /// Writes the configuration of `network` to a directory that has none. In etcd, an operator does that.
    /// Fails when the directory cannot be written.
    pub async fn ensure_config(&self, network: Ipv4Net) -> Result<(), StoreError> {
        match &self.backend {
            Backend::Etcd(_) => Ok(()),
            Backend::Dir(_) => self.write_config(config_record(network), Expected::Absent).await.map(drop),
        }
    }

    /// Writes the network's configuration, which must be usable. Returns the one that it replaces.
    /// Fails when `text` cannot be used or the store cannot be written.
    pub async fn set_config(&self, text: &str) -> Result<Option<String>, StoreError> {
        self.parse_config(text)?;
        for _ in 0..ATTEMPTS {
            let before = self.backend.get_one(CONFIG).await?;
            let expected = before.as_ref().map_or(Expected::Absent, |raw| Expected::Unchanged(raw.version));
            if self.write_config(text.to_owned(), expected).await? {
                return Ok(before.map(|raw| String::from_utf8_lossy(&raw.value).into_owned()));
            }
        }
        Err(StoreError::Contended(ATTEMPTS))
    }

    async fn write_config(&self, text: String, expected: Expected) -> Result<bool, StoreError> {
        Ok(self.backend.write(Write::new(CONFIG, expected, Some(text))).await?.is_some())
    }

    fn parse_config(&self, text: &str) -> Result<NetworkConfig, StoreError> {
        NetworkConfig::parse(text)
            .map_err(|source| StoreError::Config { location: self.config_location(), source })
    }

    /// Whether the store exists. A directory is created with the first write; etcd exists once it is connected.
    pub fn exists(&self) -> bool {
        match &self.backend {
            Backend::Dir(dir) => dir.root().is_dir(),
            Backend::Etcd(_) => true,
        }
    }

    /// All records of a kind, in order of their keys.
    /// Fails when the store cannot be read, or there is no such directory.
    pub async fn list<K: Kind>(&self) -> Result<Vec<Record<K>>, StoreError> {
        if let Backend::Dir(dir) = &self.backend {
            if !self.exists() {
                let why = "there is no such directory: check --store";
                return Err(StoreError::failed(
                    format!("there is no store at {}", dir.root().display()),
                    why,
                ));
            }
            // No host has written a record yet.
            if !dir.path(K::PREFIX).exists() {
                return Ok(Vec::new());
            }
        }
        Ok(self.backend.list(K::PREFIX).await?.records.into_iter().map(Record::from).collect())
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

    /// Removes a record of any host, if it is unchanged. `false` when it changed meanwhile.
    /// Fails when the store cannot be written.
    pub async fn remove<K: Kind>(&self, record: &Record<K>) -> Result<bool, StoreError> {
        let key = format!("{}{}", K::PREFIX, record.key);
        let write = Write::new(key, Expected::Unchanged(record.version), None);
        Ok(self.backend.write(write).await?.is_some())
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
                requests.spawn(async move { (lifetime, backend.time_left(lifetime).await) });
            }
            let Some(done) = requests.join_next().await else { return Ok(times) };
            let (lifetime, left) = done.map_err(|error| StoreError::failed("read a lifetime", error))?;
            times.extend(left?.map(|left| (lifetime, left)));
        }
    }

    /// The running agent that has claimed a public address, in words. `None` for hosts that run flannel and in a directory.
    /// Fails when the store cannot be read.
    pub async fn claimant(&self, public_ip: Ipv4Addr) -> Result<Option<String>, StoreError> {
        self.leases.claimant(public_ip).await
    }

    /// Acquires a subnet for the host at `public_ip`: the wanted one, else the one whose record carries its address, else the
    /// earlier one if it is free, else any free one.
    /// Fails when the store cannot be used, another live agent has the same address, the wanted subnet is not
    /// available, or the network is full.
    pub async fn acquire(&self, request: &SubnetRequest, public_ip: Ipv4Addr) -> Result<Held, StoreError> {
        if let Backend::Dir(dir) = &self.backend {
            dir.blocking(|dir| dir.create(Lease::PREFIX)).await?;
        }
        self.leases.acquire(request, public_ip).await
    }

    /// Releases a subnet: removes its record if it is still ours. A reservation stays.
    /// Fails when the store cannot be written.
    pub async fn release(&self, held: &Held) -> Result<(), StoreError> {
        self.leases.release(held).await
    }

    /// Gives up the claim on the public address. The record stays for the next start of this host.
    pub async fn leave(&self, held: &Held) {
        self.leases.leave(held).await;
    }

    /// Keeps a lease in a task: renews it, acquires it again when it is lost, moves it to another address of this host.
    pub fn keep(&self, held: Held) -> LeaseKeeper {
        let (sender, events) = mpsc::channel(64);
        let (address, addresses) = watch::channel(held.public_ip());
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async {
            // A dropped sender means the same.
            let _ = stopped.await;
        };
        let task = tokio::spawn(lease::keep(self.leases.clone(), held, addresses, sender, stopped));
        LeaseKeeper { events, address, _stop: stop, task }
    }
}

/// A task that keeps a lease. Ends when it is dropped.
#[derive(Debug)]
pub struct LeaseKeeper {
    /// News about the lease.
    pub events: mpsc::Receiver<LeaseEvent>,
    address: watch::Sender<Ipv4Addr>,
    _stop: oneshot::Sender<()>,
    task: JoinHandle<Held>,
}

impl LeaseKeeper {
    /// This host has another public address: the record follows, and [`LeaseEvent::Readdressed`] confirms it.
    pub fn set_address(&self, public_ip: Ipv4Addr) {
        self.address.send_replace(public_ip);
    }

    /// Stops and returns what is held.
    pub async fn stop(self) -> Option<Held> {
        let Self { events, _stop, task, .. } = self;
        drop((_stop, events));
        task.await.ok()
    }
}

fn config_record(network: Ipv4Net) -> String {
    format!("{{\"Network\":\"{network}\",\"Backend\":{{\"Type\":\"udp\"}}}}\n")
}
