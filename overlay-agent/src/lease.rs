//! A host's lease on a subnet, as flannel writes it: the key `10.5.34.0-24` and the value
//! `{"PublicIP":"1.2.3.4","PublicIPv6":null}`.

use std::net::Ipv4Addr;

use ipnet::{Ipv4Net, Ipv6Net};
use serde_json::Value;

use crate::{
    printable::{LONGEST_NAME, printable},
    record::{self, field},
    route::Subnet,
    store::{Kind, Lifetime, Record, RecordError},
};

/// The kind of record that leases are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease;

/// The value of a lease record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseValue {
    /// Underlay address of the host that holds the subnet.
    pub public_ip: Ipv4Addr,
    /// flannel's backend type, its first 64 characters; `None` for the udp backend, which writes none.
    pub backend_type: Option<String>,
}

/// A lease record.
pub type LeaseRecord = Record<Lease>;

impl Record<Lease> {
    /// The subnet, when the key names one.
    pub fn subnet(&self) -> Option<Subnet> {
        self.id.as_ref().ok().copied()
    }

    /// Whether an operator reserved the subnet: the record has no end, in a store that knows lifetimes.
    pub fn is_reservation(&self) -> bool {
        self.version.lifetime == Lifetime::Unlimited
    }

    /// The address of the holder, when the value names one.
    pub fn holder(&self) -> Option<Ipv4Addr> {
        self.value.as_ref().ok().map(|value| value.public_ip)
    }
}

impl Kind for Lease {
    const PREFIX: &'static str = "subnets/";
    type Id = Subnet;
    type Value = LeaseValue;

    /// flannel's dual-stack keys (`10.5.34.0-24&2001:cafe:42:1::-64`) name an IPv6 subnet too, which is checked and ignored.
    /// A subnet with host bits set is refused.
    fn parse_key(key: &str) -> Result<Subnet, RecordError> {
        let error = || RecordError::Key {
            key: printable(key, LONGEST_NAME),
            expected: "a subnet such as 10.5.34.0-24",
        };
        let (ipv4, ipv6) = match key.split_once('&') {
            Some((ipv4, ipv6)) => (ipv4, Some(ipv6)),
            None => (key, None),
        };
        if let Some(ipv6) = ipv6 {
            ipv6.replacen('-', "/", 1).parse::<Ipv6Net>().map_err(|_| error())?;
        }
        let prefix: Ipv4Net = ipv4.replacen('-', "/", 1).parse().map_err(|_| error())?;
        if ipv4.contains('/') {
            return Err(error());
        }
        Subnet::try_from(prefix).map_err(|_| error())
    }

    /// Field names match in any case, the last of several counts, and unknown ones are ignored, as in Go.
    fn parse_value(json: &[u8]) -> Result<LeaseValue, RecordError> {
        let record = match record::read(json) {
            Ok(Value::Object(record)) => record,
            Ok(_) => return Err(not_json(json, "it is another JSON value")),
            Err(error) => return Err(not_json(json, &error.to_string())),
        };
        let public_ip = field(&record, "PublicIP");
        let public_ip = public_ip
            .and_then(Value::as_str)
            .and_then(|text| text.parse().ok())
            .filter(|address| is_host(*address))
            .ok_or_else(|| RecordError::Field {
                field: "PublicIP",
                value: shown(public_ip.unwrap_or(&Value::Null)),
                expected: "the address of a host",
            })?;
        let backend_type = field(&record, "BackendType")
            .and_then(Value::as_str)
            .map(|kind| printable(kind, LONGEST_NAME).to_ascii_lowercase())
            .filter(|kind| !kind.is_empty() && kind != "udp");
        Ok(LeaseValue { public_ip, backend_type })
    }
}

/// The key of a subnet's record, behind [`Kind::PREFIX`].
pub fn key(subnet: Subnet) -> String {
    format!("{}-{}", subnet.base(), subnet.prefix().prefix_len())
}

/// The value that a host writes, byte for byte as flannel's udp backend does.
pub fn value(public_ip: Ipv4Addr) -> String {
    format!(r#"{{"PublicIP":"{public_ip}","PublicIPv6":null}}"#)
}

/// Whether an address can be a host's.
pub(crate) fn is_host(address: Ipv4Addr) -> bool {
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || address.is_broadcast())
}

fn not_json(value: &[u8], why: &str) -> RecordError {
    let value = printable(&String::from_utf8_lossy(value), LONGEST_NAME);
    RecordError::NotJson { value, why: why.to_owned() }
}

/// The first characters of a value, without control characters.
fn shown(value: &Value) -> String {
    printable(&value.to_string(), LONGEST_NAME)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flannels_keys_name_their_subnet() {
        let subnet = "10.5.34.0/24".parse().unwrap();
        assert_eq!(Lease::parse_key("10.5.34.0-24"), Ok(subnet));
        assert_eq!(Lease::parse_key("10.5.34.0-24&2001:cafe:42:1::-64"), Ok(subnet));
        assert_eq!(key(subnet), "10.5.34.0-24");
    }

    #[test]
    fn other_keys_are_refused() {
        for bad in [
            "",
            "config",
            "10.5.34.0",
            "10.5.34.0/24",
            "10.5.34.1-24",
            "10.5.34.0-33",
            "10.5.34.0-24&x",
            "-",
            "2001::-64",
        ] {
            assert!(Lease::parse_key(bad).is_err(), "{bad:?}");
        }
    }

    /// A record and its meaning.
    #[derive(serde::Deserialize)]
    struct Vector {
        what: String,
        key: String,
        value: String,
        lease: Option<Meaning>,
    }

    #[derive(Debug, PartialEq, serde::Deserialize)]
    struct Meaning {
        subnet: Subnet,
        public_ip: Ipv4Addr,
        backend_type: Option<String>,
    }

    #[test]
    fn records_in_every_form_that_flannel_writes_are_read() {
        let vectors: Vec<Vector> =
            serde_json::from_str(include_str!("../../tests/vectors/leases.json")).unwrap();
        for Vector { what, key, value, lease } in vectors {
            let record = LeaseRecord::parse(&key, value.as_bytes(), crate::store::Version::default());
            let subnet = record.id.unwrap();
            let meaning = record.value.ok().map(|LeaseValue { public_ip, backend_type }| Meaning {
                subnet,
                public_ip,
                backend_type,
            });
            assert_eq!(meaning, lease, "{what}");
        }
    }

    #[test]
    fn a_written_value_is_flannels_byte_for_byte() {
        let host = Ipv4Addr::new(1, 2, 3, 4);
        assert_eq!(value(host), r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#);
        assert_eq!(Lease::parse_value(value(host).as_bytes()).unwrap().public_ip, host);
    }

    #[test]
    fn values_that_are_no_leases_are_refused() {
        for bad in [
            "",
            "{",
            "[]",
            "{}",
            r#"{"PublicIP":7}"#,
            r#"{"PublicIP":"host"}"#,
            r#"{"PublicIP":"0.0.0.0"}"#,
            r#"{"PublicIP":"224.0.0.1"}"#,
            "\u{fffd}",
        ] {
            assert!(Lease::parse_value(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn parsed_records_are_short_and_errors_quote_no_control_characters() {
        let long = "9,".repeat(30_000);
        for bad in [format!("[{long}9]"), format!(r#"{{"PublicIP":"{long}"}}"#)] {
            let error = Lease::parse_value(bad.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("9,9,") && error.contains("...") && error.len() < 200, "{error}");
        }
        let backend = format!(r#"{{"PublicIP":"1.2.3.4","BackendType":"{long}"}}"#);
        assert!(Lease::parse_value(backend.as_bytes()).unwrap().backend_type.unwrap().len() < 100);
        assert!(format!("{:?}", Lease::parse_key(&long)).len() < 200);
        let error =
            Lease::parse_value("{\"PublicIP\":\"\u{9b}2J\u{7f}\"}".as_bytes()).unwrap_err().to_string();
        assert!(error.contains("\\u{9b}2J\\u{7f}") && !error.contains(char::is_control), "{error}");
        let whole = Lease::parse_value(br#"{"PublicIP":"host"}"#).unwrap_err().to_string();
        assert!(whole.starts_with("PublicIP is \"host\": "), "{whole}");
    }
}
