//! What must be true of a lease record, whatever its key and value are.

use std::net::Ipv4Addr;

use overlay_agent::{
    lease::{self, LeaseRecord},
    store::Version,
};
use serde_json::Value;

/// Longest text of an error in bytes: at most 64 and 200 characters of the record, each escaped to 10, and a sentence.
const LONGEST_ERROR: usize = 3000;

/// Checks one input: a key, a line feed, and a value.
pub(crate) fn check(input: &[u8]) {
    let end = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    let (key, value) = input.split_at(end);
    let Ok(key) = std::str::from_utf8(key) else { return };
    let value = value.get(1..).unwrap_or_default();
    let record = LeaseRecord::parse(key, value, Version::default());
    match &record.id {
        Ok(subnet) => {
            let canonical = lease::key(*subnet);
            let behind = key.strip_prefix(&canonical).expect("a key has one spelling");
            assert!(behind.is_empty() || behind.starts_with('&'), "{behind:?} follows the subnet");
        }
        Err(error) => check_error(&error.0),
    }
    match &record.value {
        Ok(parsed) => {
            check_address(parsed.public_ip);
            let backend = parsed.backend_type.as_deref().unwrap_or("other");
            assert!(!backend.is_empty() && backend != "udp" && backend.len() <= LONGEST_ERROR);
            assert!(!backend.contains(char::is_control), "the type has control characters");
            let written = lease::value(parsed.public_ip);
            let again = LeaseRecord::parse(key, written.as_bytes(), Version::default());
            assert_eq!(again.holder(), Some(parsed.public_ip), "what is written is read");
        }
        Err(error) => check_error(&error.0),
    }
    check_json(value, record.holder());
}

/// What a JSON parser without Go's rules makes of the same value.
fn check_json(value: &[u8], holder: Option<Ipv4Addr>) {
    let Ok(Value::Object(fields)) = serde_json::from_slice(value) else { return };
    let mut named = fields.iter().filter(|(name, _)| name.eq_ignore_ascii_case("PublicIP"));
    let (Some((_, address)), None) = (named.next(), named.next()) else { return };
    // Of several keys that are equal, this parser keeps the last as well, but also where it is null.
    if address.is_null() {
        return;
    }
    let address = address.as_str().and_then(|address| address.parse::<Ipv4Addr>().ok());
    let is_host = |address: &Ipv4Addr| {
        !matches!(address.octets(), [0, 0, 0, 0] | [127 | 224..=239, ..] | [255, 255, 255, 255])
    };
    assert_eq!(holder, address.filter(is_host), "the holder");
}

fn check_address(address: Ipv4Addr) {
    let octets = address.octets();
    let is_host = !matches!(octets[0], 127 | 224..=239) && octets != [0; 4] && octets != [255; 4];
    assert!(is_host, "{address} is no host's");
}

/// Errors appear in terminals and logs.
pub(crate) fn check_error(error: &str) {
    assert!(error.len() <= LONGEST_ERROR, "an error of {} bytes", error.len());
    assert!(!error.contains(char::is_control), "an error with control characters: {error:?}");
}
