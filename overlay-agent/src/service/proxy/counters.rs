//! What the proxy counts.

use std::{
    collections::BTreeMap,
    net::SocketAddrV4,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::http::{HttpCounts, HttpTally};
use crate::service::{
    ServiceName,
    latency::{Latencies, LatencyCells},
    record::Protocol,
};

/// The proxy's counters at one time. All but those named "open" only grow while the proxy runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Open TCP connections of clients.
    pub open_connections: u64,
    /// Open UDP sessions.
    pub open_sessions: u64,
    /// Connections refused because there were too many.
    pub refused: u64,
    /// By service. A service that is removed and comes back starts at 0.
    pub services: BTreeMap<ServiceName, ServiceCounts>,
}

/// The counters of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceCounts {
    /// Of the whole service. Connections for which no endpoint is left count as one failure here, whatever was tried.
    pub total: Counts,
    /// Of its endpoints, in order of protocol and address.
    pub endpoints: Vec<EndpointCounts>,
    /// Of the requests to its HTTP ports.
    #[serde(default)]
    pub http: HttpCounts,
}

/// The counters of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointCounts {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where it listens.
    pub address: SocketAddrV4,
    /// What was counted.
    pub counts: Counts,
}

/// Connections and bytes. A UDP session counts as a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Connections that were made.
    pub connections: u64,
    /// Connections that could not be made, and UDP datagrams that could not be sent.
    pub failures: u64,
    /// Connections that are open or being opened; of HTTP ports, requests that are not answered to the end.
    pub open: u64,
    /// Payload from clients to endpoints.
    pub bytes_to_endpoints: u64,
    /// Payload from endpoints to clients.
    pub bytes_to_clients: u64,
    /// How long endpoints took to accept TCP connections.
    #[serde(default)]
    pub latency: Latencies,
}

/// Counts while the proxy runs.
#[derive(Debug, Default)]
pub(super) struct Tally {
    connections: AtomicU64,
    failures: AtomicU64,
    open: AtomicU64,
    to_endpoints: AtomicU64,
    to_clients: AtomicU64,
    /// Made when the first request is counted: most services have none, and endpoints never.
    http: OnceLock<Box<HttpTally>>,
    /// Made when the first connection is counted: of many endpoints, most have none.
    latency: OnceLock<Box<LatencyCells>>,
}

impl Tally {
    /// What is counted of requests.
    pub(super) fn http(&self) -> &HttpTally {
        self.http.get_or_init(Box::default)
    }

    /// What was counted of requests.
    pub(super) fn http_snapshot(&self) -> HttpCounts {
        self.http.get().map(|http| http.snapshot()).unwrap_or_default()
    }

    pub(super) fn snapshot(&self) -> Counts {
        Counts {
            connections: self.connections.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
            open: self.open(),
            bytes_to_endpoints: self.to_endpoints.load(Ordering::Relaxed),
            bytes_to_clients: self.to_clients.load(Ordering::Relaxed),
            latency: self.latency.get().map(|cells| cells.snapshot()).unwrap_or_default(),
        }
    }

    pub(super) fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    pub(super) fn count_failure(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    ToEndpoint,
    ToClient,
}

/// A connection that counts as open until it is dropped, in all tallies that it belongs to.
#[derive(Debug)]
pub(super) struct Opened {
    tallies: [Arc<Tally>; 2],
}

impl Opened {
    /// Begins to count a connection of a service to an endpoint.
    pub(super) fn new(service: &Arc<Tally>, endpoint: &Arc<Tally>) -> Self {
        let tallies = [Arc::clone(service), Arc::clone(endpoint)];
        for tally in &tallies {
            tally.open.fetch_add(1, Ordering::Relaxed);
        }
        Self { tallies }
    }

    /// The connection is made.
    pub(super) fn count_connection(&self) {
        for tally in &self.tallies {
            tally.connections.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The endpoint accepted the TCP connection within this time.
    pub(super) fn count_latency(&self, time: Duration) {
        for tally in &self.tallies {
            tally.latency.get_or_init(Box::default).add(time);
        }
    }

    /// Something could not be sent.
    pub(super) fn count_failure(&self) {
        for tally in &self.tallies {
            tally.count_failure();
        }
    }

    /// Bytes have been passed on.
    pub(super) fn count_bytes(&self, direction: Direction, bytes: usize) {
        for tally in &self.tallies {
            let counter = match direction {
                Direction::ToEndpoint => &tally.to_endpoints,
                Direction::ToClient => &tally.to_clients,
            };
            counter.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        for tally in &self.tallies {
            tally.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
