//! Writes of records of any kind: each happens only if what it replaces is as the writer knows it.

use super::{
    Kind, LifetimeId, Record, Store, StoreError, Version, Writable,
    backend::{Expected, Write},
};

/// What must be true of another record for a write to happen.
#[derive(Clone, Debug)]
pub struct Condition {
    key: String,
    expected: Expected,
}

impl Condition {
    /// There is no such record.
    pub fn absent<K: Writable>(id: &K::Id) -> Self {
        Self { key: full::<K>(id), expected: Expected::Absent }
    }

    /// The record is as it was read.
    pub fn unchanged<K: Kind>(record: &Record<K>) -> Self {
        let key = format!("{}{}", K::PREFIX, record.key);
        Self { key, expected: Expected::Unchanged(record.version) }
    }
}

/// The key behind the store's own prefix.
pub(super) fn full<K: Writable>(id: &K::Id) -> String {
    format!("{}{}", K::PREFIX, K::key(id))
}

impl Store {
    /// A record; `None` when there is none.
    /// Fails when the store cannot be read.
    pub async fn get<K: Writable>(&self, id: &K::Id) -> Result<Option<Record<K>>, StoreError> {
        Ok(self.backend.get_one(&full::<K>(id)).await?.map(Record::from))
    }

    /// Writes a record that must be new, under these conditions, and returns its version. `None` when it exists or a condition
    /// does not hold. Without `lifetime`, it stays until a client removes it.
    /// Fails when the store cannot be written, or `lifetime` is given for a directory, which has none.
    pub async fn create_record<K: Writable>(
        &self,
        id: &K::Id,
        value: &K::Value,
        lifetime: Option<LifetimeId>,
        conditions: &[Condition],
    ) -> Result<Option<Version>, StoreError> {
        self.write_record::<K>(id, Expected::Absent, value, lifetime, conditions).await
    }

    /// Replaces a record that must be as `version` says, under these conditions, and returns the new version. `None` when it
    /// changed or a condition does not hold. It is attached to `lifetime`, and to no other one any more.
    /// Fails when the store cannot be written, or `lifetime` is given for a directory, which has none.
    pub async fn replace_record<K: Writable>(
        &self,
        id: &K::Id,
        version: Version,
        value: &K::Value,
        lifetime: Option<LifetimeId>,
        conditions: &[Condition],
    ) -> Result<Option<Version>, StoreError> {
        self.write_record::<K>(id, Expected::Unchanged(version), value, lifetime, conditions).await
    }

    async fn write_record<K: Writable>(
        &self,
        id: &K::Id,
        expected: Expected,
        value: &K::Value,
        lifetime: Option<LifetimeId>,
        conditions: &[Condition],
    ) -> Result<Option<Version>, StoreError> {
        if lifetime.is_some() {
            self.backend.lifetimes()?;
        }
        let mut write = Write { lifetime, ..Write::new(full::<K>(id), expected, Some(K::text(value))) };
        let others = conditions.iter().map(|condition| (condition.key.clone(), condition.expected));
        write.when.extend(others);
        Ok(self.backend.write(write).await?.map(|written| written.version))
    }

    /// Whether records can end by themselves. Not in a directory: its records stay until a client removes them.
    pub fn has_lifetimes(&self) -> bool {
        self.backend.has_lifetimes()
    }

    /// Creates a lifetime that is not renewed, for records that are to end by themselves. [`Self::revoke_lifetime`] ends it before.
    /// Fails in a directory, and when the store cannot be written.
    pub async fn grant_lifetime(&self, duration: std::time::Duration) -> Result<LifetimeId, StoreError> {
        self.backend.lifetimes()?.grant(duration).await
    }

    /// Ends a lifetime and removes its records. One that cannot be ended now ends by itself.
    pub async fn revoke_lifetime(&self, lifetime: LifetimeId) {
        self.revoke([lifetime]).await;
    }
}
