//! What all connections of the proxy share.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{
    sync::{Semaphore, watch},
    time::Instant,
};

use super::{
    balancer::Affinities,
    http::{Limits, Targets},
    sessions::Sessions,
    threads::Threads,
};

/// Bytes that are moved at once.
pub(super) const BUFFER: usize = 256 << 10;
/// Buffers that are kept for use again.
const SPARE_BUFFERS: usize = 16;

/// Limits and times of the proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// How long an endpoint may take to accept a connection.
    pub connect_timeout: Duration,
    /// Endpoints that are tried for one connection.
    pub attempts: usize,
    /// A TCP connection on which nothing moves for this long is reset.
    pub tcp_idle: Duration,
    /// A UDP session on which nothing moves for this long ends.
    pub udp_idle: Duration,
    /// How long connections may go on when their endpoint is removed or down, or their service is removed.
    pub drain: Duration,
    /// Most TCP connections of the node. More are refused. Each takes two file descriptors.
    pub max_connections: usize,
    /// Most UDP sessions of the node. For one more, the one that is idle for the longest time ends. Each takes a file descriptor.
    pub max_sessions: usize,
    /// Most clients of services with affinity that are remembered.
    pub max_clients: usize,
    /// The time between two attempts to listen on a port that is in use.
    pub bind_retry: Duration,
    /// Of HTTP ports.
    pub http: Limits,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
            attempts: 3,
            tcp_idle: Duration::from_secs(3600),
            udp_idle: Duration::from_secs(60),
            drain: Duration::from_secs(30),
            max_connections: 16_384,
            max_sessions: 16_384,
            max_clients: 65_536,
            bind_retry: Duration::from_secs(2),
            http: Limits::default(),
        }
    }
}

/// What all connections share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) options: Options,
    /// Free places for TCP connections.
    pub(super) places: Arc<Semaphore>,
    /// Connections that found no place.
    pub(super) refused: AtomicU64,
    pub(super) buffers: Buffers,
    /// Where TCP connections are served.
    pub(super) threads: Threads,
    pub(super) affinities: Affinities,
    pub(super) sessions: Sessions,
    /// The virtual addresses, which are no endpoints.
    pub(super) vips: ArcSwap<BTreeSet<Ipv4Addr>>,
    /// Where routes lead.
    pub(super) targets: ArcSwap<Targets>,
    /// Becomes true when the proxy stops.
    pub(super) stop: watch::Sender<bool>,
    start: Instant,
}

impl Shared {
    pub(super) fn new(options: Options) -> Self {
        Self {
            places: Arc::new(Semaphore::new(options.max_connections.min(Semaphore::MAX_PERMITS))),
            refused: AtomicU64::new(0),
            buffers: Buffers::default(),
            threads: Threads::start(),
            affinities: Affinities::new(options.max_clients),
            sessions: Sessions::new(options.max_sessions),
            vips: ArcSwap::default(),
            targets: ArcSwap::default(),
            stop: watch::Sender::new(false),
            start: Instant::now(),
            options,
        }
    }

    /// Nanoseconds since the start.
    pub(super) fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Whether this is a virtual address. As an endpoint, it would lead back to a proxy.
    pub(super) fn is_virtual(&self, ip: Ipv4Addr) -> bool {
        self.vips.load().contains(&ip)
    }

    /// Returns when the proxy stops.
    pub(super) async fn stopped(&self) {
        // The sender is here: it cannot be gone.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    pub(super) fn count_refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }
}

/// Buffers of [`BUFFER`] bytes. A connection has one only while it moves bytes, so idle ones take no memory for it.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    spare: Mutex<Vec<Vec<u8>>>,
}

impl Buffers {
    pub(super) fn take(&self) -> Vec<u8> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        spare.unwrap_or_else(|| vec![0; BUFFER])
    }

    pub(super) fn give(&self, buffer: Vec<u8>) {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARE_BUFFERS {
            spare.push(buffer);
        }
    }
}
