//! Which running agent speaks for a public address, so that two hosts with the same one do not share a subnet.
//!
//! flannel's record has no room for it, so it is a key of its own, outside `subnets/`, with an etcd lease of seconds: while an
//! agent lives the key does, and when it dies the key goes. Its value names the instance: this boot of this machine and
//! the network namespace. A restarted agent is the same instance and takes the key over at once; after a reboot or on a new
//! machine it waits until the key of the old one has gone; against one that is alive it refuses to start.

use std::{net::Ipv4Addr, time::Duration};

use etcd_client::{
    Compare, CompareOp, KeyValue, LeaseTimeToLiveOptions, PutOptions, Txn, TxnOp, TxnOpResponse,
};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::{error::EtcdError, session::Session};

/// What stands in the key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    /// The instance, compared as a whole.
    instance: String,
    /// For people.
    host: String,
}

/// What came of one attempt.
pub(super) enum Claim {
    /// It is ours, with this etcd lease. `None`: this user may not write the key, so nobody is told apart.
    Ours(Option<i64>),
    /// Another instance has it.
    Theirs(Box<KeyValue>),
}

impl Session {
    /// Claims the address, waiting for the key of an agent that is gone to expire.
    pub(super) async fn claim(&self, public_ip: Ipv4Addr) -> Result<Option<i64>, EtcdError> {
        let mut seen: Option<Seen> = None;
        loop {
            let other = match self.try_claim(public_ip).await? {
                Claim::Ours(lease) => return Ok(lease),
                Claim::Theirs(other) => other,
            };
            let remaining = self.remaining(other.lease()).await?;
            let seen = seen.get_or_insert_with(|| {
                info!("{public_ip} was claimed by {}: waiting to see whether it is gone", name(&other));
                Seen {
                    lease: other.lease(),
                    remaining,
                    until: Instant::now() + remaining + Duration::from_secs(2),
                }
            });
            // Only a live agent renews its lease or makes a new one; a key without a lease would stay for ever.
            let renewed = other.lease() != seen.lease || remaining > seen.remaining;
            if other.lease() == 0 || renewed || Instant::now() > seen.until {
                return Err(self.same_public_ip(public_ip, &other));
            }
            seen.remaining = remaining;
            sleep(Duration::from_millis(500)).await;
        }
    }

    /// The error for an address that another live agent has.
    pub(super) fn same_public_ip(&self, public_ip: Ipv4Addr, other: &KeyValue) -> EtcdError {
        EtcdError::SamePublicIp { public_ip, holder: name(other), key: self.keys.owner(public_ip) }
    }

    /// Claims the address if nobody else has it.
    pub(super) async fn try_claim(&self, public_ip: Ipv4Addr) -> Result<Claim, EtcdError> {
        let key = self.keys.owner(public_ip);
        let operation = format!("claim the public address {public_ip} in etcd");
        let owner = Owner { instance: self.instance(), host: host_name() };
        let value = serde_json::to_string(&owner)
            .map_err(|error| EtcdError::Failed { operation: operation.clone(), why: error.to_string() })?;
        let lease = self.grant(self.options.owner_ttl).await?;
        let put = TxnOp::put(key.clone(), value, Some(PutOptions::new().with_lease(lease)));
        // What must be true of the key for it to be ours: it is not there, or it is the one that an earlier run of this
        // instance left.
        let mut expected = Compare::version(key.clone(), CompareOp::Equal, 0);
        let mut left_over = None;
        loop {
            let transaction =
                Txn::new().when([expected]).and_then([put.clone()]).or_else([TxnOp::get(key.clone(), None)]);
            let answer =
                self.request(&operation, |mut client| async move { client.txn(transaction).await }).await;
            let answer = match answer {
                Ok(answer) => answer,
                Err(EtcdError::Denied { why, .. }) => {
                    self.revoke(lease).await;
                    warn!(
                        "two hosts with the address {public_ip} would not be told apart: etcd does not let this user write {key}: {why}"
                    );
                    return Ok(Claim::Ours(None));
                }
                Err(error) => return Err(error),
            };
            if answer.succeeded() {
                if let Some(left_over) = left_over {
                    self.revoke(left_over).await;
                }
                return Ok(Claim::Ours(Some(lease)));
            }
            match got(answer.op_responses()) {
                Some(found) if is_instance(&found, &owner.instance) => {
                    left_over = Some(found.lease()).filter(|lease| *lease != 0);
                    expected = Compare::mod_revision(key.clone(), CompareOp::Equal, found.mod_revision());
                }
                Some(found) => {
                    self.revoke(lease).await;
                    return Ok(Claim::Theirs(Box::new(found)));
                }
                // Gone since.
                None => expected = Compare::version(key.clone(), CompareOp::Equal, 0),
            }
        }
    }

    /// Who has claimed the address, in words; nobody when no agent does.
    pub(super) async fn owner(&self, public_ip: Ipv4Addr) -> Result<Option<String>, EtcdError> {
        let key = self.keys.owner(public_ip);
        let operation = format!("read {key} in etcd");
        let mut answer =
            self.request(&operation, |mut client| async move { client.get(key, None).await }).await?;
        Ok(answer.take_kvs().pop().map(|kv| name(&kv)))
    }

    /// Gives the address up.
    pub(super) async fn disclaim(&self, owner: Option<i64>) {
        if let Some(lease) = owner {
            self.revoke(lease).await;
        }
    }

    /// The condition that nobody else has claimed the address meanwhile.
    pub(super) fn still_owner(&self, public_ip: Ipv4Addr, owner: Option<i64>) -> Option<Compare> {
        owner.map(|lease| Compare::lease(self.keys.owner(public_ip), CompareOp::Equal, lease))
    }

    /// A new etcd lease.
    pub(super) async fn grant(&self, ttl: Duration) -> Result<i64, EtcdError> {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        let answer =
            self.request("make a lease in etcd", |mut client| async move {
                client.lease_grant(seconds, None).await
            })
            .await?;
        Ok(answer.id())
    }

    /// Ends an etcd lease, as far as possible: what cannot be ended now ends by itself.
    pub(super) async fn revoke(&self, lease: i64) {
        let ended = self
            .request("end a lease in etcd", |mut client| async move { client.lease_revoke(lease).await })
            .await;
        if let Err(error) = ended {
            tracing::debug!("{error}");
        }
    }

    async fn remaining(&self, lease: i64) -> Result<Duration, EtcdError> {
        if lease == 0 {
            return Ok(Duration::ZERO);
        }
        let answer = self
            .request("read a lease in etcd", |mut client| async move {
                client.lease_time_to_live(lease, None::<LeaseTimeToLiveOptions>).await
            })
            .await?;
        // -1 says that it has ended.
        Ok(Duration::from_secs(u64::try_from(answer.ttl()).unwrap_or(0)))
    }

    fn instance(&self) -> String {
        self.options.instance.clone().unwrap_or_else(this_instance)
    }
}

/// Another instance's claim when it was seen first.
struct Seen {
    lease: i64,
    remaining: Duration,
    until: Instant,
}

/// Whether a key is a claim of `instance`.
fn is_instance(kv: &KeyValue, instance: &str) -> bool {
    serde_json::from_slice::<Owner>(kv.value()).is_ok_and(|owner| owner.instance == instance)
}

fn name(kv: &KeyValue) -> String {
    match serde_json::from_slice::<Owner>(kv.value()) {
        Ok(owner) => format!("on host {}", owner.host),
        Err(_) => "which left no readable name".to_owned(),
    }
}

fn got(answers: Vec<TxnOpResponse>) -> Option<KeyValue> {
    answers.into_iter().find_map(|answer| match answer {
        TxnOpResponse::Get(mut answer) => answer.take_kvs().pop(),
        TxnOpResponse::Put(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => None,
    })
}

/// A machine's boot id is a random number of the kernel, also in a clone of a virtual machine; the namespace tells hosts apart
/// that are namespaces of one machine.
fn this_instance() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/net").unwrap_or_default();
    format!("{} {}", boot.trim(), namespace.display())
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "(unknown)".to_owned() } else { name.trim().to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_is_this_boot_and_this_namespace() {
        let instance = this_instance();
        assert_eq!(instance, this_instance());
        assert!(instance.len() > 36 && instance.contains("net:["), "{instance}");
    }
}
