//! A store as the commands of an operator see it: opened once, asked once, whichever it is.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Result, bail};
use ipnet::Ipv4Net;

use super::store_args::{StoreArgs, in_etcd};
use crate::{
    agent::StoreOption,
    lease,
    route_table::Record,
    store::{
        dir::DirStore,
        etcd::{EtcdStore, ListedLease},
    },
};

/// An open store.
pub(super) enum Store {
    Dir(DirStore),
    Etcd(EtcdStore),
}

/// A record, as the store will know it again.
#[derive(Clone, Debug)]
pub(super) enum Claim {
    Dir(Record),
    Etcd(ListedLease),
}

impl Claim {
    pub(super) fn record(&self) -> &Record {
        match self {
            Self::Dir(record) => record,
            Self::Etcd(listed) => &listed.record,
        }
    }

    pub(super) fn subnet(&self) -> Option<Ipv4Net> {
        lease::parse_key(&self.record().key).ok()
    }

    /// The holder and, unless it is udp, the backend.
    pub(super) fn value(&self) -> Option<lease::LeaseValue> {
        lease::parse_value(&self.record().value).ok()
    }

    /// Whether an operator wrote it. Unknown in a directory.
    pub(super) fn is_reservation(&self) -> bool {
        match self {
            Self::Dir(_) => false,
            Self::Etcd(listed) => listed.etcd_lease.is_none(),
        }
    }

    /// `None` when it does not expire or the remaining time was not queried.
    pub(super) fn expires_in(&self) -> Option<Duration> {
        match self {
            Self::Dir(_) => None,
            Self::Etcd(listed) => listed.expires_in,
        }
    }
}

impl Store {
    /// Opens the store that the command line names, in one attempt.
    pub(super) async fn open(args: StoreArgs) -> Result<Self> {
        match args.option(in_etcd)? {
            StoreOption::Dir(root) => Ok(Self::Dir(DirStore::new(root))),
            StoreOption::Etcd(options) => Ok(Self::Etcd(EtcdStore::connect(*options).await?)),
            StoreOption::None => bail!("there is no store: name it with --store"),
        }
    }

    /// Location of the records, for messages.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Dir(store) => store.root().display().to_string(),
            Self::Etcd(store) => format!("etcd at {}", store.endpoints()),
        }
    }

    /// Location of the network config, for messages.
    pub(super) fn config_location(&self) -> String {
        match self {
            Self::Dir(store) => store.config_path().display().to_string(),
            Self::Etcd(store) => format!("{} in {}", store.config_key(), self.name()),
        }
    }

    /// The network's configuration as it stands there.
    pub(super) async fn config_text(&self) -> Result<Option<String>> {
        match self {
            Self::Dir(store) => store.config_text(),
            Self::Etcd(store) => Ok(store.config_text().await?),
        }
    }

    /// Writes the network's configuration and returns what stood there before.
    pub(super) async fn set_config(&self, text: &str) -> Result<Option<String>> {
        match self {
            Self::Dir(store) => store.set_config(text),
            Self::Etcd(store) => Ok(store.set_config(text).await?),
        }
    }

    /// All records in order of their keys, without the times that they still last.
    pub(super) async fn claims(&self) -> Result<Vec<Claim>> {
        match self {
            Self::Dir(store) => Ok(store.records()?.into_iter().map(Claim::Dir).collect()),
            Self::Etcd(store) => Ok(store.records().await?.into_iter().map(Claim::Etcd).collect()),
        }
    }

    /// Fills in the times that these still last, and leaves out what has ended.
    pub(super) async fn with_times(&self, claims: Vec<Claim>) -> Result<Vec<Claim>> {
        let Self::Etcd(store) = self else { return Ok(claims) };
        let listed = |claim| match claim {
            Claim::Etcd(listed) => Some(listed),
            Claim::Dir(_) => None,
        };
        let mut leases = claims.into_iter().filter_map(listed).collect();
        store.ask_times(&mut leases).await?;
        Ok(leases.into_iter().map(Claim::Etcd).collect())
    }

    /// The running agent with this public address, if the store has owner keys.
    pub(super) async fn owner(&self, public_ip: Ipv4Addr) -> Result<Option<String>> {
        match self {
            Self::Dir(_) => Ok(None),
            Self::Etcd(store) => Ok(store.owner(public_ip).await?),
        }
    }

    /// Removes a record that is still as it was listed; `false` when it is not.
    pub(super) async fn remove(&self, claim: &Claim) -> Result<bool> {
        match (self, claim) {
            (Self::Dir(store), claim) => store.remove(claim.record()),
            (Self::Etcd(store), Claim::Etcd(listed)) => Ok(store.remove(listed).await?),
            (Self::Etcd(_), Claim::Dir(_)) => Ok(false),
        }
    }
}
