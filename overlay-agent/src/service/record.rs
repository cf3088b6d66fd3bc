//! The records of services in the store, as JSON: what operators and nodes write.
//!
//! Unknown keys are ignored, so that older agents read what newer ones write; a value outside its limits makes the record one that
//! cannot be used.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    num::NonZeroU16,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    name::{EndpointName, ServiceName, label},
    route::{MAX_ROUTES, Route, check_header},
};
use crate::{
    printable::{LONGEST_REASON, printable},
    store::{Kind, RecordError, Writable},
};

pub use super::health::{CheckKind, HealthCheck};

/// Version of the records that this agent writes.
pub const RECORD_VERSION: u32 = 1;
/// Most ports of a service.
const MAX_PORTS: usize = 16;
/// Largest weight of an endpoint.
pub const MAX_WEIGHT: u16 = 256;

/// The kind of `services/<namespace>/<name>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Services;
/// The kind of `vips/<address>`: which service holds a virtual address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vips;
/// The kind of `endpoints/<namespace>/<name>/<node>/<id>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoints;

/// A virtual address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vip {
    /// A service holds it.
    Held(ServiceName),
    /// A service held it. Clients may still have it from DNS, so no other service gets it before the record is gone.
    Released(Released),
}

/// The value of a virtual address that was released.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Released {
    /// The service that held it, and may have it again at once.
    #[serde(rename = "released")]
    pub by: ServiceName,
    /// A random number, so that two releases are two values.
    #[serde(default)]
    pub nonce: u64,
}

/// A service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Version of the record.
    pub v: u32,
    /// The virtual address that the operator wants; without, the agents allocate one of the pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vip: Option<Ipv4Addr>,
    /// Without a virtual address: DNS answers with the addresses of the endpoints.
    #[serde(default)]
    pub headless: bool,
    /// The ports, at least one.
    pub ports: Vec<Port>,
    /// How an endpoint is chosen; without, as the network's config says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lb: Option<LoadBalancing>,
    /// Keeps a client at its endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,
    /// Which endpoints are preferred.
    #[serde(default)]
    pub locality: Locality,
    /// How the node of an endpoint checks it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthCheck>,
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// A DNS label, unique in the service.
    pub name: String,
    /// The port of the virtual address.
    pub port: NonZeroU16,
    /// The protocol; without, TCP.
    #[serde(default)]
    pub protocol: Protocol,
    /// The port of the endpoints, unless their records name another; without, the same as `port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_port: Option<NonZeroU16>,
    /// What is spoken on it.
    #[serde(default)]
    pub app: App,
    /// Whether each connection to an endpoint begins with a header of the PROXY protocol, version 2, that names the client. TCP only. Such
    /// connections take the proxy.
    #[serde(default, skip_serializing_if = "is_false")]
    pub proxy_protocol: bool,
    /// With HTTP, requests that go to other services. All others go to the endpoints of this one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
}

/// For `skip_serializing_if`.
fn is_false(value: &bool) -> bool {
    !value
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// The number in the IP header.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// The name in records, and in SRV names behind an underscore.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// What is spoken on a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum App {
    /// Anything: connections are balanced.
    #[default]
    Tcp,
    /// HTTP: requests are balanced.
    Http,
}

/// How an endpoint is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadBalancing {
    /// The rule.
    pub policy: Policy,
    /// With HTTP and a hash policy, the header that is hashed. Requests without it are hashed by the client's address; those with it have no
    /// affinity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash_key: Option<String>,
}

/// The rule by which an endpoint is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// One after the other.
    #[default]
    RoundRobin,
    /// By chance.
    Random,
    /// The one with the fewest connections from this node.
    LeastConn,
    /// By a hash of the client's address.
    SourceHash,
    /// By a consistent hash of the client's address, which moves few clients when endpoints come and go.
    Maglev,
}

/// Keeps a client at its endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Affinity {
    /// By the client's address; `false` is as no affinity.
    pub client_ip: bool,
    /// Seconds without a connection after which it ends.
    pub ttl_s: u32,
}

/// Which endpoints are preferred.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Locality {
    /// All alike.
    #[default]
    Any,
    /// Those of the client's node, if there are any.
    PreferNode,
    /// Those of the client's zone, if there are any.
    PreferZone,
    /// Only those of the client's node.
    LocalOnly,
}

/// An endpoint: one running instance of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its address in the overlay.
    pub overlay_ip: Ipv4Addr,
    /// Its ports by the name of the service's port, where they are not the service's target ports.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ports: BTreeMap<String, NonZeroU16>,
    /// Its share of the connections beside the others'; 0 for none.
    #[serde(default = "default_weight")]
    pub weight: u16,
    /// Where it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Whether it takes new connections.
    #[serde(default)]
    pub state: EndpointState,
}

fn default_weight() -> u16 {
    1
}

/// Whether an endpoint takes new connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointState {
    /// It does.
    #[default]
    Ready,
    /// It keeps those that it has.
    Draining,
    /// Its node finds that it does not answer.
    Down,
}

impl Service {
    fn check(&self) -> Result<(), String> {
        if self.headless && self.vip.is_some() {
            return Err("headless and vip exclude each other".to_owned());
        }
        if self.ports.is_empty() || self.ports.len() > MAX_PORTS {
            return Err(format!("a service has 1 to {MAX_PORTS} ports, this one {}", self.ports.len()));
        }
        let mut names = BTreeSet::new();
        let mut numbers = BTreeSet::new();
        for port in &self.ports {
            label("port name", &port.name).map_err(|error| error.0.to_string())?;
            if !names.insert(&port.name) {
                return Err(format!("two ports have the name {}", port.name));
            }
            if !numbers.insert((port.protocol, port.port)) {
                return Err(format!("two ports are {} {}", port.protocol.name(), port.port));
            }
            if port.app == App::Http && port.protocol != Protocol::Tcp {
                return Err(format!("port {}: HTTP needs TCP", port.name));
            }
            if port.proxy_protocol && port.protocol != Protocol::Tcp {
                return Err(format!("port {}: proxy_protocol needs TCP", port.name));
            }
            port.check_routes().map_err(|reason| format!("port {}: {reason}", port.name))?;
        }
        if let Some(name) = self.lb.as_ref().and_then(|lb| lb.hash_key.as_ref()) {
            check_header(name)?;
        }
        if self.affinity.is_some_and(|affinity| affinity.client_ip && affinity.ttl_s == 0) {
            return Err("affinity.ttl_s is 0: expected seconds".to_owned());
        }
        self.health.as_ref().map_or(Ok(()), HealthCheck::check)
    }
}

impl Port {
    fn check_routes(&self) -> Result<(), String> {
        if !self.routes.is_empty() && self.app != App::Http {
            return Err("routes need app: http".to_owned());
        }
        if self.routes.len() > MAX_ROUTES {
            return Err(format!("{} routes are more than {MAX_ROUTES}", self.routes.len()));
        }
        (1..).zip(&self.routes).try_for_each(|(number, route)| {
            route.check().map_err(|reason| format!("route {number}: {reason}"))
        })
    }
}

impl Endpoint {
    /// Fails when no host can have the address, or the weight is above [`MAX_WEIGHT`].
    pub fn check(&self) -> Result<(), String> {
        let ip = self.overlay_ip;
        if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.is_broadcast() {
            return Err(format!("overlay_ip {ip} is no address of a host"));
        }
        if self.weight > MAX_WEIGHT {
            return Err(format!("weight {} is above {MAX_WEIGHT}", self.weight));
        }
        Ok(())
    }
}

/// Parses a JSON value of a record.
fn parse<T: DeserializeOwned>(
    value: &[u8],
    what: &str,
    check: impl Fn(&T) -> Result<(), String>,
) -> Result<T, RecordError> {
    let error = |reason: String| RecordError(printable(&format!("{what}: {reason}"), LONGEST_REASON).into());
    let parsed: T = serde_json::from_slice(value).map_err(|reason| error(reason.to_string()))?;
    check(&parsed).map_err(error)?;
    Ok(parsed)
}

impl Kind for Services {
    const PREFIX: &'static str = "services/";
    const SEGMENTS: usize = 2;
    type Id = ServiceName;
    type Value = Service;

    fn parse_key(key: &str) -> Result<ServiceName, RecordError> {
        key.parse()
    }

    fn parse_value(value: &[u8]) -> Result<Service, RecordError> {
        parse(value, "the service", |service: &Service| match service.v {
            RECORD_VERSION => service.check(),
            other => Err(format!("v is {other}, this agent reads {RECORD_VERSION}")),
        })
    }
}

impl Kind for Vips {
    const PREFIX: &'static str = "vips/";
    type Id = Ipv4Addr;
    type Value = Vip;

    fn parse_key(key: &str) -> Result<Ipv4Addr, RecordError> {
        key.parse().map_err(|_| RecordError(format!("{key:?} is no IPv4 address").into()))
    }

    /// The text `namespace/name` of the holder, or the JSON `{"released":"namespace/name","nonce":7}`.
    fn parse_value(value: &[u8]) -> Result<Vip, RecordError> {
        let text = str::from_utf8(value).map_err(|_| RecordError("the value is not UTF-8".into()))?;
        if text.trim_start().starts_with('{') {
            return parse(value, "the virtual address", |_| Ok(())).map(Vip::Released);
        }
        text.trim_end().parse().map(Vip::Held)
    }
}

impl Kind for Endpoints {
    const PREFIX: &'static str = "endpoints/";
    const SEGMENTS: usize = 4;
    type Id = EndpointName;
    type Value = Endpoint;

    fn parse_key(key: &str) -> Result<EndpointName, RecordError> {
        key.parse()
    }

    fn parse_value(value: &[u8]) -> Result<Endpoint, RecordError> {
        parse(value, "the endpoint", Endpoint::check)
    }
}

/// The JSON of a value. Those of this module have only text as keys, so they have one.
fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

impl Writable for Services {
    fn key(name: &ServiceName) -> String {
        name.to_string()
    }

    fn text(service: &Service) -> String {
        json(service)
    }
}

impl Writable for Vips {
    fn key(vip: &Ipv4Addr) -> String {
        vip.to_string()
    }

    fn text(vip: &Vip) -> String {
        match vip {
            Vip::Held(holder) => holder.to_string(),
            Vip::Released(released) => json(released),
        }
    }
}

impl Writable for Endpoints {
    fn key(name: &EndpointName) -> String {
        name.to_string()
    }

    fn text(endpoint: &Endpoint) -> String {
        json(endpoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(json: &str) -> Result<Service, String> {
        Services::parse_value(json.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_short_record_has_defaults() {
        let web = service(r#"{"v":1,"ports":[{"name":"http","port":80,"protocol":"tcp"}]}"#).unwrap();
        assert_eq!((web.vip, web.headless, web.lb.clone(), web.locality), (None, false, None, Locality::Any));
        let port = &web.ports[0];
        assert_eq!((port.port.get(), port.target_port, port.app), (80, None, App::Tcp));
        let endpoint = Endpoints::parse_value(br#"{"overlay_ip":"10.244.1.2"}"#).unwrap();
        assert_eq!((endpoint.weight, endpoint.state), (1, EndpointState::Ready));
        let written = serde_json::to_vec(&web).unwrap();
        assert_eq!(Services::parse_value(&written).unwrap(), web);
    }

    #[test]
    fn a_full_record_is_read() {
        let json = r#"{"v":1,"vip":"10.251.0.9","headless":false,"future":1,
            "ports":[{"name":"http","port":80,"protocol":"tcp","target_port":8080,"app":"http",
                      "routes":[{"host":"*.shop.example","path_prefix":"/api","service":"shop/api","port":"web"}]},
                     {"name":"dns","port":80,"protocol":"udp"}],
            "lb":{"policy":"maglev","hash_key":"x-user"},"affinity":{"client_ip":true,"ttl_s":600},
            "locality":"prefer_zone",
            "health":{"kind":"http","path":"/ok","interval_ms":500,"timeout_ms":200,"fall":2,"rise":1,
                      "slow_start_s":60}}"#;
        let service = service(json).unwrap();
        assert_eq!(service.lb.unwrap().policy, Policy::Maglev);
        let health = service.health.unwrap();
        assert_eq!((health.path.as_deref(), health.slow_start_s), (Some("/ok"), 60));
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_a_reason() {
        let port = r#"{"name":"http","port":80,"protocol":"tcp"}"#;
        for (json, reason) in [
            ("{".to_owned(), "EOF"),
            (format!(r#"{{"v":2,"ports":[{port}]}}"#), "v is 2"),
            (r#"{"v":1,"ports":[]}"#.to_owned(), "1 to 16 ports"),
            (format!(r#"{{"v":1,"ports":[{port},{port}]}}"#), "the name http"),
            (r#"{"v":1,"ports":[{"name":"http","port":0,"protocol":"tcp"}]}"#.to_owned(), "nonzero"),
            (r#"{"v":1,"ports":[{"name":"Http","port":1,"protocol":"tcp"}]}"#.to_owned(), "DNS label"),
            (
                r#"{"v":1,"ports":[{"name":"a","port":1,"protocol":"udp","app":"http"}]}"#.to_owned(),
                "needs TCP",
            ),
            (
                r#"{"v":1,"ports":[{"name":"a","port":1,"protocol":"udp","proxy_protocol":true}]}"#
                    .to_owned(),
                "proxy_protocol needs TCP",
            ),
            (
                r#"{"v":1,"ports":[{"name":"a","port":1,"routes":[{"service":"shop/api"}]}]}"#.to_owned(),
                "routes need app: http",
            ),
            (
                r#"{"v":1,"ports":[{"name":"a","port":1,"app":"http","routes":[{"service":"api"}]}]}"#
                    .to_owned(),
                "NAMESPACE/NAME",
            ),
            (
                r#"{"v":1,"ports":[{"name":"a","port":1,"app":"http","routes":[{"service":"a/b"},{"service":"a/b","host":"a:1"}]}]}"#
                    .to_owned(),
                "port a: route 2: host",
            ),
            (format!(r#"{{"v":1,"lb":{{"policy":"maglev","hash_key":"a b"}},"ports":[{port}]}}"#), "hash_key"),
            (format!(r#"{{"v":1,"headless":true,"vip":"10.251.0.1","ports":[{port}]}}"#), "exclude"),
            (format!(r#"{{"v":1,"affinity":{{"client_ip":true,"ttl_s":0}},"ports":[{port}]}}"#), "ttl_s"),
            (format!(r#"{{"v":1,"lb":{{"policy":"best"}},"ports":[{port}]}}"#), "unknown variant"),
            (format!(r#"{{"v":1,"health":{{"kind":"tcp","fall":0}},"ports":[{port}]}}"#), "health.fall is 0"),
        ] {
            let error = service(&json).unwrap_err();
            assert!(error.contains(reason), "{json}: {error}");
        }
        for (json, reason) in [
            (r#"{"overlay_ip":"127.0.0.1"}"#, "no address of a host"),
            (r#"{"overlay_ip":"10.244.1.2","weight":257}"#, "above 256"),
            (r#"{"overlay_ip":"10.244.1"}"#, "IPv4"),
        ] {
            let error = Endpoints::parse_value(json.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(reason), "{json}: {error}");
        }
    }

    #[test]
    fn vips_name_their_service() {
        assert_eq!(Vips::parse_key("10.251.0.7"), Ok(Ipv4Addr::new(10, 251, 0, 7)));
        assert!(Vips::parse_key("10.251.0").is_err());
        let web = "shop/web".parse::<ServiceName>().unwrap();
        assert_eq!(Vips::parse_value(b"shop/web\n"), Ok(Vip::Held(web.clone())));
        let released = Released { by: web.clone(), nonce: 0 };
        assert_eq!(Vips::parse_value(br#"{"released":"shop/web"}"#), Ok(Vip::Released(released.clone())));
        for vip in [Vip::Held(web), Vip::Released(Released { nonce: u64::MAX, ..released })] {
            assert_eq!(Vips::parse_value(Vips::text(&vip).as_bytes()), Ok(vip));
        }
        for bad in [&b"\xff"[..], b"{}", br#"{"released":"web"}"#, b""] {
            assert!(Vips::parse_value(bad).is_err());
        }
    }
}
