//! Acquires a subnet, releases it, and writes this host's record.

use std::net::Ipv4Addr;

use tracing::{info, warn};

use super::{
    ATTEMPTS, Claim, Held, SubnetRequest,
    choose::{Choice, choose},
    claim,
};
use crate::{
    lease::{self, Lease, LeaseRecord},
    route::Subnet,
    store::{
        Store, StoreError,
        backend::{Backend, Expected, Write, Written},
        record::{Kind as _, LifetimeId, Version},
    },
};

/// The full key of a lease record.
pub(super) fn record_key(key: &str) -> String {
    format!("{}{key}", Lease::PREFIX)
}

impl Store {
    /// Acquires a subnet for the host at `public_ip`: the wanted one, else the one whose record carries its address, else the
    /// earlier one if it is free, else any free one. A lease of this host on another subnet makes room for a wanted one.
    ///
    /// When another agent has claimed the same address, this waits for its claim to end, which takes up to the claim's time
    /// to live after that agent has died.
    ///
    /// Fails when the store cannot be used, another live agent has the same address, the wanted subnet is not
    /// available, or the network is full.
    pub async fn acquire(&self, request: &SubnetRequest, public_ip: Ipv4Addr) -> Result<Held, StoreError> {
        if let Backend::Dir(dir) = &self.backend {
            dir.blocking(|dir| dir.create::<Lease>()).await?;
        }
        let claim = self.claim(public_ip, true).await?;
        let taken = self.take_subnet(request, claim).await;
        if taken.is_err() {
            self.revoke(claim.lifetime).await;
        }
        taken
    }

    /// Takes a subnet for a host that has claimed its address. Safe to repeat: a record that an earlier attempt wrote carries
    /// our address and is found again.
    pub(super) async fn take_subnet(
        &self,
        request: &SubnetRequest,
        claim: Claim,
    ) -> Result<Held, StoreError> {
        // Granted at most once, whatever the number of attempts.
        let mut granted = None;
        let taken = self.try_to_take(request, claim, &mut granted).await;
        let in_use = taken.as_ref().ok().and_then(|held| held.lifetime);
        self.revoke(granted.filter(|_| granted != in_use)).await;
        taken
    }

    async fn try_to_take(
        &self,
        request: &SubnetRequest,
        claim: Claim,
        granted: &mut Option<LifetimeId>,
    ) -> Result<Held, StoreError> {
        let held = |key: String, subnet, Version { created: created_at, lifetime, .. }, created| Held {
            subnet,
            created,
            key,
            lifetime: lifetime.id(),
            created_at,
            claim,
            request: request.clone(),
        };
        for _ in 0..ATTEMPTS {
            match choose(&self.backend.list().await?, request, claim.public_ip)? {
                Choice::Keep(record, subnet) => {
                    if self.keep_record(&record, claim).await? {
                        return Ok(held(record.key.to_string(), subnet, record.version, false));
                    }
                }
                Choice::Discard(record) => {
                    match request.wanted {
                        Some(wanted) => info!("our lease {} makes room for --subnet {wanted}", record.key),
                        None => info!("the lease {} no longer fits the network config: removed", record.key),
                    }
                    self.overwrite(&record.key, record.version, None, None, claim.holds()).await?;
                }
                Choice::Take(subnet) => {
                    if granted.is_none() && self.backend.has_lifetimes() {
                        *granted = Some(self.backend.lifetimes()?.grant(self.times.lease_ttl).await?);
                    }
                    if let Some(version) = self.create(subnet, *granted, claim).await? {
                        return Ok(held(lease::key(subnet), subnet, version, true));
                    }
                }
            }
            // Another writer was faster. It must not be another agent with our own address.
            self.check_claim(claim).await?;
        }
        Err(StoreError::Contended(ATTEMPTS))
    }

    /// Fails when another agent has taken over our claim, or it has ended.
    async fn check_claim(&self, claim: Claim) -> Result<(), StoreError> {
        let Claim { public_ip, lifetime: Some(lifetime) } = claim else { return Ok(()) };
        match self.backend.get_one(&claim::key(public_ip)).await? {
            Some(record) if record.version.lifetime.id() == Some(lifetime) => Ok(()),
            Some(record) => Err(self.same_public_ip(public_ip, &record)),
            None => Err(StoreError::away("check our claim", format!("our claim on {public_ip} has expired"))),
        }
    }

    /// Releases a subnet: removes its record if it is still ours. A reservation stays.
    /// Fails when the store cannot be written.
    pub async fn release(&self, held: &Held) -> Result<(), StoreError> {
        let key = record_key(&held.key);
        let ours = match held.lifetime {
            Some(lifetime) => Some(Expected::Attached(lifetime)),
            None if self.backend.has_lifetimes() => None,
            None => {
                let record = self.backend.get_one(&key).await?.map(LeaseRecord::from);
                let ours = record.filter(|record| record.holder() == Some(held.public_ip()));
                ours.map(|record| Expected::Unchanged(record.version))
            }
        };
        if let Some(ours) = ours {
            let mut write = Write::new(key, ours, None);
            write.when.extend(held.claim.holds());
            // A lifetime that still has our record, though the address is no longer ours, has another user.
            if self.backend.write(write).await?.is_some() {
                self.revoke(held.lifetime).await;
            }
        }
        self.leave(held).await;
        Ok(())
    }

    /// Gives up the claim on the public address. The record stays for the next start of this host.
    pub async fn leave(&self, held: &Held) {
        self.revoke(held.claim.lifetime).await;
    }

    /// Writes our record over a version of it that cannot be read, attached to our lifetime if that has not ended, else to a
    /// new one. `None` when the record changed meanwhile.
    pub(super) async fn restore(&self, held: &Held, version: Version) -> Result<Option<Held>, StoreError> {
        let lifetime = match held.lifetime {
            Some(lifetime) if self.backend.lifetimes()?.renew(lifetime).await? => Some(lifetime),
            Some(_) => Some(self.backend.lifetimes()?.grant(self.times.lease_ttl).await?),
            None => None,
        };
        let value = Some(lease::value(held.public_ip()));
        let written = self.overwrite(&held.key, version, value, lifetime, held.claim.holds()).await;
        if !matches!(written, Ok(true)) {
            self.revoke(lifetime.filter(|_| lifetime != held.lifetime)).await;
        }
        Ok(written?.then(|| Held { lifetime, ..held.clone() }))
    }

    /// Renews a record that is ours already. `false` when it changed meanwhile.
    async fn keep_record(&self, record: &LeaseRecord, claim: Claim) -> Result<bool, StoreError> {
        let lifetime = record.version.lifetime.id();
        if let Some(lifetime) = lifetime
            && !self.backend.lifetimes()?.renew(lifetime).await?
        {
            return Ok(false);
        }
        match record.value.as_ref().ok().and_then(|value| value.backend_type.as_ref()) {
            // It is a record of this backend, in whatever form flannel or the operator wrote it.
            None => Ok(true),
            Some(other) => {
                warn!("the record {} was of the {other} backend and is of udp now", record.key);
                let value = Some(lease::value(claim.public_ip));
                self.overwrite(&record.key, record.version, value, lifetime, claim.holds()).await
            }
        }
    }

    /// Writes or removes a record that is still `version`. `false` when it is not.
    async fn overwrite(
        &self,
        key: &str,
        version: Version,
        value: Option<String>,
        lifetime: Option<LifetimeId>,
        conditions: impl IntoIterator<Item = (String, Expected)>,
    ) -> Result<bool, StoreError> {
        let mut write = Write::new(record_key(key), Expected::Unchanged(version), value);
        write.when.extend(conditions);
        Ok(self.backend.write(Write { lifetime, ..write }).await?.is_some())
    }

    /// Writes a record that must not exist yet. `None` when it exists, or when a record of another prefix length overlaps
    /// it: the write sees all records that were there before, so of two such records exactly the later one is taken back.
    async fn create(
        &self,
        subnet: Subnet,
        lifetime: Option<LifetimeId>,
        claim: Claim,
    ) -> Result<Option<Version>, StoreError> {
        let key = record_key(&lease::key(subnet));
        let value = Some(lease::value(claim.public_ip));
        let mut write = Write::new(&key, Expected::Absent, value);
        write.when.extend(claim.holds());
        (write.lifetime, write.list) = (lifetime, Some(Lease::PREFIX));
        let Some(Written { version, keys }) = self.backend.write(write).await? else { return Ok(None) };
        let others = keys.iter().filter(|other| **other != key);
        let mut subnets =
            others.filter_map(|other| Lease::parse_key(other.strip_prefix(Lease::PREFIX)?).ok());
        if subnets.any(|other| other.overlaps(subnet)) {
            self.backend.write(Write::new(key, Expected::Unchanged(version), None)).await?;
            return Ok(None);
        }
        Ok(Some(version))
    }

    /// Writes our record under the address of another claim of ours. `false` when the record is not ours any more: it is read
    /// after the wait for the claim, and what another writer wrote meanwhile stays.
    pub(super) async fn move_record(&self, held: &Held, to: Claim) -> Result<bool, StoreError> {
        let record = self.backend.get_one(&record_key(&held.key)).await?.map(LeaseRecord::from);
        let Some(record) = record.filter(|record| {
            record.holder() == Some(held.public_ip()) && record.version.lifetime.id() == held.lifetime
        }) else {
            return Ok(false);
        };
        let old_claim = match self.successor(held).await? {
            None => held.claim.holds(),
            Some(other) => {
                info!(
                    "the host of {} has our old address {} now: {} is still ours",
                    other.key,
                    held.public_ip(),
                    held.key
                );
                Some((record_key(&other.key), Expected::Unchanged(other.version)))
            }
        };
        let conditions = old_claim.into_iter().chain(to.holds());
        let value = Some(lease::value(to.public_ip));
        self.overwrite(&held.key, record.version, value, held.lifetime, conditions).await
    }

    /// The record of another host that has claimed our old address and holds a subnet of its own. A host that started at that
    /// address without one takes the record that carries it, which is ours; then there is no such record.
    async fn successor(&self, held: &Held) -> Result<Option<LeaseRecord>, StoreError> {
        if !matches!(self.check_claim(held.claim).await, Err(StoreError::SamePublicIp { .. })) {
            return Ok(None);
        }
        let theirs =
            |record: &LeaseRecord| *record.key != held.key && record.holder() == Some(held.public_ip());
        Ok(self.backend.list().await?.into_iter().find(theirs))
    }
}
