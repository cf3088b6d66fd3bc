//! The network config: flannel's JSON record `config`, with its defaults and limits.

use std::{fmt::Display, net::Ipv4Addr};

use ipnet::Ipv4Net;
use serde_json::Value;
use thiserror::Error;

use crate::{
    printable::{LONGEST_REASON, printable},
    record::Record,
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
const NO_IPV4: &str = "the network config's EnableIPv4 is false: overlay-agent carries only IPv4, remove the key or set it to true";
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
#[error("{0}")]
pub struct ConfigError(String);

/// A value that has the wrong type or is outside its range.
fn invalid(key: &str, value: &str, expected: impl Display) -> ConfigError {
    ConfigError(format!(
        "the network config's {key} is {}: expected {expected}",
        printable(value, LONGEST_REASON)
    ))
}

impl NetworkConfig {
    /// The config of a network with defaults for everything else. Fails when the network is smaller than a /28.
    pub fn of_network(network: Ipv4Net) -> Result<Self, ConfigError> {
        Self::parse(&serde_json::json!({ "Network": network.to_string() }).to_string())
    }

    /// Parses flannel's record. As in Go, keys match case-insensitively, the last of several wins, and unknown keys are ignored.
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        let record: Record = serde_json::from_str(json)
            .map_err(|error| ConfigError(format!("the network config is not a JSON object: {error}")))?;
        match record.text("EnableIPv4") {
            None | Some("true") => {}
            Some("false") => return Err(ConfigError(NO_IPV4.to_owned())),
            Some(text) => return Err(invalid("EnableIPv4", text, "true")),
        }
        let network = network(&record)?;
        let subnet_len = subnet_len(&record, network)?;
        let size = 1u32 << (32 - u32::from(subnet_len));
        let second = u32::from(network.network()).wrapping_add(size);
        let last = u32::from(network.broadcast()).wrapping_sub(size).wrapping_add(1);
        let bound = |key, default: u32| match given(&record, key) {
            None => Ok(Ipv4Addr::from(default)),
            Some(text) => record
                .get(key)
                .filter(|address| network.contains(address) && u32::from(*address) % size == 0)
                .ok_or_else(|| {
                    invalid(key, text, format_args!("the first address of a subnet inside {network}"))
                }),
        };
        let (subnet_min, subnet_max) = (bound("SubnetMin", second)?, bound("SubnetMax", last)?);
        if subnet_min > subnet_max {
            let expected = format!("an address up to SubnetMax ({subnet_max})");
            return Err(invalid("SubnetMin", &subnet_min.to_string(), expected));
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
        let Ok(record) = serde_json::from_str::<Record>(json) else { return Vec::new() };
        let backend: Record = record.get("Backend").unwrap_or_default();
        let outer = KEYS.into_iter().filter(|key| given(&record, key).is_some());
        let inner = [("Type", "Backend.Type"), ("Port", "Backend.Port")];
        let inner = inner.into_iter().filter_map(|(key, name)| backend.text(key).map(|_| name));
        outer.chain(inner).collect()
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
        let all = self.network.subnets(self.subnet_len).into_iter().flatten();
        all.map(Subnet::containing).filter(|subnet| self.may_be_assigned(*subnet))
    }
}

/// The text of a value, unless it is flannel's value for an unset key.
fn given<'a>(record: &'a Record, key: &str) -> Option<&'a str> {
    record.text(key).filter(|text| {
        !matches!((key, *text), ("SubnetLen", "0") | ("SubnetMin" | "SubnetMax", "\"0.0.0.0\""))
    })
}

fn network(record: &Record) -> Result<Ipv4Net, ConfigError> {
    let text = record.text("Network").ok_or_else(|| {
        ConfigError(
            "the network config has no Network, for example {\"Network\":\"10.244.0.0/16\"}".to_owned(),
        )
    })?;
    let network: Ipv4Net = record
        .get("Network")
        .ok_or_else(|| invalid("Network", text, "an IPv4 network such as \"10.244.0.0/16\""))?;
    match network.prefix_len() {
        1..=28 => Ok(network.trunc()),
        _ => Err(invalid(
            "Network",
            text,
            "a prefix length from 1 to 28: there must be room for several hosts",
        )),
    }
}

fn subnet_len(record: &Record, network: Ipv4Net) -> Result<u8, ConfigError> {
    let shortest = network.prefix_len() + 2;
    let Some(text) = given(record, "SubnetLen") else {
        return Ok(if network.prefix_len() <= 22 { 24 } else { shortest });
    };
    record.get("SubnetLen").filter(|length| (shortest..=30).contains(length)).ok_or_else(|| {
        let expected = format!("a prefix length from {shortest} (four subnets in {network}) to 30");
        invalid("SubnetLen", text, expected)
    })
}

fn port(record: &Record) -> Result<u16, ConfigError> {
    let Some(text) = record.text("Backend") else { return Ok(DEFAULT_PORT) };
    let backend: Record = record
        .get("Backend")
        .ok_or_else(|| invalid("Backend", text, "an object such as {\"Type\":\"udp\"}"))?;
    let kind = backend.get::<String>("Type").unwrap_or_default().to_ascii_lowercase();
    if !kind.is_empty() && kind != "udp" {
        return Err(ConfigError(format!(
            "the network config's Backend.Type is {kind:?}: overlay-agent supports only \"udp\""
        )));
    }
    let Some(text) = backend.text("Port") else { return Ok(DEFAULT_PORT) };
    let port = backend.get("Port").filter(|port| *port != 0);
    port.ok_or_else(|| invalid("Backend.Port", text, "a UDP port from 1 to 65535"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> NetworkConfig {
        NetworkConfig::parse(json).unwrap()
    }

    #[test]
    fn a_record_is_read_as_by_flannel() {
        for (json, expected) in [
            // Host bits are masked, and the other keys have defaults.
            (r#"{"Network":"10.244.7.1/16"}"#, "10.244.0.0/16 24 10.244.1.0 10.244.255.0 8285"),
            (r#"{"Network":"10.0.0.0/23"}"#, "10.0.0.0/23 25 10.0.0.128 10.0.1.128 8285"),
            // Zero bounds are unset.
            (
                r#"{"Network":"10.1.0.0/16","SubnetMin":"0.0.0.0","SubnetMax":"0.0.0.0","SubnetLen":0}"#,
                "10.1.0.0/16 24 10.1.1.0 10.1.255.0 8285",
            ),
            // Keys and backend types match case-insensitively.
            (
                r#"{"network":"10.1.0.0/16","SUBNETLEN":20,"backend":{"TYPE":"UDP","port":4789}}"#,
                "10.1.0.0/16 20 10.1.16.0 10.1.240.0 4789",
            ),
            // The last of keys that differ only in case wins.
            (
                r#"{"network":"10.2.0.0/16","Network":"10.1.0.0/16","network":null,
                    "Backend":{"PORT":1,"port":2},"backend":{"port":3,"PORT":4}}"#,
                "10.1.0.0/16 24 10.1.1.0 10.1.255.0 4",
            ),
        ] {
            let NetworkConfig { network, subnet_len, subnet_min, subnet_max, port } = parse(json);
            let found = format!("{network} {subnet_len} {subnet_min} {subnet_max} {port}");
            assert_eq!(found, expected, "{json}");
        }
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
        let unset = r#"{"Network":"10.1.0.0/16","SubnetMin":"0.0.0.0","SubnetMax":"0.0.0.0","SubnetLen":0}"#;
        assert_eq!(NetworkConfig::named_keys(unset), ["Network"]);
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
            ("{\"Network\":\"10.1.0.0/16\",\"Backend\":[\n1]}", "Backend is [\\n1]: expected an object"),
        ] {
            let error = NetworkConfig::parse(json).unwrap_err().to_string();
            assert!(error.contains(words), "{json}: {error}");
        }
        parse(r#"{"Network":"10.1.0.0/16","EnableIPv4":true}"#);
    }
}
