//! The part of the network config that is about services: the key `Services` beside flannel's, which flannel ignores.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::Serialize;
use serde_json::{Value, json};

use super::{name::label, record::LoadBalancing};
use crate::{
    printable::{LONGEST_REASON, printable},
    record::Record,
    route::{overlaps, parse_prefix},
};

/// The key in the network config.
pub(crate) const KEY: &str = "Services";
/// The keys inside it.
pub(crate) const KEYS: [&str; 3] = ["Pool", "Domain", "LoadBalancing"];
/// The virtual addresses, unless the config names others.
const DEFAULT_POOL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 251, 0, 0), 16);
/// The domain below which services have names, unless the config names another.
const DEFAULT_DOMAIN: &str = "overlay";
/// Longest domain in bytes. With the longest names of an endpoint in front (`id.node.name.namespace.svc.`, 260 bytes) no name fits a
/// DNS name anyway (255 bytes, RFC 1035 section 2.3.4); usual ones do.
const LONGEST_DOMAIN: usize = 128;

/// How the network's services work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServicesConfig {
    /// The virtual addresses; host bits are zero.
    pub pool: Ipv4Net,
    /// The domain below which services have names: `web.shop.svc.<domain>`. In lower case, without a dot at its end.
    pub domain: String,
    /// How endpoints are chosen where a service does not say it.
    pub load_balancing: LoadBalancing,
}

impl ServicesConfig {
    /// Parses the value of the key, by Go's rules as the rest of the config. What it does not say has a default.
    /// Fails with a key, its value and what is expected of it.
    pub(crate) fn parse(value: &str, network: Ipv4Net) -> Result<Self, Refusal> {
        let record: Record = serde_json::from_str(value)
            .map_err(|_| Refusal::new(KEY, value, "an object such as {\"Pool\":\"10.251.0.0/16\"}"))?;
        Ok(Self {
            pool: pool(&record, network)?,
            domain: domain(&record)?,
            load_balancing: load_balancing(&record)?,
        })
    }

    /// The values by their keys in the config.
    pub(crate) fn values(&self) -> [(&'static str, String); 3] {
        let LoadBalancing { policy, hash_key } = &self.load_balancing;
        let policy = json!(policy).as_str().map(str::to_owned).unwrap_or_default();
        let hash_key = hash_key.as_ref().map(|key| format!(" of {}", printable(key, LONGEST_REASON)));
        [
            ("Services.Pool", self.pool.to_string()),
            ("Services.Domain", self.domain.clone()),
            ("Services.LoadBalancing", format!("{policy}{}", hash_key.unwrap_or_default())),
        ]
    }

    /// The value of the key, with defaults.
    pub(crate) fn json(&self) -> Value {
        json!({ "Pool": self.pool, "Domain": self.domain, "LoadBalancing": self.load_balancing })
    }

    /// The first of `networks`, such as those of the underlay's addresses, that the pool overlaps: packets to hosts in it could be
    /// meant for services.
    pub fn overlap(&self, networks: impl IntoIterator<Item = Ipv4Net>) -> Option<Ipv4Net> {
        networks.into_iter().find(|network| overlaps(self.pool, *network))
    }
}

/// Why a value is refused.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) key: &'static str,
    pub(crate) value: String,
    pub(crate) expected: String,
}

impl Refusal {
    fn new(key: &'static str, value: &str, expected: impl Into<String>) -> Self {
        Self { key, value: value.to_owned(), expected: expected.into() }
    }
}

fn pool(record: &Record, network: Ipv4Net) -> Result<Ipv4Net, Refusal> {
    let refuse = |text: &str, expected: String| Refusal::new("Services.Pool", text, expected);
    let (text, pool) = match record.text("Pool") {
        None => (format!("\"{DEFAULT_POOL}\" (the default)"), Some(DEFAULT_POOL)),
        Some(text) => {
            let pool = record.get("Pool").and_then(|text: String| parse_prefix(&text));
            (text.to_owned(), pool.map(|pool| pool.trunc()))
        }
    };
    let expected =
        "an IPv4 network without leading zeros, such as \"10.251.0.0/16\", with a prefix length from 8 to 30";
    let pool = pool.filter(|pool| (8..=30).contains(&pool.prefix_len()));
    let pool = pool.ok_or_else(|| refuse(&text, expected.to_owned()))?;
    if overlaps(pool, network) {
        return Err(refuse(&text, format!("a network that does not overlap the overlay's, {network}")));
    }
    Ok(pool)
}

fn domain(record: &Record) -> Result<String, Refusal> {
    let Some(text) = record.text("Domain") else { return Ok(DEFAULT_DOMAIN.to_owned()) };
    let domain: Option<String> = record.get("Domain");
    let domain = domain.map(|domain| domain.strip_suffix('.').unwrap_or(&domain).to_ascii_lowercase());
    let is_domain = |domain: &String| {
        domain.len() <= LONGEST_DOMAIN && domain.split('.').all(|part| label("domain", part).is_ok())
    };
    domain.filter(is_domain).ok_or_else(|| {
        Refusal::new("Services.Domain", text, "a DNS name of at most 128 bytes, such as \"overlay\"")
    })
}

fn load_balancing(record: &Record) -> Result<LoadBalancing, Refusal> {
    let Some(text) = record.text("LoadBalancing") else { return Ok(LoadBalancing::default()) };
    record.get("LoadBalancing").ok_or_else(|| {
        let expected = "an object such as {\"policy\":\"round_robin\"}, or with random, least_conn, source_hash or maglev";
        Refusal::new("Services.LoadBalancing", text, expected)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::NetworkConfig, service::record::Policy};

    fn parse(services: &str) -> Result<ServicesConfig, String> {
        let text = format!(r#"{{"Network":"10.244.0.0/16","Services":{services}}}"#);
        let config = NetworkConfig::parse(&text).map_err(|error| error.to_string())?;
        Ok(config.services.expect("the key is there"))
    }

    #[test]
    fn what_the_config_does_not_say_has_defaults() {
        for text in ["{}", r#"{"Pool":"10.251.7.1/16","domain":"OVERLAY."}"#] {
            let config = parse(text).unwrap();
            assert_eq!(config.pool, "10.251.0.0/16".parse().unwrap(), "{text}");
            assert_eq!(
                (config.domain.as_str(), config.load_balancing.policy),
                ("overlay", Policy::RoundRobin)
            );
        }
        let full =
            parse(r#"{"pool":"10.9.0.0/24","Domain":"svc.example.com","LoadBalancing":{"policy":"maglev"}}"#)
                .unwrap();
        assert_eq!(full.load_balancing.policy, Policy::Maglev);
        assert_eq!(parse(&full.json().to_string()), Ok(full));
    }

    #[test]
    fn a_network_without_the_key_has_no_services() {
        for text in [r#"{"Network":"10.0.0.0/8"}"#, r#"{"Network":"10.0.0.0/8","Services":null}"#] {
            assert_eq!(NetworkConfig::parse(text).unwrap().services, None);
            assert!(NetworkConfig::warnings(text).is_empty());
        }
        let error =
            NetworkConfig::parse(r#"{"Network":"10.0.0.0/8","Services":{}}"#).unwrap_err().to_string();
        assert!(error.contains("Services.Pool is \"10.251.0.0/16\" (the default)"), "{error}");
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_its_key() {
        for (text, words) in [
            ("7", "Services is 7"),
            (r#"{"Pool":"10.244.7.0/24"}"#, "does not overlap the overlay's, 10.244.0.0/16"),
            (r#"{"Pool":"10.0.0.0/8"}"#, "does not overlap"),
            (r#"{"Pool":"10.251.0.0/31"}"#, "Services.Pool is"),
            (r#"{"Pool":"127.0.0.0/16"}"#, "loopback"),
            (r#"{"Pool":7}"#, "Services.Pool is 7"),
            (r#"{"Domain":"a..b"}"#, "Services.Domain is"),
            (r#"{"Domain":""}"#, "Services.Domain is"),
            (r#"{"LoadBalancing":{"policy":"best"}}"#, "Services.LoadBalancing is"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn an_overlap_with_the_underlay_is_found() {
        let config = parse("{}").unwrap();
        let networks = ["192.168.77.0/24", "10.251.9.0/24"].map(|network| network.parse().unwrap());
        assert_eq!(config.overlap(networks), Some(networks[1]));
        assert_eq!(config.overlap([networks[0]]), None);
    }

    #[test]
    fn its_keys_are_known() {
        let json = r#"{"Network":"10.244.0.0/16","services":{"pool":"10.9.0.0/24","Pol":1}}"#;
        assert_eq!(NetworkConfig::unknown_keys(json), ["Services.Pol"]);
        assert_eq!(NetworkConfig::named_keys(json), ["Network", "Services.Pool"]);
    }
}
