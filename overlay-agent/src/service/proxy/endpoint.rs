//! An endpoint of a port of a virtual address, as its connections know it.

use std::{
    net::SocketAddrV4,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use super::{counters::Tally, http::Pool};

/// An endpoint.
#[derive(Debug)]
pub(super) struct Endpoint {
    /// Where it listens.
    pub(super) address: SocketAddrV4,
    /// What is counted.
    pub(super) tally: Arc<Tally>,
    /// HTTP connections to it that wait for a request.
    pub(super) pool: Pool,
    /// When its connections are reset, if it is removed or down. Made when there is a connection or a time: a channel takes half a kilobyte,
    /// and there may be many endpoints.
    reset_at: OnceLock<watch::Sender<Option<Instant>>>,
}

impl Endpoint {
    pub(super) fn new(address: SocketAddrV4) -> Self {
        Self { address, tally: Arc::default(), pool: Pool::default(), reset_at: OnceLock::new() }
    }

    /// Its connections stay.
    pub(super) fn keep(&self) {
        if let Some(reset_at) = self.reset_at.get() {
            reset_at.send_if_modified(|at| at.take().is_some());
        }
    }

    /// Its connections have this much time left, unless they had less.
    pub(super) fn drain(&self, time: Duration) {
        self.reset_at().send_if_modified(|at| match at {
            Some(_) => false,
            None => {
                *at = Some(Instant::now() + time);
                true
            }
        });
        self.pool.clear();
    }

    /// Whether it may keep its connections.
    pub(super) fn is_kept(&self) -> bool {
        self.reset_at.get().is_none_or(|reset_at| reset_at.borrow().is_none())
    }

    /// Follows [`Self::drain`] and [`Self::keep`].
    pub(super) fn reset_time(&self) -> watch::Receiver<Option<Instant>> {
        self.reset_at().subscribe()
    }

    fn reset_at(&self) -> &watch::Sender<Option<Instant>> {
        self.reset_at.get_or_init(|| watch::Sender::new(None))
    }
}
