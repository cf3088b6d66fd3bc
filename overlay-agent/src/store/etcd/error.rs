//! What can go wrong with etcd, in words for whoever has to put it right.

use std::{error::Error as _, net::Ipv4Addr};

use etcd_client::Error;
use ipnet::Ipv4Net;
use thiserror::Error;
use tonic::Code;

use crate::config::{ConfigError, NetworkConfig};

/// Why the etcd store could not do what it was asked.
#[derive(Debug, Error)]
pub enum EtcdError {
    /// No endpoint answers. Trying again may help.
    #[error("cannot reach etcd at {endpoints}: {why}; check --etcd-endpoints and that etcd runs")]
    Unreachable {
        /// The endpoints that were tried.
        endpoints: String,
        /// What each said.
        why: String,
    },
    /// etcd did not answer a request, or not now. Trying again may help.
    #[error("{operation}: etcd does not answer: {why}")]
    Away {
        /// What was asked.
        operation: String,
        /// What happened instead.
        why: String,
    },
    /// etcd knows us and says no, or does not know us.
    #[error(
        "{operation}: etcd refuses: {why}; check --etcd-username, --etcd-password (or the client certificate) and that \
         user's rights on the prefix"
    )]
    Denied {
        /// What was asked.
        operation: String,
        /// etcd's words.
        why: String,
    },
    /// etcd answered with an error.
    #[error("{operation}: {why}")]
    Failed {
        /// What was asked.
        operation: String,
        /// etcd's words.
        why: String,
    },
    /// An option cannot be used.
    #[error("{option}: {why}")]
    Option {
        /// Its flag.
        option: &'static str,
        /// What is wrong with it, and what to do.
        why: String,
    },
    /// The network's configuration is no good.
    #[error("the network config at {key} in etcd cannot be used")]
    Config {
        /// Its key.
        key: String,
        /// What is wrong with it.
        #[source]
        source: ConfigError,
    },
    /// The wanted subnet cannot be had.
    #[error("{0}")]
    Wanted(String),
    /// Every subnet is held.
    #[error(
        "the network {network} is full: all subnets from {min} to {max} are held; remove leases of hosts that are gone, or \
         widen SubnetMin and SubnetMax in the network config"
    )]
    Full {
        /// The whole overlay.
        network: Ipv4Net,
        /// The first subnet that may be handed out.
        min: Ipv4Addr,
        /// The last one.
        max: Ipv4Addr,
    },
    /// Others were faster every time.
    #[error("no subnet could be taken: other hosts were faster {0} times in a row; try again")]
    Crowded(usize),
    /// Another running agent speaks for our public address.
    #[error(
        "the public address {public_ip} is already in use by another agent ({holder}): give this host its own address with \
         --public-ip, or stop the other agent (if it is gone for good, delete the key {key})"
    )]
    SamePublicIp {
        /// The address.
        public_ip: Ipv4Addr,
        /// Who says so.
        holder: String,
        /// The key in etcd that says so.
        key: String,
    },
}

impl EtcdError {
    /// Whether the same request may succeed later without anybody putting something right.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Away { .. } | Self::Crowded(_))
    }

    /// The error of a request that etcd did not answer well.
    pub(super) fn of(operation: &str, error: &Error) -> Self {
        let (operation, why) = (operation.to_owned(), describe(error));
        match class(error) {
            Class::Away => Self::Away { operation, why },
            Class::Denied => Self::Denied { operation, why },
            Class::Other => Self::Failed { operation, why },
        }
    }

    /// The error of a network without a free subnet.
    pub(super) fn full(config: &NetworkConfig) -> Self {
        Self::Full { network: config.network, min: config.subnet_min, max: config.subnet_max }
    }
}

/// Who has to act on an error of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// Nobody: etcd may answer later, or another endpoint now.
    Away,
    /// Whoever gave us credentials.
    Denied,
    /// Whoever reads the message.
    Other,
}

/// What etcd says about a wrong user or password, and about none. Its status code is the one for malformed requests.
const NOT_LOGGED_IN: [&str; 2] = ["authentication failed", "user name is empty"];

/// What etcd says about a login from before its users changed. A new login, which a new connection brings, puts it right.
const OLD_LOGIN: &str = "revision of auth store is old";

fn class(error: &Error) -> Class {
    let Error::GRpcStatus(status) = error else {
        let local = matches!(
            error,
            Error::InvalidArgs(_)
                | Error::InvalidUri(_)
                | Error::Utf8Error(_)
                | Error::InvalidMetadataValue(_)
        );
        return if local { Class::Other } else { Class::Away };
    };
    let code = status.code();
    let not_logged_in = NOT_LOGGED_IN.iter().any(|words| status.message().contains(words));
    if not_logged_in || matches!(code, Code::Unauthenticated | Code::PermissionDenied) {
        return Class::Denied;
    }
    // Unknown and internal are what a connection that breaks half-way looks like; a full disk is resource exhaustion.
    let away = matches!(
        code,
        Code::Unavailable
            | Code::Unknown
            | Code::Internal
            | Code::Cancelled
            | Code::Aborted
            | Code::DeadlineExceeded
            | Code::ResourceExhausted
    );
    if away || status.message().contains(OLD_LOGIN) { Class::Away } else { Class::Other }
}

/// Whether a connection should be given up after this error.
pub(super) fn breaks_connection(error: &Error) -> bool {
    // A token that cannot be renewed needs a new login, and that comes with a new connection.
    class(error) != Class::Other
}

/// Whether there is no etcd behind the connection, or none that can answer.
pub(super) fn is_away(error: &Error) -> bool {
    class(error) == Class::Away
}

/// Whether etcd no longer has the history that was asked for.
pub(super) fn is_compacted(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.message().contains("required revision has been compacted"))
}

/// Whether etcd's history is shorter than what was asked for.
pub(super) fn is_future(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.message().contains("required revision is a future revision"))
}

/// Whether an answer was longer than we accept.
pub(super) fn is_too_long(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.code() == Code::OutOfRange && !is_compacted(error) && !is_future(error))
}

/// Whether there is no such etcd lease.
pub(super) fn is_no_lease(error: &Error) -> bool {
    // The client makes the second of an answer with no time to live.
    matches!(error, Error::GRpcStatus(status) if status.code() == Code::NotFound)
        || matches!(error, Error::LeaseKeepAliveError(why) if why == "lease not found")
}

/// Whether etcd runs without users, so that none can log in.
pub(super) fn is_without_users(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.message().contains("authentication is not enabled"))
}

/// The whole story: the client's own text stops at "transport error".
pub(super) fn describe(error: &Error) -> String {
    let (mut text, mut source) = if let Error::GRpcStatus(status) = error {
        (status.message().to_owned(), status.source())
    } else if let Error::TransportError(error) = error {
        (error.to_string(), error.source())
    } else {
        (error.to_string(), error.source())
    };
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = if text.is_empty() { cause_text } else { format!("{text}: {cause_text}") };
        }
        source = cause.source();
    }
    text
}
