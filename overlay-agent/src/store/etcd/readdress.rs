//! Moving a record to another public address of this host.

use std::net::Ipv4Addr;

use etcd_client::{Compare, CompareOp, Txn};
use tracing::info;

use super::{
    EtcdStore,
    acquire::{Held, put},
    error::EtcdError,
    records::Entry,
    session::Session,
};
use crate::lease;

impl EtcdStore {
    /// Puts the subnet under another public address of this host.
    ///
    /// # Errors
    ///
    /// When etcd does not answer or refuses, another live agent has the new address, or the record is no longer ours. The
    /// old claim then stands as it was.
    pub async fn readdress(&self, held: &Held, public_ip: Ipv4Addr) -> Result<Held, EtcdError> {
        if public_ip == held.public_ip {
            return Ok(held.clone());
        }
        let owner = self.session.claim(public_ip).await?;
        let moved = match self.session.put_under(held, public_ip, owner).await {
            Ok(true) => {
                self.session.disclaim(held.owner).await;
                return Ok(Held { public_ip, owner, ..held.clone() });
            }
            Ok(false) => EtcdError::Failed {
                operation: format!("put {} under {public_ip} in etcd", held.subnet),
                why: "the record is no longer ours".to_owned(),
            },
            Err(error) => error,
        };
        self.session.disclaim(owner).await;
        Err(moved)
    }
}

impl Session {
    /// Writes our record under an address that `owner` claims for us. `false` when it is not ours, or not any more: it is read
    /// here, behind the wait for the claim, and what somebody wrote meanwhile stays.
    pub(super) async fn put_under(
        &self,
        held: &Held,
        public_ip: Ipv4Addr,
        owner: Option<i64>,
    ) -> Result<bool, EtcdError> {
        let Some(entry) = self.entry(&held.key).await? else { return Ok(false) };
        let holder = entry.parsed().map(|value| value.public_ip);
        if holder != Some(held.public_ip) || entry.lease != held.lease.unwrap_or(0) {
            return Ok(false);
        }
        let old_claim = match self.is_replaced(held).await? {
            None => self.still_owner(held.public_ip, held.owner),
            Some(other) => {
                info!(
                    "our old address {} is that of the host of {} now: {} is still ours",
                    held.public_ip, other.key, held.key
                );
                let key = self.keys.record(&other.key);
                Some(Compare::mod_revision(key, CompareOp::Equal, other.mod_revision))
            }
        };
        let key = self.keys.record(&held.key);
        let conditions = [
            Compare::mod_revision(key.clone(), CompareOp::Equal, entry.mod_revision),
            Compare::lease(key.clone(), CompareOp::Equal, entry.lease),
        ]
        .into_iter()
        .chain(old_claim)
        .chain(self.still_owner(public_ip, owner))
        .collect::<Vec<_>>();
        let transaction =
            Txn::new().when(conditions).and_then([put(key, lease::value(public_ip), held.lease)]);
        let operation = format!("put {} under {public_ip} in etcd", held.subnet);
        let answer =
            self.request(&operation, |mut client| async move { client.txn(transaction).await }).await?;
        Ok(answer.succeeded())
    }

    /// When another host has claimed our old address: the record that it holds beside ours. A host that came to the address by
    /// starting there takes what carries it, which is then our record; one that brought its own subnet there, as when two hosts
    /// swap addresses, leaves ours alone.
    async fn is_replaced(&self, held: &Held) -> Result<Option<Entry>, EtcdError> {
        let Some(ours) = held.owner else { return Ok(None) };
        let key = self.keys.owner(held.public_ip);
        let what = format!("read {key} in etcd");
        let answer = self.request(&what, |mut client| async move { client.get(key, None).await }).await?;
        if answer.kvs().first().is_none_or(|claim| claim.lease() == ours) {
            return Ok(None);
        }
        let listing = self.list().await?;
        Ok(listing.entries.into_iter().find(|entry| {
            entry.key != held.key && entry.parsed().is_some_and(|value| value.public_ip == held.public_ip)
        }))
    }

    /// One record as it is now.
    async fn entry(&self, key: &str) -> Result<Option<Entry>, EtcdError> {
        let key = self.keys.record(key);
        let what = format!("read {key} in etcd");
        let answer = self.request(&what, |mut client| async move { client.get(key, None).await }).await?;
        Ok(answer.kvs().first().map(|kv| Entry::new(&self.keys, kv)))
    }
}
