//! One etcd server: an endpoint of `--etcd-endpoints`, checked before the first connection.

use std::{fmt, net::Ipv6Addr, sync::Arc};

use http::Uri;
use tokio_rustls::rustls::pki_types::ServerName;

use super::options::ENDPOINTS;
use crate::store::StoreError;

/// The URL of a server, and the name that its certificate must have.
#[derive(Clone, Debug)]
pub(super) struct Server {
    url: Arc<str>,
    uri: Uri,
    name: ServerName<'static>,
    is_tls: bool,
}

impl Server {
    /// Reads an endpoint: a URL, or `host:port`, which is https when a TLS file is named.
    /// Errors never quote a user or a password.
    pub(super) fn parse(endpoint: &str, any_tls_file: bool) -> Result<Self, StoreError> {
        let (scheme, rest) = match endpoint.split_once("://") {
            Some((scheme, rest)) => (scheme.to_ascii_lowercase(), rest),
            None => ((if any_tls_file { "https" } else { "http" }).to_owned(), endpoint),
        };
        if rest.contains('@') {
            // The error does not quote the endpoint: it may hold a password.
            return refuse("an endpoint holds a user: give --etcd-username and --etcd-password instead");
        }
        if scheme != "http" && scheme != "https" {
            return refuse(format!(
                "an endpoint begins with {scheme:?}, which is neither http:// nor https://"
            ));
        }
        let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        let url = format!("{scheme}://{authority}");
        // Go's client ignores a slash at the end, too.
        if !path.chars().all(|character| character == '/') {
            return refuse(format!(
                "an endpoint continues after {url:?} with a path, which etcd does not have: write the scheme, the host and \
                 the port only"
            ));
        }
        let (host, port) = split_port(authority);
        if let Some(port) = port
            && !(port.bytes().all(|byte| byte.is_ascii_digit())
                && port.parse::<u16>().is_ok_and(|port| port > 0))
        {
            return refuse(format!("{url:?}: {port:?} is not a port: write a number from 1 to 65535"));
        }
        let Some(name) = server_name(host) else {
            let why = "is neither a host name nor an IP address (an IPv6 address stands in brackets)";
            return refuse(format!("{url:?}: {host:?} {why}"));
        };
        match url.parse() {
            Ok(uri) => Ok(Self { is_tls: scheme == "https", url: url.into(), uri, name }),
            Err(error) => refuse(format!("{url:?} is not a URL: {error}")),
        }
    }

    pub(super) fn is_tls(&self) -> bool {
        self.is_tls
    }

    pub(super) fn uri(&self) -> &Uri {
        &self.uri
    }

    /// The name or address that the server's certificate must have.
    pub(super) fn name(&self) -> &ServerName<'static> {
        &self.name
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

/// The host, with the brackets of an IPv6 address, and the text after its colon.
fn split_port(authority: &str) -> (&str, Option<&str>) {
    let after_address = authority.find(']').map_or(0, |end| end + 1);
    match authority.get(after_address..).and_then(|rest| rest.find(':')) {
        Some(colon) => {
            let (host, port) = authority.split_at(after_address + colon);
            (host, port.strip_prefix(':'))
        }
        None => (authority, None),
    }
}

fn server_name(host: &str) -> Option<ServerName<'static>> {
    match host.strip_prefix('[') {
        Some(rest) => {
            let address: Ipv6Addr = rest.strip_suffix(']')?.parse().ok()?;
            Some(ServerName::from(std::net::IpAddr::from(address)))
        }
        None => ServerName::try_from(host.to_owned()).ok(),
    }
}

fn refuse<T>(why: impl Into<String>) -> Result<T, StoreError> {
    Err(StoreError::Option { option: ENDPOINTS, why: why.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_addresses_and_ports_are_accepted() {
        for (endpoint, url, name) in [
            ("etcd_1.example.com:2379", "http://etcd_1.example.com:2379", "etcd_1.example.com"),
            ("HTTPS://10.0.0.1:65535/", "https://10.0.0.1:65535", "10.0.0.1"),
            ("http://[fd00::1]:2379", "http://[fd00::1]:2379", "fd00::1"),
            ("https://[fd00::1]", "https://[fd00::1]", "fd00::1"),
            ("localhost", "http://localhost", "localhost"),
        ] {
            let server = Server::parse(endpoint, false).unwrap();
            assert_eq!((server.to_string().as_str(), server.name().to_str().as_ref()), (url, name));
            assert_eq!(server.is_tls(), url.starts_with("https"));
        }
    }

    #[test]
    fn what_is_no_endpoint_is_refused_with_the_part_that_is_wrong() {
        for (endpoint, part) in [
            ("http://10.0.0.1:99999", r#""99999" is not a port"#),
            ("http://10.0.0.1:0", r#""0" is not a port"#),
            ("http://10.0.0.1:", r#""" is not a port"#),
            ("http://10.0.0.1:+1", r#""+1" is not a port"#),
            ("10.0.0.1:2379:2380", r#""2379:2380" is not a port"#),
            ("http://[fd00::1]:x", r#""x" is not a port"#),
            ("http://10.0.0.256:2379", r#""10.0.0.256" is neither"#),
            ("http://ho st:2379", r#""ho st" is neither"#),
            ("http://[10.0.0.1]:2379", r#""[10.0.0.1]" is neither"#),
            ("http://[fd00::1]x:2379", r#""[fd00::1]x" is neither"#),
            ("http://:2379", r#""" is neither"#),
            ("https://", r#""" is neither"#),
            ("http://10.0.0.1:2379/v2", r#"after "http://10.0.0.1:2379" with a path"#),
            ("http://10.0.0.1:2379?x", "with a path"),
            ("unix:///run/etcd", r#""unix", which is neither http:// nor https://"#),
        ] {
            let refusal = Server::parse(endpoint, false).unwrap_err().to_string();
            assert!(refusal.contains(part) && refusal.contains("--etcd-endpoints"), "{refusal}");
        }
    }

    #[test]
    fn secrets_in_an_endpoint_are_never_quoted() {
        for endpoint in [
            "http://u:hunter2@10.0.0.1:99999",
            "http://a:1/hunter2",
            "http://a:1?token=hunter2",
            "ftp://hunter2",
        ] {
            let refusal = Server::parse(endpoint, false).unwrap_err();
            let shown = format!("{refusal} {refusal:?}");
            assert!(!shown.contains("hunter2"), "{shown}");
        }
    }
}
