//! Where the routes of HTTP ports lead.

use std::{collections::BTreeMap, sync::Arc};

use http::header::HeaderName;

use super::super::{
    balancer::{Table, VirtualPort},
    shared::Shared,
};
use crate::service::{
    Catalog, ServiceName,
    catalog::Service,
    front::Rules,
    record::{App, Policy, Port, Protocol},
    route::{self, Route},
};

/// Ports by service and the name in the route, `None` for the one without a name.
pub(in super::super) type Targets = BTreeMap<ServiceName, BTreeMap<Option<String>, Arc<VirtualPort>>>;

/// What requests to a port do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct HttpPort {
    /// Requests that go elsewhere.
    pub(super) routes: Vec<Route>,
    /// Whether the service has endpoints, in whatever state: without, it only routes.
    pub(super) has_endpoints: bool,
    /// The header whose value is hashed for the choice of an endpoint.
    pub(super) hash_key: Option<HeaderName>,
}

impl HttpPort {
    /// `None` when the port is no HTTP port.
    pub(in super::super) fn new(service: &Service, port: &Port, rules: &Rules) -> Option<Self> {
        (port.app == App::Http).then(|| {
            let lb = service.load_balancing(&rules.default);
            let is_hashed = matches!(lb.policy, Policy::SourceHash | Policy::Maglev);
            let hash_key = lb.hash_key.as_ref().filter(|_| is_hashed);
            Self {
                routes: port.routes.clone(),
                has_endpoints: !service.endpoints.is_empty(),
                hash_key: hash_key.and_then(|name| HeaderName::from_bytes(name.as_bytes()).ok()),
            }
        })
    }
}

/// All routes of services that have a virtual address.
pub(in super::super) fn routes(catalog: &Catalog) -> impl Iterator<Item = &Route> {
    let services = catalog.services.values().filter(|service| service.vip.is_some());
    services.flat_map(|service| service.spec.ports.iter()).flat_map(|port| port.routes.iter())
}

/// The port to which a route leads; `None` when there is no such service or port.
pub(in super::super) fn port_of<'a>(catalog: &'a Catalog, route: &Route) -> Option<(&'a Service, &'a Port)> {
    let service = catalog.services.get(&route.service)?;
    let is_tcp = |port: &&Port| port.protocol == Protocol::Tcp;
    let mut ports = service.spec.ports.iter().filter(is_tcp);
    let port = match &route.port {
        Some(name) => ports.find(|port| port.name == *name),
        None => ports.clone().find(|port| port.app == App::Http).or_else(|| ports.next()),
    };
    Some((service, port?))
}

/// The port whose endpoints are to answer a request, or why there is none.
#[derive(Debug)]
pub(super) enum Found {
    /// Its own, or another's.
    Port(Arc<VirtualPort>),
    /// The route leads nowhere.
    Missing(String),
    /// The service only routes, and no route is for this request.
    NoRoute,
}

impl Shared {
    /// Finds the port for a request to `port`. `host` is without a port, `path` without a query.
    pub(super) fn find_target(
        &self,
        port: &Arc<VirtualPort>,
        table: &Table,
        host: Option<&str>,
        path: &str,
    ) -> Found {
        let Some(http) = &table.http else { return Found::Port(Arc::clone(port)) };
        match route::find(&http.routes, host, path) {
            Some(route) => match self.target(route) {
                Some(target) => Found::Port(target),
                None => Found::Missing(route.describe()),
            },
            None if http.has_endpoints || http.routes.is_empty() => Found::Port(Arc::clone(port)),
            None => Found::NoRoute,
        }
    }

    fn target(&self, route: &Route) -> Option<Arc<VirtualPort>> {
        self.targets.load().get(&route.service)?.get(&route.port).map(Arc::clone)
    }

    /// The routes of a port that lead nowhere.
    pub(in super::super) fn missing_targets(&self, table: &Table) -> Vec<String> {
        let routes = table.http.iter().flat_map(|http| http.routes.iter()).zip(1..);
        let missing = routes.filter(|(route, _)| self.target(route).is_none());
        let reason = |(route, number): (&Route, u32)| {
            format!(
                "route {number} leads to {}, which is missing: requests that take it get 503",
                route.describe()
            )
        };
        missing.map(reason).collect()
    }
}
