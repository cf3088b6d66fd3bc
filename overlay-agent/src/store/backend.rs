//! The primitives that every store offers: read, list, compare-and-swap, lifetimes and waiting for a change.
//!
//! All keys are relative to the store's own prefix or directory. A directory has no lifetimes: its records have no end.

use std::sync::Arc;

use super::{
    StoreError,
    dir::{self, Dir},
    etcd::{self, Etcd},
    record::{Kind, LifetimeId, RawRecord, Record, Version},
};

/// What must be true of a record for a write to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// There is no such record.
    Absent,
    /// The record is unchanged.
    Unchanged(Version),
    /// The record is attached to this lifetime, whatever its value.
    Attached(LifetimeId),
}

/// A write that happens as a whole or not at all.
#[derive(Clone, Debug)]
pub(super) struct Write {
    pub(super) key: String,
    /// `None` removes the record.
    pub(super) value: Option<String>,
    /// The lifetime that the written record is attached to.
    pub(super) lifetime: Option<LifetimeId>,
    /// Conditions, each with the key that it is about.
    pub(super) when: Vec<(String, Expected)>,
    /// List the keys with this prefix in the same step.
    pub(super) list: Option<&'static str>,
}

/// A write that happened.
pub(super) struct Written {
    pub(super) version: Version,
    /// The keys that [`Write::list`] asked for.
    pub(super) keys: Vec<String>,
}

impl Write {
    /// A write of `value`, or a removal, that needs `expected` to be true of the record.
    pub(super) fn new(key: impl Into<String>, expected: Expected, value: Option<String>) -> Self {
        let key = key.into();
        let when = vec![(key.clone(), expected)];
        Self { key, value, lifetime: None, when, list: None }
    }
}

/// Records of one revision; 0 in a directory.
#[derive(Clone, Debug)]
pub(super) struct Snapshot<T> {
    pub(super) revision: i64,
    pub(super) records: T,
}

/// One of the two stores. Clones share it.
#[derive(Clone, Debug)]
pub(super) enum Backend {
    Dir(Arc<Dir>),
    Etcd(Arc<Etcd>),
}

/// Waits for changes of a few keys.
pub(super) enum KeyWatch {
    Dir(Box<dir::KeyWatch>),
    Etcd(Box<etcd::KeyWatch>),
}

impl KeyWatch {
    /// Returns when one of the keys may have changed.
    pub(super) async fn changed(&mut self) -> Result<(), StoreError> {
        match self {
            Self::Dir(watch) => watch.changed().await,
            Self::Etcd(watch) => watch.changed().await,
        }
    }
}

impl Backend {
    /// Whether records can be attached to lifetimes. Where not, no host can tell whether another one is alive.
    pub(super) fn has_lifetimes(&self) -> bool {
        matches!(self, Self::Etcd(_))
    }

    /// Where a key is, for messages.
    pub(super) fn location(&self, key: &str) -> String {
        match self {
            Self::Dir(dir) => dir.path(key).display().to_string(),
            Self::Etcd(etcd) => etcd.keys.location(key),
        }
    }

    /// One element for each key; `None` where there is no record.
    pub(super) async fn get(
        &self,
        keys: Vec<String>,
    ) -> Result<Snapshot<Vec<Option<RawRecord>>>, StoreError> {
        match self {
            Self::Dir(dir) => {
                let records = dir.blocking(move |dir| Ok(dir.get(&keys))).await?;
                Ok(Snapshot { revision: 0, records })
            }
            Self::Etcd(etcd) => etcd.get(&keys).await,
        }
    }

    pub(super) async fn get_one(&self, key: &str) -> Result<Option<RawRecord>, StoreError> {
        Ok(self.get(vec![key.to_owned()]).await?.records.pop().flatten())
    }

    /// All records of a kind, in order of their keys.
    pub(super) async fn list<K: Kind>(&self) -> Result<Vec<Record<K>>, StoreError> {
        match self {
            Self::Dir(dir) => dir.blocking(|dir| dir.list()).await,
            Self::Etcd(etcd) => Ok(etcd.list().await?.records),
        }
    }

    /// Writes if all conditions hold; `None` when one does not.
    pub(super) async fn write(&self, write: Write) -> Result<Option<Written>, StoreError> {
        match self {
            Self::Dir(dir) => dir.blocking(move |dir| dir.write(&write)).await,
            Self::Etcd(etcd) => etcd.write(write).await,
        }
    }

    /// Waits for changes of `keys` after `revision`; in a directory, which has no revisions, after now. All keys are of one kind.
    pub(super) async fn watch_keys(&self, keys: &[String], revision: i64) -> Result<KeyWatch, StoreError> {
        match self {
            Self::Dir(dir) => {
                let key = keys.first().map_or("", String::as_str);
                Ok(KeyWatch::Dir(Box::new(dir.watch(key)?)))
            }
            Self::Etcd(etcd) => Ok(KeyWatch::Etcd(Box::new(etcd.watch_keys(keys, revision).await?))),
        }
    }

    /// The store's lifetimes.
    /// Fails in a directory, see [`Self::has_lifetimes`].
    pub(super) fn lifetimes(&self) -> Result<&Etcd, StoreError> {
        match self {
            Self::Etcd(etcd) => Ok(etcd),
            Self::Dir(_) => Err(StoreError::failed("use a lifetime", "a directory has none")),
        }
    }
}
