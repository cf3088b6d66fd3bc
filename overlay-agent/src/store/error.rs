//! Errors of a store: each names the operation, the object and, where there is one, the remedy.

use std::{mem, net::Ipv4Addr};

use ipnet::Ipv4Net;
use thiserror::Error;

use crate::config::{ConfigError, NetworkConfig};

/// Why a request to a store failed.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages show what each field is")]
pub enum StoreError {
    /// No etcd endpoint answers. Trying again may help.
    #[error("cannot reach etcd at {endpoints}: {why}; check --etcd-endpoints and that etcd runs")]
    Unreachable { endpoints: String, why: String },
    /// The servers answer, but no connection to them can be used: a certificate, a key or a scheme does not fit. `heals` says
    /// whether trying again may help.
    #[error("cannot use etcd at {endpoints}: {why}")]
    Unusable { endpoints: String, why: String, heals: bool },
    /// The store did not answer a request, or not now. Trying again may help.
    #[error("{operation}: etcd does not answer: {why}")]
    Away { operation: String, why: String },
    /// etcd refuses this user, or does not know it.
    #[error(
        "{operation}: etcd refuses: {why}; check --etcd-username, --etcd-password (or the client certificate) and that \
         user's rights on the prefix"
    )]
    Denied { operation: String, why: String },
    /// The store answered with an error.
    #[error("{operation}: {why}")]
    Failed { operation: String, why: String },
    /// An option cannot be used.
    #[error("{option}: {why}")]
    Option { option: &'static str, why: String },
    /// There is no configuration at this location. Trying again may help.
    #[error("there is no network config yet at {0}: write it there")]
    NoConfig(String),
    /// The network's configuration cannot be used. Trying again may help: an operator will replace it.
    #[error("the network config at {location} cannot be used: {why}")]
    Config { location: String, why: ConfigError },
    /// The requested subnet is not available, or a record of this host contradicts the options.
    #[error("{0}")]
    Conflict(String),
    /// Every subnet is held.
    #[error(
        "the network {network} is full: all subnets from {min} to {max} are held; remove leases of hosts that are gone, or \
         widen SubnetMin and SubnetMax in the network config"
    )]
    Full { network: Ipv4Net, min: Ipv4Addr, max: Ipv4Addr },
    /// Other writers were faster every time.
    #[error("the store did not settle: other writers were faster {0} times in a row; try again")]
    Contended(usize),
    /// Another running agent has claimed our public address.
    #[error(
        "the public address {public_ip} is already in use by another agent ({holder}): give this host its own address with \
         --public-ip, or stop the other agent (if it is gone for good, delete the key {key})"
    )]
    SamePublicIp { public_ip: Ipv4Addr, holder: String, key: String },
}

impl StoreError {
    /// Whether the same request may succeed later, without a change on this host.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::Unusable { heals: true, .. }
                | Self::Away { .. }
                | Self::Contended(_)
                | Self::NoConfig(_)
                | Self::Config { .. }
        )
    }

    /// Whether the store did not answer at all: what it holds is unknown.
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Away { .. })
    }

    /// Whether the two tell an operator to do the same. Texts may differ from attempt to attempt.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let heals = |error: &Self| matches!(error, Self::Unusable { heals: true, .. });
        self.is_away() && other.is_away()
            || mem::discriminant(self) == mem::discriminant(other) && heals(self) == heals(other)
    }

    pub(super) fn full(config: &NetworkConfig) -> Self {
        Self::Full { network: config.network, min: config.subnet_min, max: config.subnet_max }
    }

    pub(super) fn failed(operation: impl Into<String>, why: impl ToString) -> Self {
        Self::Failed { operation: operation.into(), why: why.to_string() }
    }

    pub(super) fn away(operation: impl Into<String>, why: impl ToString) -> Self {
        Self::Away { operation: operation.into(), why: why.to_string() }
    }
}
