//! Headers of requests and responses, and generated ones.

use hyper::{Request, Response};
use proptest::prelude::*;

use super::*;

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);

fn request(method: &str, uri: &str, headers: &[(&str, &str)]) -> request::Parts {
    let mut builder = Request::builder().method(method).uri(uri);
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(()).unwrap().into_parts().0
}

/// The headers of a request as an endpoint gets it, in order.
fn passed(mut head: request::Parts, length: Length) -> Vec<String> {
    let host = Host::of(&head).unwrap();
    to_endpoint(&mut head, &host, CLIENT, "10.251.0.1:80", length);
    assert_eq!(head.version, Version::HTTP_11);
    lines(&head.headers)
}

fn lines(headers: &HeaderMap) -> Vec<String> {
    let line = |(name, value): (&HeaderName, &HeaderValue)| format!("{name}: {}", value.to_str().unwrap());
    let mut lines: Vec<String> = headers.iter().map(line).collect();
    lines.sort();
    lines
}

const FORWARDED: [&str; 4] = [
    "host: web.shop",
    "x-forwarded-for: 10.244.1.2",
    "x-forwarded-host: web.shop",
    "x-forwarded-proto: http",
];

#[test]
fn headers_of_the_connection_stay_behind() {
    let head = request(
        "GET",
        "/",
        &[
            ("host", "web.shop"),
            ("connection", "close, X-Hop"),
            ("connection", "another"),
            ("x-hop", "1"),
            ("another", "2"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("te", "gzip"),
            ("upgrade", "websocket"),
            ("cookie", "a=b"),
        ],
    );
    let mut expected = vec!["cookie: a=b"];
    expected.extend(FORWARDED);
    assert_eq!(passed(head, Length::Empty), expected);
}

#[test]
fn what_stands_for_the_client_is_appended_or_kept() {
    let head = request(
        "GET",
        "/",
        &[
            ("host", "web.shop:8080"),
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-for", "192.0.2.2, 192.0.2.3"),
            ("x-forwarded-host", "outside.example"),
            ("x-forwarded-proto", "https"),
        ],
    );
    let expected = [
        "host: web.shop:8080",
        "x-forwarded-for: 192.0.2.1, 192.0.2.2, 192.0.2.3, 10.244.1.2",
        "x-forwarded-host: outside.example",
        "x-forwarded-proto: https",
    ];
    assert_eq!(passed(head, Length::Empty), expected);
}

#[test]
fn upgrades_are_passed_on_but_not_to_http2() {
    let websocket = [("host", "web.shop"), ("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")];
    let lines = passed(request("GET", "/", &websocket), Length::Empty);
    assert!(
        lines.contains(&"connection: upgrade".to_owned()) && lines.contains(&"upgrade: websocket".to_owned())
    );
    let http2 = [
        ("host", "web.shop"),
        ("connection", "upgrade, http2-settings"),
        ("upgrade", "h2c"),
        ("http2-settings", "AAMAAABkAAQAAP__"),
    ];
    assert_eq!(passed(request("GET", "/", &http2), Length::Empty), FORWARDED);
    let trailers = passed(request("GET", "/", &[("host", "web.shop"), ("te", "trailers")]), Length::Empty);
    assert!(trailers.contains(&"te: trailers".to_owned()) && trailers.contains(&"connection: te".to_owned()));
}

#[test]
fn the_target_becomes_a_path_and_its_host_counts() {
    let mut head = request("GET", "http://real.example:81/a?b=c", &[("host", "other.example")]);
    let host = Host::of(&head).unwrap();
    assert_eq!(host.name(), Some("real.example"));
    to_endpoint(&mut head, &host, CLIENT, "", Length::Empty);
    assert_eq!(head.uri.to_string(), "/a?b=c");
    assert_eq!(head.headers[HOST], "real.example:81");
    let mut head = request("OPTIONS", "*", &[("host", "a")]);
    let host = Host::of(&head).unwrap();
    to_endpoint(&mut head, &host, CLIENT, "", Length::Empty);
    assert_eq!(head.uri.to_string(), "*");
}

#[test]
fn requests_without_a_clear_host_are_refused() {
    let refused = |head: &request::Parts| Host::of(head).unwrap_err().status.as_u16();
    assert_eq!(refused(&request("GET", "/", &[])), 400);
    assert_eq!(refused(&request("GET", "/", &[("host", "a"), ("host", "a")])), 400);
    for bad in ["a b", "a/b", "user@a", "a,b", "a:b:c"] {
        assert_eq!(refused(&request("GET", "/", &[("host", bad)])), 400, "{bad}");
    }
    assert_eq!(refused(&request("GET", "https://a/", &[])), 400);
    assert_eq!(refused(&request("CONNECT", "a:80", &[("host", "a")])), 501);
    assert_eq!(refused(&request("POST", "/", &[("host", "a"), ("transfer-encoding", "gzip, chunked")])), 501);
    // HTTP/1.0 need not name one: then the endpoint gets the virtual address.
    let mut old = request("GET", "/", &[]);
    old.version = Version::HTTP_10;
    let expected = ["host: 10.251.0.1:80", "x-forwarded-for: 10.244.1.2", "x-forwarded-proto: http"];
    assert_eq!(passed(old, Length::Empty), expected);
}

#[test]
fn the_end_of_a_body_is_told_in_one_way() {
    let both = [("host", "web.shop"), ("content-length", "5"), ("transfer-encoding", "chunked")];
    let lines = passed(request("GET", "/", &both), Length::Unknown);
    assert!(lines.contains(&"transfer-encoding: chunked".to_owned()));
    assert!(!lines.iter().any(|line| line.starts_with("content-length")));
    let twice = [("host", "web.shop"), ("content-length", "5"), ("content-length", "5")];
    let lines = passed(request("POST", "/", &twice), Length::Known(5));
    assert_eq!(lines[0], "content-length: 5");
    assert!(!lines[1].starts_with("content-length"));
}

fn response(status: u16, headers: &[(&str, &str)], length: Length) -> Result<Vec<String>, &'static str> {
    let mut builder = Response::builder().status(status);
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    let mut head = builder.body(()).unwrap().into_parts().0;
    to_client(&mut head, length).map(|()| lines(&head.headers))
}

#[test]
fn responses_lose_what_is_of_the_connection() {
    let both =
        [("transfer-encoding", "chunked"), ("content-length", "7"), ("connection", "x-a"), ("x-a", "1")];
    assert_eq!(response(200, &both, Length::Unknown).unwrap(), [""; 0]);
    assert_eq!(
        response(200, &[("content-length", "5, 5")], Length::Known(5)).unwrap(),
        ["content-length: 5"]
    );
    // Of a response to HEAD, or a 304: that of another one.
    assert_eq!(response(304, &[("content-length", "7")], Length::Empty).unwrap(), ["content-length: 7"]);
    assert!(response(200, &[("transfer-encoding", "gzip")], Length::Unknown).is_err());
    let switching = [("connection", "Upgrade"), ("upgrade", "websocket")];
    assert_eq!(
        response(101, &switching, Length::Empty).unwrap(),
        ["connection: upgrade", "upgrade: websocket"]
    );
    assert_eq!(response(200, &switching, Length::Empty).unwrap(), [""; 0]);
}

proptest! {
    #[test]
    fn no_generated_header_of_the_connection_is_passed_on(
        headers in prop::collection::vec(
            ("connection|te|upgrade|keep-alive|transfer-encoding|x-a|x-b|x-forwarded-for|content-length",
             "(x-a|x-b|close|upgrade|te|chunked|trailers|5|, |\t|[ -~]){0,6}"), 0..8),
        length in prop::sample::select(&[Length::Empty, Length::Known(7), Length::Unknown][..]),
    ) {
        let mut builder = Request::builder().uri("/").header("host", "a");
        for (name, value) in &headers {
            builder = builder.header(name.as_str(), value.as_str());
        }
        let Ok(request) = builder.body(()) else { return Ok(()) };
        let mut head = request.into_parts().0;
        let named: Vec<String> =
            tokens(&head.headers, &CONNECTION).map(str::to_ascii_lowercase).collect();
        let Ok(host) = Host::of(&head) else { return Ok(()) };
        to_endpoint(&mut head, &host, CLIENT, "", length);
        for name in ["x-a", "x-b", "keep-alive"].iter().filter(|name| named.iter().any(|named| named == *name)) {
            prop_assert!(!head.headers.contains_key(*name));
        }
        prop_assert!(!head.headers.contains_key("keep-alive"));
        let chunked = head.headers.contains_key(TRANSFER_ENCODING);
        prop_assert_eq!(chunked, length == Length::Unknown);
        prop_assert!(!chunked || !head.headers.contains_key(CONTENT_LENGTH));
        prop_assert!(head.headers[X_FORWARDED_FOR].as_bytes().ends_with(b"10.244.1.2"));
        prop_assert_eq!(head.headers.get_all(X_FORWARDED_FOR).iter().count(), 1);
    }
}
