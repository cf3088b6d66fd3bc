//! What of the headers of requests and responses is passed on. Pure.

use std::net::Ipv4Addr;

use http::uri::{Authority, PathAndQuery, Uri};
use hyper::{
    HeaderMap, Method, StatusCode, Version,
    header::{CONNECTION, CONTENT_LENGTH, HOST, HeaderName, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE},
    http::{request, response},
};

use super::reply::Refusal;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// Headers for one connection, whether or not Connection names them (RFC 9110 section 7.6.1).
const HOP_BY_HOP: [HeaderName; 6] = [
    CONNECTION,
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("keep-alive"),
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// The host that a request is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Host {
    /// With its port, as the client names it; `None` when it names none.
    value: Option<HeaderValue>,
    /// Without its port.
    name: Option<String>,
}

impl Host {
    /// Reads it from a request. Refuses requests that a proxy must not pass on, or cannot.
    pub(super) fn of(head: &request::Parts) -> Result<Self, Refusal> {
        if head.method == Method::CONNECT {
            return Err(Refusal::new(StatusCode::NOT_IMPLEMENTED, "CONNECT is not possible here"));
        }
        if !is_only_chunked(&head.headers) {
            // RFC 9112 section 6.1: they are of this connection, and would have to be decoded.
            let reason = "transfer codings other than chunked are not possible here";
            return Err(Refusal::new(StatusCode::NOT_IMPLEMENTED, reason));
        }
        let bad = |reason: &str| Refusal::new(StatusCode::BAD_REQUEST, reason);
        let mut given = head.headers.get_all(HOST).iter();
        let (first, second) = (given.next(), given.next());
        if second.is_some() {
            return Err(bad("the request names several hosts"));
        }
        if let Some(authority) = head.uri.authority() {
            // RFC 9112 section 3.2.2: it takes the place of the header.
            if head.uri.scheme_str() != Some("http") {
                return Err(bad("the target of the request is not of this port"));
            }
            return Self::parse(authority.as_str().as_bytes());
        }
        match first {
            Some(value) if value.is_empty() => Ok(Self { value: Some(value.clone()), name: None }),
            Some(value) => Self::parse(value.as_bytes()),
            // RFC 9112 section 3.2.
            None if head.version == Version::HTTP_11 => Err(bad("the request names no host")),
            None => Ok(Self::default()),
        }
    }

    fn parse(text: &[u8]) -> Result<Self, Refusal> {
        // RFC 3986 allows more, for example a comma, which elsewhere separates two hosts.
        let is_of_host = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~:[]%".contains(byte);
        let authority = Authority::try_from(text).ok().filter(|_| text.iter().all(is_of_host));
        let parsed = authority.and_then(|authority| {
            let value = HeaderValue::from_str(authority.as_str()).ok()?;
            Some(Self { value: Some(value), name: Some(authority.host().to_owned()) })
        });
        parsed.ok_or_else(|| Refusal::new(StatusCode::BAD_REQUEST, "the request's host is no host"))
    }

    /// Without its port, for routes.
    pub(super) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }
}

/// The protocol to which a request wants to switch, if it may. Not to HTTP/2, whose requests would pass through in one tunnel.
pub(super) fn wanted_upgrade(head: &request::Parts) -> Option<HeaderValue> {
    let is_named = tokens(&head.headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    let is_http2 = tokens(&head.headers, &UPGRADE).any(|token| token.eq_ignore_ascii_case("h2c"));
    let is_possible = head.version == Version::HTTP_11 && is_named && !is_http2;
    head.headers.get(UPGRADE).filter(|_| is_possible).cloned()
}

/// Makes the header for an endpoint of a client's. `fallback` names the host if the client does not. `length` is that of the body.
pub(super) fn to_endpoint(
    head: &mut request::Parts,
    host: &Host,
    client: Ipv4Addr,
    fallback: &str,
    length: Length,
) {
    let upgrade = wanted_upgrade(head);
    let takes_trailers = tokens(&head.headers, &TE).any(|token| token.eq_ignore_ascii_case("trailers"));
    let headers = &mut head.headers;
    remove_hop_by_hop(headers);
    length.write(headers);
    let host_value = host.value.clone().or_else(|| HeaderValue::from_str(fallback).ok());
    if let Some(value) = host_value {
        if !headers.contains_key(X_FORWARDED_HOST) && host.value.is_some() {
            headers.insert(X_FORWARDED_HOST, value.clone());
        }
        headers.insert(HOST, value);
    }
    if !headers.contains_key(X_FORWARDED_PROTO) {
        headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static("http"));
    }
    append_client(headers, client);
    let mut options = Vec::new();
    if let Some(upgrade) = upgrade {
        headers.insert(UPGRADE, upgrade);
        options.push("upgrade");
    }
    if takes_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
        options.push("te");
    }
    if let Ok(options) = HeaderValue::from_str(&options.join(", "))
        && !options.is_empty()
    {
        headers.insert(CONNECTION, options);
    }
    // Endpoints get the path only (RFC 9112 section 3.2.1).
    if head.uri.authority().is_some() {
        let path = head.uri.path_and_query().cloned();
        head.uri = Uri::from(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
    }
    head.version = Version::HTTP_11;
    head.extensions.clear();
}

/// Makes the header for a client of an endpoint's. `length` is that of the body.
/// Fails when the body is coded for the connection in a way that this proxy does not know.
pub(super) fn to_client(head: &mut response::Parts, length: Length) -> Result<(), &'static str> {
    if !is_only_chunked(&head.headers) {
        return Err("a transfer coding other than chunked");
    }
    let upgrade = (head.status == StatusCode::SWITCHING_PROTOCOLS)
        .then(|| head.headers.get(UPGRADE).cloned())
        .flatten();
    if head.headers.contains_key(TRANSFER_ENCODING) {
        // RFC 9112 section 6.3: it says nothing.
        head.headers.remove(CONTENT_LENGTH);
    }
    remove_hop_by_hop(&mut head.headers);
    length.write(&mut head.headers);
    // hyper adds what the client's connection needs.
    head.headers.remove(TRANSFER_ENCODING);
    if let Some(upgrade) = upgrade {
        head.headers.insert(UPGRADE, upgrade);
        head.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
    head.version = Version::HTTP_11;
    Ok(())
}

/// The length of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Length {
    /// There is none; a Content-Length is that of another response.
    Empty,
    /// In bytes.
    Known(u64),
    /// It ends when it ends.
    Unknown,
}

impl Length {
    /// Of a body that is not empty.
    pub(super) fn of(body: &impl hyper::body::Body) -> Self {
        match body.size_hint().exact() {
            _ if body.is_end_stream() => Self::Empty,
            Some(bytes) => Self::Known(bytes),
            None => Self::Unknown,
        }
    }

    /// There is exactly one way to find the end of a body.
    fn write(self, headers: &mut HeaderMap) {
        match self {
            Self::Empty => {}
            Self::Known(bytes) => drop(headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes))),
            Self::Unknown => {
                headers.remove(CONTENT_LENGTH);
                headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
            }
        }
    }
}

/// The comma-separated words of all lines of a header. Those that are not ASCII are left out.
fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> + use<'a> {
    let lines = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim).filter(|token| !token.is_empty())
}

/// Whether the only transfer coding is chunked, once.
fn is_only_chunked(headers: &HeaderMap) -> bool {
    let mut lines = headers.get_all(TRANSFER_ENCODING).iter();
    match (lines.next(), lines.next()) {
        (None, _) => true,
        (Some(line), None) => line.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked"),
        (Some(_), Some(_)) => false,
    }
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named = tokens(headers, &CONNECTION).filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok());
    let named: Vec<HeaderName> = named.collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// Appends the client to the addresses that the request has passed. In one line, as some servers read only one.
fn append_client(headers: &mut HeaderMap, client: Ipv4Addr) {
    let mut line = Vec::new();
    for earlier in headers.get_all(X_FORWARDED_FOR) {
        line.extend_from_slice(earlier.as_bytes());
        line.extend_from_slice(b", ");
    }
    line.extend_from_slice(client.to_string().as_bytes());
    if let Ok(value) = HeaderValue::from_bytes(&line) {
        headers.insert(X_FORWARDED_FOR, value);
    }
}

#[cfg(test)]
#[path = "head_tests.rs"]
mod tests;
