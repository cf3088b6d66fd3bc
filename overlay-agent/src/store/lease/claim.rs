//! Claims of running agents on public addresses, so that two hosts with one address do not share a subnet.
//!
//! flannel's record has no room for it, so the claim is a record of its own outside `subnets/`, with a lifetime of seconds: it
//! lives as long as its agent. Its value names the instance: this boot of this machine and the network namespace. A
//! restarted agent is the same instance and takes the claim over; after a reboot or on a new machine it waits until the old
//! claim has ended; against a live one it refuses to start.

use std::{net::Ipv4Addr, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use crate::store::{
    Store, StoreError,
    backend::{Expected, Write},
    record::{LifetimeId, RawRecord},
};

/// Interval of looks at a claim of another agent that may be gone.
const POLL: Duration = Duration::from_millis(500);
/// How long a claim may outlive its lifetime.
const GRACE: Duration = Duration::from_secs(2);

/// The value of a claim.
#[derive(Serialize, Deserialize)]
struct Claimant {
    /// Compared as a whole.
    instance: String,
    /// For messages.
    host: String,
}

/// Our claim on an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) public_ip: Ipv4Addr,
    /// `None` where no claim can be written, so that hosts with one address cannot be distinguished.
    pub(super) lifetime: Option<LifetimeId>,
}

impl Claim {
    /// The condition that the claim still holds.
    pub(super) fn holds(self) -> Option<(String, Expected)> {
        self.lifetime.map(|lifetime| (key(self.public_ip), Expected::Attached(lifetime)))
    }
}

enum Claimed {
    Ours(Claim),
    /// Another instance holds it.
    Theirs(RawRecord),
}

/// The record that holds the claim on an address. flannel looks only below `subnets` and never sees it.
pub(super) fn key(public_ip: Ipv4Addr) -> String {
    format!("overlay-agent/owners/{public_ip}")
}

impl Store {
    /// Claims the address. With `wait`, the claim of an agent that is gone may end first.
    pub(super) async fn claim(&self, public_ip: Ipv4Addr, wait: bool) -> Result<Claim, StoreError> {
        let mut seen = None;
        loop {
            let other = match self.try_claim(public_ip).await? {
                Claimed::Ours(claim) => return Ok(claim),
                Claimed::Theirs(other) => other,
            };
            // Only a live agent renews its claim or makes a new one; a claim without a lifetime would stay for ever.
            let Some(lifetime) = other.version.lifetime.id().filter(|_| wait) else {
                return Err(self.same_public_ip(public_ip, &other));
            };
            let left = self.backend.lifetimes()?.time_left(lifetime).await?.unwrap_or_default();
            let (first, before, until) = *seen.get_or_insert_with(|| {
                info!("{public_ip} is claimed by {}: waiting for the claim to end", name(&other));
                (lifetime, left, Instant::now() + left + GRACE)
            });
            if lifetime != first || left > before || Instant::now() > until {
                return Err(self.same_public_ip(public_ip, &other));
            }
            seen = Some((first, left, until));
            sleep(POLL).await;
        }
    }

    /// Claims the address if no other instance has it.
    async fn try_claim(&self, public_ip: Ipv4Addr) -> Result<Claimed, StoreError> {
        if !self.backend.has_lifetimes() {
            return Ok(Claimed::Ours(Claim { public_ip, lifetime: None }));
        }
        let key = key(public_ip);
        let claimant = Claimant { instance: self.instance.clone(), host: host_name() };
        let value = serde_json::to_string(&claimant)
            .map_err(|error| StoreError::failed(format!("claim {public_ip}"), error))?;
        let lifetime = Some(self.backend.lifetimes()?.grant(self.times.claim_ttl).await?);
        let mut expected = Expected::Absent;
        let mut leftover = None;
        loop {
            let write = Write { lifetime, ..Write::new(&key, expected, Some(value.clone())) };
            match self.backend.write(write).await {
                Ok(Some(_)) => {
                    self.revoke(leftover).await;
                    return Ok(Claimed::Ours(Claim { public_ip, lifetime }));
                }
                Ok(None) => {}
                Err(StoreError::Denied { why, .. }) => {
                    self.revoke(lifetime).await;
                    warn!(
                        "two hosts with the address {public_ip} could not be distinguished: etcd does not let this user write {}: {why}",
                        self.backend.location(&key)
                    );
                    return Ok(Claimed::Ours(Claim { public_ip, lifetime: None }));
                }
                Err(error) => return Err(error),
            }
            match self.backend.get_one(&key).await? {
                Some(found) if is_instance(&found, &self.instance) => {
                    leftover = found.version.lifetime.id();
                    expected = Expected::Unchanged(found.version);
                }
                Some(found) => {
                    self.revoke(lifetime).await;
                    return Ok(Claimed::Theirs(found));
                }
                // It ended since.
                None => expected = Expected::Absent,
            }
        }
    }

    /// Ends lifetimes and removes their records. A failure is only logged: the lifetime then ends by itself.
    pub(in crate::store) async fn revoke(&self, lifetimes: impl IntoIterator<Item = LifetimeId>) {
        for lifetime in lifetimes {
            let revoked = async { self.backend.lifetimes()?.revoke(lifetime).await };
            if let Err(error) = revoked.await {
                debug!("{error}");
            }
        }
    }

    /// The running agent that has claimed a public address, in words. `None` for hosts that run flannel and in a directory.
    /// Fails when the store cannot be read.
    pub async fn claimant(&self, public_ip: Ipv4Addr) -> Result<Option<String>, StoreError> {
        match self.backend.has_lifetimes() {
            true => Ok(self.backend.get_one(&key(public_ip)).await?.as_ref().map(name)),
            false => Ok(None),
        }
    }

    /// The error for an address that another live agent has.
    pub(super) fn same_public_ip(&self, public_ip: Ipv4Addr, other: &RawRecord) -> StoreError {
        let key = self.backend.location(&key(public_ip));
        StoreError::SamePublicIp { public_ip, holder: name(other), key }
    }
}

fn is_instance(record: &RawRecord, instance: &str) -> bool {
    serde_json::from_slice::<Claimant>(&record.value).is_ok_and(|claimant| claimant.instance == instance)
}

fn name(record: &RawRecord) -> String {
    match serde_json::from_slice::<Claimant>(&record.value) {
        Ok(claimant) => format!("on host {}", claimant.host),
        Err(_) => "which left no readable name".to_owned(),
    }
}

/// The boot id is a random number of the kernel, also in a clone of a virtual machine; the namespace tells hosts apart that
/// are namespaces of one machine.
pub(in crate::store) fn this_instance() -> String {
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
