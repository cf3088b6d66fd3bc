//! Services as operators write them, in YAML or JSON: one service with its `name`, or a map of several by their names. Pure.
//!
//! Unlike records, which a newer agent may have written, input with an unknown key is refused: most often it is misspelled.

use std::{collections::BTreeMap, net::Ipv4Addr};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use thiserror::Error;

use super::{
    name::{EndpointName, ServiceName, label},
    record::{Endpoint, Endpoints, RECORD_VERSION, Service, Services},
};
use crate::{
    printable::{LONGEST_NAME, LONGEST_REASON, printable},
    store::Kind,
};

/// Longest input in bytes.
pub const LONGEST_INPUT: u64 = 1024 * 1024;

/// Why input cannot be used.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub struct InputError(String);

/// A service, and endpoints of it that run on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceInput {
    /// The service.
    pub service: Service,
    /// Endpoints by their identifiers.
    pub endpoints: BTreeMap<String, Endpoint>,
}

impl ServiceInput {
    /// The endpoints' names on a node.
    /// Fails when the node is no DNS label.
    pub fn endpoints_on(
        &self,
        service: &ServiceName,
        node: &str,
    ) -> Result<BTreeMap<EndpointName, Endpoint>, InputError> {
        let named = |(id, endpoint): (&String, &Endpoint)| {
            let name = EndpointName::new(service.clone(), node, id)
                .map_err(|error| InputError(error.to_string()))?;
            Ok((name, endpoint.clone()))
        };
        self.endpoints.iter().map(named).collect()
    }
}

/// An endpoint as operators write it.
#[derive(Serialize, Deserialize)]
struct EndpointInput {
    id: Option<String>,
    address: Ipv4Addr,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// Parses services, with endpoints of this node.
/// Fails as a whole when a part of the input cannot be used.
pub fn parse(text: &str) -> Result<BTreeMap<ServiceName, ServiceInput>, InputError> {
    let value: Value = serde_saphyr::from_str(text).map_err(|error| {
        // The parser quotes the input in further lines.
        let error = error.to_string();
        let first = error.lines().next().unwrap_or_default();
        InputError(format!("it is neither YAML nor JSON: {}", printable(first, LONGEST_REASON)))
    })?;
    let Value::Object(mut object) = value else { return Err(shape()) };
    if let Some(Value::String(name)) = object.get("name") {
        let name = service_name(name)?;
        object.remove("name");
        let service = service(&name, object)?;
        return Ok(BTreeMap::from([(name, service)]));
    }
    if object.is_empty() || object.contains_key("ports") {
        return Err(shape());
    }
    let several = object.into_iter().map(|(name, value)| {
        let name = service_name(&name)?;
        let Value::Object(object) = value else {
            let expected = "expected a service, for example {ports: [{name: http, port: 80}]}";
            return Err(InputError(format!("{name}: {expected}")));
        };
        service(&name, object).map(|service| (name, service))
    });
    several.collect()
}

/// Parses services that have no endpoints beside them, which belong to nodes.
/// Fails as a whole when a part of the input cannot be used.
pub fn parse_services(text: &str) -> Result<BTreeMap<ServiceName, Service>, InputError> {
    let services = parse(text)?.into_iter().map(|(name, input)| match input.endpoints.is_empty() {
        true => Ok((name, input.service)),
        false => Err(InputError(format!(
            "{name}: endpoints belong to a node: write them with `overlay-agent endpoint add`, or give the file to the agent of that \
             node in its --services-dir"
        ))),
    });
    services.collect()
}

fn shape() -> InputError {
    InputError(
        "expected a service with its name, for example {name: shop/web, ports: [{name: http, port: 80}]}, or a map of services by \
         their names"
            .to_owned(),
    )
}

fn service_name(text: &str) -> Result<ServiceName, InputError> {
    text.parse().map_err(|error: crate::store::RecordError| InputError(error.to_string()))
}

fn service(name: &ServiceName, mut object: Map<String, Value>) -> Result<ServiceInput, InputError> {
    let of_name = |error: String| InputError(format!("{name}: {error}"));
    let endpoints = object.remove("endpoints").unwrap_or(Value::Null);
    object.entry("v").or_insert_with(|| RECORD_VERSION.into());
    let service = strict::<Services, _>(Value::Object(object)).map_err(of_name)?;
    let endpoints: Option<Vec<Value>> = serde_json::from_value(endpoints)
        .map_err(|_| of_name("endpoints: expected a list such as [{address: 10.244.1.2}]".to_owned()))?;
    let mut named = BTreeMap::new();
    for endpoint in endpoints.unwrap_or_default() {
        let (id, endpoint) =
            self::endpoint(&service, endpoint).map_err(|error| of_name(format!("endpoints: {error}")))?;
        if named.insert(id.clone(), endpoint).is_some() {
            return Err(of_name(format!("endpoints: two have the id {id}")));
        }
    }
    Ok(ServiceInput { service, endpoints: named })
}

fn endpoint(service: &Service, value: Value) -> Result<(String, Endpoint), String> {
    let input: EndpointInput = from_value(value)?;
    let id = input.id.unwrap_or_else(|| default_id(input.address));
    label("id", &id).map_err(|error| error.to_string())?;
    let mut record = input.rest;
    record.insert("overlay_ip".to_owned(), input.address.to_string().into());
    let endpoint = strict::<Endpoints, _>(Value::Object(record))?;
    check_ports(service, &endpoint)?;
    Ok((id, endpoint))
}

/// The identifier of an endpoint that has no other: its address, as a DNS label.
pub fn default_id(address: Ipv4Addr) -> String {
    address.to_string().replace('.', "-")
}

/// Fails when an endpoint names a port that its service does not have.
pub fn check_ports(service: &Service, endpoint: &Endpoint) -> Result<(), String> {
    let names: Vec<&str> = service.ports.iter().map(|port| port.name.as_str()).collect();
    match endpoint.ports.keys().find(|name| !names.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => {
            let name = printable(name, LONGEST_NAME);
            Err(format!("the service has no port {name:?}: its ports are {}", names.join(", ")))
        }
    }
}

/// Parses a record and refuses keys that it does not have.
fn strict<K: Kind<Value = V>, V: Serialize>(value: Value) -> Result<V, String> {
    let parsed = K::parse_value(value.to_string().as_bytes()).map_err(|error| error.to_string())?;
    let known = serde_json::to_value(&parsed).map_err(|error| error.to_string())?;
    match unknown_key(&value, &known) {
        Some(key) => Err(format!("the key {} is unknown", printable(&key, LONGEST_NAME))),
        None => Ok(parsed),
    }
}

/// The first key of `given`, with those that lead to it, that is not in `known`. Keys without a value are unset.
fn unknown_key(given: &Value, known: &Value) -> Option<String> {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            given.iter().find_map(|(key, value)| match known.get(key) {
                Some(known) => unknown_key(value, known).map(|inner| format!("{key}.{inner}")),
                None if is_unset(value) => None,
                None => Some(key.clone()),
            })
        }
        (Value::Array(given), Value::Array(known)) => {
            given.iter().zip(known).find_map(|(given, known)| unknown_key(given, known))
        }
        _ => None,
    }
}

fn is_unset(value: &Value) -> bool {
    value.is_null() || value.as_object().is_some_and(Map::is_empty)
}

fn from_value<T: DeserializeOwned>(value: Value) -> Result<T, String> {
    serde_json::from_value(value).map_err(|error| printable(&error.to_string(), LONGEST_REASON))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::record::{Policy, Protocol};

    fn one(text: &str) -> ServiceInput {
        parse(text).unwrap().into_values().next().unwrap()
    }

    #[test]
    fn a_service_is_read_from_yaml_and_from_json() {
        let yaml = "name: shop/web\nports:\n  - name: http\n    port: 80\n    target_port: 8080\nlb: {policy: maglev}\n";
        let json = "{\n\t\"name\": \"shop/web\", \"ports\": [{\"name\": \"http\", \"port\": 80, \"target_port\": 8080}],\n\t\
                    \"lb\": {\"policy\": \"maglev\"}}";
        assert_eq!(parse(yaml), parse(json));
        let web = one(yaml).service;
        assert_eq!(
            (web.v, web.ports[0].protocol, web.lb.unwrap().policy),
            (1, Protocol::Tcp, Policy::Maglev)
        );
        let several = parse_services(
            "shop/web: {ports: [{name: http, port: 80}]}\nbank/db:\n  headless: true\n  ports: [{name: pg, port: 5432}]\n",
        );
        let names: Vec<_> = several.unwrap().keys().map(ToString::to_string).collect();
        assert_eq!(names, ["bank/db", "shop/web"]);
    }

    #[test]
    fn endpoints_of_the_node_stand_beside_their_service() {
        let text = "name: shop/web\nports: [{name: http, port: 80}]\nendpoints:\n  - {address: 10.244.1.2}\n  - {address: 10.244.1.3, id: b, weight: 3, ports: {http: 8080}}\n";
        let input = one(text);
        let ids: Vec<_> = input.endpoints.keys().map(String::as_str).collect();
        assert_eq!(ids, ["10-244-1-2", "b"]);
        assert_eq!((input.endpoints["b"].weight, input.endpoints["b"].ports["http"].get()), (3, 8080));
        let names = input.endpoints_on(&"shop/web".parse().unwrap(), "node-a").unwrap();
        assert_eq!(names.keys().next().unwrap().to_string(), "shop/web/node-a/10-244-1-2");
        assert!(input.endpoints_on(&"shop/web".parse().unwrap(), "Node").is_err());
        assert!(parse_services(text).unwrap_err().to_string().contains("endpoint add"));
    }

    #[test]
    fn input_that_cannot_be_used_is_refused_as_a_whole() {
        let port = "ports: [{name: http, port: 80}]";
        for (text, words) in [
            ("", "expected a service"),
            ("[]", "expected a service"),
            ("{}", "expected a service"),
            ("name: [", "neither YAML nor JSON"),
            ("\u{1b}", "neither YAML nor JSON"),
            (&format!("{port}\n"), "expected a service"),
            (&format!("name: web\n{port}\n"), "NAMESPACE/NAME"),
            ("name: shop/web\n", "shop/web: the service: missing field `ports`"),
            (&format!("name: shop/web\n{port}\nhealht: {{kind: tcp}}\n"), "the key healht is unknown"),
            (
                &format!("name: shop/web\n{port}\nlb: {{policy: maglev, hash: a}}\n"),
                "the key lb.hash is unknown",
            ),
            ("name: shop/web\nports: [{name: http, port: 80, prot: udp}]\n", "the key ports.prot is unknown"),
            (
                "name: shop/web\nports: [{name: a, port: 80, app: http, routes: [{hots: b, service: shop/b}]}]\n",
                "the key ports.routes.hots is unknown",
            ),
            (&format!("shop/web: {{{port}}}\nshop/db: 7\n"), "shop/db: expected a service"),
            (
                &format!("shop/web: {{{port}}}\nshop/db: {{ports: []}}\n"),
                "shop/db: the service: a service has 1",
            ),
            (&format!("shop/web: {{{port}}}\nshop/web: {{{port}}}\n"), "neither YAML nor JSON: "),
            (&format!("name: shop/web\n{port}\nendpoints: {{}}\n"), "expected a list"),
            (&format!("name: shop/web\n{port}\nendpoints: [{{address: x}}]\n"), "IPv4"),
            (
                &format!("name: shop/web\n{port}\nendpoints: [{{address: 10.1.1.1, wieght: 1}}]\n"),
                "wieght is unknown",
            ),
            (
                &format!("name: shop/web\n{port}\nendpoints: [{{address: 10.1.1.1, ports: {{dns: 1}}}}]\n"),
                "no port \"dns\"",
            ),
            (
                &format!(
                    "name: shop/web\n{port}\nendpoints: [{{address: 10.1.1.1}}, {{address: 10.1.1.1}}]\n"
                ),
                "two have the id",
            ),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains('\n'), "{text:?}: {error}");
        }
    }

    #[test]
    fn aliases_cannot_fill_the_memory() {
        let mut bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n".to_owned();
        for (next, last) in ('b'..='z').zip('a'..) {
            bomb.push_str(&format!("{next}: &{next} [{}]\n", vec![format!("*{last}"); 9].join(",")));
        }
        assert!(parse(&bomb).is_err());
    }
}
