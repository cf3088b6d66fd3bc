//! Facts of a certificate for checks and messages. Unlike webpki, this reads X.509 version 1.

use std::net::IpAddr;

use tokio_rustls::rustls::pki_types::CertificateDer;
use x509_parser::{
    certificate::X509Certificate,
    extensions::GeneralName,
    prelude::{ASN1Time, FromDer as _},
    x509::X509Name,
};

/// Names of one certificate that a message lists.
const NAMES: usize = 8;

/// Parses a certificate; `None` when it is not one.
pub(super) fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Option<X509Certificate<'a>> {
    let (rest, parsed) = X509Certificate::from_der(certificate).ok()?;
    rest.is_empty().then_some(parsed)
}

/// Whether a certificate may be used by a server: it says so, or does not restrict its use.
pub(super) fn is_for_servers(certificate: &X509Certificate<'_>) -> bool {
    match certificate.extended_key_usage() {
        Ok(None) => true,
        Ok(Some(usage)) => usage.value.server_auth || usage.value.any,
        Err(_) => false,
    }
}

/// Host names and addresses that a certificate is for.
pub(super) fn names(certificate: &X509Certificate<'_>) -> String {
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return String::new() };
    let names = names.value.general_names.iter().filter_map(|name| {
        if let GeneralName::DNSName(name) = name {
            return Some(printable(name));
        }
        let GeneralName::IPAddress(bytes) = name else { return None };
        address(bytes).map(|address| address.to_string())
    });
    let mut names: Vec<_> = names.take(NAMES + 1).collect();
    if names.len() > NAMES {
        names.truncate(NAMES);
        names.push("others".to_owned());
    }
    names.join(", ")
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// A subject or issuer.
pub(super) fn entity(name: &X509Name<'_>) -> String {
    let text = name.to_string();
    if text.is_empty() { "an entity without a name".to_owned() } else { printable(&text) }
}

/// A time in UTC.
pub(super) fn time(time: ASN1Time) -> String {
    let time = time.to_datetime();
    let (year, month, day) = (time.year(), u8::from(time.month()), time.day());
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", time.hour(), time.minute())
}

/// Text from a server: what could confuse a terminal or a log is escaped.
fn printable(text: &str) -> String {
    text.escape_debug().to_string()
}
