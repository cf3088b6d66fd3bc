//! A file of an earlier run, and whether a host may start from it. Time is passed in.

use std::{
    net::Ipv4Addr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use thiserror::Error;

use super::{
    Archive, Content, Identity, OwnLease, Raw,
    file::{self, Archived, FileError},
};
use crate::{lease::Lease, route::Subnet, store::record::Kind as _};

/// How far the clock may be behind the time at which the file was written: clocks are corrected by small steps.
const CLOCK_STEP: Duration = Duration::from_secs(60);

/// Why a file cannot be used.
#[derive(Debug, Error)]
#[error(transparent)]
pub struct Unusable(#[from] Why);

#[derive(Debug, Error)]
enum Why {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("it is of another network: of {prefix} in etcd at {endpoints}")]
    Foreign { prefix: String, endpoints: String },
    #[error("it has no network config")]
    NoConfig,
    #[error("this host had no lease when it was written")]
    NoLease,
    #[error("its lease is of the public address {was}, and this host has {is}")]
    OtherAddress { was: Ipv4Addr, is: Ipv4Addr },
    #[error("its lease of {subnet} ended at {}", rfc3339(*.ended))]
    Expired { subnet: Subnet, ended: SystemTime },
    #[error(
        "it was written at {}, which is still to come by this host's clock: whether its lease has ended is unknown",
        rfc3339(*.0)
    )]
    Clock(SystemTime),
}

fn rfc3339(time: SystemTime) -> humantime::Rfc3339Timestamp {
    humantime::format_rfc3339_seconds(time)
}

impl Unusable {
    /// Whether the file is of no use to anybody, now and later.
    pub fn is_broken(&self) -> bool {
        matches!(self.0, Why::File(_))
    }
}

/// What an earlier run of this host knew of the network, and may be used.
#[derive(Debug)]
pub struct Saved {
    identity: Identity,
    written: SystemTime,
    content: Content,
    config: String,
    own: OwnLease,
}

impl Saved {
    /// Reads the file at `path`, of the network that `identity` names, for a host at `public_ip`; `None` when there is no file.
    /// Leases that have ended are left out. `ttl` is the time to live of a lease: the file does not tell when those of others end,
    /// but not later than that after they were seen.
    /// Fails when the file cannot be used.
    pub(in crate::store) fn read(
        path: &Path,
        identity: Identity,
        public_ip: Ipv4Addr,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Option<Self>, Unusable> {
        let Some(archived) = file::read(path).map_err(Why::from)? else { return Ok(None) };
        Ok(Some(Self::check(archived, identity, public_ip, ttl, now)?))
    }

    fn check(
        archived: Archived,
        identity: Identity,
        public_ip: Ipv4Addr,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Self, Why> {
        let Archived { identity: theirs, written, mut content } = archived;
        let shares_endpoint = theirs.endpoints.iter().any(|endpoint| identity.endpoints.contains(endpoint));
        if theirs.prefix != identity.prefix || !shares_endpoint {
            return Err(Why::Foreign { prefix: theirs.prefix, endpoints: theirs.endpoints.join(", ") });
        }
        let config = content.config.clone().ok_or(Why::NoConfig)?;
        let own = content.own.clone().ok_or(Why::NoLease)?;
        if own.public_ip != public_ip {
            return Err(Why::OtherAddress { was: own.public_ip, is: public_ip });
        }
        if written > now + CLOCK_STEP {
            return Err(Why::Clock(written));
        }
        if let Some(end) = own.expires.filter(|_| own.has_ended(now)) {
            return Err(Why::Expired { subnet: own.subnet, ended: end.into() });
        }
        if let Some(part) = content.parts.get_mut(Lease::PREFIX)
            && now.duration_since(part.seen.into()).is_ok_and(|age| age >= ttl)
        {
            let has_no_end = |_: &Arc<str>, raw: &mut Raw| raw.version.lifetime.id().is_none();
            Arc::make_mut(&mut part.records).retain(has_no_end);
        }
        Ok(Self { identity, written, content, config, own })
    }

    /// When it was written.
    pub fn written(&self) -> SystemTime {
        self.written
    }

    /// The highest revision of etcd that it knows.
    pub fn revision(&self) -> i64 {
        self.content.parts.values().map(|part| part.revision).max().unwrap_or_default()
    }

    /// The number of its records.
    pub fn records(&self) -> usize {
        self.content.parts.values().map(|part| part.records.len()).sum()
    }

    /// The network's configuration.
    pub fn config(&self) -> &str {
        &self.config
    }

    /// The subnet of this host's lease.
    pub fn subnet(&self) -> Subnet {
        self.own.subnet
    }

    /// The public address of this host's lease.
    pub fn public_ip(&self) -> Ipv4Addr {
        self.own.public_ip
    }

    /// Whether the lease has ended at the time `now`.
    pub fn has_ended(&self, now: SystemTime) -> bool {
        self.own.has_ended(now)
    }

    /// Whether the lease is a reservation, which has no end.
    pub fn is_reservation(&self) -> bool {
        self.own.expires.is_none()
    }

    pub(in crate::store) fn own(&self) -> &OwnLease {
        &self.own
    }

    /// The archive that continues it.
    pub(in crate::store) fn into_archive(self) -> Archive {
        Archive::recall(self.identity, self.content)
    }
}
