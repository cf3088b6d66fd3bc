//! The tun rung: the slow path of a host whose fast path is eBPF, and the only path of one that has none.
//!
//! Two threads: one from the overlay device to the socket, one back. They end when the rung is dropped, and say so when the
//! device is lost.

mod counters;
mod io;
pub mod partial;
pub mod shell;

pub use counters::SlowCounters;
pub use io::bind;

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use arc_swap::ArcSwap;
use ipnet::Ipv4Net;
use nix::sys::eventfd::{EfdFlags, EventFd};
use overlay_ebpf::abi::Config;
use tokio::sync::mpsc;
use tracing::error;
use tun_rs::SyncDevice;

use crate::route_table::{Change, Lookup};

/// The running threads of the tun rung.
pub struct TunRung {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What both threads use.
pub(crate) struct Shared {
    pub(crate) config: Config,
    /// Largest inner packet in bytes.
    pub(crate) mtu: AtomicUsize,
    pub(crate) device: SyncDevice,
    pub(crate) socket: OwnedFd,
    pub(crate) routes: ArcSwap<Lookup>,
    pub(crate) counters: SlowCounters,
    /// Readable once the threads are to end.
    pub(crate) stop: EventFd,
}

impl TunRung {
    /// Starts to move packets between `device` and `socket`, with no routes yet. When a thread has to give up, its reason
    /// comes through `failures`.
    ///
    /// # Errors
    ///
    /// When a thread cannot be started.
    pub fn start(
        config: Config,
        mtu: u32,
        device: SyncDevice,
        socket: OwnedFd,
        failures: mpsc::Sender<String>,
    ) -> Result<Self> {
        device.set_nonblocking(true).context("make the overlay device non-blocking")?;
        let shared = Arc::new(Shared {
            config,
            mtu: AtomicUsize::new(mtu as usize),
            device,
            socket,
            routes: ArcSwap::default(),
            counters: SlowCounters::default(),
            stop: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .context("create an eventfd")?,
        });
        let mut rung = Self { shared, threads: Vec::new() };
        type Direction = fn(&Shared) -> Result<()>;
        let directions: [(&str, Direction); 2] = [("ovl-egress", io::egress), ("ovl-ingress", io::ingress)];
        for (name, direction) in directions {
            let (shared, failures) = (Arc::clone(&rung.shared), failures.clone());
            let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
                if let Err(failure) = direction(&shared) {
                    error!("the slow path stopped: {failure:#}");
                    // Nobody listens any more while the agent shuts down, and one word of a loss is enough.
                    let _ = failures.try_send(format!("{failure:#}"));
                }
            });
            rung.threads.push(thread.with_context(|| format!("start the thread {name}"))?);
        }
        Ok(rung)
    }

    /// Replaces all routes at once.
    pub fn set_routes(&self, routes: &BTreeMap<Ipv4Net, Ipv4Addr>) {
        self.shared.routes.store(Arc::new(Lookup::new(routes)));
    }

    /// Changes some routes, all at once.
    pub fn change_routes(&self, changes: &[Change]) {
        let changed = self.shared.routes.load().changed(changes);
        self.shared.routes.store(Arc::new(changed));
    }

    /// The overlay device carries inner packets of up to `mtu` bytes now.
    pub fn set_mtu(&self, mtu: u32) {
        self.shared.mtu.store(mtu as usize, Ordering::Relaxed);
    }

    /// What the threads counted.
    pub fn counters(&self) -> &SlowCounters {
        &self.shared.counters
    }
}

impl Drop for TunRung {
    fn drop(&mut self) {
        // Cannot fail: the counter of a fresh eventfd is far from full.
        let _ = self.shared.stop.write(1);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
