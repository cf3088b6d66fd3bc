//! Connections to an endpoint, used for one request after the other.

use std::{
    io,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    select,
    time::{interval, sleep_until},
};
use tracing::debug;

use super::{
    super::{endpoint::Endpoint, shared::Shared, tcp::connect_to},
    body::RequestBody,
};

/// For [`Usage`]: a request is on the connection.
const IN_USE: u64 = u64::MAX;

/// The connections of an endpoint that wait for a request, the one used last at the end.
#[derive(Debug, Default)]
pub(in super::super) struct Pool {
    idle: Mutex<Vec<Idle>>,
}

/// A connection that waits.
#[derive(Debug)]
struct Idle {
    sender: SendRequest<RequestBody>,
    usage: Arc<Usage>,
}

/// Since when a connection waits, in nanoseconds of [`Shared::now`], or [`IN_USE`].
#[derive(Debug)]
struct Usage(AtomicU64);

impl Usage {
    fn idle_for(&self, now: u64) -> Duration {
        match self.0.load(Ordering::Relaxed) {
            IN_USE => Duration::ZERO,
            since => Duration::from_nanos(now.saturating_sub(since)),
        }
    }
}

/// A connection with a request. Dropped, it is closed, unless it is given back.
#[derive(Debug)]
pub(super) struct Connection {
    /// Takes the request.
    pub(super) sender: SendRequest<RequestBody>,
    /// The endpoint.
    pub(super) endpoint: Arc<Endpoint>,
    usage: Arc<Usage>,
    shared: Arc<Shared>,
    is_reusable: bool,
}

impl Pool {
    /// Closes the connections that wait.
    pub(in super::super) fn clear(&self) {
        let idle = std::mem::take(&mut *self.idle());
        drop(idle);
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connections that wait now.
    #[cfg(test)]
    pub(in super::super) fn len(&self) -> usize {
        self.idle().iter().filter(|idle| !idle.sender.is_closed()).count()
    }
}

impl Connection {
    /// Takes one that has waited for less than `longest`.
    pub(super) fn reuse(endpoint: &Arc<Endpoint>, longest: Duration, shared: &Arc<Shared>) -> Option<Self> {
        let now = shared.now();
        let mut idle = endpoint.pool.idle();
        idle.retain(|idle| !idle.sender.is_closed());
        let place =
            idle.iter().rposition(|idle| idle.sender.is_ready() && idle.usage.idle_for(now) < longest)?;
        let Idle { sender, usage } = idle.remove(place);
        usage.0.store(IN_USE, Ordering::Relaxed);
        let (endpoint, shared) = (Arc::clone(endpoint), Arc::clone(shared));
        Some(Self { sender, endpoint, usage, shared, is_reusable: true })
    }

    /// Makes one. `header` is sent first; such a connection is for one client only, and is not used again.
    /// Fails when the endpoint refuses it, or does not answer in time.
    pub(super) async fn open(
        endpoint: &Arc<Endpoint>,
        header: Option<&[u8]>,
        shared: &Arc<Shared>,
    ) -> io::Result<Self> {
        let stream = connect_to(endpoint.address, header, shared).await?;
        let handshake =
            Builder::new().max_buf_size(shared.options.http.buffer()).handshake(TokioIo::new(stream));
        let (sender, connection) = handshake.await.map_err(io::Error::other)?;
        let usage = Arc::new(Usage(AtomicU64::new(IN_USE)));
        tokio::spawn(drive(connection, Arc::clone(endpoint), Arc::clone(&usage), Arc::clone(shared)));
        let (endpoint, shared) = (Arc::clone(endpoint), Arc::clone(shared));
        Ok(Self { sender, endpoint, usage, shared, is_reusable: header.is_none() })
    }

    /// Lets it wait for the next request, if there is room and the endpoint takes requests.
    pub(super) fn give_back(self) {
        let Self { sender, endpoint, usage, shared, is_reusable } = self;
        if !is_reusable || sender.is_closed() {
            return;
        }
        usage.0.store(shared.now(), Ordering::Relaxed);
        let mut idle = endpoint.pool.idle();
        if idle.len() >= shared.options.http.pool_size {
            idle.retain(|idle| !idle.sender.is_closed());
        }
        if idle.len() < shared.options.http.pool_size {
            idle.push(Idle { sender, usage });
        }
        drop(idle);
        // Behind the push: of this and the removal of the endpoint, the later one sees what the other did.
        if !endpoint.is_kept() {
            endpoint.pool.clear();
        }
    }
}

/// Moves the bytes of a connection until it ends, has waited for too long, or the endpoint's time is over.
async fn drive(
    connection: hyper::client::conn::http1::Connection<TokioIo<TcpStream>, RequestBody>,
    endpoint: Arc<Endpoint>,
    usage: Arc<Usage>,
    shared: Arc<Shared>,
) {
    let longest = shared.options.http.pool_idle;
    let mut connection = pin!(connection.with_upgrades());
    let mut stopped = pin!(shared.stopped());
    let mut reset_at = endpoint.reset_time();
    let mut ticks = interval((longest / 4).max(Duration::from_millis(10)));
    loop {
        let reset = *reset_at.borrow_and_update();
        let reset = async {
            match reset {
                Some(time) => sleep_until(time).await,
                None => std::future::pending().await,
            }
        };
        select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    debug!(endpoint = %endpoint.address, %error, "HTTP connection ended");
                }
                return;
            }
            () = stopped.as_mut() => return,
            () = reset => return,
            // It fails when the endpoint is gone, which this task holds.
            _ = reset_at.changed() => {}
            _ = ticks.tick() => {
                if usage.idle_for(shared.now()) >= longest {
                    return;
                }
            }
        }
    }
}
