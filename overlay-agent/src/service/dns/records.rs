//! The DNS records of a catalog.

use std::{
    collections::{HashMap, HashSet},
    net::Ipv4Addr,
    sync::Arc,
};

use hickory_proto::rr::{
    Name, RData, Record, RecordType,
    rdata::{A, SRV},
};

use super::zone::{Place, Zone, pointer};
use crate::service::{
    Catalog, ServiceName,
    catalog::{Endpoint, Service},
    record::{Port, Protocol},
};

/// A catalog with what is needed to find its names and addresses at once.
#[derive(Debug)]
pub struct Records {
    zone: Arc<Zone>,
    catalog: Arc<Catalog>,
    namespaces: HashSet<String>,
    /// Services by their virtual addresses.
    holders: HashMap<Ipv4Addr, Arc<Service>>,
    /// Endpoints of headless services by their addresses.
    headless: HashMap<Ipv4Addr, Vec<Endpoint>>,
}

/// What there is at a name.
#[derive(Debug, PartialEq)]
pub(super) enum Found {
    /// Records of the type.
    Records {
        /// Those of the answer section.
        answers: Vec<Record>,
        /// Addresses of names in them.
        additionals: Vec<Record>,
    },
    /// The name exists, and has no record of the type.
    NoData {
        /// The zone.
        apex: Name,
    },
    /// There is no such name.
    NoName {
        /// The zone.
        apex: Name,
    },
    /// The name is not of this zone.
    Outside,
}

impl Records {
    /// Takes time in proportion to the services and the endpoints of headless ones, and makes no name: nearly none of those will be asked
    /// for before the next change.
    pub fn new(zone: Arc<Zone>, catalog: Arc<Catalog>) -> Self {
        let mut namespaces: HashSet<String> = HashSet::new();
        let mut holders: HashMap<Ipv4Addr, Arc<Service>> = HashMap::with_capacity(catalog.services.len());
        let mut headless: HashMap<Ipv4Addr, Vec<Endpoint>> = HashMap::new();
        for service in catalog.services.values() {
            if !namespaces.contains(service.name.namespace()) {
                namespaces.insert(service.name.namespace().to_owned());
            }
            if let Some(vip) = service.vip {
                holders.insert(vip, Arc::clone(service));
            } else if service.spec.headless {
                for endpoint in &service.endpoints {
                    headless.entry(endpoint.spec.overlay_ip).or_default().push(endpoint.clone());
                }
            }
        }
        Self { zone, catalog, namespaces, holders, headless }
    }

    /// The zone.
    pub fn zone(&self) -> &Zone {
        &self.zone
    }

    /// What there is of a type at a name. `rotation` says with which of several addresses the answer begins, so that clients that take
    /// the first one spread.
    pub(super) fn find(&self, name: &Name, kind: RecordType, rotation: usize) -> Found {
        match self.zone.place(name) {
            Place::Outside => Found::Outside,
            Place::Domain { is_apex: true } => self.apex(name, kind, self.zone.domain().clone()),
            Place::Domain { is_apex: false } => Found::NoName { apex: self.zone.domain().clone() },
            Place::Reverse { address } => self.reverse(name, address, kind),
            Place::Services { labels, apex } => {
                let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
                match labels[..] {
                    [] => self.apex(name, kind, apex),
                    [namespace] if self.namespaces.contains(namespace) => Found::NoData { apex },
                    [service, namespace] => match self.service(service, namespace) {
                        Some(service) => self.addresses_of(service, name, kind, rotation, apex),
                        None => Found::NoName { apex },
                    },
                    [part, service, namespace] => match self.service(service, namespace) {
                        Some(service) if is_part(service, part) => Found::NoData { apex },
                        Some(_) | None => Found::NoName { apex },
                    },
                    [first, second, service, namespace] => match self.service(service, namespace) {
                        Some(service) => self.below_service(service, [first, second], name, kind, apex),
                        None => Found::NoName { apex },
                    },
                    _ => Found::NoName { apex },
                }
            }
        }
    }

    fn service(&self, name: &str, namespace: &str) -> Option<&Service> {
        let name = ServiceName::new(namespace, name).ok()?;
        self.catalog.services.get(&name).map(Arc::as_ref)
    }

    fn apex(&self, name: &Name, kind: RecordType, apex: Name) -> Found {
        if kind != RecordType::SOA && kind != RecordType::ANY {
            return Found::NoData { apex };
        }
        let mut soa = self.zone.soa(&apex);
        soa.name = name.clone();
        Found::Records { answers: vec![soa], additionals: Vec::new() }
    }

    /// The addresses of a service: its virtual one, or those of its endpoints.
    fn addresses_of(
        &self,
        service: &Service,
        owner: &Name,
        kind: RecordType,
        rotation: usize,
        apex: Name,
    ) -> Found {
        if !asks_for(kind, RecordType::A) {
            return Found::NoData { apex };
        }
        let mut answers = self.address_records(service, owner);
        if let Some(start) = rotation.checked_rem(answers.len()) {
            answers.rotate_left(start);
        }
        found(answers, Vec::new(), apex)
    }

    fn address_records(&self, service: &Service, owner: &Name) -> Vec<Record> {
        let ttl = self.zone.ttl();
        if !service.spec.headless {
            let vip = service.vip.into_iter();
            return vip.map(|vip| address(owner.clone(), ttl.virtual_address, vip)).collect();
        }
        let mut seen = HashSet::new();
        let addresses = service.serving().into_iter().map(|endpoint| endpoint.spec.overlay_ip);
        let addresses = addresses.filter(|address| seen.insert(*address));
        addresses.map(|ip| address(owner.clone(), ttl.endpoint, ip)).collect()
    }

    /// `_port._protocol` or `id.node` below the name of a service.
    fn below_service(
        &self,
        service: &Service,
        [first, second]: [&str; 2],
        owner: &Name,
        kind: RecordType,
        apex: Name,
    ) -> Found {
        if let (Some(port), Some(protocol)) = (first.strip_prefix('_'), protocol(second)) {
            let is_port = |candidate: &&Port| candidate.name == port && candidate.protocol == protocol;
            let Some(port) = service.spec.ports.iter().find(is_port) else { return Found::NoName { apex } };
            if !asks_for(kind, RecordType::SRV) {
                return Found::NoData { apex };
            }
            let (answers, additionals) = self.srv(service, port, owner).into_iter().unzip();
            return found(answers, additionals, apex);
        }
        let of_name = |endpoint: &Endpoint| (&*endpoint.name.node, &*endpoint.name.id).cmp(&(second, first));
        let Ok(index) = service.endpoints.binary_search_by(of_name) else { return Found::NoName { apex } };
        match service.endpoints.get(index) {
            Some(endpoint) if asks_for(kind, RecordType::A) => {
                let record = address(owner.clone(), self.zone.ttl().endpoint, endpoint.spec.overlay_ip);
                found(vec![record], Vec::new(), apex)
            }
            Some(_) | None => Found::NoData { apex },
        }
    }

    /// SRV records of a port, each with the address of its target (RFC 2782): the service when it has a virtual address, each of the
    /// serving endpoints when it is headless.
    fn srv(&self, service: &Service, port: &Port, owner: &Name) -> Vec<(Record, Record)> {
        let zone = &self.zone;
        let record = |ttl, weight, port, target: Name, ip| {
            let srv = RData::SRV(SRV::new(0, weight, port, target.clone()));
            (Record::from_rdata(owner.clone(), ttl, srv), address(target, ttl, ip))
        };
        if !service.spec.headless {
            let target = service.vip.zip(service_name(zone, service));
            let ttl = zone.ttl().virtual_address;
            return target
                .map(|(vip, target)| record(ttl, 0, port.port.get(), target, vip))
                .into_iter()
                .collect();
        }
        let ttl = zone.ttl().endpoint;
        let serving = service.serving().into_iter();
        let targets =
            serving.filter_map(|endpoint| Some((endpoint_name(zone, endpoint)?, endpoint.backend(port))));
        targets
            .map(|(target, backend)| {
                record(ttl, backend.weight, backend.address.port(), target, *backend.address.ip())
            })
            .collect()
    }

    fn reverse(&self, owner: &Name, ip: Ipv4Addr, kind: RecordType) -> Found {
        let apex = self.zone.reverse_apex(ip);
        let holder = self.holders.get(&ip).and_then(|service| service_name(&self.zone, service));
        let endpoints = self.headless.get(&ip).into_iter().flatten();
        let targets =
            holder.into_iter().chain(endpoints.filter_map(|endpoint| endpoint_name(&self.zone, endpoint)));
        let ttl = self.zone.ttl().endpoint;
        let records: Vec<_> =
            targets.map(|target| Record::from_rdata(owner.clone(), ttl, pointer(target))).collect();
        match records.is_empty() {
            false if asks_for(kind, RecordType::PTR) => found(records, Vec::new(), apex),
            false => Found::NoData { apex },
            true if self.zone.reverse_network(ip).is_some() => Found::NoName { apex },
            true => Found::Outside,
        }
    }
}

fn found(answers: Vec<Record>, additionals: Vec<Record>, apex: Name) -> Found {
    if answers.is_empty() { Found::NoData { apex } } else { Found::Records { answers, additionals } }
}

/// Whether a question of type `kind` asks for records of `own`. ANY may be answered with what there is (RFC 8482 section 4.1).
fn asks_for(kind: RecordType, own: RecordType) -> bool {
    kind == own || kind == RecordType::ANY
}

/// Whether names exist below `<part>.<service>`: a protocol or a node.
fn is_part(service: &Service, part: &str) -> bool {
    match protocol(part) {
        Some(protocol) => service.spec.ports.iter().any(|port| port.protocol == protocol),
        None => {
            let start = service.endpoints.partition_point(|endpoint| *endpoint.name.node < *part);
            service.endpoints.get(start).is_some_and(|endpoint| *endpoint.name.node == *part)
        }
    }
}

/// The protocol of a label such as `_tcp`.
fn protocol(label: &str) -> Option<Protocol> {
    let name = label.strip_prefix('_')?;
    [Protocol::Tcp, Protocol::Udp].into_iter().find(|protocol| protocol.name() == name)
}

fn address(owner: Name, ttl: u32, address: Ipv4Addr) -> Record {
    Record::from_rdata(owner, ttl, RData::A(A(address)))
}

fn service_name(zone: &Zone, service: &Service) -> Option<Name> {
    zone.name_of(&[service.name.name(), service.name.namespace()])
}

fn endpoint_name(zone: &Zone, endpoint: &Endpoint) -> Option<Name> {
    let service = &endpoint.name.service;
    zone.name_of(&[&endpoint.name.id, &endpoint.name.node, service.name(), service.namespace()])
}
