//! What the proxy has to listen on, made of the catalog. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddrV4,
};

use overlay_ebpf::service::abi::ServiceKey;

use crate::service::{
    Catalog, ServiceName,
    front::{Front, Rules, abi_address, fronts},
    record::{EndpointState, Protocol},
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
    /// How connections choose an endpoint.
    pub(super) front: Front,
    /// The endpoints that keep their connections: those that take new ones, and those that are neither down nor removed.
    pub(super) kept: BTreeSet<SocketAddrV4>,
}

/// All ports of virtual addresses.
pub(super) fn wanted(catalog: &Catalog, rules: &Rules) -> BTreeMap<ServiceKey, Wanted> {
    let mut fronts = fronts(catalog, rules);
    let mut wanted = BTreeMap::new();
    for service in catalog.services.values() {
        let Some(vip) = service.vip else { continue };
        for port in &service.spec.ports {
            let address = SocketAddrV4::new(vip, port.port.get());
            let key = ServiceKey::new(abi_address(address), port.protocol.number());
            let Some(front) = fronts.remove(&key) else { continue };
            let up = service.endpoints.iter().filter(|endpoint| endpoint.spec.state != EndpointState::Down);
            let mut kept: BTreeSet<SocketAddrV4> =
                up.map(|endpoint| endpoint.backend(port).address).collect();
            kept.extend(front.backends.iter().map(|backend| backend.address));
            let port = Wanted {
                service: service.name.clone(),
                address,
                protocol: port.protocol,
                proxy_protocol: port.proxy_protocol,
                front,
                kept,
            };
            wanted.insert(key, port);
        }
    }
    wanted
}
