//! What the load balancer of a node does at each port of each virtual address, made of the catalog. Pure.

use std::{collections::BTreeMap, net::SocketAddrV4};

use overlay_ebpf::service::abi::{self, Address, ServiceKey};

use super::{
    catalog::{Backend, Catalog, Endpoint, Service},
    record::{App, LoadBalancing, Locality, Policy, Port},
    slots,
};

/// What the catalog does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The policy of services that name none.
    pub default: LoadBalancing,
    /// This node, for services that prefer their client's.
    pub node: String,
    /// Its zone.
    pub zone: Option<String>,
    /// Whether HTTP ports are included: in the proxy, which balances their requests, and where there is no proxy, so that at least their
    /// connections are balanced.
    pub http: bool,
    /// Whether ports are included whose endpoints are told the client by the PROXY protocol: only the proxy does that.
    pub proxy_protocol: bool,
}

/// A port of a virtual address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Front {
    /// How connections choose an endpoint.
    pub policy: Policy,
    /// Seconds without a connection after which the affinity of a client ends; 0 for no affinity.
    pub affinity_ttl_s: u32,
    /// The endpoints that take connections, no two with one address.
    pub backends: Vec<Backend>,
}

/// All ports of virtual addresses.
pub type Fronts = BTreeMap<ServiceKey, Front>;

impl Front {
    /// The table of slots, as indices of [`Self::backends`].
    pub fn slots(&self) -> Vec<u32> {
        slots::table(self.policy, &self.backends)
    }

    /// The policy as the programs know it.
    pub fn abi_policy(&self) -> abi::Policy {
        match self.policy {
            Policy::RoundRobin => abi::Policy::RoundRobin,
            Policy::Random => abi::Policy::Random,
            Policy::LeastConn => abi::Policy::LeastConn,
            Policy::SourceHash | Policy::Maglev => abi::Policy::ClientHash,
        }
    }
}

/// The address as the programs know it.
pub fn abi_address(address: SocketAddrV4) -> Address {
    Address { ip: address.ip().octets(), port: address.port().to_be_bytes() }
}

/// The address that the programs know so.
pub fn socket_address(Address { ip, port }: Address) -> SocketAddrV4 {
    SocketAddrV4::new(ip.into(), u16::from_be_bytes(port))
}

/// The ports of all virtual addresses of the catalog. One without usable endpoints is there, too: connections to it are refused.
pub fn fronts(catalog: &Catalog, rules: &Rules) -> Fronts {
    ports(catalog, rules).map(|(key, service, port)| (key, front(service, port, rules))).collect()
}

/// The ports of all virtual addresses of the catalog that are included.
pub(super) fn ports<'a>(
    catalog: &'a Catalog,
    rules: &'a Rules,
) -> impl Iterator<Item = (ServiceKey, &'a Service, &'a Port)> {
    let is_included =
        |port: &Port| (rules.http || port.app != App::Http) && (rules.proxy_protocol || !port.proxy_protocol);
    let all = catalog.services.values().flat_map(|service| {
        service.spec.ports.iter().filter_map(|port| Some((key(service, port)?, &**service, port)))
    });
    all.filter(move |(_, _, port)| is_included(port))
}

/// All ports of the virtual address of a service, included or not.
pub fn keys(service: &Service) -> impl Iterator<Item = ServiceKey> {
    service.spec.ports.iter().filter_map(|port| key(service, port))
}

/// A port at the virtual address of its service; `None` when that has none.
pub(super) fn key(service: &Service, port: &Port) -> Option<ServiceKey> {
    let address = abi_address(SocketAddrV4::new(service.vip?, port.port.get()));
    Some(ServiceKey::new(address, port.protocol.number()))
}

/// A port of a service, wherever its clients are from.
pub(super) fn front(service: &Service, port: &Port, rules: &Rules) -> Front {
    let affinity = service.spec.affinity.filter(|affinity| affinity.client_ip);
    Front {
        policy: service.load_balancing(&rules.default).policy,
        affinity_ttl_s: affinity.map_or(0, |affinity| affinity.ttl_s),
        backends: backends(service, port, rules),
    }
}

/// The endpoints that take connections from this node.
fn backends(service: &Service, port: &Port, rules: &Rules) -> Vec<Backend> {
    let mut found = match service.spec.locality {
        Locality::Any => service.backends(port),
        Locality::LocalOnly => near(service, rules, false).backends(port),
        Locality::PreferNode => preferred(service, near(service, rules, false), port),
        Locality::PreferZone => preferred(service, near(service, rules, true), port),
    };
    let mut seen = std::collections::BTreeSet::new();
    found.retain(|backend| seen.insert(backend.address));
    found
}

/// Those of `near` if one of them takes connections, else all.
fn preferred(service: &Service, near: Service, port: &Port) -> Vec<Backend> {
    let is_taking = near.endpoints.iter().any(Endpoint::is_taking);
    if is_taking { near.backends(port) } else { service.backends(port) }
}

/// The service with only the endpoints of this node, or of its zone.
fn near(service: &Service, rules: &Rules, zone: bool) -> Service {
    let mut near = service.clone();
    near.endpoints.retain(|endpoint| match zone {
        true => rules.zone.is_some() && endpoint.spec.zone == rules.zone,
        false => *endpoint.name.node == *rules.node,
    });
    near
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::catalog::tests::records;

    fn catalog(service: &str, endpoints: &[(&str, &str)]) -> Catalog {
        let vips = records(&[("10.251.0.1", "shop/web")]);
        Catalog::new(&records(&[("shop/web", service)]), &vips, &records(endpoints), &Catalog::default())
    }

    fn key(port: u16, protocol: u8) -> ServiceKey {
        ServiceKey::new(Address { ip: [10, 251, 0, 1], port: port.to_be_bytes() }, protocol)
    }

    const ENDPOINTS: [(&str, &str); 4] = [
        ("shop/web/a/1", r#"{"overlay_ip":"10.244.1.2","zone":"east"}"#),
        ("shop/web/a/2", r#"{"overlay_ip":"10.244.1.2","zone":"east"}"#),
        ("shop/web/b/1", r#"{"overlay_ip":"10.244.2.2","zone":"east"}"#),
        ("shop/web/c/1", r#"{"overlay_ip":"10.244.3.2","zone":"west"}"#),
    ];

    #[test]
    fn each_port_has_its_own_front() {
        let service = r#"{"v":1,"affinity":{"client_ip":true,"ttl_s":30},"lb":{"policy":"maglev"},"ports":[
            {"name":"dns","port":53,"protocol":"udp","target_port":5353},
            {"name":"dns-tcp","port":53,"protocol":"tcp"},
            {"name":"http","port":80,"protocol":"tcp","app":"http"}]}"#;
        let catalog = catalog(service, &ENDPOINTS);
        let fronts = super::fronts(&catalog, &Rules::default());
        assert_eq!(fronts.keys().copied().collect::<Vec<_>>(), [key(53, 6), key(53, 17)]);
        let udp = &fronts[&key(53, 17)];
        assert_eq!((udp.policy, udp.affinity_ttl_s), (Policy::Maglev, 30));
        let addresses: Vec<String> = udp.backends.iter().map(|backend| backend.address.to_string()).collect();
        assert_eq!(addresses, ["10.244.1.2:5353", "10.244.2.2:5353", "10.244.3.2:5353"]);
        let with_http = super::fronts(&catalog, &Rules { http: true, ..Rules::default() });
        assert_eq!(with_http.len(), 3);
    }

    #[test]
    fn only_the_proxy_has_ports_with_the_proxy_protocol() {
        let service = r#"{"v":1,"ports":[{"name":"a","port":1,"protocol":"tcp","proxy_protocol":true},
            {"name":"b","port":2,"protocol":"tcp"}]}"#;
        let catalog = catalog(service, &ENDPOINTS);
        let fronts = super::fronts(&catalog, &Rules::default());
        assert_eq!(fronts.into_keys().collect::<Vec<_>>(), [key(2, 6)]);
        let fronts = super::fronts(&catalog, &Rules { proxy_protocol: true, ..Rules::default() });
        assert_eq!(fronts.into_keys().collect::<Vec<_>>(), [key(1, 6), key(2, 6)]);
    }

    #[test]
    fn endpoints_nearby_are_preferred_as_the_service_says() {
        let count = |locality: &str, node: &str, zone: Option<&str>| {
            let service = format!(
                r#"{{"v":1,"locality":"{locality}","ports":[{{"name":"p","port":1,"protocol":"tcp"}}]}}"#
            );
            let rules = Rules { node: node.to_owned(), zone: zone.map(str::to_owned), ..Rules::default() };
            super::fronts(&catalog(&service, &ENDPOINTS), &rules)[&key(1, 6)].backends.len()
        };
        assert_eq!(count("any", "a", Some("east")), 3);
        assert_eq!(count("local_only", "a", None), 1);
        assert_eq!(count("local_only", "d", None), 0);
        assert_eq!(count("prefer_node", "c", None), 1);
        assert_eq!(count("prefer_node", "d", None), 3);
        assert_eq!(count("prefer_zone", "d", Some("east")), 2);
        assert_eq!(count("prefer_zone", "d", Some("north")), 3);
        assert_eq!(count("prefer_zone", "d", None), 3);
    }

    #[test]
    fn a_service_without_endpoints_refuses() {
        let service = r#"{"v":1,"ports":[{"name":"p","port":1,"protocol":"tcp"}]}"#;
        let fronts = super::fronts(&catalog(service, &[]), &Rules::default());
        assert!(fronts[&key(1, 6)].slots().is_empty());
    }
}
