//! One host's claim on a subnet, as flannel writes it: the key `10.5.34.0-24` and the value
//! `{"PublicIP":"1.2.3.4","PublicIPv6":null}`.

use std::net::Ipv4Addr;

use ipnet::{Ipv4Net, Ipv6Net};
use serde_json::Value;
use thiserror::Error;

use crate::{
    printable::{LONGEST_NAME, printable},
    record::{self, field},
};

/// What a lease record says about its holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseValue {
    /// Underlay address of the host that holds the subnet.
    pub public_ip: Ipv4Addr,
    /// flannel's backend type, its first 64 characters; `None` for the udp backend, which writes none.
    pub backend_type: Option<String>,
}

/// Why a record is not a lease.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LeaseError {
    /// The key is not a subnet.
    #[error("the key {0:?} is not a subnet such as 10.5.34.0-24")]
    Key(String),
    /// The value is not JSON, or not an object.
    #[error("the value is not a JSON object: {0}")]
    NotJson(String),
    /// `PublicIP` is missing or not an address that a host can have.
    #[error("PublicIP is {0}: expected the address of a host")]
    PublicIp(String),
}

/// The subnet that a key names. flannel's dual-stack keys (`10.5.34.0-24&2001:cafe:42:1::-64`) name an IPv6 subnet too,
/// which is checked and left aside.
///
/// # Errors
///
/// [`LeaseError::Key`] for anything else, also for a subnet with host bits set.
pub fn parse_key(key: &str) -> Result<Ipv4Net, LeaseError> {
    let error = || LeaseError::Key(printable(key, LONGEST_NAME));
    let (ipv4, ipv6) = match key.split_once('&') {
        Some((ipv4, ipv6)) => (ipv4, Some(ipv6)),
        None => (key, None),
    };
    if let Some(ipv6) = ipv6 {
        ipv6.replacen('-', "/", 1).parse::<Ipv6Net>().map_err(|_| error())?;
    }
    let subnet: Ipv4Net = ipv4.replacen('-', "/", 1).parse().map_err(|_| error())?;
    if subnet != subnet.trunc() || ipv4.contains('/') {
        return Err(error());
    }
    Ok(subnet)
}

/// The key of a subnet's record.
pub fn key(subnet: Ipv4Net) -> String {
    format!("{}-{}", subnet.network(), subnet.prefix_len())
}

/// Parses a record's value. Keys match whatever their case, and the last of several goes; unknown keys are ignored.
///
/// # Errors
///
/// [`LeaseError`] says what is wrong with it.
pub fn parse_value(json: &[u8]) -> Result<LeaseValue, LeaseError> {
    let value = record::read(json).map_err(|error| LeaseError::NotJson(error.to_string()))?;
    let Value::Object(record) = value else {
        return Err(LeaseError::NotJson(format!("it is {}", shown(&value))));
    };
    let public_ip = field(&record, "PublicIP");
    let public_ip = public_ip
        .and_then(Value::as_str)
        .and_then(|text| text.parse().ok())
        .filter(|address| is_host(*address))
        .ok_or_else(|| LeaseError::PublicIp(shown(public_ip.unwrap_or(&Value::Null))))?;
    let backend_type = field(&record, "BackendType")
        .and_then(Value::as_str)
        .map(|kind| printable(kind, LONGEST_NAME).to_ascii_lowercase())
        .filter(|kind| !kind.is_empty() && kind != "udp");
    Ok(LeaseValue { public_ip, backend_type })
}

/// The beginning of a value, in a form that is fit to be shown.
fn shown(value: &Value) -> String {
    printable(&value.to_string(), LONGEST_NAME)
}

/// The value that a host writes, byte for byte as flannel's udp backend does.
pub fn value(public_ip: Ipv4Addr) -> String {
    format!(r#"{{"PublicIP":"{public_ip}","PublicIPv6":null}}"#)
}

/// Whether an address can be a host's.
pub(crate) fn is_host(address: Ipv4Addr) -> bool {
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || address.is_broadcast())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_flannel_name_their_subnet() {
        let subnet = "10.5.34.0/24".parse().unwrap();
        assert_eq!(parse_key("10.5.34.0-24"), Ok(subnet));
        assert_eq!(parse_key("10.5.34.0-24&2001:cafe:42:1::-64"), Ok(subnet));
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
            assert!(parse_key(bad).is_err(), "{bad:?}");
        }
    }

    /// A record, and what it says.
    #[derive(serde::Deserialize)]
    struct Vector {
        what: String,
        key: String,
        value: String,
        lease: Option<Said>,
    }

    #[derive(Debug, PartialEq, serde::Deserialize)]
    struct Said {
        subnet: Ipv4Net,
        public_ip: Ipv4Addr,
        backend_type: Option<String>,
    }

    #[test]
    fn records_in_every_form_of_flannels_are_read() {
        let vectors: Vec<Vector> =
            serde_json::from_str(include_str!("../../tests/vectors/leases.json")).unwrap();
        for Vector { what, key, value, lease } in vectors {
            let subnet = parse_key(&key).unwrap();
            let said = parse_value(value.as_bytes()).ok();
            let said =
                said.map(|LeaseValue { public_ip, backend_type }| Said { subnet, public_ip, backend_type });
            assert_eq!(said, lease, "{what}");
        }
    }

    #[test]
    fn a_value_of_ours_is_flannels_byte_for_byte() {
        let host = Ipv4Addr::new(1, 2, 3, 4);
        assert_eq!(value(host), r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#);
        assert_eq!(parse_value(value(host).as_bytes()).unwrap().public_ip, host);
    }

    #[test]
    fn what_is_kept_of_a_record_is_short() {
        let long = "x".repeat(60_000);
        for json in [
            format!(r#"{{"PublicIP":"{long}"}}"#),
            format!(r#"["{long}"]"#),
            format!(r#"{{"PublicIP":"1.2.3.4","BackendType":"{long}"}}"#),
        ] {
            let kept = format!("{:?}", parse_value(json.as_bytes()));
            assert!(kept.len() < 200, "{kept}");
        }
        assert!(format!("{:?}", parse_key(&long)).len() < 200);
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
            assert!(parse_value(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_error_shows_the_beginning_of_a_record_and_nothing_that_a_terminal_obeys() {
        let long = "9,".repeat(5000);
        for bad in [format!("[{long}9]"), format!(r#"{{"PublicIP":"{long}"}}"#)] {
            let error = parse_value(bad.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("9,9,") && error.contains("...") && error.len() < 200, "{error}");
        }
        let backend = format!(r#"{{"PublicIP":"1.2.3.4","BackendType":"{}"}}"#, "x".repeat(5000));
        assert!(parse_value(backend.as_bytes()).unwrap().backend_type.unwrap().len() < 100);
        let error = parse_value("{\"PublicIP\":\"\u{9b}2J\u{7f}\"}".as_bytes()).unwrap_err().to_string();
        assert!(error.contains("\\u{9b}2J\\u{7f}") && !error.contains(char::is_control), "{error}");
        let whole = parse_value(br#"{"PublicIP":"host"}"#).unwrap_err().to_string();
        assert!(whole.starts_with("PublicIP is \"host\": "), "{whole}");
    }
}
