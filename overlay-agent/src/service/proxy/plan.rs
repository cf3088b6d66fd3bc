//! What the proxy has to listen on, made of the catalog. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddrV4},
};

use overlay_ebpf::service::abi::ServiceKey;

use super::http::HttpPort;
use crate::service::{
    Catalog, ServiceName,
    catalog::Service,
    front::{Front, Rules, front, ports, socket_address},
    record::{EndpointState, Port, Protocol},
};

/// A port of a virtual address, as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// The service that it belongs to.
    pub(super) service: ServiceName,
    /// Where the proxy listens.
    pub(super) address: SocketAddrV4,
    /// TCP or UDP.
    pub(super) protocol: Protocol,
    /// Whether endpoints are told the client.
    pub(super) proxy_protocol: bool,
    /// What requests do, if it is an HTTP port.
    pub(super) http: Option<HttpPort>,
    /// How connections choose an endpoint.
    pub(super) front: Front,
    /// The endpoints that keep their connections: those that take new ones, and those that are neither down nor removed.
    pub(super) kept: BTreeSet<SocketAddrV4>,
}

/// All ports of virtual addresses.
pub(super) fn wanted(catalog: &Catalog, rules: &Rules) -> BTreeMap<ServiceKey, Wanted> {
    ports(catalog, rules)
        .map(|(key, service, port)| (key, of_port(service, port, socket_address(key.address), rules)))
        .collect()
}

/// A port to which only routes lead.
pub(super) fn target(service: &Service, port: &Port, rules: &Rules) -> Wanted {
    let address = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port.port.get());
    of_port(service, port, address, rules)
}

fn of_port(service: &Service, port: &Port, address: SocketAddrV4, rules: &Rules) -> Wanted {
    let front = front(service, port, rules);
    let up = service.endpoints.iter().filter(|endpoint| endpoint.spec.state != EndpointState::Down);
    let mut kept: BTreeSet<SocketAddrV4> = up.map(|endpoint| endpoint.backend(port).address).collect();
    kept.extend(front.backends.iter().map(|backend| backend.address));
    Wanted {
        service: service.name.clone(),
        address,
        protocol: port.protocol,
        proxy_protocol: port.proxy_protocol,
        http: HttpPort::new(service, port, rules),
        front,
        kept,
    }
}
