//! The network config: flannel's JSON record `config`, with its defaults and limits.

use std::{
    fmt::Display,
    net::{Ipv4Addr, Ipv6Addr},
};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;

use crate::{
    printable::{LONGEST_NAME, LONGEST_REASON, printable},
    record::Record,
    route::{Subnet, overlaps, parse_prefix},
    service::config::{self as services, ServicesConfig},
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
/// Whether a JSON text is a valid value.
type Check = fn(&str) -> bool;
/// Those that this agent ignores, with what flannel expects: it refuses the whole config for a value of another type.
const IGNORED_KEYS: [(&str, Check, &str); 6] = [
    ("EnableIPv6", is::<bool>, "true or false"),
    ("EnableNFTables", is::<bool>, "true or false"),
    ("IPv6Network", is::<Ipv6Net>, "an IPv6 network such as \"fd00::/48\""),
    ("IPv6SubnetLen", is::<u64>, "a prefix length"),
    ("IPv6SubnetMin", is::<Ipv6Addr>, "an IPv6 address"),
    ("IPv6SubnetMax", is::<Ipv6Addr>, "an IPv6 address"),
];
const NO_IPV4: &str = "the network config's EnableIPv4 is false: overlay-agent carries only IPv4, remove the key or set it to true";
const NO_IPV6: &str = "EnableIPv6 is true: overlay-agent carries only IPv4, and ignores the keys for IPv6";
const NO_TYPE: &str = "the network config's Backend has no Type, which flannel refuses: write {\"Type\":\"udp\"} or remove Backend";
const BACKEND_KEYS: [&str; 2] = ["Type", "Port"];

/// Address blocks that no host routes (RFC 6890).
const RESERVED: [(Ipv4Net, &str); 3] = [
    (Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 8), "\"this network\""),
    (Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8), "loopback"),
    (Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 3), "multicast and reserved"),
];

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
    /// How services work; `None` in a network without the key, which has none. flannel does not know it.
    pub services: Option<ServicesConfig>,
}

/// Whether a JSON text is a value of this type.
fn is<T: DeserializeOwned>(json: &str) -> bool {
    serde_json::from_str::<T>(json).is_ok()
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
            .map_err(|error| printable(&error.to_string(), LONGEST_REASON))
            .map_err(|error| ConfigError(format!("the network config is not a JSON object: {error}")))?;
        match record.text("EnableIPv4") {
            None | Some("true") => {}
            Some("false") => return Err(ConfigError(NO_IPV4.to_owned())),
            Some(text) => return Err(invalid("EnableIPv4", text, "true")),
        }
        for (key, is_valid, expected) in IGNORED_KEYS {
            if let Some(text) = record.text(key).filter(|text| !is_valid(text)) {
                return Err(invalid(key, text, expected));
            }
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
        let services = services(&record, network)?;
        Ok(Self { network, subnet_len, subnet_min, subnet_max, port: port(&record)?, services })
    }

    /// What an operator should know about a config that agents can use: unknown keys, and IPv6.
    pub fn warnings(json: &str) -> Vec<String> {
        let unknown = Self::unknown_keys(json).into_iter().map(|key| {
            let key = printable(&key, LONGEST_NAME);
            format!("the key \"{key}\" is ignored: it is unknown to flannel and to overlay-agent")
        });
        let wants_ipv6 = serde_json::from_str(json).ok().and_then(|record: Record| record.get("EnableIPv6"));
        unknown.chain((wants_ipv6 == Some(true)).then(|| NO_IPV6.to_owned())).collect()
    }

    /// Keys that are neither part of flannel's record nor of this agent's, most often misspelled, as written. Keys inside
    /// others are named `Backend.KEY` and `Services.KEY`. Empty when `json` is not an object.
    pub fn unknown_keys(json: &str) -> Vec<String> {
        let Ok(Value::Object(record)) = serde_json::from_str(json) else { return Vec::new() };
        let unknown =
            |known: &[&str], name: &str| !known.iter().any(|known| known.eq_ignore_ascii_case(name));
        let is_unknown = |name: &&String| unknown(&KEYS, name) && unknown(&[services::KEY], name);
        let mut names: Vec<String> = record.keys().filter(is_unknown).cloned().collect();
        for (outer, known) in [("Backend", &BACKEND_KEYS[..]), (services::KEY, &services::KEYS)] {
            let objects = record.iter().filter(|(name, _)| name.eq_ignore_ascii_case(outer));
            for object in objects.filter_map(|(_, object)| object.as_object()) {
                let inner = object.keys().filter(|name| unknown(known, name));
                names.extend(inner.map(|name| format!("{outer}.{name}")));
            }
        }
        names
    }

    /// Keys that `json` sets, in flannel's spelling; the others have defaults.
    pub fn named_keys(json: &str) -> Vec<&'static str> {
        let Ok(record) = serde_json::from_str::<Record>(json) else { return Vec::new() };
        let backend: Record = record.get("Backend").unwrap_or_default();
        let outer = KEYS.into_iter().filter(|key| given(&record, key).is_some());
        let inner = [("Type", "Backend.Type"), ("Port", "Backend.Port")];
        let inner = inner.into_iter().filter_map(|(key, name)| backend.text(key).map(|_| name));
        let services: Record = record.get(services::KEY).unwrap_or_default();
        let own = [
            ("Pool", "Services.Pool"),
            ("Domain", "Services.Domain"),
            ("LoadBalancing", "Services.LoadBalancing"),
        ];
        let own = own.into_iter().filter_map(|(key, name)| services.text(key).map(|_| name));
        outer.chain(inner).chain(own).collect()
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
    let network = record.get("Network").and_then(|text: String| parse_prefix(&text)).ok_or_else(|| {
        invalid("Network", text, "an IPv4 network without leading zeros, such as \"10.244.0.0/16\"")
    })?;
    let network = network.trunc();
    if !(1..=28).contains(&network.prefix_len()) {
        let expected = "a prefix length from 1 to 28: there must be room for several hosts";
        return Err(invalid("Network", text, expected));
    }
    match RESERVED.iter().find(|(block, _)| overlaps(network, *block)) {
        None => Ok(network),
        Some((block, what)) => {
            Err(ConfigError(format!("the network {network} overlaps {block}, {what}: choose another")))
        }
    }
}

fn services(record: &Record, network: Ipv4Net) -> Result<Option<ServicesConfig>, ConfigError> {
    let Some(text) = record.text(services::KEY) else { return Ok(None) };
    let refuse = |refusal: services::Refusal| invalid(refusal.key, &refusal.value, refusal.expected);
    let services = ServicesConfig::parse(text, network).map_err(refuse)?;
    match RESERVED.iter().find(|(block, _)| overlaps(services.pool, *block)) {
        None => Ok(Some(services)),
        Some((block, what)) => Err(ConfigError(format!(
            "Services.Pool of the network config overlaps {block}, {what}: choose another"
        ))),
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
    let kind = backend.text("Type").ok_or_else(|| ConfigError(NO_TYPE.to_owned()))?;
    match backend.get::<String>("Type") {
        Some(kind) if kind.is_empty() => return Err(ConfigError(NO_TYPE.to_owned())),
        Some(kind) if kind.eq_ignore_ascii_case("udp") => {}
        _ => return Err(invalid("Backend.Type", kind, "\"udp\": overlay-agent supports no other")),
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
                    "Backend":{"Type":"udp","PORT":1},"backend":{"port":3,"type":"udp","PORT":4}}"#,
                "10.1.0.0/16 24 10.1.1.0 10.1.255.0 4",
            ),
        ] {
            let NetworkConfig { network, subnet_len, subnet_min, subnet_max, port, .. } = parse(json);
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
        assert!(NetworkConfig::unknown_keys("{").is_empty() && NetworkConfig::warnings("{").is_empty());
        let unset = r#"{"Network":"10.1.0.0/16","SubnetMin":"0.0.0.0","SubnetMax":"0.0.0.0","SubnetLen":0}"#;
        assert_eq!(NetworkConfig::named_keys(unset), ["Network"]);
    }

    #[test]
    fn warnings_are_about_ignored_keys_and_escape_them_once() {
        let json = r#"{"Network":"10.1.0.0/16","enableipv6":true,"IPv6Network":"fd00::/48","\u001bx":1}"#;
        parse(json);
        let [key, ipv6] = NetworkConfig::warnings(json).try_into().unwrap();
        assert!(key.contains(r#"the key "\u{1b}x" is ignored"#), "{key}");
        assert!(ipv6.contains("EnableIPv6") && ipv6.contains("only IPv4"), "{ipv6}");
        assert!(NetworkConfig::warnings(r#"{"Network":"10.1.0.0/16","EnableIPv6":false}"#).is_empty());
    }

    #[test]
    fn a_config_that_flanneld_cannot_decode_is_refused() {
        for value in [
            r#""EnableIPv6":"yes""#,
            r#""EnableNFTables":1"#,
            r#""IPv6Network":"junk""#,
            r#""ipv6network":7"#,
            r#""IPv6SubnetLen":"64""#,
            r#""IPv6SubnetLen":-1"#,
            r#""IPv6SubnetMin":true"#,
            r#""IPv6SubnetMax":"10.1.0.0""#,
        ] {
            let error = NetworkConfig::parse(&format!(r#"{{"Network":"10.1.0.0/16",{value}}}"#)).unwrap_err();
            let key = value.split('"').nth(1).unwrap().to_ascii_lowercase();
            assert!(
                error.to_string().to_ascii_lowercase().contains(&format!("{key} is ")),
                "{value}: {error}"
            );
        }
        parse(
            r#"{"Network":"10.1.0.0/16","EnableIPv6":true,"EnableNFTables":false,"IPv6Network":"fd00::/48",
                "IPv6SubnetLen":64,"IPv6SubnetMin":"fd00::","IPv6SubnetMax":null}"#,
        );
    }

    #[test]
    fn reserved_networks_are_refused() {
        for network in
            ["0.0.0.0/1", "127.5.0.0/16", "96.0.0.0/3", "224.0.0.0/16", "240.0.0.0/8", "128.0.0.0/1"]
        {
            let error = NetworkConfig::of_network(network.parse().unwrap()).unwrap_err().to_string();
            assert!(error.contains("overlaps") && error.contains(network), "{error}");
        }
    }

    #[test]
    fn subnets_run_from_min_to_max() {
        let config = parse(r#"{"Network":"10.9.0.0/16","SubnetMin":"10.9.10.0","SubnetMax":"10.9.12.0"}"#);
        let subnets: Vec<_> = config.subnets().map(|subnet| subnet.to_string()).collect();
        assert_eq!(subnets, ["10.9.10.0/24", "10.9.11.0/24", "10.9.12.0/24"]);
        let all = parse(r#"{"Network":"128.0.0.0/2"}"#);
        assert_eq!(all.subnets().count(), (1 << 22) - 1);
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
            (r#"{"Network":"10.0.0.0/16","Backend":{"Type":"udp","Port":70000}}"#, "Backend.Port"),
            (r#"{"Network":"10.0.0.0/16","Backend":{}}"#, "Backend has no Type"),
            (r#"{"Network":"10.0.0.0/16","Backend":{"Type":"","Port":8285}}"#, "Backend has no Type"),
            (r#"{"Network":"10.0.0.0/16","Backend":{"Type":true}}"#, "Backend.Type is true"),
            (r#"{"Network":"010.0.0.0/16"}"#, "without leading zeros"),
            (r#"{"Network":"10.0.0.0/016"}"#, "without leading zeros"),
            (r#"{"Network":"10.0.0.0/16","SubnetMin":"10.0.01.0"}"#, "SubnetMin"),
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
