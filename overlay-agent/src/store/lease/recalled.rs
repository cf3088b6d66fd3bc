//! This host's lease as an earlier run has left it on disk, for a start without the store. The keeper claims the address and asks for
//! the record as soon as the store answers, as after an outage at run time.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::{Claim, Held, SubnetRequest, keeper::Keeper};
use crate::{
    route::Subnet,
    store::{Saved, archive::OwnLease},
};

/// Longest lease that is believed. Those of etcd take at most 9,000,000,000 s, and those of flannel a day.
const LONGEST: Duration = Duration::from_secs(9_000_000_000);

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecalledLease {
    pub(super) held: Held,
    /// When the lease ends without a renewal; `None` for a reservation.
    pub(super) ends: Option<Instant>,
}

impl RecalledLease {
    /// The lease in what was saved, at the time `now`. When it is lost, `request` leads to another.
    pub fn new(saved: &Saved, request: SubnetRequest, now: SystemTime) -> Self {
        let own = saved.own();
        let held = Held {
            subnet: own.subnet,
            created: false,
            key: own.key.clone(),
            lifetime: own.lifetime,
            created_at: own.created_at,
            // None yet: see the keeper.
            claim: Claim { public_ip: own.public_ip, lifetime: None },
            request,
        };
        let left = own.expires.map(|end| SystemTime::from(end).duration_since(now).unwrap_or_default());
        Self { held, ends: left.map(|left| Instant::now() + left.min(LONGEST)) }
    }

    /// The subnet.
    pub fn subnet(&self) -> Subnet {
        self.held.subnet
    }

    /// The rest of the lease without a renewal; `None` for a reservation.
    pub fn expires_in(&self) -> Option<Duration> {
        self.ends.map(|end| end.saturating_duration_since(Instant::now()))
    }
}

impl Keeper {
    /// The lease as it is, for a later start.
    pub(super) fn to_own_lease(&self, now: Instant) -> OwnLease {
        let left = self.expires().filter(|_| self.held.lifetime.is_some());
        let left = left.map(|end| end.saturating_duration_since(now));
        OwnLease {
            subnet: self.held.subnet,
            key: self.held.key.clone(),
            public_ip: self.held.public_ip(),
            lifetime: self.held.lifetime,
            created_at: self.held.created_at,
            expires: left.map(|left| (SystemTime::now() + left).into()),
        }
    }
}
