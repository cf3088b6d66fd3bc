//! The proxy of services: accepts connections to virtual addresses in user space, and passes them on to endpoints.
//!
//! It serves where the kernel's programs do not: on nodes without eBPF in control groups, and for connections that reach the node from
//! elsewhere. Both choose endpoints by the same code, `overlay_ebpf::service::select`.
//!
//! In reading order: `plan` (what to listen on, pure), `listeners`, `balancer` and `endpoint` (the choice of an endpoint), `tcp`, `relay` and `header`,
//! `udp` and `sessions`, `http` (requests instead of connections), `counters`. A task for each listener, each TCP connection and each UDP session: none waits for another. TCP has
//! `threads` of its own.

mod aging;
mod balancer;
mod counters;
mod endpoint;
pub(super) mod header;
mod http;
mod listeners;
mod plan;
mod relay;
mod sessions;
mod shared;
mod tcp;
#[cfg(test)]
mod tests;
mod threads;
mod udp;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddrV4},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use tokio::{
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};
use tracing::warn;

pub use self::{
    counters::{Counters, Counts, EndpointCounts, ServiceCounts},
    http::{HttpCounts, Limits},
    shared::Options,
};
use self::{
    listeners::{Listener, Listeners},
    shared::Shared,
};
use super::{
    Catalog, ServiceName,
    front::Rules,
    outcome::{Outcome, Outcomes},
    record::Protocol,
};

/// The longest time that a clock can count to without an overflow.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// A running proxy. Dropped, it closes its listeners and resets all connections.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    listeners: Mutex<Listeners>,
    /// Ends idle UDP sessions.
    sweeper: JoinHandle<()>,
}

/// A port of a virtual address that does not work, wholly or in part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The service. Others are not affected.
    pub service: ServiceName,
    /// The virtual address and its port.
    pub address: SocketAddrV4,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// What does not work, and what to do about it.
    pub reason: String,
}

impl Proxy {
    /// Starts a proxy without services. Raises the process's limit of open files to what the system allows, as every connection takes
    /// two.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn start(options: Options) -> Self {
        let limit = getrlimit(Resource::Nofile);
        if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
            warn!(%error, "the proxy of services cannot raise the limit of open files");
        }
        let (tcp_idle, udp_idle) = (options.tcp_idle.min(LONGEST), options.udp_idle.min(LONGEST));
        let (drain, attempts) = (options.drain.min(LONGEST), options.attempts.max(1));
        let shared = Arc::new(Shared::new(Options { tcp_idle, udp_idle, drain, attempts, ..options }));
        let sweeper = tokio::spawn(end_idle_sessions(Arc::clone(&shared)));
        Self { shared, listeners: Mutex::default(), sweeper }
    }

    /// Makes listeners and endpoints what the catalog says. Connections stay where that allows it. When it returns, removed ports are
    /// closed. A port that cannot be bound is among [`Self::problems`] and is tried again. Ports with the PROXY protocol are always
    /// included, and HTTP ports, whatever `rules` says.
    pub async fn reconcile(&self, catalog: &Catalog, rules: &Rules) {
        if *self.shared.stop.borrow() {
            return;
        }
        let mut closing = Vec::new();
        let rules = &Rules { http: true, proxy_protocol: true, ..rules.clone() };
        self.shared.vips.store(Arc::new(catalog.vips()));
        self.listeners().reconcile(catalog, rules, &self.shared, &mut closing);
        close(closing).await;
    }

    /// What does not work.
    pub fn problems(&self) -> Vec<Problem> {
        let listeners = self.listeners();
        let mut problems = Vec::new();
        let vips = self.shared.vips.load();
        // There may be many endpoints, and nearly all are outside of the range.
        let range = vips.first().zip(vips.last()).map(|(first, last)| *first..=*last);
        let is_virtual =
            |ip: &Ipv4Addr| range.as_ref().is_some_and(|range| range.contains(ip)) && vips.contains(ip);
        for Listener { port, .. } in listeners.by_key.values() {
            let table = port.table();
            let backends = table.front.backends.iter().map(|backend| backend.address);
            let looping = backends.filter(|address| is_virtual(address.ip())).map(|address| {
                format!("the endpoint {address} is a virtual address: give the endpoint its own address")
            });
            let routes = self.shared.missing_targets(&table);
            problems.extend(port.problem().into_iter().chain(looping).chain(routes).map(|reason| Problem {
                service: table.service.clone(),
                address: port.address,
                protocol: port.protocol,
                reason,
            }));
        }
        problems
    }

    /// The TCP ports at which it cannot listen now.
    pub fn unserved(&self) -> BTreeSet<SocketAddrV4> {
        let listeners = self.listeners();
        let ports = listeners.by_key.values().map(|listener| &listener.port);
        let unserved = ports.filter(|port| port.protocol == Protocol::Tcp && port.problem().is_some());
        unserved.map(|port| port.address).collect()
    }

    /// What was counted so far.
    pub fn counters(&self) -> Counters {
        let listeners = self.listeners();
        let open = |most: usize| most.saturating_sub(self.shared.places.available_permits()) as u64;
        let mut services: BTreeMap<ServiceName, ServiceCounts> = BTreeMap::new();
        for (name, tally) in &listeners.tallies {
            let of_service = services.entry(name.clone()).or_default();
            (of_service.total, of_service.http) = (tally.snapshot(), tally.http_snapshot());
        }
        for (port, endpoints) in listeners.ports() {
            let protocol = port.protocol;
            let of_service = services.entry(port.table().service.clone()).or_default();
            of_service.endpoints.extend(endpoints.values().map(|endpoint| {
                let counts = endpoint.tally.snapshot();
                EndpointCounts { protocol, address: endpoint.address, counts }
            }));
        }
        for counts in services.values_mut() {
            counts.endpoints.sort_by_key(|endpoint| (endpoint.protocol, endpoint.address));
        }
        Counters {
            open_connections: open(self.shared.options.max_connections),
            open_sessions: self.shared.sessions.len() as u64,
            refused: self.shared.refused.load(Ordering::Relaxed),
            services,
        }
    }

    /// What became of connections to the endpoints that had some. A UDP session is a connection, and a datagram that could not be sent a
    /// failure. What is counted of an endpoint begins again when it was removed or down.
    pub fn outcomes(&self) -> Outcomes {
        let listeners = self.listeners();
        let mut outcomes = Outcomes::new();
        for Listener { port, endpoints, .. } in listeners.by_key.values() {
            for (address, endpoint) in endpoints {
                let Counts { connections: established, failures: failed, .. } = endpoint.tally.snapshot();
                if established + failed > 0 {
                    *outcomes.entry((port.protocol, *address)).or_default() +=
                        Outcome { established, failed };
                }
            }
        }
        outcomes
    }

    /// Closes all listeners, resets all connections and waits for their end. The proxy does nothing afterwards.
    pub async fn stop(&self) {
        self.shared.stop.send_replace(true);
        self.sweeper.abort();
        let listeners = std::mem::take(&mut *self.listeners());
        close(listeners.by_key.into_values().map(|listener| listener.task).collect()).await;
        // Fails for a number that no machine can have as connections.
        let all = u32::try_from(self.shared.options.max_connections).unwrap_or(u32::MAX);
        let _ = self.shared.places.acquire_many(all).await;
    }

    fn listeners(&self) -> MutexGuard<'_, Listeners> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.send_replace(true);
        self.sweeper.abort();
        for listener in self.listeners().by_key.values() {
            listener.task.abort();
        }
    }
}

/// Waits until the tasks have ended and with them their sockets are closed.
async fn close(tasks: Vec<JoinHandle<()>>) {
    for task in tasks {
        task.abort();
        let _ = task.await;
    }
}

async fn end_idle_sessions(shared: Arc<Shared>) {
    let idle = shared.options.udp_idle;
    let mut ticks = interval((idle / 8).clamp(Duration::from_millis(10), Duration::from_secs(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let limit = shared.now().checked_sub(u64::try_from(idle.as_nanos()).unwrap_or(u64::MAX));
        if let Some(limit) = limit {
            shared.sessions.end_idle(limit);
        }
    }
}
