//! The proxy of services: accepts connections to virtual addresses in user space, and passes them on to endpoints.
//!
//! It serves where the kernel's programs do not: on nodes without eBPF in control groups, and for connections that reach the node from
//! elsewhere. Both choose endpoints by the same code, `overlay_ebpf::service::select`.
//!
//! In reading order: `plan` (what to listen on, pure), `balancer` and `endpoint` (the choice of an endpoint), `tcp`, `relay` and `header`,
//! `udp` and `sessions`, `counters`. A task for each listener, each TCP connection and each UDP session: none waits for another.

mod aging;
mod balancer;
mod counters;
mod endpoint;
mod header;
mod plan;
mod relay;
mod sessions;
mod shared;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddrV4,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use overlay_ebpf::service::abi::ServiceKey;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use tokio::{
    task::JoinHandle,
    time::{MissedTickBehavior, interval, sleep},
};
use tracing::{info, warn};

use self::{
    balancer::{Table, VirtualPort},
    counters::Tally,
    endpoint::Endpoint,
    plan::{Wanted, wanted},
    shared::Shared,
};
pub use self::{
    counters::{Counters, Counts, EndpointCounts, ServiceCounts},
    shared::Options,
};
use super::{Catalog, ServiceName, front::Rules, record::Protocol};

/// The longest time that a clock can count to without an overflow.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// A running proxy. Dropped, it closes its listeners and resets all connections.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    state: Mutex<State>,
    /// Ends idle UDP sessions.
    sweeper: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct State {
    listeners: BTreeMap<ServiceKey, Listener>,
    /// Those of the catalog, and those with connections that are drained.
    endpoints: BTreeMap<(ServiceKey, SocketAddrV4), Arc<Endpoint>>,
    tallies: BTreeMap<ServiceName, Arc<Tally>>,
    next_number: u32,
}

#[derive(Debug)]
struct Listener {
    port: Arc<VirtualPort>,
    task: JoinHandle<()>,
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
        Self { shared, state: Mutex::default(), sweeper }
    }

    /// Makes listeners and endpoints what the catalog says. Connections stay where that allows it. When it returns, removed ports are
    /// closed. A port that cannot be bound is among [`Self::problems`] and is tried again. Ports with the PROXY protocol are always
    /// included, whatever `rules` says.
    pub async fn reconcile(&self, catalog: &Catalog, rules: &Rules) {
        if *self.shared.stop.borrow() {
            return;
        }
        let mut closing = Vec::new();
        let rules = &Rules { proxy_protocol: true, ..rules.clone() };
        self.shared.vips.store(Arc::new(catalog.vips()));
        self.state().reconcile(wanted(catalog, rules), &self.shared, &mut closing);
        close(closing).await;
    }

    /// What does not work.
    pub fn problems(&self) -> Vec<Problem> {
        let state = self.state();
        let mut problems = Vec::new();
        for Listener { port, .. } in state.listeners.values() {
            let table = port.table();
            let backends = table.front.backends.iter().map(|backend| backend.address);
            let looping = backends.filter(|address| self.shared.is_virtual(*address.ip())).map(|address| {
                format!("the endpoint {address} is a virtual address: give the endpoint its own address")
            });
            problems.extend(port.problem().into_iter().chain(looping).map(|reason| Problem {
                service: table.service.clone(),
                address: port.address,
                protocol: port.protocol,
                reason,
            }));
        }
        problems
    }

    /// What was counted so far.
    pub fn counters(&self) -> Counters {
        let state = self.state();
        let open = |most: usize| most.saturating_sub(self.shared.places.available_permits()) as u64;
        let mut services: BTreeMap<ServiceName, ServiceCounts> = BTreeMap::new();
        for (name, tally) in &state.tallies {
            services.entry(name.clone()).or_default().total = tally.snapshot();
        }
        for ((key, address), endpoint) in &state.endpoints {
            // Without its service, only connections are left that are drained.
            let Some(listener) = state.listeners.get(key) else { continue };
            let of_service = services.entry(listener.port.table().service.clone()).or_default();
            let (protocol, counts) = (listener.port.protocol, endpoint.tally.snapshot());
            of_service.endpoints.push(EndpointCounts { protocol, address: *address, counts });
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

    /// Closes all listeners, resets all connections and waits for their end. The proxy does nothing afterwards.
    pub async fn stop(&self) {
        self.shared.stop.send_replace(true);
        self.sweeper.abort();
        let listeners = std::mem::take(&mut self.state().listeners);
        close(listeners.into_values().map(|listener| listener.task).collect()).await;
        // Fails for a number that no machine can have as connections.
        let all = u32::try_from(self.shared.options.max_connections).unwrap_or(u32::MAX);
        let _ = self.shared.places.acquire_many(all).await;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.send_replace(true);
        self.sweeper.abort();
        for listener in self.state().listeners.values() {
            listener.task.abort();
        }
    }
}

impl State {
    fn reconcile(
        &mut self,
        wanted: BTreeMap<ServiceKey, Wanted>,
        shared: &Arc<Shared>,
        closing: &mut Vec<JoinHandle<()>>,
    ) {
        self.listeners.retain(|key, listener| {
            let stays = wanted.contains_key(key);
            if !stays {
                listener.task.abort();
                closing.push(std::mem::replace(&mut listener.task, tokio::spawn(async {})));
            }
            stays
        });
        self.endpoints.retain(|(key, address), endpoint| {
            let is_kept = wanted.get(key).is_some_and(|port| port.kept.contains(address));
            if is_kept {
                endpoint.keep();
            } else {
                endpoint.drain(shared.options.drain);
            }
            is_kept || endpoint.tally.open() > 0
        });
        let services: BTreeSet<&ServiceName> = wanted.values().map(|port| &port.service).collect();
        self.tallies.retain(|name, _| services.contains(name));
        for (key, port) in wanted {
            self.reconcile_port(key, port, shared);
        }
    }

    fn reconcile_port(&mut self, key: ServiceKey, wanted: Wanted, shared: &Arc<Shared>) {
        let existing = self.listeners.get(&key).map(|listener| Arc::clone(&listener.port));
        if let Some(port) = &existing {
            let table = port.table();
            let is_same = table.service == wanted.service
                && table.proxy_protocol == wanted.proxy_protocol
                && table.front == wanted.front;
            if is_same {
                return;
            }
        }
        let tally = Arc::clone(self.tallies.entry(wanted.service.clone()).or_default());
        let endpoint = |address| {
            let new = || Arc::new(Endpoint::new(address));
            Arc::clone(self.endpoints.entry((key, address)).or_insert_with(new))
        };
        let table = Table::new(wanted.service, tally, wanted.proxy_protocol, wanted.front, endpoint);
        match existing {
            Some(port) => port.set_table(table),
            None => {
                let port = VirtualPort::new(wanted.address, wanted.protocol, self.next_number, table);
                self.next_number = self.next_number.wrapping_add(1);
                self.listeners.insert(key, Listener::start(Arc::new(port), shared));
            }
        }
    }
}

impl Listener {
    fn start(port: Arc<VirtualPort>, shared: &Arc<Shared>) -> Self {
        let (own, shared) = (Arc::clone(&port), Arc::clone(shared));
        let task = match port.protocol {
            Protocol::Tcp => {
                let bound = try_bind(&port, tcp::bind);
                tokio::spawn(async move {
                    let listener = bound_at_last(bound, &own, &shared, tcp::bind).await;
                    tcp::accept(&listener, &own, &shared).await;
                })
            }
            Protocol::Udp => {
                let bound = try_bind(&port, udp::bind);
                tokio::spawn(async move {
                    let socket = bound_at_last(bound, &own, &shared, udp::bind).await;
                    udp::serve(socket, own, shared).await;
                })
            }
        };
        Self { port, task }
    }
}

/// Binds, or notes why not.
fn try_bind<T>(port: &VirtualPort, bind: impl Fn(SocketAddrV4) -> io::Result<T>) -> Option<T> {
    let address = port.address;
    match bind(address) {
        Ok(bound) => {
            if port.set_problem(None) {
                info!(service = %port.table().service, %address, "the proxy of services listens now");
            }
            Some(bound)
        }
        Err(error) => {
            let reason = explain(&error, port);
            if port.set_problem(Some(reason.clone())) {
                warn!(service = %port.table().service, %address, %reason, "a port of a service cannot be served");
            }
            None
        }
    }
}

/// Tries until it is bound.
async fn bound_at_last<T>(
    mut bound: Option<T>,
    port: &VirtualPort,
    shared: &Shared,
    bind: impl Fn(SocketAddrV4) -> io::Result<T>,
) -> T {
    loop {
        if let Some(bound) = bound {
            return bound;
        }
        sleep(shared.options.bind_retry).await;
        bound = try_bind(port, &bind);
    }
}

/// Why a port cannot be bound, and what to do about it.
fn explain(error: &io::Error, port: &VirtualPort) -> String {
    let (ip, number, protocol) = (port.address.ip(), port.address.port(), port.protocol.name());
    let what = format!("listening on {ip}, {protocol} port {number}");
    let kind = error.kind();
    if kind == io::ErrorKind::AddrInUse {
        return format!(
            "{what}: another process of this host has that port there or at all addresses: let it listen on its own address, or change \
             the port of the service (`ss -lnp 'sport = :{number}'` shows the process)"
        );
    }
    let remedy = match kind == io::ErrorKind::AddrNotAvailable {
        true => {
            ": this host does not have the address: the device of the virtual addresses is missing".to_owned()
        }
        false if kind == io::ErrorKind::PermissionDenied => {
            ": the agent needs CAP_NET_BIND_SERVICE".to_owned()
        }
        false => String::new(),
    };
    format!("{what}: {error}{remedy}")
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
