//! The records of the network as this host last knew them, kept in a file, so that a host that boots while etcd is away has a
//! network.
//!
//! In reading order: this file (the records in memory, as the followers and the keeper of the lease report them), `file` (the
//! format), `saved` (whether a file may be used), `keeper` (the task that writes it).
//!
//! Records are kept as etcd has them, not parsed: what this agent cannot use, its next version may. One mechanism holds all kinds. A
//! directory store needs none: it is on this host's disk already.

mod file;
mod keeper;
mod saved;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub use keeper::ArchiveKeeper;
pub(super) use keeper::keep;
pub use saved::{Saved, Unusable};

use super::record::{Kind, LifetimeId, Record, Version};
use crate::route::Subnet;

/// What tells the records of one network from those of another: where they were read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    /// The prefix of the keys in etcd.
    pub(super) prefix: String,
    /// etcd's endpoints. Networks that share one of them are on the same etcd.
    pub(super) endpoints: Vec<String>,
}

/// This host's own lease, as it was last confirmed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct OwnLease {
    pub(super) subnet: Subnet,
    /// Key of its record behind `subnets/`.
    pub(super) key: String,
    pub(super) public_ip: Ipv4Addr,
    /// The lifetime of the record; `None` for a reservation.
    pub(super) lifetime: Option<LifetimeId>,
    /// Revision at which the record was created.
    pub(super) created_at: Option<i64>,
    /// When it ends without another renewal; `None` for a reservation.
    pub(super) expires: Option<Time>,
}

impl OwnLease {
    fn has_ended(&self, now: SystemTime) -> bool {
        self.expires.is_some_and(|end| SystemTime::from(end) <= now)
    }
}

/// A time of the wall clock, in milliseconds since 1970: a monotonic clock does not survive a reboot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Time(u64);

impl From<SystemTime> for Time {
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
}

impl From<Time> for SystemTime {
    fn from(Time(milliseconds): Time) -> Self {
        // A time in the far future, which only a damaged file has, is as good as none.
        Self::UNIX_EPOCH.checked_add(Duration::from_millis(milliseconds)).unwrap_or(Self::UNIX_EPOCH)
    }
}

/// The value of a record, and which write it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Raw {
    pub(super) value: Arc<[u8]>,
    pub(super) version: Version,
}

impl Raw {
    /// The record whose key behind the prefix of its kind is `key`.
    pub(super) fn parse<K: Kind>(&self, key: &Arc<str>) -> Record<K> {
        Record::of(Arc::clone(key), &self.value, self.version)
    }
}

/// Records of a kind by the key behind its prefix. Not parsed: that takes less memory, and copies share keys and values.
pub(super) type Known = BTreeMap<Arc<str>, Raw>;

/// The records of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    /// Revision of etcd at which they were as they are.
    revision: i64,
    /// When they were last known to be as etcd has them.
    seen: Time,
    /// Shared with a task that writes them, and copied only when one changes meanwhile.
    records: Arc<Known>,
}

/// What the file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Content {
    /// The network's configuration.
    config: Option<String>,
    own: Option<OwnLease>,
    /// By the prefix of the kind.
    parts: BTreeMap<String, Part>,
}

/// The content, and how much of it is of this run.
#[derive(Debug, Default)]
struct State {
    content: Content,
    /// Kinds that are followed and were not listed yet. Without them, the file would be worse than the one before.
    pending: BTreeSet<&'static str>,
    /// Kinds whose records are as etcd has them now.
    current: BTreeSet<&'static str>,
    /// Kinds whose records are still those of the file.
    recalled: BTreeSet<String>,
    knows_config: bool,
    knows_own: bool,
}

/// The records of one network, as the store reports them. Clones of a [`super::Store`] share it; one task at a time follows a kind.
#[derive(Debug)]
pub(super) struct Archive {
    identity: Identity,
    state: Mutex<State>,
    /// Counts changes, for the task that writes them.
    changes: watch::Sender<u64>,
}

/// Records of the file, for a store that does not answer.
pub(super) struct Recalled {
    pub(super) records: Known,
    /// The time of which they are.
    pub(super) seen: SystemTime,
}

impl Archive {
    /// An archive without records.
    pub(super) fn new(identity: Identity) -> Self {
        Self { identity, state: Mutex::default(), changes: watch::Sender::new(0) }
    }

    /// The archive of a file, with which the host starts while the store is away.
    fn recall(identity: Identity, content: Content) -> Self {
        let recalled = content.parts.keys().cloned().collect();
        let state = State { content, recalled, knows_config: true, knows_own: true, ..State::default() };
        Self { identity, state: Mutex::new(state), changes: watch::Sender::new(0) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is locked, and half a change of this copy would only be half a change in the file.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|changes| *changes = changes.wrapping_add(1));
    }

    /// A task follows a kind: no file is written before it was listed. Returns what the file had of it, until then.
    pub(super) fn follow<K: Kind>(&self) -> Option<Recalled> {
        let mut state = self.state();
        let part = state.content.parts.get(K::PREFIX).filter(|_| state.recalled.contains(K::PREFIX)).cloned();
        let Some(Part { seen, records, .. }) = part else {
            if !state.content.parts.contains_key(K::PREFIX) {
                state.pending.insert(K::PREFIX);
            }
            return None;
        };
        Some(Recalled { records: Arc::unwrap_or_clone(records), seen: seen.into() })
    }

    /// All records of a kind at a revision. Others that are known stay if `stays` says so of their keys.
    pub(super) fn list<K: Kind>(&self, revision: i64, records: &Known, stays: impl Fn(&str) -> bool) {
        let mut state = self.state();
        let before = state.content.parts.remove(K::PREFIX).map(|part| part.records).unwrap_or_default();
        let kept = before.iter().filter(|(key, _)| stays(key) && !records.contains_key(*key));
        let all = kept.chain(records).map(|(key, raw)| (Arc::clone(key), raw.clone()));
        let part = Part { revision, seen: SystemTime::now().into(), records: Arc::new(all.collect()) };
        state.content.parts.insert(K::PREFIX.to_owned(), part);
        state.pending.remove(K::PREFIX);
        state.recalled.remove(K::PREFIX);
        state.current.insert(K::PREFIX);
        drop(state);
        self.changed();
    }

    /// Changes of a kind up to a revision, in order: the new record of a key, or none if it is gone.
    pub(super) fn apply<K: Kind>(
        &self,
        revision: i64,
        changes: impl IntoIterator<Item = (Arc<str>, Option<Raw>)>,
    ) {
        let mut state = self.state();
        let Some(part) = state.content.parts.get_mut(K::PREFIX) else { return };
        (part.revision, part.seen) = (revision, SystemTime::now().into());
        let records = Arc::make_mut(&mut part.records);
        for (key, raw) in changes {
            match raw {
                Some(raw) => drop(records.insert(key, raw)),
                None => drop(records.remove(&key)),
            }
        }
        drop(state);
        self.changed();
    }

    /// A kind cannot be read any more.
    pub(super) fn lose<K: Kind>(&self) {
        let mut state = self.state();
        if state.current.remove(K::PREFIX)
            && let Some(part) = state.content.parts.get_mut(K::PREFIX)
        {
            part.seen = SystemTime::now().into();
        }
    }

    /// The network's configuration as it is stored.
    pub(super) fn set_config(&self, config: Option<String>) {
        let mut state = self.state();
        if !std::mem::replace(&mut state.knows_config, true) || state.content.config != config {
            state.content.config = config;
            drop(state);
            self.changed();
        }
    }

    /// This host's lease as it was just confirmed; `None` when it is lost.
    pub(super) fn set_own(&self, own: Option<OwnLease>) {
        let mut state = self.state();
        if !std::mem::replace(&mut state.knows_own, true) || state.content.own != own {
            state.content.own = own;
            drop(state);
            self.changed();
        }
    }

    /// A copy to be written, once everything was read that is followed. Records share their memory with it.
    fn complete(&self, now: SystemTime) -> Option<Content> {
        let mut state = self.state();
        if !state.pending.is_empty() || !state.knows_config || !state.knows_own {
            return None;
        }
        let State { content, current, .. } = &mut *state;
        for prefix in current.iter() {
            if let Some(part) = content.parts.get_mut(*prefix) {
                part.seen = now.into();
            }
        }
        Some(content.clone())
    }

    /// Whether any kind can be read now, so that the file's times can be renewed.
    fn is_current(&self) -> bool {
        !self.state().current.is_empty()
    }
}
