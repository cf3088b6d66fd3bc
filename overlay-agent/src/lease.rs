//! A host's lease on a subnet, as flannel writes it: the key `10.5.34.0-24` and the value
//! `{"PublicIP":"1.2.3.4","PublicIPv6":null}`.

use std::net::Ipv4Addr;

use ipnet::{Ipv4Net, Ipv6Net};
use serde::Deserialize;

use crate::{
    printable::{LONGEST_NAME, LONGEST_REASON, printable},
    record,
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
    /// Whether the host takes unfinished packets: super-packets, and checksums that its kernel has to complete. Records of this
    /// agent say so in `BackendData`, which flannel's udp backend neither reads nor writes.
    pub takes_unfinished: bool,
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
    /// A key has one spelling: it counts only if the parsed subnets, formatted, give it again. Other spellings
    /// (`010.5.34.0-24`), which Go's parser refuses since Go 1.17, would be second records for a subnet.
    fn parse_key(key: &str) -> Result<Subnet, RecordError> {
        let parse = || {
            let (ipv4, ipv6) = key.split_once('&').map_or((key, None), |(ipv4, ipv6)| (ipv4, Some(ipv6)));
            let subnet = Subnet::try_from(ipv4.replacen('-', "/", 1).parse::<Ipv4Net>().ok()?).ok()?;
            let canonical = match ipv6 {
                None => self::key(subnet),
                Some(ipv6) => {
                    let ipv6: Ipv6Net = ipv6.replacen('-', "/", 1).parse().ok()?;
                    format!("{}&{}-{}", self::key(subnet), ipv6.network(), ipv6.prefix_len())
                }
            };
            (canonical == key).then_some(subnet)
        };
        parse().ok_or_else(|| {
            let key = printable(key, LONGEST_NAME);
            RecordError(format!("the key \"{key}\" is not a subnet such as 10.5.34.0-24").into())
        })
    }

    /// Field names match in any case, the last of several counts, and unknown ones are ignored, as in Go.
    fn parse_value(json: &[u8]) -> Result<LeaseValue, RecordError> {
        let record: record::Record = serde_json::from_slice(json).map_err(|error| {
            let value = printable(&String::from_utf8_lossy(json), LONGEST_NAME);
            // It may quote the whole value.
            let error = printable(&error.to_string(), LONGEST_REASON);
            RecordError(format!("the value `{value}` is not a JSON object: {error}").into())
        })?;
        let public_ip = record.get("PublicIP").filter(|address| is_host(*address)).ok_or_else(|| {
            let value = printable(record.text("PublicIP").unwrap_or("null"), LONGEST_NAME);
            RecordError(format!("PublicIP is {value}: expected the address of a host").into())
        })?;
        let backend_type = record
            .get::<String>("BackendType")
            .map(|kind| printable(&kind, LONGEST_NAME).to_ascii_lowercase())
            .filter(|kind| !kind.is_empty() && kind != "udp");
        let takes_unfinished =
            record.get::<BackendData>("BackendData").is_some_and(|data| data.takes_unfinished);
        Ok(LeaseValue { public_ip, backend_type, takes_unfinished })
    }
}

/// The key of a subnet's record, behind [`Kind::PREFIX`].
pub fn key(subnet: Subnet) -> String {
    format!("{}-{}", subnet.base(), subnet.prefix().prefix_len())
}

/// The value that a host writes: as flannel's udp backend does, with `BackendData` in addition.
pub fn value(public_ip: Ipv4Addr) -> String {
    format!(
        r#"{{"PublicIP":"{public_ip}","PublicIPv6":null,"BackendData":{{"TakesUnfinishedPackets":true}}}}"#
    )
}

/// What this agent's records say about their host.
#[derive(Default, Deserialize)]
struct BackendData {
    #[serde(default, rename = "TakesUnfinishedPackets")]
    takes_unfinished: bool,
}

/// Whether an address can be a host's.
pub(crate) fn is_host(address: Ipv4Addr) -> bool {
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || address.is_broadcast())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn other_keys_and_values_are_refused() {
        let keys = " config 10.5.34.0 10.5.34.0/24 10.5.34.1-24 10.5.34.0-33 10.5.34.0-24&x - 2001::-64 \
            010.5.34.0-24 10.5.034.0-24 10.5.34.0-024 10.5.34.0-+24 10.5.34.0-24& 10.5.34.0-24&2001:0::-64 \
            10.5.34.0-24&2001:CAFE::-64 10.5.34.0-24&2001::-064 10.5.34.0-24&2001::1-64 10.5.34.0-24&2001::-64-";
        for bad in keys.split(' ') {
            assert!(Lease::parse_key(bad).is_err(), "{bad:?}");
        }
        let addresses = ["7", r#""host""#, r#""0.0.0.0""#, r#""224.0.0.1""#];
        let values = addresses.map(|address| format!(r#"{{"PublicIP":{address}}}"#));
        for bad in ["", "{", "[]", "{}", "\u{fffd}"].into_iter().chain(values.iter().map(String::as_str)) {
            assert!(Lease::parse_value(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn records_in_every_form_that_flannel_writes_are_read() {
        let vectors: Value = serde_json::from_str(include_str!("../../tests/vectors/leases.json")).unwrap();
        for vector in vectors.as_array().unwrap() {
            let [key, value] = ["key", "value"].map(|name| vector[name].as_str().unwrap());
            let record = LeaseRecord::parse(key, value.as_bytes(), crate::store::Version::default());
            let subnet = record.id.unwrap();
            let meaning = record.value.ok().map(|LeaseValue { public_ip, backend_type, .. }| {
                json!({ "subnet": subnet, "public_ip": public_ip, "backend_type": backend_type })
            });
            assert_eq!(meaning.unwrap_or_default(), vector["lease"], "{}", vector["what"]);
        }
    }

    #[test]
    fn a_written_record_is_flannels_with_a_note_for_our_own_agents() {
        assert_eq!(key("10.5.34.0/24".parse().unwrap()), "10.5.34.0-24");
        let host = Ipv4Addr::new(1, 2, 3, 4);
        let flannels = r#"{"PublicIP":"1.2.3.4","PublicIPv6":null"#;
        assert!(value(host).starts_with(flannels) && serde_json::from_str::<Value>(&value(host)).is_ok());
        let parse = |value: &str| Lease::parse_value(value.as_bytes()).unwrap();
        assert_eq!((parse(&value(host)).public_ip, parse(&value(host)).takes_unfinished), (host, true));
        for (data, takes) in [
            ("", false),
            (r#","BackendData":null"#, false),
            (r#","BackendData":{"VtepMAC":"02:00:00:00:00:01"}"#, false),
            (r#","BackendData":"junk""#, false),
            (r#","BackendData":{"TakesUnfinishedPackets":false}"#, false),
            (r#","BackendData":{"TakesUnfinishedPackets":true,"More":1}"#, true),
        ] {
            assert_eq!(parse(&format!("{flannels}{data}}}")).takes_unfinished, takes, "{data}");
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
