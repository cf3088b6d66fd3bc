//! What was counted of services and endpoints on this node: by the eBPF programs, the proxy and the DNS server together. Pure.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddrV4},
    ops::AddAssign,
};

use serde::{Deserialize, Serialize};

use super::{
    Catalog, ServiceName,
    catalog::Service,
    dns,
    front::{abi_address, key},
    latency::Latencies,
    proxy::{Counters, EndpointCounts, HttpCounts},
    record::{EndpointState, Protocol},
};
use crate::datapath::ebpf::KernelCounts;

/// What the parts of a node have counted.
#[derive(Clone, Debug, Default)]
pub struct Measures {
    /// By the programs, while they are attached.
    pub kernel: Option<KernelCounts>,
    /// Why the programs do not count TCP connections, if so.
    pub uncounted: Option<String>,
    /// By the proxy, while it runs.
    pub proxy: Option<Counters>,
    /// By the DNS server, while it runs.
    pub dns: Option<dns::Counters>,
}

/// The traffic of services through this node. The numbers are those since the agent's start and only grow, except for open connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// In order of their names.
    pub services: Vec<ServiceTraffic>,
    /// The DNS server of the node, while it runs.
    pub dns: Option<dns::Counters>,
    /// Why the eBPF programs do not count TCP connections, if so: what they choose counts as established then.
    pub uncounted: Option<String>,
    /// Connections that the proxy refused because there were too many.
    pub proxy_refused: u64,
}

/// The traffic of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceTraffic {
    /// Its name.
    pub name: ServiceName,
    /// Its virtual address.
    pub vip: Option<Ipv4Addr>,
    /// Of all its ports. The connections that are open are those of its endpoints, also where several services have one.
    pub counts: TrafficCounts,
    /// In order of protocol and address.
    pub endpoints: Vec<EndpointTraffic>,
    /// Requests to its HTTP ports through the proxy.
    #[serde(default)]
    pub http: HttpCounts,
}

/// The traffic of an endpoint. Through eBPF, it is that of all services that have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointTraffic {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where it listens.
    pub address: SocketAddrV4,
    /// Its node and identifier: `node-b/1`; `None` when it was removed and has connections left.
    pub endpoint: Option<String>,
    /// `None` when it was removed.
    pub state: Option<EndpointState>,
    /// What was counted.
    pub counts: TrafficCounts,
}

/// Connections, failures and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficCounts {
    /// TCP connections that were established, connected UDP sockets, destinations of other UDP sockets, and UDP sessions of the proxy.
    pub connections: u64,
    /// TCP connections that the endpoint refused, reset or did not answer, and datagrams that the proxy could not send. Of a service, the
    /// proxy counts the connections that no endpoint took.
    pub failures: u64,
    /// Calls that failed in eBPF because the service has no usable endpoint.
    pub refused: u64,
    /// Connections that are open now.
    pub open: u64,
    /// Times that the eBPF programs chose an endpoint.
    pub picks: u64,
    /// Payload from clients to endpoints through the proxy, in bytes. eBPF does not see the payload.
    pub bytes_to_endpoints: u64,
    /// Payload from endpoints to clients through the proxy, in bytes.
    pub bytes_to_clients: u64,
    /// How long TCP connections took to be established.
    pub latency: Latencies,
}

impl AddAssign for TrafficCounts {
    fn add_assign(&mut self, other: Self) {
        self.connections = self.connections.saturating_add(other.connections);
        self.failures = self.failures.saturating_add(other.failures);
        self.refused = self.refused.saturating_add(other.refused);
        self.open = self.open.saturating_add(other.open);
        self.picks = self.picks.saturating_add(other.picks);
        self.bytes_to_endpoints = self.bytes_to_endpoints.saturating_add(other.bytes_to_endpoints);
        self.bytes_to_clients = self.bytes_to_clients.saturating_add(other.bytes_to_clients);
        self.latency += other.latency;
    }
}

impl Measures {
    /// The traffic of the services of a catalog.
    pub fn traffic(&self, catalog: &Catalog) -> Traffic {
        Traffic {
            services: catalog.services.values().map(|service| self.of_service(service)).collect(),
            dns: self.dns,
            uncounted: self.uncounted.clone(),
            proxy_refused: self.proxy.as_ref().map_or(0, |proxy| proxy.refused),
        }
    }

    fn of_service(&self, service: &Service) -> ServiceTraffic {
        let mut counts = TrafficCounts::default();
        let mut endpoints: BTreeMap<(Protocol, SocketAddrV4), EndpointTraffic> = BTreeMap::new();
        for port in &service.spec.ports {
            let protocol = port.protocol;
            if let Some(key) = key(service, port) {
                let of_port = self.kernel.as_ref().and_then(|kernel| kernel.ports.get(&key));
                counts += of_port.map(|of_port| self.of_kernel(protocol, of_port)).unwrap_or_default();
            }
            for endpoint in &service.endpoints {
                let address = endpoint.backend(port).address;
                endpoints.entry((protocol, address)).or_insert_with(|| EndpointTraffic {
                    protocol,
                    address,
                    endpoint: Some(format!("{}/{}", endpoint.name.node, endpoint.name.id)),
                    state: Some(endpoint.spec.state),
                    counts: self.of_endpoint(protocol, address),
                });
            }
        }
        counts.open = endpoints.values().map(|endpoint| endpoint.counts.open).sum();
        if let Some(of_proxy) = self.proxy.as_ref().and_then(|proxy| proxy.services.get(&service.name)) {
            counts += of_proxy.total.into();
            for EndpointCounts { protocol, address, counts } in &of_proxy.endpoints {
                let removed = EndpointTraffic {
                    protocol: *protocol,
                    address: *address,
                    endpoint: None,
                    state: None,
                    counts: TrafficCounts::default(),
                };
                endpoints.entry((*protocol, *address)).or_insert(removed).counts += (*counts).into();
            }
        }
        let endpoints = endpoints.into_values().collect();
        let of_proxy = self.proxy.as_ref().and_then(|proxy| proxy.services.get(&service.name));
        let http = of_proxy.map(|of_proxy| of_proxy.http).unwrap_or_default();
        ServiceTraffic { name: service.name.clone(), vip: service.vip, counts, endpoints, http }
    }

    fn of_endpoint(&self, protocol: Protocol, address: SocketAddrV4) -> TrafficCounts {
        let key = (protocol.number(), abi_address(address));
        let Some(endpoint) = self.kernel.as_ref().and_then(|kernel| kernel.endpoints.get(&key)) else {
            return TrafficCounts::default();
        };
        TrafficCounts { open: endpoint.open, ..self.of_kernel(protocol, &endpoint.counts) }
    }

    fn of_kernel(&self, protocol: Protocol, counts: &overlay_ebpf::service::abi::Counts) -> TrafficCounts {
        let latency = Latencies::from(counts.latency);
        let connections = match protocol {
            Protocol::Tcp if self.uncounted.is_none() => latency.total(),
            Protocol::Tcp | Protocol::Udp => counts.picks,
        };
        TrafficCounts {
            connections,
            failures: counts.failed,
            refused: counts.refused,
            picks: counts.picks,
            latency,
            ..TrafficCounts::default()
        }
    }
}

impl From<super::proxy::Counts> for TrafficCounts {
    fn from(counts: super::proxy::Counts) -> Self {
        Self {
            connections: counts.connections,
            failures: counts.failures,
            open: counts.open,
            bytes_to_endpoints: counts.bytes_to_endpoints,
            bytes_to_clients: counts.bytes_to_clients,
            latency: counts.latency,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use overlay_ebpf::service::abi::{Counts, TCP, UDP};

    use overlay_ebpf::service::abi::ServiceKey;

    use super::*;
    use crate::{
        datapath::ebpf::KernelEndpoint,
        service::{catalog::tests::records, proxy},
    };

    fn catalog() -> Catalog {
        let web = r#"{"v":1,"ports":[{"name":"web","port":80,"protocol":"tcp","target_port":8080},
            {"name":"alt","port":81,"protocol":"tcp","target_port":8080},{"name":"dns","port":53,"protocol":"udp"}]}"#;
        let endpoints = [
            ("shop/web/a/1", r#"{"overlay_ip":"10.244.1.1"}"#),
            ("shop/web/b/2", r#"{"overlay_ip":"10.244.1.2","state":"draining"}"#),
        ];
        let services = [
            ("shop/web", web),
            ("shop/none", r#"{"v":1,"headless":true,"ports":[{"name":"p","port":1,"protocol":"tcp"}]}"#),
        ];
        let vips = [("10.251.0.1", "shop/web")];
        Catalog::new(&records(&services), &records(&vips), &records(&endpoints), &Catalog::default())
    }

    fn established(count: u64) -> Counts {
        let mut counts = Counts { picks: count + 2, failed: 2, ..Counts::default() };
        counts.latency[7] = count;
        counts
    }

    fn address(number: u8, port: u16) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::new(10, 244, 1, number), port)
    }

    fn kernel() -> KernelCounts {
        let port = |port, protocol| {
            ServiceKey::new(abi_address(SocketAddrV4::new(Ipv4Addr::new(10, 251, 0, 1), port)), protocol)
        };
        let udp = Counts { picks: 3, refused: 1, ..Counts::default() };
        let ports = [(port(80, TCP), established(10)), (port(81, TCP), established(5)), (port(53, UDP), udp)];
        let endpoint = |protocol, number, port, open, counts| {
            ((protocol, abi_address(address(number, port))), KernelEndpoint { open, counts })
        };
        let endpoints = [
            endpoint(TCP, 1, 8080, 4, established(15)),
            endpoint(UDP, 1, 53, 1, udp),
            // Of another service.
            endpoint(TCP, 9, 8080, 7, established(70)),
        ];
        KernelCounts { ports: ports.into(), endpoints: endpoints.into() }
    }

    fn proxy() -> Counters {
        let counts = |connections| proxy::Counts {
            connections,
            failures: 1,
            open: 2,
            bytes_to_clients: 100,
            latency: Latencies::from(established(connections).latency),
            ..proxy::Counts::default()
        };
        let endpoint = |number, connections| EndpointCounts {
            protocol: Protocol::Tcp,
            address: address(number, 8080),
            counts: counts(connections),
        };
        let service = proxy::ServiceCounts {
            http: proxy::HttpCounts::default(),
            total: counts(6),
            endpoints: vec![endpoint(1, 2), endpoint(1, 3), endpoint(3, 1)],
        };
        let services = [("shop/web".parse().unwrap(), service)].into();
        Counters { refused: 9, services, ..Counters::default() }
    }

    fn measures() -> Measures {
        Measures { kernel: Some(kernel()), proxy: Some(proxy()), ..Measures::default() }
    }

    #[test]
    fn programs_and_proxy_are_added_up() {
        let traffic = measures().traffic(&catalog());
        assert_eq!(traffic.proxy_refused, 9);
        let [none, web] = &traffic.services[..] else { panic!("{traffic:?}") };
        assert_eq!((none.name.to_string(), none.counts), ("shop/none".to_owned(), TrafficCounts::default()));
        let counts = web.counts;
        // 10 and 5 at the TCP ports, 3 at the UDP port, 6 through the proxy.
        assert_eq!((counts.connections, counts.failures, counts.refused), (24, 5, 1));
        assert_eq!((counts.picks, counts.open, counts.bytes_to_clients), (22, 7, 100));
        assert_eq!(counts.latency.total(), 21);
        let rows: Vec<_> = web
            .endpoints
            .iter()
            .map(|row| {
                let name = row.endpoint.as_deref().unwrap_or("removed");
                format!(
                    "{} {} {name} {}/{}",
                    row.protocol.name(),
                    row.address,
                    row.counts.connections,
                    row.counts.open
                )
            })
            .collect();
        assert_eq!(
            rows,
            [
                "tcp 10.244.1.1:8080 a/1 20/8",
                "tcp 10.244.1.2:8080 b/2 0/0",
                "tcp 10.244.1.3:8080 removed 1/2",
                "udp 10.244.1.1:53 a/1 3/1",
                "udp 10.244.1.2:53 b/2 0/0",
            ]
        );
        assert_eq!(web.endpoints[1].state, Some(EndpointState::Draining));
    }

    #[test]
    fn attempts_are_shown_where_outcomes_are_not_counted() {
        let mut kernel = kernel();
        kernel.ports.values_mut().for_each(|counts| counts.latency = [0; 32]);
        let measures =
            Measures { kernel: Some(kernel), uncounted: Some("why".to_owned()), ..Measures::default() };
        let traffic = measures.traffic(&catalog());
        assert_eq!(traffic.uncounted.as_deref(), Some("why"));
        assert_eq!(traffic.services[1].counts.connections, 12 + 7 + 3);
    }
}
