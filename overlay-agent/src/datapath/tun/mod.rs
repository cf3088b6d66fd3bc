//! The tun rung: the slow path of a host whose fast path is eBPF, and the only path of one that has none.
//!
//! Two threads: one from the overlay device to the socket, one back. They run as long as the device; settings and routes are
//! replaced under them.

mod counters;
pub mod fragment;
mod io;
mod lookup;
pub mod partial;
mod queue;
pub mod shell;
mod socket;

pub(crate) use counters::SlowCounters;
pub use lookup::Lookup;
pub(crate) use queue::{Queue, device_of};
pub(crate) use socket::{Endpoint, Socket};

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use arc_swap::ArcSwap;
use nix::sys::eventfd::{EfdFlags, EventFd};
use overlay_ebpf::{
    abi::{Config, NextHop},
    route::Routes as _,
};
use tokio::sync::mpsc;
use tracing::error;

use crate::{
    device::OverlayDevice,
    icmp::Answers,
    route::{NextHops, RouteChange},
};

/// The running threads of the tun rung.
pub(crate) struct TunRung {
    /// Index of the overlay device.
    pub(crate) ifindex: u32,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What may change while the threads run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) config: Config,
    /// This host's overlay address, the source of ICMP errors.
    pub(crate) own: Ipv4Addr,
    /// Largest inner packet in bytes.
    pub(crate) mtu: usize,
    /// One per underlay device; packets leave by that of their peer's device.
    pub(crate) sockets: Vec<Arc<Socket>>,
}

/// What both threads use.
struct Shared {
    device: Queue,
    settings: ArcSwap<Settings>,
    routes: RwLock<Lookup>,
    counters: Arc<SlowCounters>,
    answers: Arc<Answers>,
    stop: AtomicBool,
    /// Whether a thread has ended by itself.
    failed: AtomicBool,
    /// Readable when settings or `stop` have changed: of egress, of ingress.
    wakes: [EventFd; 2],
}

impl Shared {
    /// A change of the routes waits until this is dropped: hold it for one packet at most on the way of packets.
    fn routes(&self) -> RwLockReadGuard<'_, Lookup> {
        self.routes.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TunRung {
    /// Starts to move packets between `device` and the sockets. When a thread has to end, its reason comes through `failures`.
    pub(crate) fn start(
        device: OverlayDevice,
        settings: Settings,
        routes: &NextHops,
        (counters, answers): (Arc<SlowCounters>, Arc<Answers>),
        failures: &mpsc::Sender<String>,
    ) -> Result<Self> {
        let wake = || {
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).context("create an eventfd")
        };
        let shared = Arc::new(Shared {
            device: device.queue,
            settings: ArcSwap::from_pointee(settings),
            routes: RwLock::new(Lookup::new(routes)),
            counters,
            answers,
            stop: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            wakes: [wake()?, wake()?],
        });
        let mut rung = Self { ifindex: device.index, shared, threads: Vec::new() };
        type Direction = fn(&Shared) -> Result<()>;
        let directions: [(&str, Direction); 2] = [("ovl-egress", io::egress), ("ovl-ingress", io::ingress)];
        for (name, direction) in directions {
            let (shared, failures) = (Arc::clone(&rung.shared), failures.clone());
            let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
                if let Err(failure) = direction(&shared) {
                    error!("the slow path stopped: {failure:#}");
                    shared.failed.store(true, Ordering::Release);
                    // Full or closed: one message of a loss is enough, and none while the agent shuts down.
                    let _ = failures.try_send(format!("{failure:#}"));
                }
            });
            rung.threads.push(thread.with_context(|| format!("start the thread {name}"))?);
        }
        Ok(rung)
    }

    /// Whether both threads run.
    pub(crate) fn is_alive(&self) -> bool {
        !self.shared.failed.load(Ordering::Acquire)
    }

    /// The present name of the device; `None` when it was removed.
    pub(crate) fn device_name(&self) -> Option<String> {
        self.shared.device.device_name()
    }

    /// The device's queue.
    pub(crate) fn queue(&self) -> &Queue {
        &self.shared.device
    }

    /// Replaces the settings if they differ.
    pub(crate) fn set_settings(&self, settings: Settings) {
        if **self.shared.settings.load() != settings {
            self.shared.settings.store(Arc::new(settings));
            self.wake();
        }
    }

    /// Replaces all routes at once if they differ.
    pub(crate) fn set_routes(&self, routes: &NextHops) {
        // Compared and built without the write lock: that stops all packets.
        if self.shared.routes().routes != *routes {
            let mut lookup = Lookup::new(routes);
            let mut present = self.shared.routes.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::swap(&mut lookup.former, &mut present.former);
            *present = lookup;
        }
    }

    /// Accepts packets from these former addresses of peers, and from no other one.
    pub(crate) fn set_former(&self, former: &BTreeMap<Ipv4Addr, Ipv4Addr>) {
        let mut routes = self.shared.routes.write().unwrap_or_else(PoisonError::into_inner);
        routes.former.clone_from(former);
    }

    /// The way to the peer that holds an overlay address.
    pub(crate) fn next_hop(&self, address: Ipv4Addr) -> Option<NextHop> {
        self.shared.routes().next_hop(address.octets())
    }

    /// Makes some changes to the routes, all at once.
    pub(crate) fn apply_routes(&self, changes: &[RouteChange<NextHop>]) {
        self.shared.routes.write().unwrap_or_else(PoisonError::into_inner).apply(changes);
    }

    fn wake(&self) {
        for wake in &self.shared.wakes {
            // Fails only when the counter is full, and then it is readable.
            let _ = wake.write(1);
        }
    }
}

impl Drop for TunRung {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.wake();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
