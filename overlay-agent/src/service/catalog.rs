//! The services of the network as the agent knows them, made of the records. Pure.
//!
//! One bad record never changes another service: it is left out, with the reason.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddrV4},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{
    name::{EndpointName, ServiceName},
    record::{self, EndpointState, Endpoints, LoadBalancing, Port, Protocol, Services, Vip, Vips},
};
use crate::store::Record;

/// The share of an endpoint whose whole weight counts, in percent.
pub const FULL_SHARE: u16 = 100;

/// All services. Equal catalogs are the same to every client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Catalog {
    /// The usable services by name. A service that is the same in two catalogs in a row is the same `Arc`.
    pub services: BTreeMap<ServiceName, Arc<Service>>,
    /// Records that are left out.
    pub skipped: Vec<Skipped>,
}

/// A service with its virtual address and its endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: ServiceName,
    /// What its record says.
    pub spec: record::Service,
    /// Its virtual address; `None` when it is headless, or has none yet.
    pub vip: Option<Ipv4Addr>,
    /// Its endpoints, in order of node and identifier. Those that are draining or down, too.
    pub endpoints: Vec<Endpoint>,
}

/// An endpoint of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Which one.
    pub name: EndpointName,
    /// What its record says.
    pub spec: record::Endpoint,
    /// What this node knows about it.
    pub local: Local,
}

/// What one node knows about an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Local {
    /// Whether connections of this node to it fail, so that it gets none for a while. Those that it has may go on.
    pub is_ejected: bool,
    /// The part of its weight that counts, in percent: less than 100 while it begins to take connections.
    pub share: u16,
}

impl Default for Local {
    /// Nothing that the record does not say.
    fn default() -> Self {
        Self { is_ejected: false, share: FULL_SHARE }
    }
}

/// Where connections to one port of a service go: one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    /// Its address in the overlay, and its port.
    pub address: SocketAddrV4,
    /// Its share of the connections beside the others'.
    pub weight: u16,
}

/// A record that is left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Its key below the network's prefix: `services/shop/web`.
    pub key: String,
    /// Why.
    pub reason: String,
}

impl Service {
    /// The port that listens on this number.
    pub fn port(&self, protocol: Protocol, number: u16) -> Option<&Port> {
        self.spec.ports.iter().find(|port| port.protocol == protocol && port.port.get() == number)
    }

    /// An endpoint by its name.
    pub fn endpoint(&self, name: &EndpointName) -> Option<&Endpoint> {
        let place = self.endpoints.binary_search_by(|endpoint| endpoint.name.cmp(name)).ok()?;
        self.endpoints.get(place)
    }

    /// The endpoints that take new connections, in the order of [`Self::endpoints`]: those that are ready and not ejected. When there
    /// is none, those that are ready, and else those that are down: an error of the health check must not take down a service. Empty
    /// when there is none at all.
    pub fn serving(&self) -> Vec<&Endpoint> {
        let of_state = |state: EndpointState| {
            let wanted = self.endpoints.iter().filter(|endpoint| endpoint.spec.state == state);
            wanted.filter(|endpoint| endpoint.spec.weight > 0).collect::<Vec<_>>()
        };
        let mut ready = of_state(EndpointState::Ready);
        if ready.is_empty() {
            return of_state(EndpointState::Down);
        }
        if ready.iter().any(|endpoint| endpoint.is_taking()) {
            ready.retain(|endpoint| endpoint.is_taking());
        }
        ready
    }

    /// Where connections to a port go: [`Self::serving`] with the port of each. While one of them has less than its full share, all
    /// weights are multiplied by [`FULL_SHARE`], so that parts of small ones count.
    pub fn backends(&self, port: &Port) -> Vec<Backend> {
        let serving = self.serving();
        let is_shared = serving.iter().any(|endpoint| endpoint.local.share < FULL_SHARE);
        let backends = serving.into_iter().map(|endpoint| {
            let backend = endpoint.backend(port);
            let weight = match is_shared {
                true => backend.weight.saturating_mul(endpoint.local.share),
                false => backend.weight,
            };
            Backend { weight, ..backend }
        });
        backends.collect()
    }

    /// The policy: that of the record, or else the network's.
    pub fn load_balancing<'a>(&'a self, default: &'a LoadBalancing) -> &'a LoadBalancing {
        self.spec.lb.as_ref().unwrap_or(default)
    }
}

impl Endpoint {
    /// An endpoint of which this node knows only the record.
    pub fn new(name: EndpointName, spec: record::Endpoint) -> Self {
        Self { name, spec, local: Local::default() }
    }

    /// Whether it takes new connections while others do, too.
    pub fn is_taking(&self) -> bool {
        self.spec.state == EndpointState::Ready && self.spec.weight > 0 && !self.local.is_ejected
    }

    /// Where it listens for a port of its service.
    pub fn backend(&self, port: &Port) -> Backend {
        let own = self.spec.ports.get(&port.name).copied();
        let number = own.or(port.target_port).unwrap_or(port.port);
        Backend { address: SocketAddrV4::new(self.spec.overlay_ip, number.get()), weight: self.spec.weight }
    }
}

impl Catalog {
    /// Makes the catalog of all records of the store. `previous` gives the parts that have not changed.
    pub fn new(
        services: &[Record<Services>],
        vips: &[Record<Vips>],
        endpoints: &[Record<Endpoints>],
        previous: &Self,
    ) -> Self {
        let mut skipped = Vec::new();
        let mut usable: BTreeMap<ServiceName, Service> = BTreeMap::new();
        for record in services {
            match (&record.id, &record.value) {
                (Ok(name), Ok(spec)) => {
                    let service =
                        Service { name: name.clone(), spec: spec.clone(), vip: None, endpoints: Vec::new() };
                    usable.insert(name.clone(), service);
                }
                (Err(reason), _) | (_, Err(reason)) => skipped.push(skip("services/", &record.key, reason)),
            }
        }
        let holders = Self::assign_vips(&mut usable, vips, &mut skipped);
        Self::check_wanted(&usable, &holders, &mut skipped);
        for record in endpoints {
            match (&record.id, &record.value) {
                (Ok(name), Ok(spec)) => match usable.get_mut(&name.service) {
                    Some(service) => {
                        service.endpoints.push(Endpoint::new(name.clone(), spec.clone()));
                    }
                    None => {
                        let reason = format!("there is no usable service {}", name.service);
                        skipped.push(skip("endpoints/", &record.key, &reason));
                    }
                },
                (Err(reason), _) | (_, Err(reason)) => skipped.push(skip("endpoints/", &record.key, reason)),
            }
        }
        let services = usable.into_iter().map(|(name, mut service)| {
            service.endpoints.sort_by(|a, b| a.name.cmp(&b.name));
            service.endpoints.shrink_to_fit();
            let unchanged = previous.services.get(&name).filter(|before| ***before == service);
            let service = unchanged.map_or_else(|| Arc::new(service), Arc::clone);
            (name, service)
        });
        Self { services: services.collect(), skipped }
    }

    /// Gives services the virtual addresses that the records assign to them: the one that the service wants, or else the lowest.
    fn assign_vips(
        services: &mut BTreeMap<ServiceName, Service>,
        vips: &[Record<Vips>],
        skipped: &mut Vec<Skipped>,
    ) -> BTreeMap<Ipv4Addr, ServiceName> {
        let mut holders = BTreeMap::new();
        for record in vips {
            match (&record.id, &record.value) {
                (Ok(vip), Ok(Vip::Held(name))) => {
                    holders.insert(*vip, name.clone());
                }
                (Ok(_), Ok(Vip::Released(_))) => {}
                (Err(reason), _) | (_, Err(reason)) => skipped.push(skip("vips/", &record.key, reason)),
            }
        }
        for (vip, name) in &holders {
            let Some(service) = services.get_mut(name).filter(|service| !service.spec.headless) else {
                continue;
            };
            match service.spec.vip {
                Some(wanted) if wanted != *vip => {}
                _ => service.vip = service.vip.or(Some(*vip)),
            }
        }
        holders
    }

    /// Reports services that want an address which another one holds.
    fn check_wanted(
        services: &BTreeMap<ServiceName, Service>,
        holders: &BTreeMap<Ipv4Addr, ServiceName>,
        skipped: &mut Vec<Skipped>,
    ) {
        for service in services.values().filter(|service| service.vip.is_none()) {
            if let Some(wanted) = service.spec.vip
                && let Some(holder) = holders.get(&wanted)
                && *holder != service.name
            {
                let reason = format!("{holder} holds {wanted}: the service has no virtual address");
                skipped.push(skip("services/", &service.name.to_string(), &reason));
            }
        }
    }

    /// The service that has this virtual address.
    pub fn by_vip(&self, vip: Ipv4Addr) -> Option<&Arc<Service>> {
        self.services.values().find(|service| service.vip == Some(vip))
    }

    /// The virtual addresses in use.
    pub fn vips(&self) -> BTreeSet<Ipv4Addr> {
        self.services.values().filter_map(|service| service.vip).collect()
    }
}

fn skip(prefix: &str, key: &str, reason: &dyn ToString) -> Skipped {
    Skipped { key: format!("{prefix}{key}"), reason: reason.to_string() }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::store::Version;

    /// Records of these keys and values.
    pub(in crate::service) fn records<K: crate::store::Kind>(records: &[(&str, &str)]) -> Vec<Record<K>> {
        let parse = |(key, value): &(&str, &str)| Record::parse(key, value.as_bytes(), Version::default());
        records.iter().map(parse).collect()
    }

    const WEB: &str = r#"{"v":1,"ports":[{"name":"http","port":80,"protocol":"tcp","target_port":8080}]}"#;

    fn catalog(services: &[(&str, &str)], vips: &[(&str, &str)], endpoints: &[(&str, &str)]) -> Catalog {
        Catalog::new(&records(services), &records(vips), &records(endpoints), &Catalog::default())
    }

    #[test]
    fn a_service_has_its_address_and_its_endpoints_in_order() {
        let catalog = catalog(
            &[("shop/web", WEB)],
            &[("10.251.0.9", "shop/web"), ("10.251.0.3", "shop/web"), ("10.251.0.1", "shop/other")],
            &[
                ("shop/web/node-b/1", r#"{"overlay_ip":"10.244.2.2"}"#),
                ("shop/web/node-a/2", r#"{"overlay_ip":"10.244.1.3","ports":{"http":9090},"weight":3}"#),
                ("shop/web/node-a/1", r#"{"overlay_ip":"10.244.1.2","state":"draining"}"#),
                ("shop/web/node-a/3", r#"{"overlay_ip":"10.244.1.4","weight":0}"#),
            ],
        );
        let web = &catalog.services[&"shop/web".parse().unwrap()];
        assert_eq!(web.vip, Some(Ipv4Addr::new(10, 251, 0, 3)));
        assert_eq!(catalog.by_vip(Ipv4Addr::new(10, 251, 0, 3)), Some(web));
        let names: Vec<String> = web.endpoints.iter().map(|endpoint| endpoint.name.to_string()).collect();
        assert_eq!(
            names,
            ["shop/web/node-a/1", "shop/web/node-a/2", "shop/web/node-a/3", "shop/web/node-b/1"]
        );
        let port = web.port(Protocol::Tcp, 80).unwrap();
        assert_eq!(web.port(Protocol::Udp, 80), None);
        let backends = web.backends(port);
        let texts: Vec<_> =
            backends.iter().map(|backend| format!("{} {}", backend.address, backend.weight)).collect();
        assert_eq!(texts, ["10.244.1.3:9090 3", "10.244.2.2:8080 1"]);
        assert!(catalog.skipped.is_empty());
    }

    #[test]
    fn endpoints_that_are_down_are_used_when_no_other_is_left() {
        let down = r#"{"overlay_ip":"10.244.1.2","state":"down"}"#;
        let draining = r#"{"overlay_ip":"10.244.1.3","state":"draining"}"#;
        let endpoints = [("shop/web/a/1", down), ("shop/web/a/2", draining)];
        let all_down = catalog(&[("shop/web", WEB)], &[], &endpoints);
        let web = all_down.services.values().next().unwrap();
        assert_eq!(web.backends(&web.spec.ports[0]).len(), 1);
        let ready = r#"{"overlay_ip":"10.244.1.4"}"#;
        let endpoints = [endpoints[0], endpoints[1], ("shop/web/a/3", ready)];
        let one_up = catalog(&[("shop/web", WEB)], &[], &endpoints);
        let web = one_up.services.values().next().unwrap();
        assert_eq!(web.backends(&web.spec.ports[0])[0].address.ip().octets(), [10, 244, 1, 4]);
    }

    #[test]
    fn ejected_endpoints_are_used_before_those_that_are_down() {
        let endpoints = [
            ("shop/web/a/1", r#"{"overlay_ip":"10.244.1.1","weight":3}"#),
            ("shop/web/a/2", r#"{"overlay_ip":"10.244.1.2"}"#),
            ("shop/web/a/3", r#"{"overlay_ip":"10.244.1.3","state":"down"}"#),
        ];
        let catalog = catalog(&[("shop/web", WEB)], &[], &endpoints);
        let mut web = (**catalog.services.values().next().unwrap()).clone();
        let serving = |web: &Service| -> Vec<(u8, u16)> {
            let backends = web.backends(&web.spec.ports[0]);
            backends.iter().map(|backend| (backend.address.ip().octets()[3], backend.weight)).collect()
        };
        web.endpoints[0].local.is_ejected = true;
        assert_eq!(serving(&web), [(2, 1)]);
        web.endpoints[1].local.is_ejected = true;
        assert_eq!(serving(&web), [(1, 3), (2, 1)]);
        web.endpoints[0].spec.weight = 0;
        web.endpoints[1].spec.state = EndpointState::Draining;
        assert_eq!(serving(&web), [(3, 1)]);
    }

    #[test]
    fn a_part_of_a_small_weight_counts() {
        let endpoints = [
            ("shop/web/a/1", r#"{"overlay_ip":"10.244.1.1","weight":256}"#),
            ("shop/web/a/2", r#"{"overlay_ip":"10.244.1.2"}"#),
        ];
        let catalog = catalog(&[("shop/web", WEB)], &[], &endpoints);
        let mut web = (**catalog.services.values().next().unwrap()).clone();
        let weights = |web: &Service| -> Vec<u16> {
            web.backends(&web.spec.ports[0]).iter().map(|backend| backend.weight).collect()
        };
        assert_eq!(weights(&web), [256, 1]);
        web.endpoints[1].local.share = 10;
        assert_eq!(weights(&web), [25_600, 10]);
        web.endpoints[0].spec.state = EndpointState::Down;
        assert_eq!(weights(&web), [10]);
    }

    #[test]
    fn a_bad_record_changes_no_other_service() {
        let catalog = catalog(
            &[("shop/web", WEB), ("shop/bad", "{}"), ("shop", WEB)],
            &[("10.251.0.1", "shop/web"), ("10.251", "shop/web")],
            &[
                ("shop/web/a/1", r#"{"overlay_ip":"10.244.1.2"}"#),
                ("shop/web/a/2", "{}"),
                ("shop/bad/a/1", r#"{"overlay_ip":"10.244.1.2"}"#),
            ],
        );
        let keys: Vec<&str> = catalog.skipped.iter().map(|skipped| skipped.key.as_str()).collect();
        assert_eq!(
            keys,
            [
                "services/shop/bad",
                "services/shop",
                "vips/10.251",
                "endpoints/shop/web/a/2",
                "endpoints/shop/bad/a/1"
            ]
        );
        assert_eq!(catalog.services.len(), 1);
        assert_eq!(catalog.services.values().next().unwrap().endpoints.len(), 1);
    }

    #[test]
    fn a_wanted_address_is_the_only_one() {
        let wants = r#"{"v":1,"vip":"10.251.0.1","ports":[{"name":"http","port":80,"protocol":"tcp"}]}"#;
        let vips = [("10.251.0.1", "shop/other"), ("10.251.0.2", "shop/web")];
        let taken = catalog(&[("shop/web", wants)], &vips, &[]);
        assert_eq!(taken.services.values().next().unwrap().vip, None);
        assert!(taken.skipped[0].reason.contains("shop/other holds 10.251.0.1"), "{:?}", taken.skipped);
        let headless = r#"{"v":1,"headless":true,"ports":[{"name":"http","port":80,"protocol":"tcp"}]}"#;
        let headless = catalog(&[("shop/web", headless)], &[("10.251.0.2", "shop/web")], &[]);
        assert_eq!(headless.services.values().next().unwrap().vip, None);
    }

    #[test]
    fn what_has_not_changed_is_shared() {
        let services = records(&[("shop/web", WEB), ("shop/api", WEB)]);
        let first = Catalog::new(&services, &[], &[], &Catalog::default());
        let endpoints = records(&[("shop/api/a/1", r#"{"overlay_ip":"10.244.1.2"}"#)]);
        let second = Catalog::new(&services, &[], &endpoints, &first);
        let same = |name: &str| {
            let name = name.parse().unwrap();
            Arc::ptr_eq(&first.services[&name], &second.services[&name])
        };
        assert!(same("shop/web") && !same("shop/api"));
    }
}
