//! The listeners of the proxy, and what they keep from one catalog to the next.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddrV4,
    sync::Arc,
};

use overlay_ebpf::service::abi::ServiceKey;
use tokio::{task::JoinHandle, time::sleep};
use tracing::{info, warn};

use super::{
    balancer::{Table, VirtualPort},
    counters::Tally,
    endpoint::Endpoint,
    plan::{Wanted, wanted},
    shared::Shared,
    tcp, udp,
};
use crate::service::{Catalog, ServiceName, catalog::Service, front::Rules, record::Protocol};

/// All listeners.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    /// By virtual address, port and protocol.
    pub(super) by_key: BTreeMap<ServiceKey, Listener>,
    /// The counters of services.
    pub(super) tallies: BTreeMap<ServiceName, Arc<Tally>>,
    /// Endpoints of ports that are gone, with connections that are drained.
    drained: BTreeMap<ServiceKey, Endpoints>,
    /// What the listeners are made of: a service that is the same `Arc` again has not changed.
    services: BTreeMap<ServiceName, Arc<Service>>,
    rules: Rules,
    next_number: u32,
}

/// The task at a port of a virtual address.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) port: Arc<VirtualPort>,
    pub(super) task: JoinHandle<()>,
    /// Those of the catalog, and those with connections that are drained.
    pub(super) endpoints: Endpoints,
}

type Endpoints = BTreeMap<SocketAddrV4, Arc<Endpoint>>;

impl Listeners {
    /// Makes them what the catalog says. Looks only at services that have changed. Tasks that end are added to `closing`.
    pub(super) fn reconcile(
        &mut self,
        catalog: &Catalog,
        rules: &Rules,
        shared: &Arc<Shared>,
        closing: &mut Vec<JoinHandle<()>>,
    ) {
        let is_new = self.rules != *rules;
        let has_changed = |(name, service): &(&ServiceName, &Arc<Service>)| {
            is_new || self.services.get(*name).is_none_or(|before| !Arc::ptr_eq(before, service))
        };
        let changed = catalog.services.iter().filter(has_changed);
        let changed: BTreeMap<_, _> =
            changed.map(|(name, service)| (name.clone(), Arc::clone(service))).collect();
        let removed = self.services.keys().filter(|name| !catalog.services.contains_key(*name));
        let removed: BTreeSet<ServiceName> = removed.cloned().collect();
        let wanted = wanted(&Catalog { services: changed.clone(), skipped: Vec::new() }, rules);

        let is_gone = |(key, listener): &(&ServiceKey, &Listener)| {
            let table = listener.port.table();
            let is_of_changed = removed.contains(&table.service) || changed.contains_key(&table.service);
            is_of_changed && !wanted.contains_key(*key)
        };
        let gone: Vec<ServiceKey> = self.by_key.iter().filter(is_gone).map(|(key, _)| *key).collect();
        for key in gone {
            let Some(listener) = self.by_key.remove(&key) else { continue };
            listener.task.abort();
            closing.push(listener.task);
            listener.endpoints.values().for_each(|endpoint| endpoint.drain(shared.options.drain));
            self.drained.insert(key, listener.endpoints);
        }
        self.drained.retain(|_, endpoints| {
            endpoints.retain(|_, endpoint| endpoint.tally.open() > 0);
            !endpoints.is_empty()
        });
        self.tallies.retain(|name, _| !removed.contains(name));
        for (key, port) in wanted {
            self.reconcile_port(key, port, shared);
        }
        self.services.clone_from(&catalog.services);
        self.rules.clone_from(rules);
    }

    fn reconcile_port(&mut self, key: ServiceKey, wanted: Wanted, shared: &Arc<Shared>) {
        let mut endpoints = match self.by_key.get_mut(&key) {
            Some(listener) => std::mem::take(&mut listener.endpoints),
            None => self.drained.remove(&key).unwrap_or_default(),
        };
        endpoints.retain(|address, endpoint| {
            let is_kept = wanted.kept.contains(address);
            if is_kept {
                endpoint.keep();
            } else {
                endpoint.drain(shared.options.drain);
            }
            is_kept || endpoint.tally.open() > 0
        });
        let tally = Arc::clone(self.tallies.entry(wanted.service.clone()).or_default());
        let (address, protocol) = (wanted.address, wanted.protocol);
        let table = |wanted: Wanted| {
            let endpoint = |address| {
                Arc::clone(endpoints.entry(address).or_insert_with(|| Arc::new(Endpoint::new(address))))
            };
            Table::new(wanted.service, tally, wanted.proxy_protocol, wanted.front, endpoint)
        };
        if let Some(listener) = self.by_key.get_mut(&key) {
            if !listener.port.table().is_of(&wanted) {
                listener.port.set_table(table(wanted));
            }
            listener.endpoints = endpoints;
            return;
        }
        let port = Arc::new(VirtualPort::new(address, protocol, self.next_number, table(wanted)));
        self.next_number = self.next_number.wrapping_add(1);
        self.by_key.insert(key, Listener::start(port, endpoints, shared));
    }
}

impl Listener {
    fn start(port: Arc<VirtualPort>, endpoints: Endpoints, shared: &Arc<Shared>) -> Self {
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
        Self { port, task, endpoints }
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
