//! The network config: flannel's JSON record `config`, with its defaults and limits.

use std::{net::Ipv4Addr, str::FromStr};

use ipnet::Ipv4Net;
use serde_json::{Map, Value};
use thiserror::Error;

use crate::{
    record::{self, field},
    route::Subnet,
};

/// Default UDP port of the network (flannel's `Backend.Port` of type udp).
pub const DEFAULT_PORT: u16 = 8285;

/// The keys of flannel's record; this agent ignores those for IPv6 and nftables.
const KEYS: [&str; 12] = [
    "Network",
    "SubnetLen",
    "SubnetMin",
    "SubnetMax",
    "Backend",
    "EnableIPv4",
    "EnableIPv6",
    "EnableNFTables",
    "IPv6Network",
    "IPv6SubnetLen",
    "IPv6SubnetMin",
    "IPv6SubnetMax",
];
/// The keys of the udp backend.
const BACKEND_KEYS: [&str; 2] = ["Type", "Port"];

/// The config that all hosts of one network share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Network of the overlay; host bits are zero.
    pub network: Ipv4Net,
    /// Prefix length of each host's subnet.
    pub subnet_len: u8,
    /// First subnet that may be allocated.
    pub subnet_min: Ipv4Addr,
    /// Last subnet that may be allocated.
    pub subnet_max: Ipv4Addr,
    /// UDP port of all hosts.
    pub port: u16,
}

/// Why a config cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// It is not a JSON object.
    #[error("the network config is not a JSON object: {0}")]
    NotJson(String),
    /// A key, its value, which has the wrong type or is outside its range, and the expected value.
    #[error("the network config's {0} is {1}: expected {2}")]
    Invalid(&'static str, String, String),
    /// `Network` is missing.
    #[error("the network config has no Network, for example {{\"Network\":\"10.244.0.0/16\"}}")]
    NoNetwork,
    /// The network uses another backend.
    #[error("the network config's Backend.Type is {0:?}: overlay-agent supports only \"udp\"")]
    OtherBackend(String),
    /// IPv4 is disabled.
    #[error(
        "the network config's EnableIPv4 is false: overlay-agent carries only IPv4, remove the key or set it to true"
    )]
    NoIpv4,
}

fn invalid(key: &'static str, value: impl ToString, expected: impl Into<String>) -> ConfigError {
    ConfigError::Invalid(key, value.to_string(), expected.into())
}

impl NetworkConfig {
    /// The config of a network with defaults for everything else. Fails when the network is smaller than a /28.
    pub fn of_network(network: Ipv4Net) -> Result<Self, ConfigError> {
        Self::parse(&serde_json::json!({ "Network": network.to_string() }).to_string())
    }

    /// Parses flannel's record. As in Go, keys match case-insensitively, the last of several wins, and unknown keys are ignored.
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        let value = record::read(json.as_bytes()).map_err(|error| ConfigError::NotJson(error.to_string()))?;
        let Value::Object(record) = value else {
            return Err(ConfigError::NotJson(format!("it is {value}")));
        };
        check_ipv4(&record)?;
        let network = network(&record)?;
        let subnet_len = subnet_len(&record, network)?;
        let size = 1u32 << (32 - u32::from(subnet_len));
        let second = u32::from(network.network()).wrapping_add(size);
        let last = u32::from(network.broadcast()).wrapping_sub(size).wrapping_add(1);
        let bound = |key, default: u32| match given(&record, key) {
            None => Ok(Ipv4Addr::from(default)),
            Some(value) => text_as(value)
                .filter(|address| network.contains(address) && u32::from(*address) % size == 0)
                .ok_or_else(|| {
                    invalid(key, value, format!("the first address of a subnet inside {network}"))
                }),
        };
        let (subnet_min, subnet_max) = (bound("SubnetMin", second)?, bound("SubnetMax", last)?);
        if subnet_min > subnet_max {
            let expected = format!("an address up to SubnetMax ({subnet_max})");
            return Err(invalid("SubnetMin", subnet_min, expected));
        }
        Ok(Self { network, subnet_len, subnet_min, subnet_max, port: port(&record)? })
    }

    /// Keys that are not part of flannel's record, most often misspelled, as written. Keys of the backend are named
    /// `Backend.KEY`. Empty when `json` is not an object.
    pub fn unknown_keys(json: &str) -> Vec<String> {
        let Ok(Value::Object(record)) = serde_json::from_str(json) else { return Vec::new() };
        let unknown =
            |known: &[&str], name: &str| !known.iter().any(|known| known.eq_ignore_ascii_case(name));
        let mut names: Vec<String> = record.keys().filter(|name| unknown(&KEYS, name)).cloned().collect();
        let backends = record.iter().filter(|(name, _)| name.eq_ignore_ascii_case("Backend"));
        for backend in backends.filter_map(|(_, backend)| backend.as_object()) {
            let inner = backend.keys().filter(|name| unknown(&BACKEND_KEYS, name));
            names.extend(inner.map(|name| format!("Backend.{name}")));
        }
        names
    }

    /// Keys of flannel's record that `json` sets, in flannel's spelling; the others have defaults.
    pub fn named_keys(json: &str) -> Vec<&'static str> {
        let Ok(Value::Object(record)) = record::read(json.as_bytes()) else { return Vec::new() };
        let mut names: Vec<_> = KEYS.into_iter().filter(|key| given(&record, key).is_some()).collect();
        if let Some(Value::Object(backend)) = field(&record, "Backend") {
            let inner = [("Type", "Backend.Type"), ("Port", "Backend.Port")].into_iter();
            names.extend(inner.filter_map(|(key, name)| field(backend, key).map(|_| name)));
        }
        names
    }

    /// Whether `subnet` is one of [`Self::subnets`].
    pub fn may_be_assigned(&self, subnet: Subnet) -> bool {
        subnet.prefix().prefix_len() == self.subnet_len
            && (self.subnet_min..=self.subnet_max).contains(&subnet.base())
    }

    /// Whether a host that starts keeps its lease of `subnet`. An operator may reserve any part of the network, even outside
    /// [`Self::subnets`].
    pub fn may_be_held(&self, subnet: Subnet, is_reservation: bool) -> bool {
        if is_reservation { subnet.is_part_of(self.network) } else { self.may_be_assigned(subnet) }
    }

    /// All assignable subnets, in order.
    pub fn subnets(&self) -> impl Iterator<Item = Subnet> {
        let size = 1u64 << (32 - u32::from(self.subnet_len));
        let (first, last) = (u64::from(u32::from(self.subnet_min)), u64::from(u32::from(self.subnet_max)));
        let length = self.subnet_len;
        (first..=last)
            .step_by(size as usize)
            .filter_map(move |base| Ipv4Net::new(Ipv4Addr::from(base as u32), length).ok())
            .map(Subnet::containing)
    }
}

/// The value of a key, unless it is flannel's value for an unset key.
fn given<'a>(record: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    let unset = |value: &Value| match key {
        "SubnetLen" => value.as_u64() == Some(0),
        "SubnetMin" | "SubnetMax" => value.as_str() == Some("0.0.0.0"),
        _ => false,
    };
    field(record, key).filter(|value| !unset(value))
}

/// A string's value of another type.
fn text_as<T: FromStr>(value: &Value) -> Option<T> {
    value.as_str()?.parse().ok()
}

fn check_ipv4(record: &Map<String, Value>) -> Result<(), ConfigError> {
    match field(record, "EnableIPv4") {
        None | Some(Value::Bool(true)) => Ok(()),
        Some(Value::Bool(false)) => Err(ConfigError::NoIpv4),
        Some(value) => Err(invalid("EnableIPv4", value, "true")),
    }
}

fn network(record: &Map<String, Value>) -> Result<Ipv4Net, ConfigError> {
    let value = field(record, "Network").ok_or(ConfigError::NoNetwork)?;
    let invalid = |expected| invalid("Network", value, expected);
    let network: Ipv4Net =
        text_as(value).ok_or_else(|| invalid("an IPv4 network such as \"10.244.0.0/16\""))?;
    if network.prefix_len() > 28 || network.prefix_len() == 0 {
        return Err(invalid("a prefix length from 1 to 28: there must be room for several hosts"));
    }
    Ok(network.trunc())
}

fn subnet_len(record: &Map<String, Value>, network: Ipv4Net) -> Result<u8, ConfigError> {
    let shortest = network.prefix_len() + 2;
    let Some(value) = given(record, "SubnetLen") else {
        return Ok(if network.prefix_len() <= 22 { 24 } else { shortest });
    };
    let length = value.as_u64().and_then(|length| u8::try_from(length).ok());
    length.filter(|length| (shortest..=30).contains(length)).ok_or_else(|| {
        let expected = format!("a prefix length from {shortest} (four subnets in {network}) to 30");
        invalid("SubnetLen", value, expected)
    })
}

fn port(record: &Map<String, Value>) -> Result<u16, ConfigError> {
    let backend = match field(record, "Backend") {
        None => return Ok(DEFAULT_PORT),
        Some(Value::Object(backend)) => backend,
        Some(other) => return Err(invalid("Backend", other, "an object such as {\"Type\":\"udp\"}")),
    };
    let kind = field(backend, "Type").map(|kind| kind.as_str().unwrap_or_default().to_ascii_lowercase());
    if let Some(kind) = kind.filter(|kind| kind != "udp" && !kind.is_empty()) {
        return Err(ConfigError::OtherBackend(kind));
    }
    let Some(value) = field(backend, "Port") else { return Ok(DEFAULT_PORT) };
    let port = value.as_u64().and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0);
    port.ok_or_else(|| invalid("Backend.Port", value, "a UDP port from 1 to 65535"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> NetworkConfig {
        NetworkConfig::parse(json).unwrap()
    }

    #[test]
    fn defaults_are_flannels() {
        let config = parse(r#"{"Network":"10.244.7.1/16"}"#);
        assert_eq!(config.network, "10.244.0.0/16".parse().unwrap(), "host bits are masked");
        assert_eq!((config.subnet_len, config.port), (24, 8285));
        assert_eq!(config.subnet_min, Ipv4Addr::new(10, 244, 1, 0));
        assert_eq!(config.subnet_max, Ipv4Addr::new(10, 244, 255, 0));
        assert_eq!(parse(r#"{"Network":"10.0.0.0/23"}"#).subnet_len, 25);
    }

    #[test]
    fn keys_and_backend_types_match_case_insensitively() {
        let config =
            parse(r#"{"network":"10.1.0.0/16","SUBNETLEN":20,"backend":{"TYPE":"UDP","port":4789}}"#);
        assert_eq!((config.subnet_len, config.port), (20, 4789));
    }

    #[test]
    fn the_last_of_keys_that_differ_only_in_case_wins() {
        for (json, network, port) in [
            (r#"{"Network":"10.1.0.0/16","network":"10.2.0.0/16"}"#, "10.2.0.0/16", 8285),
            (r#"{"network":"10.2.0.0/16","Network":"10.1.0.0/16"}"#, "10.1.0.0/16", 8285),
            (
                r#"{"Network":"10.1.0.0/16","Backend":{"PORT":1,"port":2},"backend":{"port":3,"PORT":4}}"#,
                "10.1.0.0/16",
                4,
            ),
            (r#"{"Network":"10.1.0.0/16","network":null}"#, "10.1.0.0/16", 8285),
        ] {
            let config = parse(json);
            assert_eq!((config.network.to_string().as_str(), config.port), (network, port), "{json}");
        }
    }

    #[test]
    fn zero_bounds_are_unset() {
        let json = r#"{"Network":"10.1.0.0/16","SubnetMin":"0.0.0.0","SubnetMax":"0.0.0.0","SubnetLen":0}"#;
        assert_eq!(parse(json), parse(r#"{"Network":"10.1.0.0/16"}"#));
        assert_eq!(NetworkConfig::named_keys(json), ["Network"]);
    }

    #[test]
    fn unknown_keys_are_listed() {
        let json = r#"{"network":"10.1.0.0/16","Subnetlen":20,"SubnetLenght":24,"EnableIPv6":false,
            "backend":{"TYPE":"udp","VNI":1}}"#;
        assert_eq!(NetworkConfig::unknown_keys(json), ["SubnetLenght", "Backend.VNI"]);
        assert_eq!(
            NetworkConfig::named_keys(json),
            ["Network", "SubnetLen", "Backend", "EnableIPv6", "Backend.Type"]
        );
        assert!(NetworkConfig::unknown_keys("{").is_empty());
    }

    #[test]
    fn subnets_run_from_min_to_max() {
        let config = parse(r#"{"Network":"10.9.0.0/16","SubnetMin":"10.9.10.0","SubnetMax":"10.9.12.0"}"#);
        let subnets: Vec<_> = config.subnets().map(|subnet| subnet.to_string()).collect();
        assert_eq!(subnets, ["10.9.10.0/24", "10.9.11.0/24", "10.9.12.0/24"]);
        let all = parse(r#"{"Network":"128.0.0.0/1"}"#);
        assert_eq!(all.subnets().count(), (1 << 23) - 1);
    }

    #[test]
    fn invalid_values_are_refused_by_key() {
        for (json, words) in [
            ("[]", "not a JSON object"),
            ("{", "not a JSON object"),
            ("{}", "Network"),
            (r#"{"Network":"10.0.0.0/29"}"#, "Network"),
            (r#"{"Network":"fd00::/64"}"#, "IPv4 network"),
            (r#"{"Network":"10.0.0.0/16","SubnetLen":17}"#, "from 18"),
            (r#"{"Network":"10.0.0.0/16","SubnetLen":31}"#, "SubnetLen"),
            (r#"{"Network":"10.0.0.0/16","SubnetMin":"10.0.1.1"}"#, "SubnetMin"),
            (r#"{"Network":"10.0.0.0/16","SubnetMax":"10.1.0.0"}"#, "SubnetMax"),
            (r#"{"Network":"10.0.0.0/16","SubnetMin":"10.0.5.0","SubnetMax":"10.0.4.0"}"#, "SubnetMin"),
            (r#"{"Network":"10.0.0.0/16","Backend":{"Type":"vxlan"}}"#, "vxlan"),
            (r#"{"Network":"10.0.0.0/16","Backend":{"Port":70000}}"#, "Backend.Port"),
            (r#"{"Network":"10.1.0.0/16","enableipv4":false}"#, "carries only IPv4"),
            (r#"{"Network":"10.1.0.0/16","enableipv4":"no"}"#, "EnableIPv4"),
        ] {
            let error = NetworkConfig::parse(json).unwrap_err().to_string();
            assert!(error.contains(words), "{json}: {error}");
        }
        parse(r#"{"Network":"10.1.0.0/16","EnableIPv4":true}"#);
    }
}
