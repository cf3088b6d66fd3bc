//! The listeners of the proxy, and what they keep from one catalog to the next.

use std::{collections::BTreeMap, io, net::SocketAddrV4, sync::Arc};

use overlay_ebpf::service::abi::ServiceKey;
use tokio::{task::JoinHandle, time::sleep};
use tracing::{info, warn};

use super::{
    balancer::{Table, VirtualPort},
    counters::Tally,
    endpoint::Endpoint,
    http::{Targets, port_of, routes},
    plan::{Wanted, target, wanted},
    shared::Shared,
    tcp, udp,
};
use crate::service::{
    Catalog, ServiceName,
    changes::{Changes, Seen},
    front::{Rules, key, keys},
    record::Protocol,
};

/// All listeners.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    /// By virtual address, port and protocol.
    pub(super) by_key: BTreeMap<ServiceKey, Listener>,
    /// The counters of services.
    pub(super) tallies: BTreeMap<ServiceName, Arc<Tally>>,
    /// Endpoints of ports that are gone, with connections that are drained.
    drained: BTreeMap<ServiceKey, Endpoints>,
    /// Ports without a virtual address, to which routes lead.
    hidden: Hidden,
    /// What the listeners are made of.
    seen: Seen,
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

pub(super) type Endpoints = BTreeMap<SocketAddrV4, Arc<Endpoint>>;

/// By service and name of the port.
type Hidden = BTreeMap<(ServiceName, String), (Arc<VirtualPort>, Endpoints)>;

impl Listeners {
    /// All ports with their endpoints: those that listen, and those to which only routes lead.
    pub(super) fn ports(&self) -> impl Iterator<Item = (&Arc<VirtualPort>, &Endpoints)> {
        let listening = self.by_key.values().map(|listener| (&listener.port, &listener.endpoints));
        listening.chain(self.hidden.values().map(|(port, endpoints)| (port, endpoints)))
    }

    /// Makes them what the catalog says. Looks only at services that have changed. Tasks that end are added to `closing`.
    pub(super) fn reconcile(
        &mut self,
        catalog: &Catalog,
        rules: &Rules,
        shared: &Arc<Shared>,
        closing: &mut Vec<JoinHandle<()>>,
    ) {
        let Changes { changed, former } = self.seen.update(catalog);
        let (wanted, present): (_, Vec<ServiceKey>) = if self.rules == *rules {
            (wanted(&changed, rules), former.iter().flat_map(|service| keys(service)).collect())
        } else {
            (wanted(catalog, rules), self.by_key.keys().copied().collect())
        };
        for key in present.into_iter().filter(|key| !wanted.contains_key(key)) {
            let Some(listener) = self.by_key.remove(&key) else { continue };
            listener.task.abort();
            listener.port.close(shared.options.drain);
            closing.push(listener.task);
            listener.endpoints.values().for_each(|endpoint| endpoint.drain(shared.options.drain));
            self.drained.insert(key, listener.endpoints);
        }
        self.drained.retain(|_, endpoints| {
            endpoints.retain(|_, endpoint| endpoint.tally.open() > 0);
            !endpoints.is_empty()
        });
        for service in former.iter().filter(|former| !catalog.services.contains_key(&former.name)) {
            self.tallies.remove(&service.name);
        }
        for (key, port) in wanted {
            self.reconcile_port(key, port, shared);
        }
        self.rules.clone_from(rules);
        self.reconcile_targets(catalog, rules, shared);
    }

    /// Finds the ports to which routes lead, those with a virtual address among the listeners.
    fn reconcile_targets(&mut self, catalog: &Catalog, rules: &Rules, shared: &Shared) {
        let mut targets = Targets::new();
        let mut unused = std::mem::take(&mut self.hidden);
        for route in routes(catalog) {
            let of_service = targets.entry(route.service.clone()).or_default();
            if of_service.contains_key(&route.port) {
                continue;
            }
            let Some((service, port)) = port_of(catalog, route) else { continue };
            if let Some(listener) = key(service, port).and_then(|key| self.by_key.get(&key)) {
                of_service.insert(route.port.clone(), Arc::clone(&listener.port));
                continue;
            }
            let name = (service.name.clone(), port.name.clone());
            let earlier = self.hidden.remove(&name).or_else(|| unused.remove(&name));
            let hidden = self.hidden_port(earlier, target(service, port, rules), shared);
            of_service.insert(route.port.clone(), Arc::clone(&hidden.0));
            self.hidden.insert(name, hidden);
        }
        for endpoint in unused.values().flat_map(|(_, endpoints)| endpoints.values()) {
            endpoint.drain(shared.options.drain);
        }
        shared.targets.store(Arc::new(targets));
    }

    fn hidden_port(
        &mut self,
        earlier: Option<(Arc<VirtualPort>, Endpoints)>,
        wanted: Wanted,
        shared: &Shared,
    ) -> (Arc<VirtualPort>, Endpoints) {
        let (earlier, mut endpoints) = earlier.unzip();
        let endpoints_of = endpoints.get_or_insert_default();
        keep_endpoints(endpoints_of, &wanted, shared);
        let port = match earlier {
            Some(port) if port.table().is_of(&wanted) => port,
            Some(port) => {
                port.set_table(self.table(wanted, endpoints_of));
                port
            }
            None => {
                let (address, protocol) = (wanted.address, wanted.protocol);
                let table = self.table(wanted, endpoints_of);
                Arc::new(VirtualPort::new(address, protocol, self.number(), table))
            }
        };
        (port, endpoints.unwrap_or_default())
    }

    fn table(&mut self, wanted: Wanted, endpoints: &mut Endpoints) -> Table {
        let tally = Arc::clone(self.tallies.entry(wanted.service.clone()).or_default());
        Table::new(wanted, tally, |address| {
            Arc::clone(endpoints.entry(address).or_insert_with(|| Arc::new(Endpoint::new(address))))
        })
    }

    fn number(&mut self) -> u32 {
        let number = self.next_number;
        self.next_number = number.wrapping_add(1);
        number
    }

    fn reconcile_port(&mut self, key: ServiceKey, wanted: Wanted, shared: &Arc<Shared>) {
        let mut endpoints = match self.by_key.get_mut(&key) {
            Some(listener) => std::mem::take(&mut listener.endpoints),
            None => self.drained.remove(&key).unwrap_or_default(),
        };
        keep_endpoints(&mut endpoints, &wanted, shared);
        let (address, protocol) = (wanted.address, wanted.protocol);
        let is_same = self.by_key.get(&key).is_some_and(|listener| listener.port.table().is_of(&wanted));
        let table = (!is_same).then(|| self.table(wanted, &mut endpoints));
        if let Some(listener) = self.by_key.get_mut(&key) {
            table.into_iter().for_each(|table| listener.port.set_table(table));
            listener.endpoints = endpoints;
        } else if let Some(table) = table {
            let port = Arc::new(VirtualPort::new(address, protocol, self.number(), table));
            self.by_key.insert(key, Listener::start(port, endpoints, shared));
        }
    }
}

/// Drains the endpoints that the port does not keep, and forgets those without connections.
fn keep_endpoints(endpoints: &mut Endpoints, wanted: &Wanted, shared: &Shared) {
    endpoints.retain(|address, endpoint| {
        let is_kept = wanted.kept.contains(address);
        if is_kept {
            endpoint.keep();
        } else {
            endpoint.drain(shared.options.drain);
        }
        is_kept || endpoint.tally.open() > 0
    });
}

impl Listener {
    fn start(port: Arc<VirtualPort>, endpoints: Endpoints, shared: &Arc<Shared>) -> Self {
        let (own, shared) = (Arc::clone(&port), Arc::clone(shared));
        let task = match port.protocol {
            Protocol::Tcp => {
                let thread = shared.threads.next();
                let bound = {
                    let _guard = thread.enter();
                    try_bind(&port, tcp::bind)
                };
                let here = thread.clone();
                thread.spawn(async move {
                    let listener = bound_at_last(bound, &own, &shared, tcp::bind).await;
                    tcp::accept(&listener, &here, &own, &shared).await;
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
