//! This host's own lease, on either store.
//!
//! In reading order: `choose` decides which subnet a host gets, `claim` keeps two hosts with one public address apart,
//! `acquire` takes and releases a subnet, `keeper` decides how to keep it (a pure state machine), `driver` acts for it; `recalled` is the lease of an
//! earlier run, for a start without the store.

mod acquire;
mod choose;
mod claim;
mod driver;
mod keeper;
mod recalled;

use std::{net::Ipv4Addr, time::Duration};

use claim::Claim;
pub(super) use claim::this_instance;
pub use driver::LeaseKeeper;
pub use recalled::RecalledLease;

use super::record::LifetimeId;
use crate::{config::NetworkConfig, route::Subnet};

/// Attempts at a write that other writers keep overtaking.
pub(super) const ATTEMPTS: usize = 64;

/// The network in which a subnet is chosen, and preferences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetRequest {
    /// The network.
    pub config: NetworkConfig,
    /// This subnet or none: `--subnet`.
    pub wanted: Option<Subnet>,
    /// This subnet if it is free: that of an earlier run.
    pub earlier: Option<Subnet>,
    /// Subnets of `--peer`s, which hold no record.
    pub fixed: Vec<Subnet>,
}

impl SubnetRequest {
    /// A request for any subnet of a network.
    pub fn any(config: NetworkConfig) -> Self {
        Self { config, wanted: None, earlier: None, fixed: Vec::new() }
    }
}

/// A subnet that this host holds, and its record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The subnet.
    pub subnet: Subnet,
    /// Whether the record was written just now.
    pub created: bool,
    /// Key of the record behind `subnets/`: flannel's own may name an IPv6 subnet, too.
    key: String,
    /// The lifetime that the record is attached to; `None` for a reservation and in a directory.
    lifetime: Option<LifetimeId>,
    /// Revision at which the record was created: it stays while others overwrite the record. `None` where it is unknown.
    created_at: Option<i64>,
    /// The address in the record, and our claim on it.
    claim: Claim,
    /// The request that led to this subnet, repeated when the subnet is lost.
    request: SubnetRequest,
}

impl Held {
    /// The address in the record.
    pub fn public_ip(&self) -> Ipv4Addr {
        self.claim.public_ip
    }
}

/// News about this host's own lease. `why` is the reason, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the variants describe their fields")]
pub enum LeaseEvent {
    /// The store confirms the lease, for this time without another renewal; `None` for a record without end.
    Confirmed { expires_in: Option<Duration> },
    /// The lease cannot be confirmed; its last confirmation holds for this time. Sent once, until it is confirmed again.
    Unconfirmed { why: String, expires_in: Option<Duration> },
    /// The lease was lost, and the same subnet acquired again.
    Reacquired { subnet: Subnet, why: String },
    /// The lease was lost to another host, and another subnet acquired.
    Moved { from: Subnet, to: Subnet, why: String },
    /// The record carries another public address of this host.
    Readdressed { public_ip: Ipv4Addr },
    /// The lease was lost, and no subnet could be acquired yet. Attempts continue.
    Lost { why: String },
    /// Another host has claimed our public address, and with it our subnet.
    Superseded { why: String },
}

/// Times to live in a store with lifetimes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) lease_ttl: Duration,
    pub(super) renew_margin: Duration,
    pub(super) claim_ttl: Duration,
}
